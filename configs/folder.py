r"""SimCLR with CLOP on a folder of your own images.

python -m clop_jax.preview --config=configs/folder.py \
  --config.data.data_dir=DIR
python -m clop_jax.train --config=configs/folder.py --workdir=runs/folder \
  --config.data.data_dir=DIR
python -m clop_jax.evaluate --workdir=runs/folder

Needs DIR/train/<class>/* and DIR/test/<class>/*, in any size and any format
that Pillow opens. Images directly in DIR/train are unlabelled. For photographs
set data.image_size and augment.size to 224, model.stem to imagenet and
data.host_crops to True.
"""

import ml_collections

from clop_jax import defaults


def get_config() -> ml_collections.ConfigDict:
  """Returns the defaults with the changes of this experiment."""
  config = defaults.get_config()

  config.data.name = 'folder'
  config.data.num_classes = 0  # the number of class folders
  config.data.channels = 3
  config.data.image_size = 64  # central square, resized
  # Unlabelled images are those outside the class folders.
  config.data.label_fraction = 1.0

  config.augment.size = 64
  config.augment.mean = (0.485, 0.456, 0.406)
  config.augment.std = (0.229, 0.224, 0.225)
  config.augment.crop_area = (0.08, 1.0)
  config.augment.flip_probability = 0.5
  config.augment.saturation = 0.4
  config.augment.hue = 0.1
  config.augment.grey_probability = 0.2

  config.model.name = 'resnet18'
  config.model.head_hidden_dim = 512

  config.loss.temperature = 0.2

  config.optimizer.name = 'lars'
  config.optimizer.learning_rate = 0.3  # * batch size / 256

  config.train.batch_size = 256
  config.train.num_epochs = 200
  return config.lock()
