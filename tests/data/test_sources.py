import io
import os
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
  """Two classes, unlabelled images, files that are no images."""
  for name, value in (('b/2.png', (2, 0, 0)), ('b/10.tiff', (3, 0, 0))):
    write(tmp_path / 'train' / name, value)
  write(tmp_path / 'train' / 'a' / 'x.bmp', (1, 0, 0))
  write(tmp_path / 'train' / 'free.PNG', (9, 0, 0))
  write(tmp_path / 'test' / 'b' / 'y.png', (7, 0, 0))
  (tmp_path / 'train' / 'b' / 'notes.txt').write_text('no image')
  (tmp_path / 'train' / 'a' / '.hidden.png').write_text('no image')
  return tmp_path


def test_folder_has_its_classes_by_name_and_the_unlabelled(tree):
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
  # A split without some class still numbers them as training does.
  test = sources.load('folder', 'test', str(tree))
  np.testing.assert_array_equal(test.labels, [1])
  assert test.num_classes == 2


@pytest.mark.parametrize(
  ('break_it', 'split', 'message'),
  [
    (lambda t: None, 'val', r"one of \['test', 'train'\], got 'val'"),
    (
      lambda t: (t / 'train' / 'c').mkdir(),
      'train',
      'train/c is an empty class',
    ),
    (
      lambda t: write(t / 'train' / 'c' / 'images' / '1.png'),
      'train',
      r'c is an empty class: .* \(1 file .*images/1.png\): in folders below a',
    ),
    (
      lambda t: write(t / 'test' / 'zebra' / '1.png'),
      'test',
      r'test has classes that .*train lacks: zebra',
    ),
    (lambda t: (t / 'extra').mkdir(), 'extra', 'extra has no images'),
  ],
)
def test_folder_that_will_not_do_is_named(tree, break_it, split, message):
  break_it(tree)
  with pytest.raises(ValueError, match=message):
    sources.load('folder', split, str(tree))


def test_folder_takes_no_documents_for_pictures(tree):
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


def test_folder_tells_of_what_it_leaves_out_and_not_of_hidden_files(
  tree, capsys
):
  train = tree / 'train'
  (train / 'b' / 'notes.txt').unlink()
  folder.Folder('train', str(tree))
  assert not capsys.readouterr().err
  (train / '1').write_bytes(b'')
  folder.Folder('train', str(tree))
  (line,) = capsys.readouterr().err.splitlines()
  assert line == (
    f'note: 1 file under {train} was left out (first: 1): without the suffix '
    'of a picture: 1'
  )
  write(train / 'b' / 'more' / 'deep' / 'z.png')
  write(train / 'b' / 'more' / '.hidden' / 'z.png')
  write(train / 'b' / '.thumbnails' / 'z.png')
  (train / 'a' / 'gone.png').symlink_to(tree / 'nowhere.png')
  (train / 'a' / 'self.png').symlink_to(train / 'a' / 'self.png')
  (train / 'a' / 'kept.png').symlink_to(train / 'a' / 'x.bmp')
  for _ in range(2):  # told once
    source = folder.Folder('train', str(tree))
    assert len(source) == 5
  (line,) = capsys.readouterr().err.splitlines()
  assert line == (
    f'note: 4 files under {train} were left out (first: 1): broken links or '
    'special files: 2; in folders below a class: 1; without the suffix of a '
    'picture: 1'
  )


@pytest.mark.parametrize(
  ('path', 'message'),
  [('nowhere', 'nowhere: there is no such folder'), (None, 'got None')],
)
def test_folder_that_is_missing_is_named(path, message):
  with pytest.raises(ValueError, match=message):
    folder.Folder('train', path)


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


def test_npz_has_images_and_labels_of_each_split(npz):
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


def test_npz_that_cannot_be_read_is_named(npz, tmp_path):
  with pytest.raises(ValueError, match=r"\['train', 'test', 'free'\].*'val'"):
    sources.load('npz', 'val', npz)
  with pytest.raises(ValueError, match='data_dir must be the path of a npz'):
    sources.load('npz', 'train')
  with pytest.raises(ValueError, match=r'missing\.npz: there is no such file'):
    sources.load('npz', 'train', str(tmp_path / 'missing.npz'))
  broken = tmp_path / 'broken.npz'
  with open(npz, 'rb') as file:
    whole = file.read()
  array = io.BytesIO()
  np.save(array, np.zeros(3))
  contents = (b'', b'no zip', whole[:-40], whole[:300], array.getvalue())
  for content in contents:
    broken.write_bytes(content)
    with pytest.raises(
      ValueError, match=r'broken\.npz cannot be read as a npz'
    ):
      sources.load('npz', 'train', str(broken))


@pytest.mark.parametrize('dtype', [np.uint8, np.int8, np.uint64, np.int64])
def test_integers_of_any_kind_are_labels(dtype, tmp_path):
  labels = np.array([2, 0, 1], dtype)
  made = arrays.Arrays(np.zeros((3, 2, 2), np.uint8), labels)
  np.testing.assert_array_equal(made.labels, [2, 0, 1])
  assert made.labels.dtype == np.int32 and made.num_classes == 3
  np.savez(
    tmp_path / 'set.npz',
    train_images=np.zeros((3, 2, 2), np.uint8),
    train_labels=labels,
  )
  read = sources.load('npz', 'train', str(tmp_path / 'set.npz'))
  np.testing.assert_array_equal(read.labels, [2, 0, 1])


