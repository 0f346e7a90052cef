"""Reading: the images of a source in one shape, with the labels of a run."""

import copy
import functools
import sys

import numpy as np

from clop_jax.data import images
from clop_jax.data import sources


class Reader:
  """A source's images in one shape, with the labels for training.

  It can be pickled for worker processes if the source can.

  Attributes:
    labels: Labels `[n]` int32, -1 is unlabelled.
    shape: Shape of every image; with `crops`, `[2, size, size, channels]`.
  """

  def __init__(
    self,
    source: sources.Source,
    labels: np.ndarray,
    *,
    channels: int,
    size: int | None = None,
    share: float = 1.0,
    interpolation: str = 'bilinear',
    crops: dict | None = None,
    seed: int = 0,
    skip_corrupt: bool = False,
    instead: str = 'the next one takes its place',
  ):
    """Reads 32 of the images, so that errors show at the start.

    Args:
      source: Source of the examples.
      labels: Labels `[n]` int32, used instead of the source's own.
      channels: Number of channels, 1 or 3. Grey images are repeated over 3
        channels, which is reported if one of the first images read is grey.
      size: Height and width to which the middle square of each image is
        resized. None requires images of one shape.
      share: Width of the middle square, as a share of the shorter side.
      interpolation: Interpolation of the middle square, 'bilinear' or
        'bicubic'.
      crops: Arguments of `images.random_crops`. Training then gets two crops,
        which depend on the seed, the step and the example, instead of the
        middle square.
      seed: Seed of the crops.
      skip_corrupt: If True, the next readable example replaces one that cannot
        be decoded. Each process warns once for each such image.
      instead: End of that warning.

    Raises:
      ValueError: If the source is empty, an image does not fit, or the size or
        the crops are impossible.
    """
    if not len(source):
      raise ValueError('the source has no examples')
    if channels not in (1, 3):
      raise ValueError(f'config.data.channels must be 1 or 3, got {channels}')
    if size is not None:
      images.check_size(
        'config.data.image_size (if None: config.augment.size)', size
      )
    if crops is not None:
      images.check_crops(**crops)
    self.labels = np.asarray(labels, np.int32)
    self._source, self._channels = source, channels
    self._crop = None
    if size is not None:
      self._crop = functools.partial(
        images.center_crop, size=size, share=share, interpolation=interpolation
      )
    self._crops, self._seed = crops, seed
    self._skip_corrupt, self._instead = skip_corrupt, instead
    self.shape: tuple[int, ...] = ()  # unknown until the first image is read
    self._report_grey = channels == 3
    image, position = self.read(0)
    self.shape, self._first = image.shape, sources.name_of(source, position)
    if crops is not None:
      self.shape = (2, crops['size'], crops['size'], channels)
    for index in np.linspace(0, len(source) - 1, 32).astype(int).tolist():
      self.example(0, index)
    self._report_grey = False

  def __len__(self):
    return len(self._source)

  def subset(self, positions: np.ndarray) -> 'Reader':
    """Returns a reader of the examples at some positions."""
    other = copy.copy(self)
    other._source = sources.Subset(self._source, positions)
    other.labels = self.labels[positions]
    return other

  def example(self, step: int, index: int) -> dict:
    """Returns the image, label and index of an example at a training step.

    The label belongs to the image, which may replace a corrupt one.
    """
    if self._crops is None:
      image, position = self.read(index)
    else:
      whole, position = self._decoded(index)
      rng = np.random.default_rng([self._seed, step, index])
      image = images.random_crops(whole, count=2, rng=rng, **self._crops)
    return {
      'image': image,
      'label': self.labels[position],
      'index': np.int32(index),
    }

  def read(self, index: int) -> tuple[np.ndarray, int]:
    """Returns an image without random crops, and its position in the source.

    The position differs from `index` where a corrupt image was skipped.
    """
    whole, position = self._decoded(index)
    image = self._crop(whole) if self._crop else images.as_array(whole)
    if self.shape and image.shape != self.shape:
      name = sources.name_of(self._source, position)
      raise ValueError(
        f'images must all have one shape, got {self.shape} of {self._first} '
        f'and {image.shape} of {name}; config.data.image_size=N resizes them '
        'to N x N pixels'
      )
    return image, position

  def _decoded(self, index):
    """Returns the Pillow image and its position in the source."""
    for offset in range(len(self)):
      position = (index + offset) % len(self)
      try:
        image = self._source[position]['image']
      except images.CorruptImageError as error:
        if not self._skip_corrupt:
          raise
        reason = str(error).split(';')[0]
        images.print_once(f'warning: {reason}; {self._instead}')
        continue
      name = sources.name_of(self._source, position)
      fitted = images.to_channels(image, self._channels, name)
      if self._report_grey and images.is_grey(image):
        images.print_once(
          'note: grey images are repeated over 3 channels', sys.stdout
        )
      return fitted, position
    raise ValueError('no image of the source can be decoded')
