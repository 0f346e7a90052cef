"""Draws training images beside their two random views.

python -m clop_jax.preview --config=configs/cifar10.py --out=preview.png

Shows images of the first batch, each followed by the two views that the first
training step makes of it.
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
  """Returns a contact sheet of images and their views.

  Args:
    config: Config, see `defaults`.
    count: Largest number of images to show.

  Returns:
    `[height, width, 3]` uint8.
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
  """Defines the flags of the command."""
  config_flags.DEFINE_config_file('config', None, 'Config, as configs/*.py.')
  flags.DEFINE(cli.PATH, 'out', 'preview.png', 'PNG file to write.')
  flags.DEFINE_integer('count', 32, 'Largest number of images to show.')


def main() -> None:
  """Runs the command."""
  config, out = flags.FLAGS.config, flags.FLAGS.out
  if config is None:
    raise ValueError('--config must be a file such as configs/cifar10.py')
  remote.check_local('--out', out)
  if os.path.isdir(out) or not out.endswith('.png'):
    raise ValueError(f'--out must be a file *.png, got {out}')
  sheet = draw(config, count=flags.FLAGS.count)
  os.makedirs(os.path.dirname(out) or '.', exist_ok=True)
  Image.fromarray(sheet).save(out)
  print(f'images with two views each: {out}')


if __name__ == '__main__':
  cli.run(main, define_flags)
