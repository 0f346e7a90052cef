"""All config fields: default, type, range, unit and meaning.

A file in `configs/` starts from these defaults and overrides what differs in
its experiment. The defaults train on `digits`.
"""

import ml_collections

from clop_jax import fields

choice, switch, text = fields.choice, fields.switch, fields.text
real, reals, share = fields.real, fields.reals, fields.share
whole, options = fields.whole, fields.options

_PIXELS = 4096
_BATCH = 2**20

# Text above the table of a group in docs/config/, or above one of its fields.
NOTES = {
  'data.unlabelled_classes': (
    'These fields choose the training labels. They apply in this order, see '
    'clop_jax/data/labels.py, and the choice depends on the seed only.'
  ),
  'watch.tensorboard': (
    'This group does not affect training: a run can resume with other values. '
    'See docs/watching.md.'
  ),
  'eval.batch_size': (
    'This group does not affect training: a run can resume with other values, '
    'and `evaluate` accepts `--config.eval.*`.'
  ),
}

FIELDS = {'seed': whole(0, 'Random seed.', 0, 2**31 - 1)}

FIELDS |= fields.group(
  'data',
  name=text(
    'digits',
    'Image source: folder, npz, synthetic, digits, tiny_imagenet, the name of '
    'a TFDS data set, or your own as package.module:attribute.',
  ),
  data_dir=text(
    None,
    'Folder of images, npz file, or folder of TFDS data sets (None is the '
    'default of TFDS).',
    is_path=True,
  ),
  options=options(
    'Keyword arguments of the source; see clop_jax/data/sources.py.'
  ),
  train_split=text('train', 'Split for training and for fitting the probe.'),
  test_split=text(
    'test', 'Split for evaluation; empty for none.', may_be_empty=True
  ),
  unlabelled_split=text(
    None, 'Split of additional training images, used without labels.'
  ),
  num_classes=whole(
    10, 'Number of classes; 0 takes it from the source.', 0, 100_000
  ),
  channels=choice((1, 3), 'Image channels; grey images are repeated over 3.'),
  image_size=whole(
    None,
    'Side to which the central square of an image is resized; None keeps the '
    'images, which must then have one size.',
    1,
    _PIXELS,
    unit='px',
  ),
  host_crops=switch(
    False,
    'Make the two random crops on the host, from the image at full size. '
    'image_size is then ignored in training, and the loader must be stream.',
  ),
  skip_corrupt=switch(False, 'Skip images that cannot be decoded.'),
  loader=choice(
    ('auto', 'resident', 'stream'),
    'resident keeps the whole data set on every device; stream reads it in '
    'worker processes; auto is resident up to resident_limit_gib.',
  ),
  resident_limit_gib=real(
    4.0, 'Largest data set (as uint8) that auto makes resident.', unit='GiB'
  ),
  num_workers=whole(
    -1, 'Worker processes of stream; 0 uses threads, -1 all CPUs.', -1, 1024
  ),
  prefetch=whole(
    2, 'Batches prepared ahead by each worker and the device.', 1, 1024
  ),
  unlabelled_classes=reals(
    (), 'Classes without any labels.', 0, 10**9, lengths=(0, 10_000), kind=int
  ),
  imbalance_factor=real(
    1.0,
    'Ratio of labels kept in the first class to the last. The first class '
    'keeps all labels, the last one 1 / imbalance_factor.',
    1,
  ),
  class_fractions=fields.Field(
    {},
    'Fraction of labels kept in single classes: class_fractions.3=0.5 keeps '
    'half of class 3.',
    dict,
    0,
    1,
  ),
  label_fraction=share(1.0, 'Fraction of labels kept in each class.'),
  labels_per_class=whole(
    None, 'Number of labels kept in each class; replaces label_fraction.', 0
  ),
  label_noise=share(0.0, 'Fraction of the kept labels made wrong.'),
  label_noise_kind=choice(
    ('symmetric', 'asymmetric'),
    'Wrong label: any other class (symmetric) or the next one (asymmetric).',
  ),
)

