"""Images in memory, or in an npz file."""

import zipfile

import numpy as np

from clop_jax.runtime import files


class Arrays:
  """A source of images in arrays.

  Attributes:
    labels: Labels `[n]` int32, -1 is unlabelled.
    num_classes: Largest label plus one.
  """

  def __init__(self, images: np.ndarray, labels: np.ndarray | None = None):
    """Wraps arrays without copying the images.

    Args:
      images: uint8 images `[n, height, width, channels]` or
        `[n, height, width]`.
      labels: Integer labels `[n]`; None means unlabelled.

    Raises:
      ValueError: If a shape or dtype is wrong.
    """
    if images.ndim == 3:
      images = images[..., None]
    if images.ndim != 4 or images.dtype != np.uint8:
      raise ValueError(
        'images must be uint8 [n, height, width, channels] or '
        f'[n, height, width], got {images.dtype} {images.shape}'
      )
    if labels is None:
      labels = np.full(len(images), -1, np.int32)
    if labels.shape != images.shape[:1] or labels.dtype.kind not in 'iu':
      raise ValueError(
        f'labels must be integers of shape [n]=[{len(images)}], got '
        f'{labels.dtype} {labels.shape}'
      )
    self._images = images
    self.labels = as_int32(labels)
    self.num_classes = int(self.labels.max(initial=-1)) + 1

  def __len__(self):
    return len(self._images)

  def __getitem__(self, index):
    return {'image': self._images[index], 'label': int(self.labels[index])}


def as_int32(labels: np.ndarray) -> np.ndarray:
  """Returns integers as int32, or raises ValueError if one does not fit."""
  limits = np.iinfo(np.int32)
  wrong = np.flatnonzero((labels < limits.min) | (labels > limits.max))
  if wrong.size:
    raise ValueError(
      f'labels must fit 32 bits, got {labels[wrong[0]]} at index {wrong[0]}'
    )
  return labels.astype(np.int32)


def load_npz(split: str, path: str | None) -> Arrays:
  """Returns a split of an npz file.

  Args:
    split: Name of the split. The file has `<split>_images` and, unless nothing
      is labelled, `<split>_labels`; see `Arrays`.
    path: Path of the file.

  Raises:
    ValueError: If the file is missing or damaged, or lacks the split.
  """
  if path is None:
    raise ValueError(
      'config.data.data_dir must be the path of an npz file, got None'
    )
  try:
    # Opened here: NumPy leaves a file that it cannot read open.
    with open(path, 'rb') as opened, np.load(opened) as file:
      try:
        files.check_unpacked(file)
      except ValueError as error:
        raise ValueError(
          f'config.data.data_dir={path}: {error}; use a machine with more '
          "memory, or a folder of images with config.data.loader='stream'"
        ) from None
      names = [x for x in file.files if x.endswith('_images')]
      splits = [name.removesuffix('_images') for name in names]
      if split not in splits:
        raise ValueError(
          f'split must be one of {splits} of {path}, got {split!r}; its arrays '
          f'are {file.files}, expected <split>_images and <split>_labels'
        )
      images = file[f'{split}_images']
      key = f'{split}_labels'
      labels = file[key] if key in file.files else None
      other = file['train_labels'] if 'train_labels' in file.files else None
  except FileNotFoundError as error:
    raise ValueError(f'config.data.data_dir={path}: no such file') from error
  except (zipfile.BadZipFile, OSError, EOFError, TypeError) as error:
    raise ValueError(
      f'{path} cannot be read as an npz file: {error}'
    ) from error
  except ValueError as error:
    if 'pickle' not in str(error):
      raise
    raise ValueError(f'{path} cannot be read as an npz file') from error
  try:
    source = Arrays(images, labels)
  except ValueError as error:
    raise ValueError(f'{path}, split {split!r}: {error}') from error
  if other is not None and other.size:
    # A split may lack the last class.
    source.num_classes = max(source.num_classes, int(other.max()) + 1)
  return source
