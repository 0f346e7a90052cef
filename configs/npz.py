r"""SimCLR with CLOP on an npz file, here glyphs100 (32x32, grey).

python -m clop_jax.train --config=configs/npz.py --workdir=runs/glyphs \
  --config.data.data_dir=glyphs100.npz
python -m clop_jax.evaluate --workdir=runs/glyphs

Needs a file with train_images (uint8 [n, height, width, channels]),
train_labels ([n] integers, -1 is unlabelled), test_images and test_labels. For
other images set data.channels and augment.size, mean and std.
"""

import ml_collections

from clop_jax import defaults


def get_config() -> ml_collections.ConfigDict:
  """Returns the defaults with the changes of this experiment."""
  config = defaults.get_config()

  config.data.name = 'npz'
  config.data.num_classes = 0  # taken from the labels
  config.data.channels = 1
  config.data.label_fraction = 0.1

  config.augment.size = 32
  config.augment.mean = (0.117,)
  config.augment.std = (0.29,)
  config.augment.crop_area = (0.4, 1.0)

  config.model.name = 'resnet18'
  config.model.head_hidden_dim = 512

  config.loss.temperature = 0.2

  config.optimizer.name = 'lars'
  config.optimizer.learning_rate = 0.3  # * batch size / 256

  config.train.batch_size = 512
  config.train.num_epochs = 200
  config.train.steps_per_dispatch = 10
  config.train.checkpoint_every_epochs = 10
  return config.lock()
