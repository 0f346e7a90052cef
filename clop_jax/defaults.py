"""Every field of a config: default, type, range, unit and meaning.

A file of `configs/` takes the defaults and sets what its experiment differs in;
nothing else gives a field a default. The defaults train on `digits`.
"""

import ml_collections

from clop_jax import fields

choice, switch, text = fields.choice, fields.switch, fields.text
real, reals, share = fields.real, fields.reals, fields.share
whole = fields.whole

# No run has more of anything; a slip of the finger does.
_MANY = 10**9
_LARGE = 1e6
_PIXELS = 4096
_BATCH = 1 << 20

# What a group of fields is about, or some of a group from one field on.
NOTES = {
  'data.unlabelled_classes': (
    'Which training labels are used, in the order in which the fields apply; '
    'see clop_jax/data/labels.py. The choice depends on the seed alone.'
  ),
  'watch.tensorboard': (
    'Nothing in this group changes what is trained, and a run may resume with '
    'other values than it began with; see docs/watching.md.'
  ),
  'eval.batch_size': (
    'Nothing in this group changes what is trained, and a run may resume with '
    'other values than it began with; `evaluate` takes `--config.eval.*`, too.'
  ),
}

FIELDS = {
  'seed': whole(0, 'Seed of everything random.', 0, 2**31 - 1),
  # data
  'data.name': text(
    'digits',
    'Source of the images: folder, npz, synthetic, digits, tiny_imagenet or a '
    'data set of TFDS.',
  ),
  'data.data_dir': text(
    None,
    "The folder of images, the npz file, or the folder of TFDS's data sets "
    "(None is TFDS's own default).",
    is_path=True,
  ),
  'data.options': fields.Field(
    {}, 'Keyword arguments of the source; see clop_jax/data/sources.py.', dict
  ),
  'data.train_split': text(
    'train', 'Split for training, and for fitting the probe.'
  ),
  'data.test_split': text(
    'test', 'Split for evaluation; empty if there is none.', may_be_empty=True
  ),
  'data.unlabelled_split': text(
    None,
    'Further training images, whose labels are not used; None for none.',
  ),
  'data.num_classes': whole(
    10, 'Number of classes; 0 takes the number from the source.', 0, 100_000
  ),
  'data.channels': choice(
    1, 'Channels of the images; grey images are repeated over 3.', 1, 3
  ),
  'data.image_size': whole(
    None,
    'Images are cropped to the middle square and resized to this side; None '
    'takes them as they are, all of one size.',
    1,
    _PIXELS,
    unit='px',
  ),
  'data.host_crops': switch(
    False,
    'Workers cut the two random crops out of the image at full size. '
    'image_size does not apply then, and the loader must be stream.',
  ),
  'data.skip_corrupt': switch(
    False, 'Skips images that cannot be decoded, instead of an error.'
  ),
  'data.loader': choice(
    'auto',
    'resident keeps the whole set on every device, stream reads it by worker '
    'processes; auto is resident up to resident_limit_gib.',
    'auto',
    'resident',
    'stream',
  ),
  'data.resident_limit_gib': real(
    4.0, 'Limit of auto, as uint8 images.', 0, _LARGE, unit='GiB'
  ),
  'data.num_workers': whole(
    -1, 'Processes of stream; 0 uses threads, -1 one per CPU core.', -1, 1024
  ),
  'data.prefetch': whole(
    2, 'Batches that each worker and the device hold ready.', 1, 1024
  ),
  'data.unlabelled_classes': reals(
    (), 'Classes that lose all labels.', 0, _MANY, length=(0, 10_000), kind=int
  ),
  'data.imbalance_factor': real(
    1.0,
    'The first class keeps all labels, the last one 1 / imbalance_factor.',
    1,
    _LARGE,
  ),
  'data.class_fractions': fields.Field(
    {},
    'Shares of labels kept of single classes: class_fractions.3=0.5 keeps half '
    'of class 3.',
    dict,
    low=0,
    high=1,
  ),
  'data.label_fraction': share(1.0, "Share kept of each class's labels."),
  'data.labels_per_class': whole(
    None, 'Labels kept of each class, instead of label_fraction.', 0, _MANY
  ),
  'data.label_noise': share(
    0.0, 'Share of the kept labels that are made wrong.'
  ),
  'data.label_noise_kind': choice(
    'symmetric',
    'symmetric takes any other class, asymmetric the next one.',
    'symmetric',
    'asymmetric',
  ),
  # augment
  'augment.size': whole(
    8, 'Height and width of a view.', 1, _PIXELS, unit='px'
  ),
  'augment.mean': reals(
    (0.305,), 'Mean of each channel, of images in [0, 1].', 0, 1, length=(1, 3)
  ),
  'augment.std': reals(
    (0.376,),
    'Standard deviation of each channel, of images in [0, 1].',
    0,
    100,
    above=True,
    length=(1, 3),
  ),
  'augment.crop_probability': share(
    1.0, 'Probability of a random box instead of the whole image.'
  ),
  'augment.crop_area': reals(
    (0.4, 1.0),
    "Share of the image's area that a box has, least and most.",
    0,
    1,
    above=True,
    length=2,
    ascending=True,
  ),
  'augment.crop_aspect': reals(
    (3 / 4, 4 / 3),
    'Width over height of a box, least and most.',
    0.01,
    100,
    length=2,
    ascending=True,
  ),
  'augment.interpolation': choice(
    'bilinear',
    'How images and crops are resized, in training and evaluation; always '
    'antialiased.',
    'bilinear',
    'bicubic',
  ),
  'augment.flip_probability': share(
    0.0, 'Probability of a mirror image. (A mirrored digit is another one.)'
  ),
  'augment.jitter_probability': share(
    0.8, 'Probability of the four changes that follow.'
  ),
  'augment.brightness': share(0.4, 'Factor within 1 plus or minus this.'),
  'augment.contrast': share(0.4, 'Factor within 1 plus or minus this.'),
  'augment.saturation': share(
    0.0, 'Factor within 1 plus or minus this; colour images only.'
  ),
  'augment.hue': real(
    0.0,
    'Turn of the colour circle, plus or minus; colour images only.',
    0,
    0.5,
    unit='turns',
  ),
  'augment.grey_probability': share(
    0.0, 'Probability of a grey view; colour images only.'
  ),
  'augment.blur_probability': share(0.0, 'Probability of a Gaussian blur.'),
  'augment.blur_sigma': reals(
    (0.1, 2.0),
    'Standard deviation of the blur, least and most.',
    0,
    1000,
    above=True,
    unit='px',
    length=2,
    ascending=True,
  ),
  'augment.solarize_probability': share(
    0.0, 'Probability that what is bright is inverted.'
  ),
  'augment.solarize_threshold': share(
    0.5, 'Value from which solarization inverts, of images in [0, 1].'
  ),
  'augment.randaugment_layers': whole(
    0, 'RandAugment operations on each view; 0 is off.', 0, 16
  ),
  'augment.randaugment_magnitude': real(
    0.0, 'Magnitude of all RandAugment operations.', 0, 30
  ),
  # model
  'model.depth': choice(8, 'Layers of the ResNet.', 8, 18, 34, 50),
  'model.stem': choice(
    'cifar',
    'First layers: cifar up to 64 px, or imagenet.',
    'cifar',
    'imagenet',
  ),
  'model.width_multiplier': real(
    1.0, 'Factor on the channels of all layers.', 1 / 64, 64
  ),
  'model.zero_init_last_bn': switch(
    False, 'Residual blocks begin as the identity.'
  ),
  'model.bn_scope': choice(
    'global',
    'Batch statistics over the global batch, or over that of a device.',
    'global',
    'device',
  ),
  'model.dtype': choice(
    'auto',
    'Type that networks compute in; auto is bfloat16 on accelerators.',
    'auto',
    'float32',
    'bfloat16',
  ),
  'model.embedding_dim': whole(
    # The logged effective rank takes a matrix of this size squared.
    128,
    'Dimension of embeddings and prototypes.',
    1,
    16_384,
  ),
  'model.head_layers': whole(
    2, 'Dense layers of the projection head; 0 is no head.', 0, 16
  ),
  'model.head_hidden_dim': whole(
    128, "Width of the head's hidden layers.", 1, 65_536
  ),
  'model.head_bn': switch(
    True, "Batch normalization in the head's hidden layers."
  ),
  'model.initial_weights': text(
    None,
    "Weights that the backbone starts from, under torchvision's names: a "
    '.safetensors file, or .pth where PyTorch is installed; None for random '
    'ones.',
    is_path=True,
  ),
  # loss
  'loss.contrastive': choice(
    'nt_xent',
    'The contrastive loss.',
    'nt_xent',
    'supcon',
    'dcl',
    'vicreg',
    'barlow_twins',
    'none',
  ),
  'loss.temperature': real(
    0.5, 'Temperature of nt_xent, supcon and dcl.', 1e-4, 1e4
  ),
  'loss.block_size': whole(
    None,
    'Rows of the similarity matrix at one time (nt_xent, supcon), over all '
    'devices; None takes all, or 512 a device where `loss.choose_block_size` '
    'says so.',
    1,
    _MANY,
  ),
  'loss.supcon_variant': choice(
    'out', 'Mean of logarithms, or logarithm of the mean.', 'out', 'in'
  ),
  'loss.vicreg_weights': reals(
    (25.0, 25.0, 1.0),
    'Weights of invariance, variance and covariance.',
    0,
    _LARGE,
    length=3,
  ),
  'loss.barlow_weight': real(5e-3, 'Weight of the redundancy term.', 0, _LARGE),
  'loss.clop_weight': real(
    1.0, "The paper's lambda; 0 trains without CLOP.", 0, _LARGE
  ),
  'loss.clop_after_epochs': whole(
    0, 'Epochs before the CLOP term begins.', 0, _MANY, unit='epochs'
  ),
  'loss.clop_distance': choice(
    'cosine',
    'Distance of an embedding to its prototype.',
    'cosine',
    'euclidean',
    'manhattan',
    'softmax',
  ),
  'loss.clop_temperature': real(
    0.1, 'Temperature of softmax, and of the pseudo-labels.', 1e-4, 1e4
  ),
  'loss.clop_repulsion': real(
    0.0,
    'Weight of the repulsion from the other prototypes; cosine only.',
    0,
    _LARGE,
  ),
  'loss.pseudo_label_threshold': share(
    None,
    'An unlabelled example gets the label of its nearest prototype in the CLOP '
    'term where the softmax over the prototypes is at least so sure; None '
    'leaves it unlabelled.',
    above=True,
  ),
  'loss.pseudo_label_after_epochs': whole(
    1,
    'Epochs before pseudo-labels begin: a new network is sure of wrong ones.',
    0,
    _MANY,
    unit='epochs',
  ),
  # prototypes
  'prototypes.kind': choice(
    'orthonormal',
    'orthonormal, simplex_etf and random (not orthogonal) are fixed; learned '
    'follow the gradient and stay orthonormal; aligned are set to suit the '
    'class means.',
    'orthonormal',
    'simplex_etf',
    'random',
    'learned',
    'aligned',
  ),
  'prototypes.learning_rate': real(
    0.1,
    'Learning rate of learned prototypes, for the CLOP loss unweighted.',
    0,
    _LARGE,
    above=True,
  ),
  'prototypes.align_after_epochs': whole(
    1,
    'Epochs before aligned prototypes are set; until then no CLOP term.',
    1,
    _MANY,
    unit='epochs',
  ),
  'prototypes.align_every_epochs': whole(
    None,
    'Epochs from one alignment to the next; None aligns once.',
    1,
    _MANY,
    unit='epochs',
  ),
  'prototypes.align_by': choice(
    'procrustes',
    'procrustes takes the nearest orthonormal set, assignment the best order '
    'of the present prototypes.',
    'procrustes',
    'assignment',
  ),
  # optimizer
  'optimizer.name': choice('sgd', 'The optimizer.', 'sgd', 'lars', 'adamw'),
  'optimizer.learning_rate': real(
    # To see a run diverge is a purpose, too.
    0.2,
    'Base learning rate; see scaling.',
    0,
    1e30,
  ),
  'optimizer.scaling': choice(
    'linear',
    'linear: base * batch / 256; sqrt: base * sqrt(batch); none: base.',
    'linear',
    'sqrt',
    'none',
  ),
  'optimizer.warmup_epochs': real(
    0.0,
    'Epochs of a linear warm-up from 0; then a cosine to 0.',
    0,
    _LARGE,
    unit='epochs',
  ),
  'optimizer.momentum': real(0.9, 'Momentum; for adamw b1.', 0, 1, below=True),
  'optimizer.weight_decay': real(
    1e-6, 'Weight decay, of kernels only.', 0, 100
  ),
  'optimizer.trust_coefficient': real(
    0.001, 'Of lars, for kernels only.', 0, 1000, above=True
  ),
  'optimizer.rate_in_momentum': switch(
    True,
    'For lars: the learning rate multiplies a step before it enters the '
    "momentum, as in SimCLR's code; false multiplies the momentum, as VICReg's "
    'code, solo-learn and lightly do.',
  ),
  'optimizer.clip_norm': real(
    None,
    'Largest global norm of the gradient; None does not clip.',
    0,
    1e30,
    above=True,
  ),
  # train
  'train.batch_size': whole(
    128, 'Images over all devices.', 1, _BATCH, unit='images'
  ),
  'train.num_micro_batches': whole(
    1,
    'Parts in which a device processes its images: memory for one part, at the '
    'cost of one more forward pass. The losses stay those of the whole batch; '
    'batch statistics become those of one part, over all devices or one device '
    'as model.bn_scope says.',
    1,
    _MANY,
  ),
  'train.num_epochs': whole(
    20, 'Passes over the training images.', 1, _MANY, unit='epochs'
  ),
  'train.steps_per_dispatch': whole(
    1,
    'Steps that the device makes by itself at a time; fewer where a log line '
    'or a checkpoint is due.',
    1,
    100_000,
  ),
  'train.log_every_steps': whole(
    10,
    'Steps between two lines of metrics.jsonl, with diagnostics.',
    1,
    _MANY,
    unit='steps',
  ),
  'train.checkpoint_every_epochs': whole(
    5,
    'Epochs between two checkpoints; there is one at the end, too.',
    1,
    _MANY,
    unit='epochs',
  ),
  'train.keep_checkpoints': whole(
    3, 'How many of the newest checkpoints stay.', 1, _MANY
  ),
  'train.keep_best': text(
    None,
    'Also keeps the best checkpoint by this metric of metrics.jsonl, as its '
    'mean since the last checkpoint; None keeps none.',
  ),
  'train.keep_best_mode': choice(
    'max', 'Whether a high or a low metric is better.', 'max', 'min'
  ),
  # watch
  'watch.tensorboard': switch(
    True,
    "Writes event files in the workdir's tensorboard/, if tensorboardX is "
    'installed.',
  ),
  'watch.images_every_epochs': whole(
    10,
    'Epochs between two pictures of embeddings, their spectrum and some '
    'augmented images (one at the end of a shorter run); 0 is never.',
    0,
    _MANY,
    unit='epochs',
  ),
  'watch.probe_every_epochs': whole(
    0,
    'Epochs between two probes by the evaluation protocol, which read the '
    'whole training split and the test split; 0 is never.',
    0,
    _MANY,
    unit='epochs',
  ),
  'watch.probe': choice('knn', 'Which probe.', 'knn', 'linear', 'both'),
  'watch.collapse_share': share(
    0.5,
    'Warns when the effective rank stays below this share of the largest that '
    'is to be expected, min(num_classes, embedding_dim, 2 * batch_size); 0 is '
    'never.',
  ),
  'watch.collapse_patience': whole(
    5, 'Logged steps in a row before that warning.', 1, _MANY
  ),
  # eval
  'eval.batch_size': whole(
    512, 'Images over all devices.', 1, _BATCH, unit='images'
  ),
  'eval.crop_share': share(
    1.0,
    "Side of the middle square that is shown, of the image's shorter side.",
    above=True,
  ),
  'eval.knn_neighbours': reals(
    (20, 200),
    'Numbers of neighbours; the first one gives knn_top1.',
    1,
    _MANY,
    kind=int,
  ),
  'eval.knn_temperature': real(
    0.1, 'Temperature of the votes by cosine.', 1e-4, 1e4
  ),
  'eval.probe_l2': reals(
    (1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
    "Candidates for the linear probe's L2 strength.",
    0,
    _LARGE,
  ),
  'eval.probe_iterations': whole(
    200, 'Iterations of L-BFGS, at most.', 1, _MANY
  ),
  'eval.finetune_learning_rates': reals(
    (0.001, 0.01, 0.1),
    'For evaluate --mode=finetune: candidates for the peak learning rate.',
    0,
    _LARGE,
    above=True,
  ),
  'eval.finetune_batch_size': whole(
    128, 'Images over all devices.', 1, _BATCH, unit='images'
  ),
  'eval.finetune_epochs': whole(
    30,
    'Passes over the labelled examples, but at least finetune_min_steps.',
    1,
    _MANY,
    unit='epochs',
  ),
  'eval.finetune_min_steps': whole(
    200, 'Updates, at least.', 0, _MANY, unit='steps'
  ),
  'eval.finetune_augment': switch(
    True, 'Random crops and flips as in augment, and nothing else.'
  ),
}

# Fields that hold a path, in which commands expand a leading `~`.
PATHS = tuple(name for name, field in FIELDS.items() if field.is_path)


def get_config() -> ml_collections.ConfigDict:
  """Returns all fields with their defaults, unlocked."""
  config = ml_collections.ConfigDict()
  for name, field in FIELDS.items():
    group = config
    *path, last = name.split('.')
    for part in path:
      if part not in group:
        group[part] = ml_collections.ConfigDict()
      group = group[part]
    group[last] = _value(field)
  return config


def _value(field):
  if field.kind is dict:
    return ml_collections.ConfigDict()
  if field.default is None:
    return ml_collections.config_dict.placeholder(field.kind)
  return field.default


def check(config: ml_collections.ConfigDict) -> None:
  """Checks the type and the range of every field.

  Raises:
    ValueError: If a field is missing, unknown or out of range.
  """
  fields.check(config, FIELDS)
