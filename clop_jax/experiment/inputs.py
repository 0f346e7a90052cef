"""Sources, labels, readers and loaders of a config."""

import math
import os

from jax.sharding import Mesh
import ml_collections
import numpy as np

from clop_jax import defaults
from clop_jax.data import labels as label_policy
from clop_jax.data import loader
from clop_jax.data import reader as reader_lib
from clop_jax.data import sources


def source(config: ml_collections.ConfigDict, split: str) -> sources.Source:
  """Returns a split of the config's data set, by its name there."""
  data = config.data
  return sources.load(data.name, split, data.data_dir, **data.options.to_dict())


def training_source(config: ml_collections.ConfigDict) -> sources.Source:
  """Returns the training split followed by the unlabelled split, if any."""
  labelled = source(config, config.data.train_split)
  if config.data.unlabelled_split is None:
    return labelled
  other = source(config, config.data.unlabelled_split)
  return sources.Union([labelled, sources.Unlabelled(other)])


def on_other_data(
  config: ml_collections.ConfigDict,
  name: str,
  *,
  data_dir: str | None = None,
  train_split: str = 'train',
  test_split: str = 'test',
) -> ml_collections.ConfigDict:
  """Returns a run's config with another data set.

  Channels and sizes stay, because the network depends on them. If the run took
  images at their own size, the other images are center-cropped and resized to
  the size of its views. The number of classes is the source's.
  """
  fields = config.to_dict()
  fields['data'] |= {
    'name': name,
    'data_dir': data_dir,
    'options': {},
    'train_split': train_split,
    'test_split': test_split,
    'unlabelled_split': None,
    'num_classes': 0,
    'image_size': config.data.image_size or config.augment.size,
  }
  return ml_collections.ConfigDict(fields).lock()


def fitted(
  config: ml_collections.ConfigDict, other: sources.Source
) -> sources.Source:
  """Returns a source of another data set in the colors of the run."""
  return sources.Grey(other) if config.data.channels == 1 else other


def labelled_source(
  config: ml_collections.ConfigDict,
  split: str,
  given: sources.Source | None = None,
) -> tuple[sources.Source, np.ndarray]:
  """Returns the labelled examples of a split and their true labels `[n]`.

  Args:
    config: Config with a known `data.num_classes`.
    split: 'train' or 'test'; the config has its name in the data set.
    given: Examples to use instead of those of the config.

  Raises:
    ValueError: If the split is missing, has no label, or one out of range.
  """
  name = config.data[f'{split}_split']
  where = f'config.data.{split}_split={name!r}'
  if given is not None:
    where = f'given[{split!r}]'
  elif not name:
    raise ValueError(
      f'{where}: this run was trained without a {split} split, and evaluation '
      'needs one; evaluate from Python with your own examples: '
      'evaluate.Request(workdir, given=...)'
    )
  try:
    evaluated = source(config, name) if given is None else given
    known = sources.labels_of(evaluated)
    label_policy.check_range(known, config.data.num_classes)
  except ValueError as error:
    raise ValueError(f'{where}: {error}') from error
  if (known < 0).any():
    evaluated = sources.Subset(evaluated, np.flatnonzero(known >= 0))
    known = known[known >= 0]
  if not known.size:
    raise ValueError(
      f'{where} has no labelled example to evaluate with; choose another split'
    )
  return evaluated, known


