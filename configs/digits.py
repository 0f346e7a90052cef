"""SimCLR with CLOP on 1,797 real handwritten digits (8x8): minutes on a CPU.

python -m clop_jax.train --config=configs/digits.py --workdir=runs/digits
python -m clop_jax.evaluate --workdir=runs/digits

Override any field: --config.loss.clop_weight=0
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """The configuration; lists of what a name may be stand in the comments."""
  config = ml_collections.ConfigDict()
  config.seed = 0  # of everything random

  config.data = data = ml_collections.ConfigDict()
  data.name = 'digits'  # see clop_jax/data/sources.py
  # Folder of TFDS's data sets; None is TFDS's own default.
  data.data_dir = ml_collections.config_dict.placeholder(str)
  data.num_classes = 10
  data.label_fraction = 0.1  # of each class's training labels, in [0, 1]

  config.augment = augment = ml_collections.ConfigDict()
  augment.size = 8  # height and width of a view, pixels
  augment.mean = (0.305,)  # per channel, of images in [0, 1]
  augment.std = (0.376,)  # per channel, of images in [0, 1]
  augment.crop_probability = 1.0
  augment.crop_area = (0.4, 1.0)  # share of the image's area
  augment.crop_aspect = (3 / 4, 4 / 3)  # width over height
  augment.flip_probability = 0.0  # a mirrored digit is another character
  augment.jitter_probability = 0.8
  augment.brightness = 0.4  # factor within 1 +- this
  augment.contrast = 0.4  # factor within 1 +- this
  augment.saturation = 0.0  # factor within 1 +- this; colour images only
  augment.hue = 0.0  # turns of the colour circle, +-; colour images only
  augment.grey_probability = 0.0  # colour images only
  augment.blur_probability = 0.0
  augment.blur_sigma = (0.1, 2.0)  # pixels

  config.model = model = ml_collections.ConfigDict()
  model.depth = 8  # 8, 18, 34 or 50 layers
  model.stem = 'cifar'  # cifar (up to 64 px) or imagenet
  model.width_multiplier = 1.0
  model.zero_init_last_bn = False
  model.bn_scope = 'global'  # batch statistics over global batch, or device
  model.dtype = 'auto'  # float32, bfloat16; auto: bfloat16 on accelerators
  model.embedding_dim = 128
  model.head_layers = 2  # dense layers of the projection head; 0 is no head
  model.head_hidden_dim = 128
  model.head_bn = True  # batch normalization in the head's hidden layers

  config.loss = loss = ml_collections.ConfigDict()
  # nt_xent, supcon, dcl, vicreg, barlow_twins or none
  loss.contrastive = 'nt_xent'
  loss.temperature = 0.5  # of nt_xent, supcon and dcl
  # Rows of the similarity matrix at one time (nt_xent, supcon); None is all.
  loss.block_size = ml_collections.config_dict.placeholder(int)
  loss.supcon_variant = 'out'  # out or in
  loss.vicreg_weights = (25.0, 25.0, 1.0)  # invariance, variance, covariance
  loss.barlow_weight = 5e-3  # of the redundancy term
  loss.clop_weight = 1.0  # the paper's lambda; 0 trains without CLOP
  loss.clop_distance = 'cosine'  # cosine, euclidean or manhattan

  config.prototypes = prototypes = ml_collections.ConfigDict()
  prototypes.kind = 'orthonormal'  # orthonormal or simplex_etf

  config.optimizer = optimizer = ml_collections.ConfigDict()
  optimizer.name = 'sgd'  # lars, sgd or adamw
  optimizer.learning_rate = 0.2  # base; see scaling
  # linear: base * batch / 256; sqrt: base * sqrt(batch); none: base
  optimizer.scaling = 'linear'
  optimizer.warmup_epochs = 0.0
  optimizer.momentum = 0.9  # for adamw: b1
  optimizer.weight_decay = 1e-6  # kernels only
  optimizer.trust_coefficient = 0.001  # of lars, kernels only
  # Clip the gradient to this global norm; None does not clip.
  optimizer.clip_norm = ml_collections.config_dict.placeholder(float)

  config.train = train = ml_collections.ConfigDict()
  train.batch_size = 128  # images over all devices
  train.num_epochs = 20
  train.log_every_steps = 10
  train.checkpoint_every_epochs = 5
  train.keep_checkpoints = 3

  config.eval = evaluation = ml_collections.ConfigDict()
  evaluation.batch_size = 512  # images over all devices
  evaluation.knn_neighbours = (20, 200)  # the first one gives knn_top1
  evaluation.knn_temperature = 0.1
  # Candidates for the linear probe's L2 strength.
  evaluation.probe_l2 = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
  evaluation.probe_iterations = 200  # of L-BFGS
  return config.lock()
