r"""SimCLR with CLOP on ImageNet (224x224, 1,000 classes), as in the paper.

python -m clop_jax.prepare --name=imagenet2012 --data_dir=DIR
python -m clop_jax.train --config=configs/imagenet2012.py --workdir=runs/in1k \
  --config.data.data_dir=DIR
python -m clop_jax.evaluate --workdir=runs/in1k

With `--config=configs/imagenet2012.py:vit_s` (or vit_ti, vit_b) it trains a
vision transformer with AdamW and 40 epochs of warm-up.

Needs ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, which image-net.org
provides after registration, 300 GB of disk, TensorFlow to prepare the data (pip
install 'clop-jax[prepare]') and several accelerators. Worker processes decode
and crop the images. The validation split is the test split, because the
official test split has no labels. docs/data.md has overrides for other TFDS
data sets.
"""

import ml_collections

from clop_jax import defaults


def get_config(backbone: str = 'resnet50') -> ml_collections.ConfigDict:
  """Returns the defaults with the changes of this experiment.

  Args:
    backbone: 'resnet50', or 'vit_ti', 'vit_s' or 'vit_b'.
  """
  if backbone not in ('resnet50', 'vit_ti', 'vit_s', 'vit_b'):
    raise ValueError(
      'configs/imagenet2012.py: the name after the colon must be resnet50, '
      f'vit_ti, vit_s or vit_b, got {backbone!r}'
    )
  config = defaults.get_config()

  config.data.name = 'imagenet2012'
  config.data.test_split = 'validation'
  config.data.num_classes = 1000
  config.data.channels = 3
  config.data.label_fraction = 0.1
  config.data.image_size = 224  # for evaluation; training crops at full size
  config.data.host_crops = True

  # SimCLR's recipe at full strength (arXiv 2002.05709, appendix A), with the
  # mean of BYOL's solarization probabilities (arXiv 2006.07733).
  config.augment.size = 224
  config.augment.mean = (0.485, 0.456, 0.406)
  config.augment.std = (0.229, 0.224, 0.225)
  config.augment.crop_area = (0.08, 1.0)
  config.augment.interpolation = 'bicubic'
  config.augment.flip_probability = 0.5
  config.augment.brightness = 0.8
  config.augment.contrast = 0.8
  config.augment.saturation = 0.8
  config.augment.hue = 0.2
  config.augment.grey_probability = 0.2
  config.augment.blur_probability = 0.5
  config.augment.solarize_probability = 0.1

  config.model.name = backbone
  config.model.stem = 'imagenet'
  config.model.embedding_dim = 1024
  config.model.head_hidden_dim = 2048

  config.loss.temperature = 0.1

  config.optimizer.name = 'lars'
  config.optimizer.learning_rate = 0.3  # * batch size / 256
  config.optimizer.warmup_epochs = 10.0

  config.train.batch_size = 1024
  config.train.num_epochs = 200
  config.train.checkpoint_every_epochs = 1

  config.eval.crop_share = 0.875

  if backbone.startswith('vit'):
    # The usual recipe of contrastive ViTs (MoCo v3, arXiv 2104.02057, section
    # 4): AdamW, a long warm-up, a large weight decay and clipped gradients.
    config.model.options.stochastic_depth = 0.1
    config.loss.temperature = 0.2
    config.optimizer.name = 'adamw'
    config.optimizer.learning_rate = 1.5e-4  # * batch size / 256
    config.optimizer.weight_decay = 0.1
    config.optimizer.warmup_epochs = 40.0
    config.optimizer.clip_norm = 3.0
    config.train.batch_size = 4096
    config.train.num_epochs = 300
  return config.lock()
