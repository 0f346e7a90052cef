"""Folders of images: `DIR/<split>/<class>/*`, or just images, at any depth."""

import contextlib
import functools
import os

import numpy as np
from PIL import Image

from clop_jax.data import images

# Formats that Pillow knows by name only: it opens them with a program or plugin
# that most machines lack, or not at all.
_NO_PICTURES = {'BUFR', 'EPS', 'GRIB', 'HDF5', 'MPEG', 'WMF'}


class _Files:
  """Base of the sources over image files."""

  paths: list[str]
  labels: np.ndarray

  def __len__(self):
    return len(self.paths)

  def __getitem__(self, index):
    image = images.decode(self.paths[index], self.paths[index])
    return {'image': image, 'label': int(self.labels[index])}

  def name_of(self, index):
    """Returns the path of an image."""
    return self.paths[index]


class Folder(_Files):
  """A source of image files, which are decoded when they are read.

  The classes are the folders in `DIR/train`, sorted by name. Files directly in
  `DIR/<split>` are unlabelled. Other files, files in folders below a class and
  broken links are skipped, with a note. Hidden files and folders are ignored.

  Attributes:
    paths: Paths of the images, sorted within each class.
    labels: Labels `[n]` int32, -1 is unlabelled.
    class_names: Names of the classes, by label.
    num_classes: Number of classes.
  """

  def __init__(self, split: str, data_dir: str | None):
    """Lists the files of a split.

    Args:
      split: Folder in `data_dir`, such as 'train' or 'test'.
      data_dir: Folder of the splits.

    Raises:
      ValueError: If a folder is missing, a class is empty, or a split has a
        class that `train` does not.
    """
    if data_dir is None or not os.path.isdir(data_dir):
      raise ValueError(
        'config.data.data_dir must be a folder with train/<class>/*, got '
        f'{data_dir}'
      )
    splits, _, _ = _scan(data_dir)
    if split not in splits:
      raise ValueError(f'split must be one of {splits}, got {split!r}')
    root = os.path.join(data_dir, split)
    names, self.paths, skipped = _scan(root)
    classes = names
    if 'train' in splits:
      classes, _, _ = _scan(os.path.join(data_dir, 'train'))
    if unknown := sorted({*names} - {*classes}):
      raise ValueError(
        f'{root} has classes that {data_dir}/train lacks: '
        f'{", ".join(unknown[:10])}'
      )
    self.class_names, self.num_classes = classes, len(classes)
    labels = [-1] * len(self.paths)
    for name in names:
      path = os.path.join(root, name)
      below, paths, others = _scan(path)
      for folder in below:
        for found, rest in _walk(os.path.join(path, folder)):
          others += found + rest
      if not paths:
        raise ValueError(
          f'{path} is an empty class: it has no image that Pillow can read'
          f'{_first(others)}; put some there, or remove the folder'
        )
      skipped += others
      self.paths += paths
      labels += [classes.index(name)] * len(paths)
    if not self.paths:
      raise ValueError(f'{root} has no images, neither in folders nor directly')
    self.labels = np.asarray(labels, np.int32)
    _note(root, skipped)


class Tree(_Files):
  """A source of all images in a folder, at any depth, without labels.

  It skips what `Folder` skips, and does not follow links to folders.

  Attributes:
    paths: Paths of the images, sorted.
    labels: Labels `[n]` int32, all -1.
  """

  def __init__(self, root: str):
    """Lists the files; raises ValueError if there is no image."""
    if not os.path.isdir(root):
      raise ValueError(f'{root}: no such folder')
    self.paths, skipped = [], []
    for paths, others in _walk(root):
      self.paths += paths
      skipped += others
    if not self.paths:
      raise ValueError(
        f'{root} has no image that Pillow can read, at any depth'
        f'{_first(skipped)}'
      )
    self.paths.sort()
    self.labels = np.full(len(self.paths), -1, np.int32)
    _note(root, skipped)


def _walk(root):
  """Yields the images and other files of a folder and each one below it."""
  for path, folders, _ in os.walk(root):
    folders[:] = [name for name in folders if not name.startswith('.')]
    yield _scan(path)[1:]


def _scan(root):
  """Returns names of folders, paths of images and of other files in a folder.

  Hidden ones are left out. Broken links and special files are other files.
  """
  folders, paths, others = [], [], []
  with os.scandir(root) as entries:
    for entry in entries:
      if entry.name.startswith('.'):
        continue
      with contextlib.suppress(OSError):  # a link to itself
        if entry.is_dir():
          folders.append(entry.name)
          continue
        if entry.is_file() and os.path.splitext(entry.name)[1].lower() in (
          _suffixes()
        ):
          paths.append(entry.path)
          continue
      others.append(entry.path)
  return sorted(folders), sorted(paths), sorted(others)


@functools.cache
def _suffixes():
  """Returns the suffixes of the formats that Pillow opens, such as '.png'."""
  formats = Image.registered_extensions()
  # MPO, several JPEGs in one file, is opened as JPEG.
  opened = {*Image.OPEN, 'MPO'} - _NO_PICTURES
  return {suffix for suffix, name in formats.items() if name in opened}


def _first(skipped):
  if not skipped:
    return ''
  return f' (skipped {len(skipped)} files, such as {skipped[0]})'


def _note(root, skipped):
  if skipped:
    images.print_once(
      f'note: skipped {len(skipped)} of the files in {root}, which are no '
      f'images or lie below a class: {skipped[0]}, ...'
    )
