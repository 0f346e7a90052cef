"""A contact sheet of training images beside their two random views.

python -m clop_jax.preview --config=configs/cifar10.py --out=preview.png

Each triple is an image of the first batch, then the two views that the first
step of a training with this config makes of it.
"""

import os

from absl import flags
import ml_collections
from ml_collections import config_flags
import numpy as np
from PIL import Image

from clop_jax import cli
from clop_jax import defaults
from clop_jax.data import loader
from clop_jax.experiment import build
from clop_jax.experiment import inputs
from clop_jax.experiment import setup
from clop_jax.runtime import remote
from clop_jax.tracking import contact_sheet


def draw(config: ml_collections.ConfigDict, *, count: int = 32) -> np.ndarray:
  """Draws the sheet.

  Args:
    config: see `defaults`.
    count: images to show; fewer where the set or the batch has fewer.

  Returns:
    `[height, width, 3]` uint8.

  Raises:
    ValueError: for a wrong config, or data that do not fit it.
  """
  if count < 1:
    raise ValueError(f'--count must be at least 1, got {count}')
  defaults.check(config)
  config, examples = setup.read_labels(config)
  reader = examples.reader
  plain = inputs.evaluation_reader(config, examples.source, examples.labels)
  order = loader.Order(
    len(reader),
    batch_size=min(config.train.batch_size, len(reader)),
    seed=config.seed,
  )
  sheets = contact_sheet.Sheets(
    build.recipe(config),
    build.training_key(config),
    reader,
    plain,
    host_crops=config.data.host_crops,
  )
  return sheets.draw(0, order.indices(0)[:count])


def define_flags() -> None:
  """Defines the command's flags; importing this module defines none."""
  config_flags.DEFINE_config_file('config', None, 'A file of configs/.')
  flags.DEFINE(cli.PATH, 'out', 'preview.png', 'The PNG to write.')
  flags.DEFINE_integer('count', 32, 'Images to show.')


def main() -> None:
  """The command."""
  if flags.FLAGS.config is None:
    raise ValueError('--config must name a file of configs/, got none')
  out = flags.FLAGS.out
  remote.check_local('--out', out)
  if os.path.isdir(out):
    raise ValueError(f'--out must be the PNG to write, got the folder {out}')
  if not out.endswith('.png'):
    raise ValueError(f'--out must be a file *.png, got {out}')
  sheet = draw(flags.FLAGS.config, count=flags.FLAGS.count)
  if folder := os.path.dirname(out):
    os.makedirs(folder, exist_ok=True)
  Image.fromarray(sheet).save(out, format='PNG')
  print(f'images, and two views of each: {out}')


if __name__ == '__main__':
  cli.run(main, define_flags)
