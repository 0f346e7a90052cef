import os
import pathlib
import pickle

import numpy as np
from PIL import Image
import pytest

from clop_jax.data import arrays
from clop_jax.data import folder
from clop_jax.data import sources
from clop_jax.data import synthetic


def write(path, value=0, size=(5, 4), mode='RGB'):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new(mode, size, value).save(path)


@pytest.fixture
def tree(tmp_path):
  """A folder of two classes, unlabelled images and other files."""
  for name, value in (('b/2.png', (2, 0, 0)), ('b/10.tiff', (3, 0, 0))):
    write(tmp_path / 'train' / name, value)
  write(tmp_path / 'train' / 'a' / 'x.bmp', (1, 0, 0))
  write(tmp_path / 'train' / 'free.PNG', (9, 0, 0))
  write(tmp_path / 'test' / 'b' / 'y.png', (7, 0, 0))
  (tmp_path / 'train' / 'b' / 'notes.txt').write_text('no image')
  (tmp_path / 'train' / 'a' / '.hidden.png').write_text('no image')
  return tmp_path


def test_folder_lists_classes_by_name_and_unlabelled_images(tree):
  source = sources.load('folder', 'train', str(tree))
  names = [os.path.relpath(path, tree / 'train') for path in source.paths]
  assert names == ['free.PNG', 'a/x.bmp', 'b/10.tiff', 'b/2.png']
  np.testing.assert_array_equal(source.labels, [-1, 0, 1, 1])
  assert source.class_names == ['a', 'b']
  assert source.num_classes == 2
  red = [source[i]['image'].getpixel((0, 0))[0] for i in range(4)]
  assert red == [9, 1, 3, 2]
  assert [source[i]['label'] for i in range(4)] == [-1, 0, 1, 1]
  assert source.name_of(1).endswith('train/a/x.bmp')
  # A split that lacks a class has the same labels as training.
  test = sources.load('folder', 'test', str(tree))
  np.testing.assert_array_equal(test.labels, [1])
  assert test.num_classes == 2


def test_folder_skips_documents(tree):
  # Pillow registers all of these.
  for suffix in ('pdf', 'palm', 'h5', 'hdf', 'mpg', 'eps', 'ps', 'wmf', 'grib'):
    (tree / 'train' / 'a' / f'paper.{suffix}').write_bytes(b'no picture')
  for suffix in ('jpg', 'webp', 'ppm', 'mpo', 'jp2'):
    write(tree / 'train' / 'a' / f'x.{suffix}')
  source = folder.Folder('train', str(tree))
  names = [os.path.basename(source.paths[i]) for i in range(len(source))]
  expected = ['x.bmp', 'x.jp2', 'x.jpg', 'x.mpo', 'x.ppm', 'x.webp']
  assert [name for name in names if name[0] in 'px'] == expected
  for index in range(len(source)):
    source[index]


def test_folder_reports_what_it_skips_except_hidden_files(tree, capsys):
  train = tree / 'train'
  (train / 'b' / 'notes.txt').unlink()
  folder.Folder('train', str(tree))
  assert not capsys.readouterr().err
  (train / '1').write_bytes(b'')
  write(train / 'b' / 'more' / 'deep' / 'z.png')
  write(train / 'b' / 'more' / '.hidden' / 'z.png')
  write(train / 'b' / '.thumbnails' / 'z.png')
  (train / 'a' / 'gone.png').symlink_to(tree / 'nowhere.png')
  (train / 'a' / 'self.png').symlink_to(train / 'a' / 'self.png')
  (train / 'a' / 'kept.png').symlink_to(train / 'a' / 'x.bmp')
  for _ in range(2):  # reported once
    assert len(folder.Folder('train', str(tree))) == 5
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f'note: skipped 4 of the files in {train}')
  assert f'{train / "1"}, ...' in line


@pytest.fixture
def npz(tmp_path):
  path = str(tmp_path / 'set.npz')
  rng = np.random.default_rng(0)
  np.savez(
    path,
    train_images=rng.integers(0, 256, size=(6, 4, 4, 1)).astype(np.uint8),
    train_labels=np.array([0, 1, 2, 3, 0, -1]),
    test_images=rng.integers(0, 256, size=(2, 4, 4)).astype(np.uint8),
    test_labels=np.array([1, 0]),
    free_images=np.zeros((3, 4, 4, 1), np.uint8),
  )
  return path


