"""SimCLR with CLOP on STL-10 (96x96), 5,000 labelled and 100,000 other images.

python -m clop_jax.prepare --name=stl10
python -m clop_jax.train --config=configs/stl10.py --workdir=runs/stl10
python -m clop_jax.evaluate --workdir=runs/stl10

Needs a download of 2.6 GB, TensorFlow to prepare the data (pip install
'clop-jax[prepare]') and an accelerator with 3 GB for the data. Trains on the
labelled and the unlabelled split together, with all labels.
"""

import ml_collections

from clop_jax import defaults


def get_config() -> ml_collections.ConfigDict:
  """Returns the defaults with the changes of this experiment."""
  config = defaults.get_config()

  config.data.name = 'stl10'
  config.data.unlabelled_split = 'unlabelled'
  config.data.num_classes = 10
  config.data.channels = 3

  config.augment.size = 96
  config.augment.mean = (0.485, 0.456, 0.406)
  config.augment.std = (0.229, 0.224, 0.225)
  config.augment.crop_area = (0.08, 1.0)
  config.augment.flip_probability = 0.5
  config.augment.saturation = 0.4
  config.augment.hue = 0.1
  config.augment.grey_probability = 0.2
  config.augment.blur_probability = 0.5

  config.model.name = 'resnet18'
  config.model.stem = 'imagenet'
  config.model.head_hidden_dim = 512

  config.loss.temperature = 0.2

  config.optimizer.name = 'lars'
  config.optimizer.learning_rate = 0.3  # * batch size / 256

  config.train.batch_size = 512
  config.train.num_epochs = 200
  config.train.steps_per_dispatch = 10
  return config.lock()