def test_a_label_beyond_32_bits_is_refused_and_not_wrapped_around():
  images = np.zeros((2, 2, 2), np.uint8)
  with pytest.raises(
    ValueError, match='fit 32 bits, got 4294967297 at index 1'
  ):
    arrays.Arrays(images, np.array([0, 2**32 + 1]))
  own = [{'image': images[..., None][0], 'label': 2**31 + 7}]
  with pytest.raises(
    ValueError, match='fit 32 bits, got 2147483655 at index 0'
  ):
    sources.labels_of(own)


def test_what_is_wrong_with_an_array_names_the_file(tmp_path):
  path = tmp_path / 'set.npz'
  np.savez(path, train_images=np.zeros((2, 3, 3)))
  with pytest.raises(ValueError, match=r"set\.npz, split 'train': images must"):
    sources.load('npz', 'train', str(path))


@pytest.mark.parametrize(
  ('images', 'labels', 'message'),
  [
    (np.zeros((2, 3, 3, 1)), None, 'images must be uint8 .*got float64'),
    (np.zeros((2, 3), np.uint8), None, r'got uint8 \(2, 3\)'),
    (
      np.zeros((2, 3, 3), np.uint8),
      np.zeros(3, int),
      r'labels must be integers of shape \[n\]=\[2\], got int64 \(3,\)',
    ),
    (np.zeros((2, 3, 3), np.uint8), np.zeros(2), r'got float64 \(2,\)'),
  ],
)
def test_arrays_of_wrong_shape_are_refused(images, labels, message):
  with pytest.raises(ValueError, match=message):
    arrays.Arrays(images, labels)


def test_synthetic_classes_lie_in_their_own_orthogonal_subspaces():
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
  # Another split shares the subspaces and no image.
  test = sources.load('synthetic', 'test', noise=0.0, num_examples=300)
  np.testing.assert_array_equal(test.bases, bases)
  assert len(test) == 60
  train_images = {source[i]['image'].tobytes() for i in range(len(source))}
  assert not train_images & {test[i]['image'].tobytes() for i in range(60)}


def test_synthetic_noise_is_what_was_asked_for():
  source = synthetic.Synthetic('train', noise=0.5, num_examples=500)
  deviations = []
  for index in range(500):
    signal = (source[index]['image'].reshape(-1) / 255 - 0.5) / 0.15
    basis = source.bases[source.labels[index]]
    rest = signal - basis @ (basis.T @ signal)
    deviations.append(np.sum(rest**2) / (64 - 2))
  assert np.sqrt(np.mean(deviations)) == pytest.approx(0.5, rel=0.02)


def test_synthetic_depends_on_its_seed_alone():
  one, same, other = (
    synthetic.Synthetic('train', seed=seed, num_examples=20)
    for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(one[5]['image'], same[5]['image'])
  assert (one[5]['image'] != other[5]['image']).any()


@pytest.mark.parametrize(
  ('split', 'options', 'message'),
  [
    ('val', {}, r"one of \['train', 'test'\], got 'val'"),
    ('train', {'size': 4}, '10 orthogonal subspaces of 2 .* = 16 pixels'),
    *(
      (
        'train',
        {name: value},
        rf'config.data.options.{name} must be an integer',
      )
      for name in ('num_classes', 'num_examples', 'size', 'subspace_dim')
      for value in (0, -1, 2.5, None)
    ),
    ('train', {'seed': -1}, r'options.seed must be an integer >= 0, got -1'),
    *(
      ('train', {'noise': value}, r'options.noise must be a number >= 0, got')
      for value in (-1, float('nan'), float('inf'), '1')
    ),
    ('train', {'sise': 4}, "config.data.options: 'synthetic' has no such"),
  ],
)
def test_synthetic_that_is_impossible_is_refused(split, options, message):
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


def test_labels_are_read_where_a_source_does_not_tell():
  np.testing.assert_array_equal(sources.labels_of(examples(4)), [0, 1, 2, 0])
  assert sources.labels_of(examples(4)).dtype == np.int32


@pytest.mark.parametrize('label', [0.5, '1', None, [0]])
def test_labels_that_are_no_integers_are_refused(label):
  source = examples(2)
  for example in source:
    example['label'] = label
  message = r'one integer label for each of its 2 examples'
  with pytest.raises(ValueError, match=message):
    sources.labels_of(source)


def test_union_of_labelled_and_unlabelled():
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


def test_subset_has_the_examples_asked_for():
  subset = sources.Subset(Named(examples(6)), np.array([4, 1]))
  assert len(subset) == 2
  np.testing.assert_array_equal(subset.labels, [1, 1])
  assert subset[0]['image'][0, 0, 0] == 4
  assert subset.name_of(0) == 'file 4'
