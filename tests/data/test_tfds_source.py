import collections
import errno
import functools
import http.server
import importlib.util
import io
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from typing import ClassVar
import zipfile

import numpy as np
from PIL import Image
import pytest
import sklearn.datasets
import tensorflow_datasets as tfds

from clop_jax.data import digits
from clop_jax.data import images as images_lib
from clop_jax.data import sources
from clop_jax.data import tfds_source
from clop_jax.data import tiny_imagenet
from tests import small


def test_splits_can_be_joined_and_cut(digits_dir):
  both = sources.load('digits', 'train+test', digits_dir)
  assert len(both) == len(both.labels) == 1797
  assert len(sources.load('digits', 'test[:10]+train[:5]', digits_dir)) == 15


def test_digits_equal_scikit_learns(digits_dir):
  digits = sklearn.datasets.load_digits()
  expected = np.round(digits.images * 255 / 16).astype(np.uint8)
  remaining = collections.Counter(
    (image.tobytes(), label)
    for image, label in zip(expected, digits.target, strict=True)
  )
  for split, share in (('train', 0.8), ('test', 0.2)):
    source = sources.load('digits', split, digits_dir)
    labels = source.labels
    assert labels.dtype == np.int32
    # Every example is one of scikit-learn's, and none is used twice.
    remaining.subtract(
      (np.asarray(source[i]['image']).tobytes(), labels[i])
      for i in range(len(source))
    )
    np.testing.assert_allclose(
      np.bincount(labels), share * np.bincount(digits.target), atol=0.51
    )
    assert (np.diff(labels) < 0).any()  # not sorted by class
    # The labels are cached beside the data.
    again = sources.load('digits', split, digits_dir)
    assert os.path.exists(again._cache)
    np.testing.assert_array_equal(again.labels, labels)
  assert set(remaining.values()) == {0}


def encoded(pixels, kind):
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, format=kind)
  return file.getvalue()


class Shapes(tfds.core.GeneratorBasedBuilder):
  """JPEG or PNG bytes, with a second image and a damaged one."""

  VERSION = tfds.core.Version('1.0.0')
  BUILDER_CONFIGS: ClassVar = [
    tfds.core.BuilderConfig(name=kind) for kind in ('png', 'jpeg')
  ]

  def _info(self):
    image = tfds.features.Image(
      shape=(None, None, 3), encoding_format=self.builder_config.name
    )
    mask = tfds.features.Image(shape=(None, None, 1), encoding_format='png')
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          'image': image,
          'mask': mask,
          'label': tfds.features.ClassLabel(names=['a', 'b']),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    mask = encoded(np.zeros((2, 2), np.uint8), 'png')
    for index in range(4):
      image = encoded(shape(index), self.builder_config.name)
      yield (
        index,
        {
          'image': io.BytesIO(image[:20] if index == 3 else image),
          'mask': io.BytesIO(mask),
          # -1 is unlabelled, as in the unlabelled split of stl10.
          'label': index - 1 if index < 3 else 0,
        },
      )


def shape(index):
  rng = np.random.default_rng(index)
  return rng.integers(0, 256, size=(5 + index, 6, 3)).astype(np.uint8)


@pytest.mark.parametrize('kind', ['png', 'jpeg'])
def test_images_are_decoded_by_pillow(kind, tmp_path):
  builder = Shapes(
    config=kind, data_dir=str(tmp_path), file_format='array_record'
  )
  builder.download_and_prepare()
  source = tfds_source.TfdsSource(builder, 'train')
  assert source.num_classes == 2
  assert source.class_names == ['a', 'b']
  readable = []
  for index in range(4):
    try:
      readable.append(source[index])
    except images_lib.CorruptImageError as error:
      assert f'shapes/{kind}/1.0.0 train example {index} cannot' in str(error)
  assert len(readable) == 3
  expected = [shape(index) for index in range(3)]
  for example in readable:
    original = expected[example['label'] + 1]
    data = encoded(original, kind)
    with Image.open(io.BytesIO(data)) as image:
      np.testing.assert_array_equal(example['image'], np.asarray(image))
  assert sorted(source.labels) == [-1, 0, 0, 1]
  again = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(again.labels, source.labels)
  part = tfds_source.TfdsSource(builder, 'train[:50%]')
  assert len(part) == 2
  assert part.labels.shape == (2,)


def test_damaged_label_cache_is_read_again(digits_dir):
  source = sources.load('digits', 'test', digits_dir)
  labels = source.labels
  foreign = io.BytesIO()
  np.save(foreign, np.zeros(3, np.int32))
  for content in (foreign.getvalue(), b'no array'):
    with open(source._cache, 'wb') as file:
      file.write(content)
    again = sources.load('digits', 'test', digits_dir)
    np.testing.assert_array_equal(again.labels, labels)


