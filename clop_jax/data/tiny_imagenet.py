"""TFDS builder of Tiny-ImageNet, which TFDS itself lacks."""

from collections.abc import Iterator
import io
import os
import posixpath
from typing import ClassVar
import zipfile

import tensorflow_datasets as tfds

_FILE = 'tiny-imagenet-200.zip'
_URL = f'http://cs231n.stanford.edu/{_FILE}'
_ROOT = 'tiny-imagenet-200'

_DESCRIPTION = """200 classes of ImageNet at 64x64 pixels: 500 training and 50
validation images of each, and 10,000 test images without labels. Some images
are grey. Labels are numbered by the sorted WordNet ids of wnids.txt."""

_CITATION = """Y. Le and X. Yang, "Tiny ImageNet visual recognition challenge",
Stanford CS 231N, 2015."""


class TinyImagenet(tfds.core.GeneratorBasedBuilder):
  """JPEG bytes as they are in the official zip; needs no TensorFlow.

  The zip is `tiny-imagenet-200.zip` in the folder of the data sets
  (`data_dir`). If it is missing, it is downloaded.
  """

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES: ClassVar = {'1.0.0': 'The official zip.'}

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=_DESCRIPTION,
      citation=_CITATION,
      homepage='http://cs231n.stanford.edu',
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(
            shape=(64, 64, 3), encoding_format='jpeg'
          ),
          'label': tfds.features.ClassLabel(num_classes=200),
        }
      ),
      supervised_keys=('image', 'label'),
    )

  def _split_generators(self, dl_manager):
    path = os.path.join(self._data_dir_root, _FILE)
    if not os.path.exists(path):
      path = os.fspath(dl_manager.download(_URL))
    try:
      with zipfile.ZipFile(path) as archive:
        members = set(archive.namelist())
        wnids = _lines(archive, members, path, 'wnids.txt')
        annotations = _lines(archive, members, path, 'val/val_annotations.txt')
    except zipfile.BadZipFile as error:
      raise ValueError(
        f'{path} cannot be read as a zip ({error}); delete it to download it '
        'again'
      ) from error
    class_of = {wnid: label for label, wnid in enumerate(sorted(wnids))}
    # The columns are file, class and bounding box.
    validation = dict(line.split('\t')[:2] for line in annotations)
    examples = {'train': [], 'validation': [], 'test': []}
    for member in sorted(x for x in members if x.endswith('.JPEG')):
      parts = posixpath.relpath(member, _ROOT).split('/')
      if parts[0] == 'train':
        examples['train'].append((member, class_of.get(parts[1])))
      elif parts[0] == 'val':
        wnid = validation.get(parts[-1])
        examples['validation'].append((member, class_of.get(wnid)))
      elif parts[0] == 'test':
        examples['test'].append((member, -1))
    for split, listed in examples.items():
      if not listed:
        raise ValueError(f'{path} has no images of the split {split}')
    for member, label in (x for listed in examples.values() for x in listed):
      if label is None:
        raise ValueError(
          f'{path}: {member} has no class in wnids.txt; the file is not the '
          'official one'
        )
    return {
      split: self._generate_examples(path, listed)
      for split, listed in examples.items()
    }

  def _generate_examples(self, path, listed) -> Iterator[tuple[str, dict]]:
    with zipfile.ZipFile(path) as archive:
      for member, label in listed:
        try:
          # Encoded, because TFDS needs TensorFlow to encode an array.
          image = io.BytesIO(archive.read(member))
        except zipfile.BadZipFile as error:
          raise ValueError(
            f'{path}: {member} is damaged ({error}); delete the zip to '
            'download it again'
          ) from error
        yield member, {'image': image, 'label': label}


def _lines(archive, members, path, name):
  member = f'{_ROOT}/{name}'
  if member not in members:
    raise ValueError(
      f'{path} lacks {member}; the file is not the official {_FILE}'
    )
  return archive.read(member).decode().splitlines()
