"""What training reads: a source's images at one shape, with its own labels."""

import sys

import numpy as np
from PIL import Image

from clop_jax.data import images
from clop_jax.data import sources

_noted_grey = set()  # not empty once this process has said it
_reported = (
  set()
)  # what this process has warned of; several readers may read it


class Reader:
  """A source's images at one shape, with the labels that training sees.

  Picklable where the source is: worker processes read with a copy.

  Attributes:
    labels: `[n]` int32, -1 is unlabelled.
    shape: of every image; with `crops`, `[2, size, size, channels]`.
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
    """Looks at some images, so that what is wrong shows at the start.

    Args:
      source: the examples.
      labels: `[n]` int32, instead of the source's own.
      channels: 1 or 3; grey images are repeated over 3 channels. A note says
        so: once if some image looked at here is grey, else at most once in each
        process that reads.
      size: the middle square of each image is brought to `size` x `size`; None
        takes the images as they are, all of one shape.
      share: of the shorter side that the middle square is wide.
      interpolation: 'bilinear' or 'bicubic', for the middle square.
      crops: arguments of `images.random_crops`; instead of the middle square,
        two crops that depend on the seed, the step and the example.
      seed: of the crops.
      skip_corrupt: the next readable example takes the place of one that cannot
        be decoded, with its label. A warning says so, once for each image in
        each process that reads; worker processes do not know of one another.
      instead: how that warning ends.

    Raises:
      ValueError: if the source is empty, an image does not fit, or there can be
        no such size or crops.
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
    image, position = self._fitted(0)
    self.shape = image.shape
    self._shape_from = sources.name_of(source, position)
    if crops is not None:
      self.shape = (2, crops['size'], crops['size'], channels)
    for index in np.linspace(0, len(source) - 1, 32).astype(int).tolist():
      self.example(0, index)

  def __len__(self):
    return len(self._source)

  def __getstate__(self):
    # Workers do not repeat what the process that starts them has said.
    return self.__dict__ | {'_tells_grey': self._tells_grey and not _noted_grey}

  def example(self, step: int, index: int) -> dict:
    """`{'image', 'label', 'index'}` as training sees it at a step."""
    if self._crops is None:
      image, position = self._fitted(index)
    else:
      image, position = self._read(index)
      rng = np.random.default_rng([self._seed, step, index])
      image = images.random_crops(image, count=2, rng=rng, **self._crops)
    return {
      'image': image,
      'label': self.labels[position],
      'index': np.int32(index),
    }

  def _fitted(self, index):
    image, position = self._read(index)
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

  def _read(self, index):
    """The image, an array or Pillow's, and whose it is."""
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
