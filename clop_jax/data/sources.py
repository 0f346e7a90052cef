"""Random-access sources of labelled images, by name.

A source is any object with `__len__` and `__getitem__(i)` that gives
`{'image': ..., 'label': int}`: the image uint8 `[height, width, channels]` or a
Pillow image, the label -1 for unlabelled.
Three attributes are used where it has them: `labels` (`[n]` integers; spares
reading every image to learn its label), `num_classes`, and `name_of(i)` (what
an error calls an example: its file).
"""

from collections.abc import Callable, Sequence
import re
import sys
from typing import Protocol

import numpy as np
import tqdm

from clop_jax.data import arrays
from clop_jax.data import folder
from clop_jax.data import images
from clop_jax.data import synthetic
from clop_jax.data import tfds_source
from clop_jax.runtime import remote


class Source(Protocol):
  """What a loader reads from."""

  def __len__(self) -> int:
    """Number of examples."""

  def __getitem__(self, index: int) -> dict:
    """`{"image": an array or a Pillow image (above), "label": int}`."""


def load(
  name: str, split: str, data_dir: str | None = None, **options
) -> Source:
  """The source of that name and split, prepared first if need be.

  Args:
    name: 'folder', 'npz', 'synthetic', or a data set of TFDS: 'digits' and
      'tiny_imagenet' are ours, the others TFDS's own ('cifar100', ...).
    split: a split of it, as 'train'.
    data_dir: the folder of images, the npz file, or where TFDS keeps its data
      sets (None is TFDS's default).
    **options: keyword arguments of that source; see `synthetic.Synthetic`.

  Returns:
    The source.

  Raises:
    ValueError: for an unknown name, split or option, or unreadable data.
  """
  make = _SOURCES.get(name)
  if data_dir is not None:
    # The config of a workdir has not been checked by a command.
    check = remote.check if make is None else remote.check_local
    check('config.data.data_dir', data_dir)
  try:
    if make is not None:
      return make(split, data_dir, **options)
    return tfds_source.load(
      name, split, data_dir, progress=sys.stderr.isatty(), **options
    )
  except TypeError as error:
    if 'unexpected keyword argument' not in str(error):
      raise
    raise ValueError(
      f'config.data.options: {name!r} has no such option ({error})'
    ) from error


def in_flags(error: ValueError, name: str) -> str:
  """What `load` raised, for a command whose flags name the data set.

  Args:
    error: speaks of the fields of `config.data`.
    name: the flag that stands for `config.data.name`, as '--source'.

  Returns:
    The message; for each other field it names the flag of that name.

  Example:
    >>> from clop_jax.data import sources
    >>> try:
    ...   sources.load('npz', 'train', 'missing.npz')
    ... except ValueError as error:
    ...   print(sources.in_flags(error, '--data'))
    --data_dir=missing.npz: there is no such file
  """
  # But for those that say how to train.
  message = re.sub(r'(?<!-)config\.data\.name', name, str(error))
  return re.sub(r'(?<!-)config\.data\.', '--', message)


def _synthetic(split, data_dir, **options):
  del data_dir  # made, not read
  return synthetic.Synthetic(split, **options)


_SOURCES: dict[str, Callable[..., Source]] = {
  'folder': folder.Folder,
  'npz': arrays.load_npz,
  'synthetic': _synthetic,
}


WITHOUT_PREPARING = tuple(_SOURCES)


def labels_of(source: Source) -> np.ndarray:
  """All labels of a source, `[n]` int32."""
  labels = getattr(source, 'labels', None)
  if labels is None:
    indices = tqdm.tqdm(
      range(len(source)), 'reading labels', disable=not sys.stderr.isatty()
    )
    labels = [source[index]['label'] for index in indices]
  labels = np.asarray(labels)
  if labels.shape != (len(source),) or labels.dtype.kind not in 'iu':
    raise ValueError(
      f'a source must have one integer label for each of its {len(source)} '
      f'examples (-1: unlabelled), got {labels.dtype} {labels.shape}'
    )
  return arrays.as_int32(labels)


def name_of(source: Source, index: int) -> str:
  """What an error calls an example."""
  name = getattr(source, 'name_of', None)
  return name(index) if name is not None else f'image {index}'


class Union:
  """Several sources, one after the other.

  For training on labelled and unlabelled sets together:
  `Union([labelled, Unlabelled(other)])`.
  """

  def __init__(self, parts: Sequence[Source]):
    """Joins sources whose classes, where they have any, are the same."""
    if not parts:
      raise ValueError('parts must hold at least one source, got none')
    self._parts = list(parts)
    self._ends = np.cumsum([len(part) for part in parts])
    self.labels = np.concatenate([labels_of(part) for part in parts])
    self.num_classes = getattr(parts[0], 'num_classes', None)

  def __len__(self):
    return int(self._ends[-1])

  def _locate(self, index):
    if not 0 <= index < len(self):
      raise IndexError(index)
    part = int(np.searchsorted(self._ends, index, side='right'))
    start = int(self._ends[part - 1]) if part else 0
    return self._parts[part], index - start

  def __getitem__(self, index):
    part, position = self._locate(index)
    return part[position] | {'label': int(self.labels[index])}

  def name_of(self, index):
    """The example's name in its own source."""
    return name_of(*self._locate(index))


class Unlabelled:
  """A source without its labels."""

  def __init__(self, source: Source):
    """Hides the labels of `source`."""
    self._source = source
    self.labels = np.full(len(source), -1, np.int32)

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    return self._source[index] | {'label': -1}

  def name_of(self, index):
    """The example's name in the source."""
    return name_of(self._source, index)


class Subset:
  """Some examples of a source, in the order asked for."""

  def __init__(self, source: Source, indices: np.ndarray):
    """Takes the examples `indices` of `source`."""
    self._source, self._indices = source, np.asarray(indices)
    self.labels = labels_of(source)[self._indices]
    self.num_classes = getattr(source, 'num_classes', None)

  def __len__(self):
    return len(self._indices)

  def __getitem__(self, index):
    return self._source[int(self._indices[index])]

  def name_of(self, index):
    """The example's name in the source."""
    return name_of(self._source, int(self._indices[index]))


class Grey:
  """A source without its colours, for a network of one channel."""

  def __init__(self, source: Source):
    """Takes the colours from `source`."""
    self._source = source
    self.labels = labels_of(source)
    self.num_classes = getattr(source, 'num_classes', None)

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    example = self._source[index]
    return example | {'image': images.to_grey(example['image'])}

  def name_of(self, index):
    """The example's name in the source."""
    return name_of(self._source, index)
