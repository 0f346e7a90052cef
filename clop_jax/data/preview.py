"""A contact sheet of training images beside their two random views.

python -m clop_jax.data.preview --config=configs/cifar10.py --out=preview.png

Each triple is an image of the first batch, then the two views that the first
step of a training with this config makes of it.
"""

import os

from absl import flags
import jax
import ml_collections
from ml_collections import config_flags
import numpy as np
from PIL import Image

from clop_jax import augment
from clop_jax import command
from clop_jax import experiment
from clop_jax import inputs
from clop_jax.data import images as images_lib
from clop_jax.data import loader
from clop_jax.data import sources

_TRIPLES = 4  # beside one another
_PIXELS = 96  # smaller images are enlarged to about this


def contact_sheet(
  config: ml_collections.ConfigDict, *, count: int = 32
) -> np.ndarray:
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
  source = inputs.training_source(config)
  config = inputs.with_num_classes(config, source)
  labels = inputs.training_labels(config, sources.labels_of(source))
  reader = inputs.training_reader(config, source, labels)
  plain = inputs.evaluation_reader(config, source, labels)
  order = loader.Order(
    len(reader),
    batch_size=min(config.train.batch_size, len(reader)),
    seed=config.seed,
  )
  index = order.indices(0)[:count]
  images = np.stack([reader.example(0, i)['image'] for i in index.tolist()])
  if config.data.host_crops:
    images = images.swapaxes(0, 1)
  recipe = experiment.recipe(config)
  mean, std = np.array(recipe['mean']), np.array(recipe['std'])

  @jax.jit
  def make(images):
    keys = augment.example_keys(experiment.training_key(config), 0, index)
    return augment.two_views(keys, images, **recipe)

  views = np.asarray(make(images)) * std + mean
  views = np.round(255 * np.clip(views, 0, 1)).astype(np.uint8)
  scale = max(1, round(_PIXELS / views.shape[2]))
  cells = []
  for position, i in enumerate(index.tolist()):
    original = plain.example(0, i)['image']
    cells.append([original, views[0, position], views[1, position]])
  while len(cells) > _TRIPLES and len(cells) % _TRIPLES:
    cells.pop()  # no gaps in the last row
  rows = [
    [image for triple in cells[i : i + _TRIPLES] for image in triple]
    for i in range(0, len(cells), _TRIPLES)
  ]
  return images_lib.contact_sheet(rows, scale=scale)


def define_flags() -> None:
  """Defines the command's flags; importing this module defines none."""
  config_flags.DEFINE_config_file('config', None, 'A file of configs/.')
  flags.DEFINE_string('out', 'preview.png', 'The PNG to write.')
  flags.DEFINE_integer('count', 32, 'Images to show.')


def main() -> None:
  """The command."""
  if flags.FLAGS.config is None:
    raise ValueError('--config must name a file of configs/, got none')
  out = flags.FLAGS.out
  if os.path.isdir(out):
    raise ValueError(f'--out must be the PNG to write, got the folder {out}')
  sheet = contact_sheet(flags.FLAGS.config, count=flags.FLAGS.count)
  if folder := os.path.dirname(out):
    os.makedirs(folder, exist_ok=True)
  Image.fromarray(sheet).save(out, format='PNG')
  print(f'images, and two views of each: {out}')


if __name__ == '__main__':
  command.run(main, define_flags)