FIELDS |= fields.group(
  'augment',
  size=whole(8, 'Height and width of a view.', 1, _PIXELS, unit='px'),
  mean=reals(
    (0.305,), 'Mean of each channel, images in [0, 1].', 0, 1, lengths=(1, 3)
  ),
  std=reals(
    (0.376,),
    'Standard deviation of each channel, images in [0, 1].',
    0,
    100,
    above=True,
    lengths=(1, 3),
  ),
  crop_probability=share(1.0, 'Probability of a random crop.'),
  crop_area=reals(
    (0.4, 1.0),
    'Minimum and maximum area of a crop, as a fraction of the image.',
    0,
    1,
    above=True,
    lengths=(2, 2),
    ascending=True,
  ),
  crop_aspect=reals(
    (3 / 4, 4 / 3),
    'Minimum and maximum width / height of a crop.',
    0.01,
    100,
    lengths=(2, 2),
    ascending=True,
  ),
  interpolation=choice(
    ('bilinear', 'bicubic'),
    'Interpolation of images and crops, always antialiased.',
  ),
  flip_probability=share(0.0, 'Probability of a horizontal flip.'),
  jitter_probability=share(0.8, 'Probability of colour jitter.'),
  brightness=share(0.4, 'Jitter: brightness factor in 1 ± this value.'),
  contrast=share(0.4, 'Jitter: contrast factor in 1 ± this value.'),
  saturation=share(
    0.0, 'Jitter: saturation factor in 1 ± this value; colour images only.'
  ),
  hue=real(
    0.0,
    'Jitter: largest change of hue; colour images only.',
    0,
    0.5,
    unit='turns',
  ),
  grey_probability=share(
    0.0, 'Probability of a grey view; colour images only.'
  ),
  blur_probability=share(0.0, 'Probability of a Gaussian blur.'),
  blur_sigma=reals(
    (0.1, 2.0),
    'Minimum and maximum standard deviation of the blur.',
    0,
    1000,
    above=True,
    unit='px',
    lengths=(2, 2),
    ascending=True,
  ),
  solarize_probability=share(0.0, 'Probability of solarization.'),
  solarize_threshold=share(
    0.5, 'Solarization inverts pixels from this value on, images in [0, 1].'
  ),
  randaugment_layers=whole(
    0, 'Number of RandAugment operations on each view; 0 for none.', 0, 16
  ),
  randaugment_magnitude=real(
    0.0, 'Magnitude of all RandAugment operations.', 0, 30
  ),
)

FIELDS |= fields.group(
  'model',
  name=choice(
    (
      'resnet8',
      'resnet18',
      'resnet34',
      'resnet50',
      'vit_ti',
      'vit_s',
      'vit_b',
    ),
    'Backbone: one of ours or your own, see docs/own_code.md.',
    importable=True,
  ),
  options=options(
    'Keyword arguments of the backbone: patch_size, pool, dropout and '
    'stochastic_depth of a ViT, or those of your own.'
  ),
  stem=choice(
    ('cifar', 'imagenet'),
    'First layers of a ResNet: cifar for images up to 64 px.',
  ),
  width_multiplier=real(
    1.0, 'Factor of the number of channels of a ResNet.', 1 / 64, 64
  ),
  zero_init_last_bn=switch(
    False, 'Initialize the residual blocks of a ResNet as identity.'
  ),
  bn_scope=choice(
    ('global', 'device'),
    'Batch statistics over the global batch or over the batch of a device.',
  ),
  dtype=choice(
    ('auto', 'float32', 'bfloat16'),
    'Dtype of the networks; auto is bfloat16 on accelerators.',
  ),
  # The effective rank needs a matrix of this size squared.
  embedding_dim=whole(
    128, 'Dimension of embeddings and prototypes.', 1, 16_384
  ),
  head_layers=whole(
    2, 'Number of dense layers of the projection head; 0 for no head.', 0, 16
  ),
  head_hidden_dim=whole(128, "Width of the head's hidden layers.", 1, 65_536),
  head_bn=switch(True, "Batch normalization in the head's hidden layers."),
  initial_weights=text(
    None,
    'File of initial backbone weights, named as in torchvision: .safetensors, '
    'or .pth if PyTorch is installed. None for random weights.',
    is_path=True,
  ),
)

