"""What the augmentation makes of training images, for a person to look at."""

from collections.abc import Callable, Sequence

import jax
import ml_collections
import numpy as np

from clop_jax import augment
from clop_jax import experiment
from clop_jax.data import images as images_lib
from clop_jax.data import reader as reader_lib

_TRIPLES = 4  # beside one another
_PIXELS = 96  # smaller images are enlarged to about this


def sheets(
  config: ml_collections.ConfigDict,
  reader: reader_lib.Reader,
  plain: reader_lib.Reader,
) -> Callable[[int, Sequence[int]], np.ndarray]:
  """Draws images beside the two random views that a step makes of them.

  Args:
    config: see `defaults`.
    reader: what training reads, see `inputs.training_reader`.
    plain: reads the same images whole, see `inputs.evaluation_reader`.

  Returns:
    `(step, index) -> sheet`: of the examples numbered `index` at the step that
    begins with `state.step == step`, a contact sheet of triples, `[height,
    width, 3]` uint8.
  """
  recipe = experiment.recipe(config)
  mean, std = np.array(recipe['mean']), np.array(recipe['std'])

  @jax.jit
  def make(step, index, images):
    keys = augment.example_keys(experiment.training_key(config), step, index)
    return augment.two_views(keys, images, **recipe)

  def sheet(step, index):
    index = np.asarray(index, np.int32)
    examples = [reader.example(step, i) for i in index.tolist()]
    images = np.stack([example['image'] for example in examples])
    if config.data.host_crops:
      images = images.swapaxes(0, 1)
    views = np.asarray(make(np.int32(step), index, images)) * std + mean
    views = np.round(255 * np.clip(views, 0, 1)).astype(np.uint8)
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
    scale = max(1, round(_PIXELS / views.shape[2]))
    return images_lib.contact_sheet(rows, scale=scale)

  return sheet
