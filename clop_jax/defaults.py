"""Every field of a config, with its unit and its default.

A file of `configs/` takes these and sets what its experiment differs in, and
nothing else gives a field a default. The defaults train on `digits`.
"""

import ml_collections

# Fields that hold a path, in which commands expand a leading `~`.
PATHS = ('data.data_dir', 'model.initial_weights')


def get_config() -> ml_collections.ConfigDict:
  """All fields, unlocked; lists of what a name may be stand in the comments."""
  config = ml_collections.ConfigDict()
  config.seed = 0  # of everything random

  config.data = data = ml_collections.ConfigDict()
  # folder, npz, synthetic, digits, tiny_imagenet or a data set of TFDS
  data.name = 'digits'
  # The folder of images, the npz file, or the folder of TFDS's data sets (None
  # is TFDS's own default).
  data.data_dir = ml_collections.config_dict.placeholder(str)
  # Keyword arguments of the source; see clop_jax/data/sources.py.
  data.options = ml_collections.ConfigDict()
  data.train_split = 'train'  # of training, and of the probe's fit
  data.test_split = 'test'  # of evaluation; '': there is none
  # Further training images whose labels, if any, are not used; None: none.
  data.unlabelled_split = ml_collections.config_dict.placeholder(str)
  data.num_classes = 10  # 0: as many as the source says
  data.channels = 1  # 1 or 3; grey images are repeated over 3
  # Images are cut to the middle square and resized to this side, pixels; None
  # takes them as they are, all of one size.
  data.image_size = ml_collections.config_dict.placeholder(int)
  # The workers cut the two random crops out of the image at full size; None of
  # image_size applies then, and the loader must be stream.
  data.host_crops = False
  data.skip_corrupt = False  # else an image that cannot be decoded is an error
  # resident (the whole set on every device), stream (by worker processes) or
  # auto: resident up to resident_limit_gib
  data.loader = 'auto'
  data.resident_limit_gib = 4.0  # of uint8 images
  data.num_workers = -1  # processes of stream; 0: threads; -1: one per CPU core
  data.prefetch = 2  # batches that each worker and the device hold ready

  # Which training labels are used, in the order in which they apply; see
  # clop_jax/data/labels.py. The choice depends on the seed alone.
  data.unlabelled_classes = ()  # these classes lose all labels
  data.imbalance_factor = 1.0  # first class keeps all, the last 1 / this
  data.class_fractions = ''  # as '0:0.6,1:0.23'; the others keep all
  data.label_fraction = 1.0  # of each class's labels, in [0, 1]
  # Labels kept of each class, instead of label_fraction; None: not used.
  data.labels_per_class = ml_collections.config_dict.placeholder(int)
  data.label_noise = 0.0  # share of the kept labels that are made wrong
  data.label_noise_kind = 'symmetric'  # symmetric or asymmetric (next class)

  config.augment = augment = ml_collections.ConfigDict()
  augment.size = 8  # height and width of a view, pixels
  augment.mean = (0.305,)  # per channel, of images in [0, 1]
  augment.std = (0.376,)  # per channel, of images in [0, 1]
  augment.crop_probability = 1.0  # of a random box instead of the whole image
  augment.crop_area = (0.4, 1.0)  # share of the image's area
  augment.crop_aspect = (3 / 4, 4 / 3)  # width over height
  augment.flip_probability = 0.0  # a mirrored digit is another character
  augment.jitter_probability = 0.8  # of the four changes that follow
  augment.brightness = 0.4  # factor within 1 +- this
  augment.contrast = 0.4  # factor within 1 +- this
  augment.saturation = 0.0  # factor within 1 +- this; colour images only
  augment.hue = 0.0  # turns of the colour circle, +-; colour images only
  augment.grey_probability = 0.0  # colour images only
  augment.blur_probability = 0.0  # Gaussian
  augment.blur_sigma = (0.1, 2.0)  # pixels
  augment.solarize_probability = 0.0  # inverts what is bright
  augment.solarize_threshold = 0.5  # of images in [0, 1]
  augment.randaugment_layers = 0  # operations a view; 0 is off
  augment.randaugment_magnitude = 0.0  # of all of them, 0 to 30

  config.model = model = ml_collections.ConfigDict()
  model.depth = 8  # 8, 18, 34 or 50 layers
  model.stem = 'cifar'  # cifar (up to 64 px) or imagenet
  model.width_multiplier = 1.0  # of the channels of all layers
  model.zero_init_last_bn = False  # residual blocks begin as the identity
  model.bn_scope = 'global'  # batch statistics over global batch, or device
  model.dtype = 'auto'  # float32, bfloat16; auto: bfloat16 on accelerators
  model.embedding_dim = 128  # of embeddings and prototypes
  model.head_layers = 2  # dense layers of the projection head; 0 is no head
  model.head_hidden_dim = 128  # width of the head's hidden layers
  model.head_bn = True  # batch normalization in the head's hidden layers
  # Weights that the backbone starts from, under torchvision's names: a
  # .safetensors file, or .pth where PyTorch is installed; None: random ones.
  model.initial_weights = ml_collections.config_dict.placeholder(str)

  config.loss = loss = ml_collections.ConfigDict()
  # nt_xent, supcon, dcl, vicreg, barlow_twins or none
  loss.contrastive = 'nt_xent'
  loss.temperature = 0.5  # of nt_xent, supcon and dcl
  # Rows of the similarity matrix at one time (nt_xent, supcon), over all
  # devices; None: all, or 512 a device where `loss.choose_block_size` says so.
  loss.block_size = ml_collections.config_dict.placeholder(int)
  loss.supcon_variant = 'out'  # out or in
  loss.vicreg_weights = (25.0, 25.0, 1.0)  # invariance, variance, covariance
  loss.barlow_weight = 5e-3  # of the redundancy term
  loss.clop_weight = 1.0  # the paper's lambda; 0 trains without CLOP
  loss.clop_after_epochs = 0  # until then no CLOP term
  loss.clop_distance = 'cosine'  # cosine, euclidean, manhattan or softmax
  loss.clop_temperature = 0.1  # of softmax, and of the pseudo-labels
  loss.clop_repulsion = 0.0  # from the other prototypes; of cosine only
  # Unlabelled examples get the label of their nearest prototype in the CLOP
  # term where the softmax over the prototypes is at least so sure, in (0, 1];
  # None: they stay unlabelled.
  loss.pseudo_label_threshold = ml_collections.config_dict.placeholder(float)
  loss.pseudo_label_after_epochs = 1  # a new network is sure of wrong ones

  config.prototypes = prototypes = ml_collections.ConfigDict()
  # orthonormal, simplex_etf or random (not orthogonal), all fixed; learned
  # (they follow the gradient and stay orthonormal); aligned (set to suit the
  # class means)
  prototypes.kind = 'orthonormal'
  prototypes.learning_rate = 0.1  # of learned, by the CLOP loss unweighted
  prototypes.align_after_epochs = 1  # of aligned; until then no CLOP term
  # Aligned again every so many epochs; None: once.
  prototypes.align_every_epochs = ml_collections.config_dict.placeholder(int)
  # procrustes (the nearest orthonormal set) or assignment (the best order of
  # the prototypes that there are)
  prototypes.align_by = 'procrustes'

  config.optimizer = optimizer = ml_collections.ConfigDict()
  optimizer.name = 'sgd'  # lars, sgd or adamw
  optimizer.learning_rate = 0.2  # base; see scaling
  # linear: base * batch / 256; sqrt: base * sqrt(batch); none: base
  optimizer.scaling = 'linear'
  optimizer.warmup_epochs = 0.0  # linear from 0; then a cosine to 0
  optimizer.momentum = 0.9  # for adamw: b1
  optimizer.weight_decay = 1e-6  # kernels only
  optimizer.trust_coefficient = 0.001  # of lars, kernels only
  # Clip the gradient to this global norm; None does not clip.
  optimizer.clip_norm = ml_collections.config_dict.placeholder(float)

  config.train = train = ml_collections.ConfigDict()
  train.batch_size = 128  # images over all devices
  # Parts that a device works through its images in: memory for one part, at the
  # cost of one more forward pass. The losses stay those of the whole batch;
  # batch statistics become those of one part, over all devices or one device as
  # model.bn_scope says.
  train.num_micro_batches = 1
  train.num_epochs = 20  # passes over the training images
  # Steps that the device makes by itself at a time; fewer where a log line or a
  # checkpoint is due.
  train.steps_per_dispatch = 1
  train.log_every_steps = 10  # a line of metrics.jsonl, with diagnostics
  train.checkpoint_every_epochs = 5  # and one at the end
  train.keep_checkpoints = 3  # the newest ones
  # The best checkpoint by this metric (as metrics.jsonl has it, its mean since
  # the last checkpoint) is kept as well; None: none is.
  train.keep_best = ml_collections.config_dict.placeholder(str)
  train.keep_best_mode = 'max'  # max or min is better

  # Nothing in this group changes what is trained, and a run may go on with
  # other values than it began with; see docs/watching.md.
  config.watch = watch = ml_collections.ConfigDict()
  watch.tensorboard = True  # event files in the workdir's tensorboard/
  # Every so many epochs (at the end of a shorter run) the spectrum of some
  # embeddings, a picture of them and some augmented images; 0: never.
  watch.images_every_epochs = 10
  # Every so many epochs a probe by the evaluation protocol, which reads the
  # whole training split and the test split; 0: never.
  watch.probe_every_epochs = 0
  watch.probe = 'knn'  # knn, linear or both
  # Warns when the effective rank stays below this share of the largest that is
  # to be expected, min(num_classes, embedding_dim, 2 * batch_size); 0: never.
  watch.collapse_share = 0.5
  watch.collapse_patience = 5  # logged steps in a row, for the warning

  # Nothing in this group changes what is trained, and a run may go on with
  # other values than it began with; evaluate --eval takes others, too.
  config.eval = evaluation = ml_collections.ConfigDict()
  evaluation.batch_size = 512  # images over all devices
  # Side of the middle square that is shown, of the image's shorter side.
  evaluation.crop_share = 1.0
  evaluation.knn_neighbours = (20, 200)  # the first one gives knn_top1
  evaluation.knn_temperature = 0.1  # of the votes by cosine
  # Candidates for the linear probe's L2 strength.
  evaluation.probe_l2 = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
  evaluation.probe_iterations = 200  # of L-BFGS
  # Of evaluate --mode=finetune: candidates for the peak learning rate.
  evaluation.finetune_learning_rates = (0.001, 0.01, 0.1)
  evaluation.finetune_batch_size = 128  # images over all devices
  evaluation.finetune_epochs = 30  # of the labelled examples, and at least
  evaluation.finetune_min_steps = 200  # so many updates
  # Random crops and flips as augment has them, and nothing else; False: none.
  evaluation.finetune_augment = True
  return config