def test_npz_holds_images_and_labels_of_each_split(npz):
  train = sources.load('npz', 'train', npz)
  with np.load(npz) as file:
    np.testing.assert_array_equal(train[3]['image'], file['train_images'][3])
    np.testing.assert_array_equal(train.labels, file['train_labels'])
  test = sources.load('npz', 'test', npz)
  assert test[0]['image'].shape == (4, 4, 1)
  assert test[0]['label'] == 1
  assert train.num_classes == test.num_classes == 4
  free = sources.load('npz', 'free', npz)
  np.testing.assert_array_equal(free.labels, [-1, -1, -1])


def cut_short(path):
  path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
  ('name', 'split', 'change', 'message'),
  [
    ('folder', 'val', None, r"split.*\['test', 'train'\].*'val'"),
    ('folder', 'train', lambda t: (t / 'train/c').mkdir(), 'train/c'),
    (
      'folder',
      'train',
      lambda t: write(t / 'train/c/images/1.png'),
      r'train/c .*c/images/1\.png',
    ),
    (
      'folder',
      'test',
      lambda t: write(t / 'test/zebra/1.png'),
      'test .*train .*zebra',
    ),
    ('folder', 'extra', lambda t: (t / 'extra').mkdir(), 'extra has no image'),
    (
      'folder',
      'train',
      lambda t: t.rename(f'{t}.gone'),
      'data_dir.*train/.*set',
    ),
    ('npz', 'val', None, r"split.*\['train', 'test', 'free'\].*'val'"),
    ('npz', 'train', lambda p: p.unlink(), r'data_dir=.*set\.npz: no such'),
    ('npz', 'train', lambda p: p.write_bytes(b''), r'set\.npz cannot be read'),
    ('npz', 'train', lambda p: p.write_bytes(b'x'), r'set\.npz cannot be read'),
    ('npz', 'train', cut_short, r'set\.npz cannot be read'),
    (
      'npz',
      'train',
      lambda p: np.savez(p, train_images=np.zeros((2, 3, 3))),
      r"set\.npz.*'train'.*uint8.*float64",
    ),
  ],
)
def test_wrong_folder_or_npz_file_is_named(
  name, split, change, message, tree, npz
):
  path = {'folder': tree / 'set', 'npz': pathlib.Path(npz)}[name]
  if name == 'folder':
    path.mkdir()
    for part in ('train', 'test'):
      (tree / part).rename(path / part)
  if change is not None:
    change(path)
  with pytest.raises(ValueError, match=message):
    sources.load(name, split, str(path))


@pytest.mark.parametrize('name', ['folder', 'npz'])
def test_missing_data_dir_is_named(name):
  with pytest.raises(ValueError, match=r'data_dir.*None'):
    sources.load(name, 'train')


@pytest.mark.parametrize('dtype', [np.uint8, np.uint64, np.int64])
def test_labels_may_be_any_integers(dtype):
  made = arrays.Arrays(IMAGES, np.array([2, 0, 1], dtype))
  np.testing.assert_array_equal(made.labels, [2, 0, 1])
  assert made.labels.dtype == np.int32 and made.num_classes == 3


IMAGES = np.zeros((3, 2, 2), np.uint8)


@pytest.mark.parametrize(
  ('images', 'labels', 'message'),
  [
    (np.zeros((2, 3, 3, 1)), None, 'images.*float64'),
    (np.zeros((2, 3), np.uint8), None, r'images.*\(2, 3\)'),
    (IMAGES, np.zeros(2, int), r'labels.*\[3\].*\(2,\)'),
    (IMAGES, np.zeros(3), 'labels.*float64'),
    (IMAGES, np.array([0, 2**32 + 1, 0]), 'labels.*4294967297 at index 1'),
  ],
)
def test_wrong_arrays_are_named(images, labels, message):
  with pytest.raises(ValueError, match=message):
    arrays.Arrays(images, labels)


def test_synthetic_classes_have_orthogonal_subspaces():
  source = sources.load('synthetic', 'train', noise=0.0, num_examples=300)
  bases = source.bases
  assert bases.shape == (10, 64, 2)
  flat = bases.transpose(0, 2, 1).reshape(20, 64)
  np.testing.assert_allclose(flat @ flat.T, np.eye(20), atol=1e-12)
  np.testing.assert_array_equal(np.bincount(source.labels), [30] * 10)
  for index in range(50):
    example = source[index]
    assert example['image'].shape == (8, 8, 1)
    assert example['image'].dtype == np.uint8
    signal = example['image'].reshape(-1) / 255 - 0.5
    energy = np.sum((signal @ bases) ** 2, axis=-1) / np.sum(signal**2)
    assert np.argmax(energy) == example['label']
    assert energy.max() > 0.99  # rounding to 256 levels is the rest
  # Another split shares the subspaces, but no image.
  test = sources.load('synthetic', 'test', noise=0.0, num_examples=300)
  np.testing.assert_array_equal(test.bases, bases)
  assert len(test) == 60
  train_images = {source[i]['image'].tobytes() for i in range(len(source))}
  assert not train_images & {test[i]['image'].tobytes() for i in range(60)}


