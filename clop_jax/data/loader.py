"""Batches from a data set that stays on the device.

The order of the data is a pure function of (seed, step): it knows nothing of
devices or of what ran before, so a run that resumes at any step sees what an
unbroken one would have seen.
"""

import functools

import jax
from jax.sharding import Mesh
import numpy as np

from clop_jax import parallel
from clop_jax.data import sources


def to_arrays(source: sources.Source) -> tuple[np.ndarray, np.ndarray]:
  """Reads a whole source.

  Returns:
    `(images [n, height, width, channels] uint8, labels [n] int32)`.

  Raises:
    ValueError: if the source is empty, or an image is not uint8 or not of the
      first one's shape (named by its index).
  """
  if not len(source):
    raise ValueError('the source has no examples')
  images, labels = [], []
  for index in range(len(source)):
    example = source[index]
    image = np.asarray(example['image'])
    if image.dtype != np.uint8 or image.ndim != 3:
      raise ValueError(
        'images must be uint8 [height, width, channels], got '
        f'{image.dtype} {image.shape} at index {index}'
      )
    if images and image.shape != images[0].shape:
      raise ValueError(
        f'images must all have one shape, got {images[0].shape} at index 0 and '
        f'{image.shape} at index {index}'
      )
    images.append(image)
    labels.append(example['label'])
  return np.stack(images), np.asarray(labels, np.int32)


class ResidentLoader:
  """Keeps the whole set on every device as uint8; a batch is a gather in jit.

  A step calls `unpack(loader.resident, batch)` inside jit for each
  `batch = loader.batch(step)`: what crosses to the device is a row of numbers.

  Attributes:
    resident: the set on the devices, `{'image', 'label'}`.
    steps_per_epoch: full batches in an epoch; what is left over of one epoch's
      order is left out.
  """

  def __init__(
    self,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    mesh: Mesh,
  ):
    """Puts the set on the devices.

    Args:
      images: `[n, height, width, channels]` uint8.
      labels: `[n]` int32, -1 is unlabelled.
      batch_size: global batch size, a multiple of the devices, at most `n`.
      seed: of the order.
      mesh: see `parallel.make_mesh`.

    Raises:
      ValueError: if the batch does not fit the devices or the data.
    """
    parallel.check_batch_size(batch_size, mesh)
    if batch_size > len(images):
      raise ValueError(
        f'batch_size must be at most the {len(images)} examples, got '
        f'{batch_size}'
      )
    self._num_examples = len(images)
    self._batch_size = batch_size
    self._seed = seed
    self._mesh = mesh
    self.steps_per_epoch = len(images) // batch_size
    self.resident = parallel.replicate(
      mesh, {'image': images, 'label': labels.astype(np.int32)}
    )
    # One instance's epochs only; the step asks for the same epoch many times.
    self._order = functools.lru_cache(maxsize=2)(self._make_order)

  def _make_order(self, epoch):
    rng = np.random.default_rng([self._seed, epoch])
    return rng.permutation(self._num_examples).astype(np.int32)

  def indices(self, step: int) -> np.ndarray:
    """The global batch of step `step` (from 0): `[batch_size]` numbers."""
    epoch, position = divmod(step, self.steps_per_epoch)
    start = position * self._batch_size
    return self._order(epoch)[start : start + self._batch_size]

  def batch(self, step: int) -> dict[str, jax.Array]:
    """The global batch of step `step`, split over the devices."""
    return parallel.shard(self._mesh, {'index': self.indices(step)})


def unpack(
  resident: dict[str, jax.Array], batch: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """A shard's examples from the resident set; call it inside jit.

  Args:
    resident: `ResidentLoader.resident`.
    batch: `{'index': [batch]}`, a shard of `ResidentLoader.batch`.

  Returns:
    `{'image', 'label', 'index'}`, each with a leading `[batch]`.
  """
  index = batch['index']
  return {
    'image': resident['image'][index],
    'label': resident['label'][index],
    'index': index,
  }
