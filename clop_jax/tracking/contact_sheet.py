"""What the augmentation makes of training images, for a person to look at."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from clop_jax.data import augment
from clop_jax.data import images as images_lib
from clop_jax.data import reader as reader_lib

_TRIPLES = 4  # beside one another
_PIXELS = 96  # smaller images are enlarged to about this


class Sheets:
  """Draws images beside the two random views that a step makes of them."""

  def __init__(
    self,
    recipe: Mapping[str, Any],
    key: jax.Array,
    reader: reader_lib.Reader,
    plain: reader_lib.Reader,
    *,
    host_crops: bool = False,
  ):
    """Reads nothing yet.

    Args:
      recipe: the keyword arguments of `augment.view`.
      key: of the run.
      reader: what training reads, see `inputs.training_reader`.
      plain: reads the same images whole, see `inputs.evaluation_reader`.
      host_crops: whether `reader` gives two crops of each image.
    """
    self._mean, self._std = np.array(recipe['mean']), np.array(recipe['std'])
    self._key, self._reader, self._plain = key, reader, plain
    self._crops = host_crops

    @jax.jit
    def make(key, step, index, images):
      keys = augment.example_keys(key, step, index)
      return augment.two_views(keys, images, **recipe)

    self._make: Callable = make
    self._lower = make.lower

  def compile(self, count: int) -> None:
    """Compiles ahead what draws so many images, and no other number."""
    shape = (count, *self._reader.shape)
    if self._crops:
      shape = (shape[1], count, *shape[2:])
    self._make = self._lower(
      self._key,
      jax.ShapeDtypeStruct((), np.int32),
      jax.ShapeDtypeStruct((count,), np.int32),
      jax.ShapeDtypeStruct(shape, np.uint8),
    ).compile()

  def draw(self, step: int, index: Sequence[int] | np.ndarray) -> np.ndarray:
    """A contact sheet of triples.

    Args:
      step: the one that begins with `state.step == step`.
      index: numbers of the examples.

    Returns:
      `[height, width, 3]` uint8.
    """
    examples = [self._reader.example(step, int(i)) for i in index]
    images = np.stack([example['image'] for example in examples])
    if self._crops:
      images = images.swapaxes(0, 1)
    numbers = np.asarray(index, np.int32)
    views = np.asarray(self._make(self._key, np.int32(step), numbers, images))
    views = np.clip(views * self._std + self._mean, 0, 1)
    views = np.round(255 * views).astype(np.uint8)
    cells = []
    for position, i in enumerate(index):
      original = self._plain.example(0, int(i))['image']
      cells.append([original, views[0, position], views[1, position]])
    while len(cells) > _TRIPLES and len(cells) % _TRIPLES:
      cells.pop()  # no gaps in the last row
    rows = [
      [image for triple in cells[i : i + _TRIPLES] for image in triple]
      for i in range(0, len(cells), _TRIPLES)
    ]
    scale = max(1, round(_PIXELS / views.shape[2]))
    return images_lib.contact_sheet(rows, scale=scale, group=3)
