"""SimCLR with CLOP and a ResNet-50 on CIFAR-10, as in the paper.

python -m clop_jax.prepare --name=cifar10
python -m clop_jax.train --config=configs/cifar10.py --workdir=runs/cifar10
python -m clop_jax.evaluate --workdir=runs/cifar10

Needs a download of 160 MB, TensorFlow to prepare the data (pip install
'clop-jax[prepare]') and an accelerator.
"""

import ml_collections

from clop_jax import defaults


def get_config() -> ml_collections.ConfigDict:
  """Returns the defaults with the changes of this experiment."""
  config = defaults.get_config()

  config.data.name = 'cifar10'
  config.data.num_classes = 10
  config.data.channels = 3
  config.data.label_fraction = 0.1

  config.augment.size = 32
  config.augment.mean = (0.4914, 0.4822, 0.4465)
  config.augment.std = (0.2470, 0.2435, 0.2616)
  config.augment.crop_area = (0.08, 1.0)
  config.augment.flip_probability = 0.5
  config.augment.saturation = 0.4
  config.augment.hue = 0.1
  config.augment.grey_probability = 0.2

  config.model.name = 'resnet50'
  config.model.head_hidden_dim = 2048

  config.optimizer.name = 'lars'
  config.optimizer.learning_rate = 0.3  # * batch size / 256

  config.train.batch_size = 512
  config.train.num_epochs = 200
  config.train.steps_per_dispatch = 10
  config.train.checkpoint_every_epochs = 10
  return config.lock()
