"""SimCLR with CLOP on Tiny-ImageNet (64x64, 200 classes), as in the paper.

python -m clop_jax.prepare --name=tiny_imagenet
python -m clop_jax.train --config=configs/tiny_imagenet.py --workdir=runs/tiny
python -m clop_jax.evaluate --workdir=runs/tiny

Needs an accelerator with 1.3 GB for the data. tiny-imagenet-200.zip (250 MB) is
downloaded unless it is in --data_dir. The validation split is the test split,
because the official test split has no labels.
"""

import ml_collections

from clop_jax import defaults


def get_config() -> ml_collections.ConfigDict:
  """Returns the defaults with the changes of this experiment."""
  config = defaults.get_config()

  config.data.name = 'tiny_imagenet'
  config.data.test_split = 'validation'
  config.data.num_classes = 200
  config.data.channels = 3
  config.data.label_fraction = 0.1

  config.augment.size = 64
  config.augment.mean = (0.4802, 0.4481, 0.3975)
  config.augment.std = (0.2302, 0.2265, 0.2262)
  config.augment.crop_area = (0.08, 1.0)
  config.augment.flip_probability = 0.5
  config.augment.jitter_probability = 0.0
  config.augment.randaugment_layers = 3
  config.augment.randaugment_magnitude = 18.0

  config.model.name = 'resnet50'
  config.model.embedding_dim = 256
  config.model.head_hidden_dim = 2048

  config.loss.temperature = 0.1

  config.optimizer.name = 'lars'
  config.optimizer.learning_rate = 0.3  # * batch size / 256

  config.train.batch_size = 512
  config.train.num_epochs = 200
  config.train.steps_per_dispatch = 10
  config.train.checkpoint_every_epochs = 10
  return config.lock()