@pytest.mark.parametrize(
  ('name', 'split', 'message'),
  [
    ('cifra10', 'train', "data.name.*'cifra10'.*cifar10"),
    ('cifar10/none', 'train', "data.name.*'cifar10/none'"),
    ('imdb_reviews', 'train', "data.name='imdb_reviews'.*text"),
    ('digits', 'train+val', r"split.*'test'.*'train\+val'"),
  ],
)
def test_wrong_name_or_split_is_named(name, split, message, digits_dir):
  with pytest.raises(ValueError, match=message):
    sources.load(name, split, digits_dir)


@pytest.mark.parametrize(
  ('name', 'num_classes'),
  [
    ('cifar10', 10),
    ('cifar100', 100),
    ('imagenet2012', 1000),
    ('imagenette', 10),
    ('stl10', 10),
    ('svhn_cropped', 10),
    ('food101', 101),
    ('oxford_iiit_pet', 37),
    ('oxford_flowers102', 102),
    ('dtd', 47),
    ('caltech101', 102),
    ('sun397', 397),
  ],
)
def test_data_sets_of_the_paper_exist(name, num_classes, tmp_path):
  builder = tfds_source.builder(name, str(tmp_path))
  assert builder.info.features['label'].num_classes == num_classes
  assert not builder.is_prepared()


@pytest.mark.parametrize(
  ('name', 'messages'),
  [
    ('cifar10', ["pip install 'clop-jax[prepare]'", '--name=cifar10 --data_']),
    ('imagenet2012', ['downloads/manual', 'ILSVRC2012_img', 'TensorFlow']),
  ],
)
def test_requirements_of_preparing_are_named(
  name, messages, tmp_path, monkeypatch
):
  find_spec = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    'find_spec',
    lambda name: None if name == 'tensorflow' else find_spec(name),
  )
  with pytest.raises(ValueError, match=name) as error:
    tfds_source.prepared(name, str(tmp_path))
  for message in messages:
    assert message in str(error.value)


def test_several_processes_prepare_a_set_once(tmp_path):
  code = (
    'import os, sys\n'
    'from clop_jax.data import digits, tfds_source\n'
    'generate = digits.Digits._generate_examples\n'
    'def watched(self, indices):\n'
    '  os.write(1, b"generated ")\n'
    '  return generate(self, indices)\n'
    'digits.Digits._generate_examples = watched\n'
    f'source = tfds_source.load("digits", "train", {str(tmp_path)!r})\n'
    'print(len(source), source[5]["image"].size, "tensorflow" in sys.modules)'
  )
  processes = [
    subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE)
    for _ in range(2)
  ]
  outputs = [p.communicate(timeout=120)[0].decode() for p in processes]
  assert ''.join(outputs).count('1438 (8, 8) False') == 2
  # TFDS asks for the train and the test split's examples.
  assert ''.join(outputs).count('generated') == 2


def test_killed_preparation_does_not_count(tmp_path):
  code = (
    'import os, time\n'
    'from clop_jax.data import digits, tfds_source\n'
    'generate = digits.Digits._generate_examples\n'
    'def slow(self, indices):\n'
    '  for n, example in enumerate(generate(self, indices)):\n'
    '    if n == 20:\n'
    '      os.write(1, b"here\\n")\n'
    '      time.sleep(60)\n'
    '    yield example\n'
    'digits.Digits._generate_examples = slow\n'
    f'tfds_source.load("digits", "train", {str(tmp_path)!r})\n'
  )
  process = subprocess.Popen(
    [sys.executable, '-c', code], stdout=subprocess.PIPE
  )
  assert process.stdout.readline() == b'here\n'
  process.send_signal(signal.SIGKILL)
  process.communicate()
  left = os.listdir(tmp_path / 'digits')
  assert any(name.startswith('incomplete.') for name in left)
  assert not tfds_source.builder('digits', str(tmp_path)).is_prepared()
  began = time.monotonic()
  assert len(tfds_source.load('digits', 'train', str(tmp_path))) == 1438
  assert time.monotonic() - began < 60  # its lock is free
  left = os.listdir(tmp_path / 'digits')
  assert sorted(left) == ['1.0.0', '1.0.0.lock']


def test_full_disk_leaves_no_prepared_set(tmp_path, monkeypatch):
  def full(self, indices):
    del self, indices
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    yield

  with monkeypatch.context() as patch:
    patch.setattr(digits.Digits, '_generate_examples', full)
    with pytest.raises(OSError, match='No space left') as caught:
      tfds_source.load('digits', 'train', str(tmp_path))
  assert caught.value.errno == errno.ENOSPC
  assert len(tfds_source.load('digits', 'train', str(tmp_path))) == 1438


WNIDS = ['n03', 'n01', 'n02']


def pixels(wnid, number):
  value = 60 * WNIDS.index(wnid) + 5 * number
  return np.full((64, 64, 3), value, np.uint8)