FIELDS |= fields.group(
  'loss',
  contrastive=choice(
    (
      'nt_xent',
      'supcon',
      'dcl',
      'vicreg',
      'barlow_twins',
      'alignment_uniformity',
      'spectral',
      'sigmoid',
      'w_mse',
      'invariance',
      'none',
    ),
    'Contrastive loss: one of ours or your own, see docs/own_code.md.',
    importable=True,
  ),
  options=options(
    'Keyword arguments of the contrastive loss, such as variant of supcon or '
    'redundancy_weight of barlow_twins; see clop_jax/loss.'
  ),
  temperature=real(0.5, 'Temperature of nt_xent, supcon and dcl.', 1e-4, 1e4),
  block_size=whole(
    None,
    'Rows of the similarity matrix computed at a time, over all devices '
    '(nt_xent, supcon). None computes all rows, or 512 on each device if '
    '`loss.choose_block_size` says so.',
  ),
  clop_weight=real(
    1.0,
    'Weight of the CLOP loss (lambda in the paper). If 0, the loss is only '
    'logged.',
  ),
  clop_after_epochs=whole(0, 'Epochs before the CLOP loss is added.', 0),
  clop_distance=choice(
    ('cosine', 'euclidean', 'manhattan', 'softmax'),
    'Distance between an embedding and its prototype.',
  ),
  clop_temperature=real(
    0.1, 'Temperature of softmax and of pseudo-labels.', 1e-4, 1e4
  ),
  clop_repulsion=real(
    0.0, 'Weight of the repulsion from other prototypes; cosine only.'
  ),
  cross_entropy_weight=real(
    0.0,
    'Weight of the cross-entropy of a linear classifier on the features, '
    'trained along with the networks on the labelled examples.',
  ),
  pseudo_label_threshold=share(
    None,
    'Softmax probability from which the nearest prototype labels an '
    'unlabelled example in the CLOP loss; None for no pseudo-labels.',
    above=True,
  ),
  pseudo_label_after_epochs=whole(
    1, 'Epochs before pseudo-labels are used; early ones are often wrong.', 0
  ),
)

FIELDS |= fields.group(
  'method',
  predictor=switch(
    False,
    'Train a predictor from the embedding of one view to that of the other '
    '(SimSiam, BYOL).',
  ),
  predictor_hidden_dim=whole(
    512, "Width of the predictor's hidden layer.", 1, 65_536
  ),
  target=choice(
    ('none', 'stop_gradient', 'moving_average'),
    'Embeddings that the contrastive loss compares with: the same ones (none), '
    'those without a gradient (SimSiam), or those of a moving average of the '
    'networks (BYOL, MoCo v3).',
  ),
  momentum=share(
    0.996, 'First momentum of the moving average; it rises to 1 like a cosine.'
  ),
)

FIELDS |= fields.group(
  'prototypes',
  kind=choice(
    ('orthonormal', 'simplex_etf', 'random', 'learned', 'aligned'),
    'orthonormal, simplex_etf and random (not orthogonal) are fixed; learned '
    'prototypes follow the gradient and stay orthonormal; aligned prototypes '
    'are fitted to the class means.',
  ),
  learning_rate=real(
    0.1,
    'Learning rate of learned prototypes, for the unweighted CLOP loss.',
    above=True,
  ),
  align_after_epochs=whole(
    1, 'Epochs before prototypes are aligned and the CLOP loss is added.'
  ),
  align_every_epochs=whole(
    None, 'Epochs between alignments; None aligns once.'
  ),
  align_by=choice(
    ('procrustes', 'assignment'),
    'procrustes takes the nearest orthonormal set, assignment the best order '
    'of the current prototypes.',
  ),
)

FIELDS |= fields.group(
  'optimizer',
  name=choice(('sgd', 'lars', 'adamw'), 'Optimizer.'),
  # High enough to make a run diverge on purpose.
  learning_rate=real(0.2, 'Base learning rate; see scaling.', 0, 1e30),
  scaling=choice(
    ('linear', 'sqrt', 'none'),
    'Learning rate: base * batch / 256 (linear), base * sqrt(batch) (sqrt) or '
    'base (none).',
  ),
  warmup_epochs=real(
    0.0, 'Epochs of linear warmup, followed by a cosine schedule to 0.'
  ),
  momentum=real(0.9, 'Momentum; b1 of adamw.', 0, 1, below=True),
  weight_decay=real(1e-6, 'Weight decay of kernels.', 0, 100),
  trust_coefficient=real(
    0.001, 'Trust coefficient of lars, for kernels.', 0, 1000, above=True
  ),
  rate_in_momentum=switch(
    True,
    'lars: apply the learning rate before momentum, as the code of SimCLR '
    'does. If false, apply it after, as VICReg, solo-learn and lightly do.',
  ),
  clip_norm=real(
    None,
    'Largest global norm of the gradient; None does not clip.',
    0,
    1e30,
    above=True,
  ),
)

