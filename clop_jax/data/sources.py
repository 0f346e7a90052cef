"""Random-access sources of labelled images, by name.

A source is any object with `__len__` and `__getitem__(i)` that gives
`{'image': uint8 [height, width, channels], 'label': int}`.
"""

import io
from typing import Protocol

import numpy as np
from PIL import Image

SPLITS = ('train', 'test')


class Source(Protocol):
  """What a loader reads from."""

  def __len__(self) -> int:
    """Number of examples."""

  def __getitem__(self, index: int) -> dict:
    """`{'image': uint8 [height, width, channels], 'label': int}`."""


class _Decoded:
  """A TFDS data source whose image bytes are decoded by Pillow.

  TFDS would decode with TensorFlow or OpenCV where it finds one: another
  decoder on another machine, and other pixels.
  """

  def __init__(self, encoded):
    self._encoded = encoded

  def __len__(self):
    return len(self._encoded)

  def __getitem__(self, index):
    example = self._encoded[index]
    image = np.asarray(Image.open(io.BytesIO(example['image'])))
    if image.ndim == 2:
      image = image[..., None]
    return {'image': image, 'label': int(example['label'])}


def load(name: str, split: str, data_dir: str | None = None) -> Source:
  """The source of that name and split, prepared first if need be.

  Args:
    name: 'digits'.
    split: 'train' or 'test'.
    data_dir: where TFDS keeps its data sets; None is TFDS's default.

  Returns:
    The source.

  Raises:
    ValueError: for an unknown name or split.
  """
  if name not in _SOURCES:
    raise ValueError(
      f'data.name must be one of {sorted(_SOURCES)}, got {name!r}'
    )
  if split not in SPLITS:
    raise ValueError(f'split must be one of {list(SPLITS)}, got {split!r}')
  return _SOURCES[name](split, data_dir)


def _digits(split, data_dir):
  # TFDS takes a second to import, so only those who read with it pay.
  import tensorflow_datasets as tfds

  from clop_jax.data import digits

  # array_record: random access, and no TensorFlow to read it.
  builder = digits.Digits(data_dir=data_dir, file_format='array_record')
  if not builder.is_prepared():
    tfds.disable_progress_bar()
    builder.download_and_prepare()
  decoders = {'image': tfds.decode.SkipDecoding()}
  return _Decoded(builder.as_data_source(split, decoders=decoders))


_SOURCES = {'digits': _digits}
