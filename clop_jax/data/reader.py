"""Reading: the images of a source at one shape, with the labels of a run."""

import copy
import sys

import numpy as np
from PIL import Image

from clop_jax.data import images
from clop_jax.data import sources

_noted_grey = set()  # the first grey image that this process has reported
_reported = set()  # warnings of this process, shared by its readers


class Reader:
  """A source's images at one shape, with the labels that training sees.

  Picklable if the source is: worker processes read with a copy.

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
    """Reads some of the images, so that errors show at the start.

    Args:
      source: Source of the examples.
      labels: Labels `[n]` int32, used instead of the source's own.
      channels: Number of channels, 1 or 3. Grey images are repeated over 3
        channels, which a note reports: once if one of the images read here is
        grey, else at most once in each process that reads.
      size: Height and width to which the middle square of each image is
        resized; None takes the images as they are, all of one shape.
      share: Width of the middle square, as a share of the shorter side.
      interpolation: Interpolation of the middle square, 'bilinear' or
        'bicubic'.
      crops: Arguments of `images.random_crops`. Training then gets, instead of
        the middle square, two crops that depend on the seed, the step and the
        example.
      seed: Seed of the crops.
      skip_corrupt: If True, the next readable example replaces one that cannot
        be decoded. Each process that reads warns once for each such image.
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
    self._size, self._share = size, share
    self._interpolation = interpolation
    self._crops, self._seed = crops, seed
    # A copy of it goes to the workers.
    self._skip_corrupt, self._reported = skip_corrupt, _reported
    self._instead = instead
    self._tells_grey = channels == 3
    self.shape: tuple[int, ...] = ()  # not known yet
    self._shape_from = None
    image, position = self.read(0)
    self.shape = image.shape
    self._shape_from = sources.name_of(source, position)
    if crops is not None:
      self.shape = (2, crops['size'], crops['size'], channels)
    for index in np.linspace(0, len(source) - 1, 32).astype(int).tolist():
      self.example(0, index)

  def __len__(self):
    return len(self._source)

  def __getstate__(self):
    # Workers do not repeat the notes of the process that starts them.
    return self.__dict__ | {'_tells_grey': self._tells_grey and not _noted_grey}

  def subset(self, positions: np.ndarray) -> 'Reader':
    """Returns a reader of the examples at some positions."""
    other = copy.copy(self)
    other._source = sources.Subset(self._source, positions)
    other.labels = self.labels[positions]
    return other

  def example(self, step: int, index: int) -> dict:
    """Returns `{'image', 'label', 'index'}` as training sees it at a step.

    The label belongs to the image, the index is the given one.
    """
    if self._crops is None:
      image, position = self.read(index)
    else:
      image, position = self._decoded(index)
      rng = np.random.default_rng([self._seed, step, index])
      image = images.random_crops(image, count=2, rng=rng, **self._crops)
    return {
      'image': image,
      'label': self.labels[position],
      'index': np.int32(index),
    }

  def read(self, index: int) -> tuple[np.ndarray, int]:
    """Returns an image without random crops, and its position in the source.

    The position differs from `index` where a corrupt image was skipped.
    """
    image, position = self._decoded(index)
    if self._size is not None:
      image = images.center_crop(
        image,
        self._size,
        share=self._share,
        interpolation=self._interpolation,
      )
    else:
      image = images.as_array(image)
    if self.shape and image.shape != self.shape:
      name = sources.name_of(self._source, position)
      raise ValueError(
        f'images must all have one shape, got {self.shape} of '
        f'{self._shape_from} and {image.shape} of {name}; '
        'config.data.image_size=N brings them all to N x N pixels'
      )
    return image, position

  def _decoded(self, index):
    """Returns the image, an array or Pillow's, and its position."""
    for offset in range(len(self)):
      position = (index + offset) % len(self)
      try:
        image = self._source[position]['image']
      except images.CorruptImageError as error:
        if not self._skip_corrupt:
          raise
        self._report(error)
        continue
      # Pillow's own images are kept as they are: an array costs a copy there
      # and another one back, a fifth of what decoding takes.
      if not isinstance(image, Image.Image):
        image = np.asarray(image)
      name = sources.name_of(self._source, position)
      fitted = images.to_channels(image, self._channels, name)
      if self._tells_grey and not _noted_grey and images.is_grey(image):
        _noted_grey.add(name)
        print(
          f'note: grey images ({name}, ...) are repeated over 3 channels',
          flush=True,
        )
      return fitted, position
    raise ValueError('no image of the source can be decoded')

  def _report(self, error):
    warning = f'warning: {str(error).split(";")[0]}; {self._instead}'
    if warning not in self._reported:
      self._reported.add(warning)
      print(warning, file=sys.stderr, flush=True)
