"""Random-access sources of labelled images, by name.

A source is an object with `__len__` and `__getitem__`; see `Source`. Optional
are `labels` (integers `[n]`, which saves reading every image), `num_classes`,
and a method `name_of(index)` that names an example in errors, as by its path.
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
from clop_jax.runtime import names
from clop_jax.runtime import remote


class Source(Protocol):
  """Examples that can be read in any order."""

  def __len__(self) -> int:
    """Returns the number of examples."""

  def __getitem__(self, index: int) -> dict:
    """Returns `{'image': ..., 'label': int}`.

    The image is a uint8 array `[height, width, channels]` or a Pillow image.
    The label is -1 if the example is unlabelled.
    """


def load(
  name: str, split: str, data_dir: str | None = None, **options
) -> Source:
  """Returns a split of a data set, prepared first if necessary.

  Args:
    name: 'folder', 'npz', 'synthetic', 'digits', 'tiny_imagenet', a data set of
      TFDS such as 'cifar100', or 'package.module:attribute' of a function
      `(split, data_dir, **options) -> source`.
    split: Name of the split, such as 'train'.
    data_dir: Folder of images, npz file, or folder of TFDS's data sets (None is
      TFDS's default).
    **options: Keyword arguments of the source; see `synthetic.Synthetic`.

  Raises:
    ValueError: If the name, split or an option is unknown, or the data cannot
      be read.

  Example:
    >>> from clop_jax.data import sources
    >>> source = sources.load('synthetic', 'train', num_examples=100)
    >>> len(source), source[0]['image'].shape
    (100, (8, 8, 1))
  """
  make = _SOURCES.get(name)
  is_own = make is None and ':' in name
  if is_own:
    make = names.resolve('data.name', name, _SOURCES)
  if data_dir is not None and not is_own:
    # The config of a workdir was not checked by a command.
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
  """Returns a message of `load` that names flags instead of config fields.

  Args:
    error: Error of `load`.
    name: Flag that stands for `config.data.name`. The other fields of
      `config.data` become flags of the same name.
  """
  # Not in advice on how to train, which begins with `--config`.
  message = re.sub(r'(?<!-)config\.data\.name', name, str(error))
  return re.sub(r'(?<!-)config\.data\.', '--', message)


def _synthetic(split, data_dir, **options):
  del data_dir
  return synthetic.Synthetic(split, **options)


_SOURCES: dict[str, Callable[..., Source]] = {
  'folder': folder.Folder,
  'npz': arrays.load_npz,
  'synthetic': _synthetic,
}

WITHOUT_PREPARING = tuple(_SOURCES)


def labels_of(source: Source) -> np.ndarray:
  """Returns all labels of a source, `[n]` int32."""
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
      f'examples (-1 if unlabelled), got {labels.dtype} {labels.shape}'
    )
  return arrays.as_int32(labels)


def name_of(source: Source, index: int) -> str:
  """Returns the name of an example, for errors."""
  name = getattr(source, 'name_of', None)
  return name(index) if name is not None else f'image {index}'


class Union:
  """Several sources, one after the other.

  Example:
    >>> from clop_jax.data import sources
    >>> labelled, other = (
    ...   sources.load('synthetic', 'train', num_examples=n) for n in (10, 20)
    ... )
    >>> union = sources.Union([labelled, sources.Unlabelled(other)])
    >>> len(union), union[29]['label']
    (30, -1)
  """

  def __init__(self, parts: Sequence[Source]):
    """Joins sources of the same classes; unlabelled ones need none."""
    if not parts:
      raise ValueError('parts must hold at least one source, got none')
    self._parts = list(parts)
    self._ends = np.cumsum([len(part) for part in parts])
    self.labels = np.concatenate([labels_of(part) for part in parts])
    self.num_classes = getattr(parts[0], 'num_classes', None)

  def __len__(self):
    return len(self.labels)

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
    """Returns the example's name in its own source."""
    return name_of(*self._locate(index))


class Subset:
  """Some examples of a source, by their indices."""

  def __init__(self, source: Source, indices: np.ndarray):
    """Selects the examples."""
    self._source, self._indices = source, np.asarray(indices)
    self.labels = labels_of(source)[self._indices]
    self.num_classes = getattr(source, 'num_classes', None)

  def __len__(self):
    return len(self._indices)

  def __getitem__(self, index):
    return self._source[int(self._indices[index])]

  def name_of(self, index):
    """Returns the example's name in the source."""
    return name_of(self._source, int(self._indices[index]))


class Unlabelled:
  """A source without its labels."""

  def __init__(self, source: Source):
    """Hides the labels."""
    self._source = source
    self.labels = np.full(len(source), -1, np.int32)

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    return self._source[index] | {'label': -1}

  def name_of(self, index):
    """Returns the example's name in the source."""
    return name_of(self._source, index)


class Grey(Subset):
  """A source without its colours, for a network of one channel."""

  def __init__(self, source: Source):
    """Hides the colours."""
    super().__init__(source, np.arange(len(source)))

  def __getitem__(self, index):
    example = super().__getitem__(index)
    return example | {'image': images.to_grey(example['image'])}
