"""Folders of images: `DIR/<split>/<class>/*`."""

import os

import numpy as np
from PIL import Image

from clop_jax.data import images


class Folder:
  """A source over files, decoded when they are asked for.

  The classes are the folders in `DIR/train`, sorted by name; files directly
  under `DIR/<split>` are unlabelled. Files that Pillow does not know by their
  suffix, and hidden ones, are left out.

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
    self.paths = _images(root)
    labels = [-1] * len(self.paths)
    for name in own:
      paths = _images(os.path.join(root, name))
      if not paths:
        raise ValueError(
          f'{os.path.join(root, name)} is an empty class: it has no image that '
          'Pillow can read; put some there, or remove the folder'
        )
      self.paths += paths
      labels += [known.index(name)] * len(paths)
    if not self.paths:
      raise ValueError(f'{root} has no images, neither in folders nor directly')
    self.labels = np.asarray(labels, np.int32)

  def __len__(self):
    return len(self.paths)

  def __getitem__(self, index):
    image = images.decode(self.paths[index], self.paths[index])
    return {'image': image, 'label': int(self.labels[index])}

  def name_of(self, index):
    """The path."""
    return self.paths[index]


def _folders(root):
  with os.scandir(root) as entries:
    return sorted(
      e.name for e in entries if e.is_dir() and not e.name.startswith('.')
    )


def _images(root):
  known = Image.registered_extensions()
  with os.scandir(root) as entries:
    names = [e.name for e in entries if e.is_file()]
  return [
    os.path.join(root, name)
    for name in sorted(names)
    if os.path.splitext(name)[1].lower() in known and not name.startswith('.')
  ]
