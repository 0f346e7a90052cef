"""Contact sheets of training images and their augmented views."""

from collections.abc import Sequence

import jax
import numpy as np

from clop_jax.data import augment
from clop_jax.data import reader as reader_lib

_TRIPLES = 4  # in a row
_PIXELS = 96  # approximate size to which smaller images are enlarged
_GAP, _GROUP_GAP = 2, 10  # pixels between images, and between groups


class Sheets:
  """Draws images beside the two random views that a step makes of them."""

  def __init__(
    self,
    recipe: augment.Recipe,
    key: jax.Array,
    reader: reader_lib.Reader,
    plain: reader_lib.Reader,
    *,
    host_crops: bool = False,
  ):
    """Stores the readers; reads nothing yet.

    Args:
      recipe: Random operations of the views.
      key: Key of the run's training steps.
      reader: Reader of the training, see `inputs.training_reader`.
      plain: Reader of the whole images, see `inputs.evaluation_reader`.
      host_crops: True if `reader` returns two crops of each image.
    """
    self._mean, self._std = np.array(recipe.mean), np.array(recipe.std)
    self._key, self._reader, self._plain = key, reader, plain
    self._crops = host_crops

    @jax.jit
    def make(key, step, index, images):
      keys = augment.example_keys(key, step, index)
      return augment.two_views(keys, images, recipe)

    self._make = make

  def draw(self, step: int, index: Sequence[int] | np.ndarray) -> np.ndarray:
    """Draws a triple (image, view, view) for each example.

    Args:
      step: Value of `state.step` before the step.
      index: Numbers of the examples.

    Returns:
      Sheet `[height, width, 3]`, uint8.
    """
    index = np.asarray(index, np.int32)
    images = np.stack(
      [self._reader.example(step, int(i))['image'] for i in index]
    )
    if self._crops:
      images = images.swapaxes(0, 1)
    views = np.asarray(self._make(self._key, np.int32(step), index, images))
    views = np.clip(views * self._std + self._mean, 0, 1)
    views = np.round(255 * views).astype(np.uint8)
    triples = [
      [self._plain.example(0, int(i))['image'], *views[:, position]]
      for position, i in enumerate(index)
    ]
    if len(triples) > _TRIPLES:  # no gaps in the last row
      triples = triples[: len(triples) // _TRIPLES * _TRIPLES]
    rows = [
      [image for triple in triples[i : i + _TRIPLES] for image in triple]
      for i in range(0, len(triples), _TRIPLES)
    ]
    return paste(rows, scale=max(1, round(_PIXELS / views.shape[2])), group=3)


def paste(
  rows: Sequence[Sequence[np.ndarray]], *, scale: int = 1, group: int = 1
) -> np.ndarray:
  """Pastes rows of images into one picture.

  Args:
    rows: Rows of equal length of images `[height, width, 1 or 3]`, uint8. Each
      image is centred in a cell of the size of the largest one.
    scale: Factor by which each pixel is repeated.
    group: Number of images in a row before a wider gap.

  Returns:
    Picture `[height, width, 3]`, uint8.
  """
  shapes = [image.shape[:2] for row in rows for image in row]
  cell = np.max(shapes, axis=0) * scale + _GAP
  columns = len(rows[0])
  size = cell * (len(rows), columns) + _GAP
  size[1] += _GROUP_GAP * ((columns - 1) // group)
  sheet = np.full((*size, 3), 255, np.uint8)
  for i, row in enumerate(rows):
    for j, image in enumerate(row):
      large = image.repeat(scale, axis=0).repeat(scale, axis=1)
      height, width = large.shape[:2]
      top, left = _GAP + cell * (i, j) + (cell - _GAP - (height, width)) // 2
      left += _GROUP_GAP * (j // group)
      sheet[top : top + height, left : left + width] = large
  return sheet