FIELDS |= fields.group(
  'train',
  batch_size=whole(128, 'Global batch size.', 1, _BATCH, unit='images'),
  num_micro_batches=whole(
    1,
    'Number of parts that a device processes one after the other. More parts '
    'need less memory, at the cost of one more forward pass. Losses are still '
    'those of the whole batch, but batch statistics are those of one part.',
  ),
  num_epochs=whole(20, 'Number of training epochs.'),
  steps_per_dispatch=whole(
    1,
    'Steps in one call of the compiled program; fewer before a log line or a '
    'checkpoint.',
    1,
    100_000,
  ),
  log_every_steps=whole(10, 'Steps between log lines in metrics.jsonl.'),
  checkpoint_every_epochs=whole(
    5, 'Epochs between checkpoints. The last step always has one.'
  ),
  keep_checkpoints=whole(3, 'Number of latest checkpoints to keep.'),
  keep_best=text(
    None,
    'Metric of metrics.jsonl, averaged since the last checkpoint, by which the '
    'best checkpoint is also kept; None for none.',
  ),
  keep_best_mode=choice(
    ('max', 'min'), 'max if higher values of keep_best are better, else min.'
  ),
)

FIELDS |= fields.group(
  'watch',
  tensorboard=switch(
    True,
    'Write event files to <workdir>/tensorboard/ if tensorboardX is installed.',
  ),
  images_every_epochs=whole(
    10,
    'Epochs between pictures of embeddings, their spectrum and augmented '
    'images; 0 for never. Shorter runs have one set at the end.',
    0,
  ),
  probe_every_epochs=whole(
    0,
    'Epochs between probes with the evaluation protocol, which read the whole '
    'training and test splits; 0 for never.',
    0,
  ),
  probe=choice(('knn', 'linear', 'both'), 'Probe to run.'),
  collapse_share=share(
    0.5,
    'Warn if the effective rank is below this fraction of its expected '
    'maximum, min(num_classes, embedding_dim, 2 * batch_size); 0 for never.',
  ),
  collapse_patience=whole(
    5, 'Consecutive log lines below collapse_share before the warning.'
  ),
)

FIELDS |= fields.group(
  'eval',
  batch_size=whole(512, 'Global batch size.', 1, _BATCH, unit='images'),
  crop_share=share(
    1.0,
    "Side of the central crop, as a fraction of the image's shorter side.",
    above=True,
  ),
  knn_neighbours=reals(
    (20, 200),
    'Numbers of neighbours; knn_top1 uses the first.',
    1,
    10**9,
    kind=int,
  ),
  knn_temperature=real(
    0.1, 'Temperature of the cosine-weighted votes of kNN.', 1e-4, 1e4
  ),
  probe_l2=reals(
    (1e-5, 1e-4, 1e-3, 1e-2, 1e-1), 'L2 strengths tried by the linear probe.'
  ),
  probe_iterations=whole(200, 'Maximum number of L-BFGS iterations.'),
  finetune_learning_rates=reals(
    (0.001, 0.01, 0.1),
    'Peak learning rates tried by evaluate --mode=finetune.',
    above=True,
  ),
  finetune_batch_size=whole(
    128, 'Global batch size of fine-tuning.', 1, _BATCH, unit='images'
  ),
  finetune_epochs=whole(30, 'Epochs of fine-tuning, over the labelled images.'),
  finetune_min_steps=whole(200, 'Minimum number of fine-tuning steps.', 0),
  finetune_augment=switch(
    True, 'Random crops and flips in fine-tuning, as in augment.'
  ),
)

# Commands expand a leading `~` in these fields.
PATHS = tuple(name for name, field in FIELDS.items() if field.is_path)


def get_config() -> ml_collections.ConfigDict:
  """Returns all fields with their defaults, unlocked."""
  config = ml_collections.ConfigDict()
  for name, field in FIELDS.items():
    group, _, last = name.rpartition('.')
    value = field.default
    if field.kind is dict:
      value = ml_collections.ConfigDict()
    elif value is None:
      value = ml_collections.config_dict.placeholder(field.kind)
    if group and group not in config:
      config[group] = ml_collections.ConfigDict()
    (config[group] if group else config)[last] = value
  return config


def check(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError if a field is missing, unknown or out of range."""
  fields.check(config, FIELDS)