def test_synthetic_noise_has_its_standard_deviation():
  source = synthetic.Synthetic('train', noise=0.5, num_examples=500)
  deviations = []
  for index in range(500):
    signal = (source[index]['image'].reshape(-1) / 255 - 0.5) / 0.15
    basis = source.bases[source.labels[index]]
    rest = signal - basis @ (basis.T @ signal)
    deviations.append(np.sum(rest**2) / (64 - 2))
  assert np.sqrt(np.mean(deviations)) == pytest.approx(0.5, rel=0.02)


def test_synthetic_depends_on_its_seed():
  one, same, other = (
    synthetic.Synthetic('train', seed=seed, num_examples=20)
    for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(one[5]['image'], same[5]['image'])
  assert (one[5]['image'] != other[5]['image']).any()


@pytest.mark.parametrize(
  ('split', 'options', 'message'),
  [
    ('val', {}, r"split.*\['train', 'test'\].*'val'"),
    ('train', {'size': 4}, '10 orthogonal subspaces of 2 .* = 16 pixels'),
    ('train', {'num_classes': 0}, r'options\.num_classes.*0'),
    ('train', {'num_examples': 2.5}, r'options\.num_examples.*2\.5'),
    ('train', {'size': None}, r'options\.size.*None'),
    ('train', {'subspace_dim': -1}, r'options\.subspace_dim.*-1'),
    ('train', {'seed': -1}, r'options\.seed.*-1'),
    ('train', {'noise': '1'}, r'options\.noise.*1'),
    ('train', {'noise': np.nan}, r'options\.noise.*nan'),
    ('train', {'sise': 4}, r"data\.options.*'synthetic'.*'sise'"),
  ],
)
def test_wrong_options_of_synthetic_are_named(split, options, message):
  with pytest.raises(ValueError, match=message):
    sources.load('synthetic', split, **options)


def examples(count, first=0):
  return [
    {'image': np.full((2, 3, 1), first + i, np.uint8), 'label': i % 3}
    for i in range(count)
  ]


class Named(list):
  def name_of(self, index):
    return f'file {index}'


def test_labels_are_read_from_the_examples_if_necessary():
  np.testing.assert_array_equal(sources.labels_of(examples(4)), [0, 1, 2, 0])
  assert sources.labels_of(examples(4)).dtype == np.int32


@pytest.mark.parametrize('label', [0.5, '1', None, [0], 2**31 + 7])
def test_wrong_labels_of_examples_are_named(label):
  source = examples(2)
  for example in source:
    example['label'] = label
  message = f'labels.*{label}' if label == 2**31 + 7 else 'one integer label'
  with pytest.raises(ValueError, match=message):
    sources.labels_of(source)


def test_union_joins_labelled_and_unlabelled_sources():
  labelled, free = examples(3), Named(examples(2, first=10))
  union = sources.Union([labelled, sources.Unlabelled(free)])
  assert len(union) == 5
  np.testing.assert_array_equal(union.labels, [0, 1, 2, -1, -1])
  values = [int(union[i]['image'][0, 0, 0]) for i in range(5)]
  assert values == [0, 1, 2, 10, 11]
  assert [union[i]['label'] for i in range(5)] == [0, 1, 2, -1, -1]
  assert sources.name_of(union, 4) == 'file 1'
  assert sources.name_of(union, 1) == 'image 1'
  with pytest.raises(IndexError):
    union[5]
  again = pickle.loads(pickle.dumps(union))
  assert again[3]['label'] == -1
  with pytest.raises(ValueError, match='at least one source'):
    sources.Union([])


def test_subset_selects_examples():
  subset = sources.Subset(Named(examples(6)), np.array([4, 1]))
  assert len(subset) == 2
  np.testing.assert_array_equal(subset.labels, [1, 1])
  assert subset[0]['image'][0, 0, 0] == 4
  assert subset.name_of(0) == 'file 4'