def check_evaluation(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError, before training, if evaluation would fail after it."""
  if not config.data.test_split:
    return
  try:
    evaluation_reader(config, *labelled_source(config, 'test'))
  except ValueError as error:
    raise ValueError(
      f'{error} (--config.data.test_split= trains without a test split)'
    ) from error


def with_num_classes(
  config: ml_collections.ConfigDict, training: sources.Source
) -> ml_collections.ConfigDict:
  """Returns the config with `data.num_classes`, if need be the source's.

  Raises:
    ValueError: If neither the config nor the source has it, or it is below 2.
  """
  num_classes = config.data.num_classes or getattr(
    training, 'num_classes', None
  )
  if not num_classes:
    raise ValueError(
      'config.data.num_classes must be set, because the source does not have '
      'it (use 2 if nothing is labelled); got 0'
    )
  if num_classes < 2:
    raise ValueError(
      f'config.data.num_classes must be at least 2, got {num_classes}'
    )
  if config.data.num_classes:
    return config
  field = defaults.FIELDS['data.num_classes']
  if not field.accepts(int(num_classes)):
    raise ValueError(
      f'config.data.num_classes must be {field.range()}, but the source has a '
      f'label {num_classes - 1}; number its classes from 0'
    )
  config = ml_collections.ConfigDict(config.to_dict())
  config.data.num_classes = int(num_classes)
  return config.lock()


def training_labels(
  config: ml_collections.ConfigDict, true_labels: np.ndarray
) -> np.ndarray:
  """Returns the labels that training sees, by the policies of the config.

  Raises:
    ValueError: If a label is out of range, or a policy does not fit the data.
  """
  data = config.data
  per_class = data.labels_per_class
  return label_policy.apply(
    true_labels,
    num_classes=data.num_classes,
    unlabelled_classes=data.unlabelled_classes,
    imbalance_factor=data.imbalance_factor,
    class_fractions=data.class_fractions,
    # A count replaces the fraction that a config file sets.
    label_fraction=data.label_fraction if per_class is None else 1.0,
    labels_per_class=per_class,
    label_noise=data.label_noise,
    label_noise_kind=data.label_noise_kind,
    seed=config.seed,
  )


def training_reader(
  config: ml_collections.ConfigDict,
  training: sources.Source,
  labels: np.ndarray,
) -> reader_lib.Reader:
  """Returns the reader of the training examples."""
  data, augment = config.data, config.augment
  names = ('size', 'crop_area', 'crop_aspect', 'interpolation')
  return reader_lib.Reader(
    training,
    labels,
    channels=data.channels,
    size=data.image_size,
    interpolation=augment.interpolation,
    crops={x: augment[x] for x in names} if data.host_crops else None,
    seed=config.seed,
    skip_corrupt=data.skip_corrupt,
  )


def evaluation_reader(
  config: ml_collections.ConfigDict,
  evaluated: sources.Source,
  labels: np.ndarray,
  **changes,
) -> reader_lib.Reader:
  """Returns a reader of whole images, or of their center.

  Args:
    config: Config of the run.
    evaluated: Examples to read.
    labels: Labels `[n]` to use instead of those of the source.
    **changes: Arguments of the reader that replace those of the config.
  """
  data, share = config.data, config.eval.crop_share
  size = data.image_size
  if size is None and (data.host_crops or share < 1):
    size = config.augment.size
  arguments = {
    'channels': data.channels,
    'size': size,
    'share': share,
    'interpolation': config.augment.interpolation,
    'skip_corrupt': data.skip_corrupt,
  }
  return reader_lib.Reader(evaluated, labels, **arguments | changes)


def is_resident(
  config: ml_collections.ConfigDict, reader: reader_lib.Reader
) -> bool:
  """Returns True if the data set is kept on the devices.

  Raises:
    ValueError: If the loader of the config cannot serve these images.
  """
  return _fits(config, len(reader) * math.prod(reader.shape))


def _fits(config, num_bytes):
  data = config.data
  if data.host_crops and data.loader == 'resident':
    raise ValueError(
      'config.data.host_crops=True makes new crops at each step, which '
      "config.data.loader='resident' cannot keep; use 'stream' or 'auto'"
    )
  if data.host_crops or data.loader == 'stream':
    return False
  limit = data.resident_limit_gib * 2**30
  return data.loader == 'resident' or num_bytes <= limit


def training_loader(
  config: ml_collections.ConfigDict, reader: reader_lib.Reader, mesh: Mesh
) -> loader.Loader:
  """Returns the loader of the config, by default the one for the set's size."""
  shared = {
    'batch_size': config.train.batch_size,
    'seed': config.seed,
    'mesh': mesh,
  }
  if is_resident(config, reader):
    return loader.ResidentLoader(*loader.read_all(reader), **shared)
  return loader.StreamLoader(
    reader,
    num_workers=num_workers(config, reader),
    prefetch=config.data.prefetch,
    **shared,
  )


def abstract_loader(
  config: ml_collections.ConfigDict,
  mesh: Mesh,
  *,
  num_examples: int,
  image_shape: tuple[int, ...],
) -> loader.AbstractLoader:
  """Returns the shapes of the data that `training_loader` would serve.

  Args:
    config: Config of the run.
    mesh: Mesh of the devices, which need not be attached to this process.
    num_examples: Number of training images.
    image_shape: `(height, width, channels)` of the images in the data set,
      before the config resizes or crops them.
  """
  data, size = config.data, config.data.image_size
  shape: tuple[int, ...] = (*image_shape[:2], data.channels)
  if data.host_crops:
    shape = (2, config.augment.size, config.augment.size, data.channels)
  elif size is not None:
    shape = (size, size, data.channels)
  return loader.AbstractLoader(
    num_examples,
    shape,
    batch_size=config.train.batch_size,
    mesh=mesh,
    resident=_fits(config, num_examples * math.prod(shape)),
  )


def num_workers(
  config: ml_collections.ConfigDict, reader: reader_lib.Reader
) -> int:
  """Returns the number of worker processes for a pass over a data set."""
  # Reading a small set takes less time than starting processes.
  if is_resident(config, reader):
    return 0
  workers = config.data.num_workers
  # In a container a process may not use all cores of the machine.
  return len(os.sched_getaffinity(0)) if workers == -1 else workers
