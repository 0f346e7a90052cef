"""Folders of images: `DIR/<split>/<class>/*`, or just images, at any depth."""

import collections
import os
import sys

import numpy as np
from PIL import Image

from clop_jax.data import images

# What Pillow knows by name only: it opens them with a program or plug-in that
# most machines lack, or not at all.
_NO_PICTURES = {'BUFR', 'EPS', 'GRIB', 'HDF5', 'MPEG', 'WMF'}
_noted = set()  # what this process has said already


class Folder:
  """A source over files, decoded when they are asked for.

  The classes are the folders in `DIR/train`, sorted by name; files directly
  under `DIR/<split>` are unlabelled. Left out are files without the suffix of a
  picture that Pillow opens, files in folders below a class, and broken links:
  one line on stderr counts them. Hidden files and folders are left out too, and
  are not spoken of.

  Attributes:
    paths: `[n]` strings, sorted within each class.
    labels: `[n]` int32, -1 is unlabelled.
    class_names: the folders' names, by label.
    num_classes: their number.
  """

  def __init__(self, split: str, data_dir: str | None):
    """Lists the files of a split.

    Args:
      split: 'train', 'test' or any other folder of `data_dir`.
      data_dir: the folder above.

    Raises:
      ValueError: if a folder is missing, a class is empty, or a split has a
        class that `train` does not.
    """
    if data_dir is None:
      raise ValueError(
        'config.data.data_dir must be a folder with train/<class>/*, got None'
      )
    if not os.path.isdir(data_dir):
      raise ValueError(
        f'config.data.data_dir={data_dir}: there is no such folder'
      )
    splits = _folders(data_dir)
    if split not in splits:
      raise ValueError(f'split must be one of {splits}, got {split!r}')
    root = os.path.join(data_dir, split)
    own = _folders(root)
    known = _folders(
      os.path.join(data_dir, 'train' if 'train' in splits else split)
    )
    if unknown := sorted({*own} - {*known}):
      raise ValueError(
        f'{root} has classes that {data_dir}/train lacks: '
        f'{", ".join(unknown[:10])}'
      )
    self.class_names, self.num_classes = known, len(known)
    self.paths, left_out = _images(root)
    labels = [-1] * len(self.paths)
    for name in own:
      path = os.path.join(root, name)
      paths, others = _images(path)
      others += [(file, 'in folders below a class') for file in _below(path)]
      if not paths:
        found = f' ({_summary(path, others)})' if others else ''
        raise ValueError(
          f'{path} is an empty class: it has no image that Pillow can read'
          f'{found}; put some there, or remove the folder'
        )
      left_out += others
      self.paths += paths
      labels += [known.index(name)] * len(paths)
    if not self.paths:
      raise ValueError(f'{root} has no images, neither in folders nor directly')
    self.labels = np.asarray(labels, np.int32)
    if left_out:
      _note(_summary(root, left_out))

  def __len__(self):
    return len(self.paths)

  def __getitem__(self, index):
    image = images.decode(self.paths[index], self.paths[index])
    return {'image': image, 'label': int(self.labels[index])}

  def name_of(self, index):
    """The path."""
    return self.paths[index]


class Tree:
  """A source over all images below a folder, at any depth, without labels.

  Left out is what `Folder` leaves out; links to folders are not followed.

  Attributes:
    paths: `[n]` strings, sorted.
    labels: `[n]` int32, all -1.
  """

  def __init__(self, root: str):
    """Lists the files.

    Args:
      root: the folder.

    Raises:
      ValueError: if it is missing or holds no image.
    """
    if not os.path.isdir(root):
      raise ValueError(f'{root}: there is no such folder')
    paths, left_out = [], []
    for path, folders, _ in os.walk(root):
      folders[:] = [name for name in folders if not name.startswith('.')]
      found, others = _images(path)
      paths += found
      left_out += others
    if not paths:
      found = f' ({_summary(root, left_out)})' if left_out else ''
      raise ValueError(
        f'{root} has no image that Pillow can read, at any depth{found}'
      )
    self.paths = sorted(paths)
    self.labels = np.full(len(paths), -1, np.int32)
    if left_out:
      _note(_summary(root, left_out))

  def __len__(self):
    return len(self.paths)

  def __getitem__(self, index):
    image = images.decode(self.paths[index], self.paths[index])
    return {'image': image, 'label': -1}

  def name_of(self, index):
    """The path."""
    return self.paths[index]


def _folders(root):
  with os.scandir(root) as entries:
    return sorted(
      e.name for e in entries if not e.name.startswith('.') and _is_folder(e)
    )


def _is_folder(entry):
  try:
    return entry.is_dir()
  except OSError:  # a link to itself
    return False


def _is_file(entry):
  try:
    return entry.is_file()
  except OSError:
    return False


def _images(root):
  """The images directly in a folder, and `(path, why)` of what is left out."""
  known = _suffixes()
  paths, left_out = [], []
  with os.scandir(root) as entries:
    for entry in entries:
      if entry.name.startswith('.') or _is_folder(entry):
        continue
      if not _is_file(entry):
        left_out.append((entry.path, 'broken links or special files'))
      elif os.path.splitext(entry.name)[1].lower() in known:
        paths.append(entry.path)
      else:
        left_out.append((entry.path, 'without the suffix of a picture'))
  return sorted(paths), left_out


def _suffixes():
  """Of the formats that Pillow opens by itself, as '.png'."""
  formats = Image.registered_extensions()
  # MPO, several JPEGs in one file, is opened as JPEG.
  opened = {*Image.OPEN, 'MPO'} - _NO_PICTURES
  return {suffix for suffix, name in formats.items() if name in opened}


def _below(root):
  """The files in the folders of a folder, at any depth."""
  for folder in _folders(root):
    for path, folders, names in os.walk(os.path.join(root, folder)):
      folders[:] = [name for name in folders if not name.startswith('.')]
      for name in names:
        if not name.startswith('.'):
          yield os.path.join(path, name)


def _summary(root, left_out):
  first = os.path.relpath(min(path for path, _ in left_out), root)
  reasons = collections.Counter(why for _, why in left_out)
  counts = '; '.join(f'{why}: {n}' for why, n in sorted(reasons.items()))
  files = '1 file' if len(left_out) == 1 else f'{len(left_out)} files'
  were = 'was' if len(left_out) == 1 else 'were'
  return f'{files} under {root} {were} left out (first: {first}): {counts}'


def _note(text):
  if text not in _noted:
    _noted.add(text)
    print(f'note: {text}', file=sys.stderr, flush=True)