def make_zip(path, *, without=(), annotate=True, damage=False):
  """The official layout with three classes; some images are grey."""
  root = 'tiny-imagenet-200'
  members = {f'{root}/wnids.txt': '\n'.join(WNIDS) + '\n'}
  members[f'{root}/words.txt'] = ''.join(f'{w}\tthing\n' for w in WNIDS)
  annotations = []
  for wnid in WNIDS:
    folder = f'{root}/train/{wnid}'
    members[f'{folder}/{wnid}_boxes.txt'] = f'{wnid}_0.JPEG\t0\t0\t9\t9\n'
    for number in range(3):
      image = pixels(wnid, number)
      image = image[..., 0] if number == 2 else image
      name = f'{folder}/images/{wnid}_{number}.JPEG'
      members[name] = encoded(image, 'jpeg')
  for number, wnid in enumerate(['n02', 'n03', 'n01', 'n02']):
    name = f'val_{number}.JPEG'
    members[f'{root}/val/images/{name}'] = encoded(pixels(wnid, 4), 'jpeg')
    annotations.append(f'{name}\t{wnid}\t0\t0\t62\t62\n')
  members[f'{root}/val/val_annotations.txt'] = ''.join(
    annotations if annotate else annotations[1:]
  )
  for number in range(2):
    name = f'{root}/test/images/test_{number}.JPEG'
    members[name] = encoded(pixels('n01', number), 'jpeg')
  with zipfile.ZipFile(path, 'w') as archive:
    for name, content in members.items():
      if name.removeprefix(f'{root}/') not in without:
        archive.writestr(name, content)
  if damage:
    data = path.read_bytes()
    middle = data.index(b'train/n01/images/n01_1.JPEG') + 200
    path.write_bytes(data[:middle] + b'damage' + data[middle + 6 :])


def test_tiny_imagenet_is_prepared_from_the_official_zip(tmp_path):
  make_zip(tmp_path / 'tiny-imagenet-200.zip')
  output = small.call(
    'clop_jax.prepare', '--name=tiny_imagenet', f'--data_dir={tmp_path}'
  ).stdout
  for part in ('200 classes', 'train 9', 'validation 4', 'test 2'):
    assert part in output
  ordered = sorted(WNIDS)
  for split, count in (('train', 9), ('validation', 4), ('test', 2)):
    source = sources.load('tiny_imagenet', split, str(tmp_path))
    assert len(source) == count
    for index in range(count):
      example = source[index]
      assert example['image'].size == (64, 64)
      if split == 'test':
        assert example['label'] == -1
      else:
        # The pixels show the class in the zip.
        level = np.mean(example['image'])
        wnid = WNIDS[int(level + 2) // 60]
        assert ordered[example['label']] == wnid
  train = sources.load('tiny_imagenet', 'train', str(tmp_path))
  np.testing.assert_array_equal(np.bincount(train.labels), [3, 3, 3])
  kinds = [train[index]['image'].mode for index in range(9)]
  assert sorted(kinds) == ['L'] * 3 + ['RGB'] * 6


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'without': ['wnids.txt']}, 'tiny-imagenet-200/wnids.txt'),
    ({'annotate': False}, r'val/images/val_0\.JPEG'),
    ({'damage': True}, r'n01_1\.JPEG.*delete'),
    (None, r'tiny-imagenet-200\.zip.*delete'),
  ],
)
def test_wrong_zip_is_named(options, message, tmp_path):
  path = tmp_path / 'tiny-imagenet-200.zip'
  if options is None:
    path.write_bytes(b'half of a download')
  else:
    make_zip(path, **options)
  with pytest.raises(ValueError, match=message):
    sources.load('tiny_imagenet', 'train', str(tmp_path))
  assert not tfds_source.builder('tiny_imagenet', str(tmp_path)).is_prepared()


def test_missing_zip_is_downloaded(tmp_path, monkeypatch):
  (tmp_path / 'site').mkdir()
  make_zip(tmp_path / 'site' / 'tiny-imagenet-200.zip')
  handler = functools.partial(
    http.server.SimpleHTTPRequestHandler, directory=tmp_path / 'site'
  )
  monkeypatch.setattr(handler.func, 'log_message', lambda *_: None)
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  address = f'http://127.0.0.1:{server.server_port}/tiny-imagenet-200.zip'
  try:
    monkeypatch.setattr(tiny_imagenet, '_URL', address + '.gone')
    with pytest.raises(ValueError, match=r'tiny_imagenet .*run python -m'):
      sources.load('tiny_imagenet', 'train', str(tmp_path / 'data'))
    monkeypatch.setattr(tiny_imagenet, '_URL', address)
    data = sources.load('tiny_imagenet', 'train', str(tmp_path / 'data'))
  finally:
    server.shutdown()
    thread.join()
    server.server_close()
  assert len(data) == 9
