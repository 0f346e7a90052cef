import contextlib
import dataclasses
import os

import jax
import numpy as np
from PIL import Image
from pyarrow import parquet
import pytest

import clop_jax
from clop_jax import embed
from clop_jax.data import arrays
from tests import small

ONE = slice(0, 1)


@pytest.fixture(scope='module')
def run(digits_run):
  return clop_jax.load(str(digits_run), devices=jax.devices()[ONE])


@pytest.fixture
def write(run, digits_run, monkeypatch):
  """Calls `embed.embed` on one device, with one compiled network."""
  monkeypatch.setattr(embed.restored, 'load', lambda *_, **__: run)

  def call(out, **arguments):
    return embed.embed(
      embed.Request(
        str(digits_run), str(out), devices=jax.devices()[ONE], **arguments
      )
    )

  return call


def columns_of(path):
  if path.suffix == '.npz':
    with np.load(path) as file:
      return dict(file)
  table = parquet.read_table(path)
  return {x: np.array(table[x].to_pylist()) for x in table.column_names}


def picture(seed, height=8, width=8, channels=1):
  rng = np.random.default_rng(seed)
  pixels = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
  return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def test_test_split_of_the_run_is_the_default(write, run, digits_dir, tmp_path):
  out = tmp_path / 'own.npz'
  # 359 images in batches of 64: the last one is not full.
  assert write(out, batch_size=64) == 359
  assert os.listdir(tmp_path) == ['own.npz']
  images, labels = small.digits_arrays(digits_dir, 'test')
  columns = columns_of(out)
  assert [*columns] == ['name', 'label', 'features', 'embeddings', 'step']
  assert columns['step'] == 10
  assert columns['name'].tolist() == [str(n) for n in range(359)]
  np.testing.assert_array_equal(columns['label'], labels)
  for name, output in zip(embed.WHAT, run.apply(images), strict=True):
    assert columns[name].dtype == np.float32
    np.testing.assert_allclose(columns[name], output, atol=1e-4)


def test_parquet_has_the_columns_of_npz_in_row_groups(
  write, tmp_path, monkeypatch
):
  monkeypatch.setattr(embed, '_ROW_GROUP', 100)
  split = {'split': 'train[:250]', 'batch_size': 50}
  for suffix in ('npz', 'parquet'):
    assert write(tmp_path / f'a.{suffix}', **split) == 250
  file = parquet.ParquetFile(tmp_path / 'a.parquet')
  groups = [file.metadata.row_group(i).num_rows for i in range(3)]
  assert groups == [100, 100, 50]
  assert file.schema_arrow.metadata[b'step'] == b'10'
  assert str(file.read()['features'].type.value_type) == 'float'
  expected = columns_of(tmp_path / 'a.npz')
  del expected['step']
  columns = columns_of(tmp_path / 'a.parquet')
  assert [*columns] == [*expected]
  for name, column in columns.items():
    np.testing.assert_array_equal(column, expected[name])


@pytest.fixture
def photos(tmp_path):
  """Images of several sizes and colours, and files that are no images."""
  root = tmp_path / 'photos'
  (root / 'b' / 'deep').mkdir(parents=True)
  (root / '.hidden').mkdir()
  files = {
    'z.png': picture(0),
    'b/large.png': picture(1, 21, 30),
    'b/deep/colour.png': picture(2, 12, 12, 3),
    'b/ünï.png': picture(3),
  }
  for name, image in files.items():
    image.save(root / name)
  os.rename(os.fsencode(root / 'z.png'), os.fsencode(root) + b'/\xff.png')
  (root / 'notes.txt').write_text('no image')
  picture(4).save(root / '.hidden' / 'x.png')
  return root, {r'\udcff.png': files.pop('z.png'), **files}


@pytest.mark.parametrize('suffix', ['npz', 'parquet'])
def test_folder_of_any_depth(run, digits_run, photos, tmp_path, capsys, suffix):
  root, files = photos
  out = tmp_path / f'out.{suffix}'
  small.command(
    embed, f'--workdir={digits_run}', f'--source={root}', f'--out={out}'
  )
  assert capsys.readouterr().out.startswith(f'{out}: 4 images in ')
  columns = columns_of(out)
  assert {*columns['name']} == {*files}
  assert (columns['label'] == -1).all()
  for name, features in zip(columns['name'], columns['features'], strict=True):
    image = files[name].convert('L')
    if image.size != (8, 8):
      side = min(image.size)
      left, top = (image.width - side) / 2, (image.height - side) / 2
      image = image.resize(
        (8, 8),
        Image.Resampling.BILINEAR,
        box=(left, top, left + side, top + side),
      )
    expected, _ = run.apply(np.asarray(image)[None, ..., None])
    np.testing.assert_allclose(features, expected[0], rtol=1e-3, atol=1e-4)


def test_split_of_a_folder_has_labels(write, tmp_path):
  for split, label, count in (('train', 'a', 2), ('train', 'b', 1)):
    folder = tmp_path / 'set' / split / label
    folder.mkdir(parents=True)
    for number in range(count):
      picture(number).save(folder / f'{number}.png')
  out = tmp_path / 'out.npz'
  write(out, source=str(tmp_path / 'set'), split='train', what=['features'])
  columns = columns_of(out)
  names = ['train/a/0.png', 'train/a/1.png', 'train/b/0.png']
  assert columns['name'].tolist() == names
  assert columns['label'].tolist() == [0, 0, 1]
  assert 'embeddings' not in columns


def test_npz_file_and_source_object(write, tmp_path):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
  labels = np.array([4, -1, 0, 0, 1])
  path = tmp_path / 'images.npz'
  np.savez(path, some_images=images, some_labels=labels)
  write(tmp_path / 'a.npz', source=str(path))
  write(tmp_path / 'b.npz', source=arrays.Arrays(images, labels))
  a, b = (columns_of(tmp_path / f'{x}.npz') for x in 'ab')
  np.testing.assert_array_equal(a['label'], labels)
  for name in a:
    np.testing.assert_array_equal(a[name], b[name])
  np.savez(path, some_images=images, other_images=images)
  with pytest.raises(ValueError, match=r"some.*'test'"):
    write(tmp_path / 'c.npz', source=str(path))


def test_corrupt_images(write, tmp_path, capsys):
  root = tmp_path / 'images'
  root.mkdir()
  for number in range(6):
    picture(number).save(root / f'{number}.png')
  for number in (2, 3, 5):
    path = root / f'{number}.png'
    path.write_bytes(path.read_bytes()[:60])
  arguments = {'source': str(root), 'batch_size': 4}
  with pytest.raises(ValueError, match=r'2\.png cannot .*--skip_corrupt'):
    write(tmp_path / 'a.npz', **arguments)
  assert os.listdir(tmp_path) == ['images']
  assert write(tmp_path / 'a.npz', skip_corrupt=True, **arguments) == 3
  warnings = capsys.readouterr().err.splitlines()
  assert len(warnings) == 3
  assert all(line.endswith('it is left out') for line in warnings)
  for number in (2, 3, 5):
    os.remove(root / f'{number}.png')
  write(tmp_path / 'b.npz', **arguments)
  a, b = (columns_of(tmp_path / f'{x}.npz') for x in 'ab')
  assert a['name'].tolist() == b['name'].tolist() == [f'{x}.png' for x in '014']
  for name in embed.WHAT:
    np.testing.assert_allclose(a[name], b[name], atol=1e-5)


class Endless:
  """Images that are created when they are read, and counted."""

  def __init__(self, count, fail_at=None):
    self.labels = np.full(count, -1)
    self.read, self._fail_at = 0, fail_at

  def __len__(self):
    return len(self.labels)

  def __getitem__(self, index):
    self.read += 1
    if index == self._fail_at:
      raise OSError('the disk is gone')
    return {'image': np.full((8, 8, 1), index % 256, np.uint8), 'label': -1}


def test_few_batches_are_read_ahead(write, tmp_path, monkeypatch):
  source, ahead, written = Endless(4000), [], 0

  @contextlib.contextmanager
  def counting(path, step, capacity):
    def add(columns):
      nonlocal written
      written += len(columns['label'])
      ahead.append(source.read - written)

    (tmp_path / 'a.npz.partial').touch()
    yield add

  monkeypatch.setattr(embed, '_npz', counting)
  write(tmp_path / 'a.npz', source=source, batch_size=100, num_workers=0)
  assert written == 4000
  # 33 that the reader checks, two batches on the devices, some read ahead.
  assert max(ahead) < 1000
  # The devices have a batch while one is written.
  assert min(ahead[:-3]) >= 200


@pytest.mark.parametrize('suffix', ['npz', 'parquet'])
def test_existing_file_is_kept_until_the_new_one_is_complete(
  suffix, write, tmp_path
):
  out = tmp_path / f'a.{suffix}'
  out.write_bytes(b'before')
  with pytest.raises(ValueError, match=r'a\.\w+ already exists.*--overwrite'):
    write(out, source=Endless(3))
  with pytest.raises(OSError, match='the disk is gone'):
    write(out, source=Endless(150, 113), batch_size=50, overwrite=True)
  assert out.read_bytes() == b'before'
  assert os.listdir(tmp_path) == [out.name]
  write(out, source=Endless(3), overwrite=True)
  assert columns_of(out)['name'].tolist() == ['0', '1', '2']


def test_diverged_run(run, tmp_path, monkeypatch, write):
  nan = jax.tree.map(lambda x: x * np.nan, run.variables)
  diverged = dataclasses.replace(run, variables=nan)
  monkeypatch.setattr(embed.restored, 'load', lambda *_, **__: diverged)
  with pytest.raises(FloatingPointError, match='not finite at step 10'):
    write(tmp_path / 'a.npz', source=Endless(3))
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--out='], '--out .*none'),
    (['--out=a.csv'], r'--out .*a\.csv'),
    (['--out=nowhere/a.npz'], '--out=nowhere/a.npz: .*nowhere'),
    (['--what=logits'], "--what .*'logits'"),
    (['--source=empty'], '--source=empty: .*no image'),
    (['--source=notes.txt'], '--source=notes.txt: it is a file'),
    (['--source=no.npz'], '--source=no.npz: .*not exist'),
    (['--source=digist'], "--source=digist: no .*folder.*'digist'"),
    (['--source=folder'], '--source=folder: --data_dir'),
    (['--data_dir=d'], '--data_dir=d needs --source=NAME'),
    (['--split=dev'], "'dev'"),
    (['--checkpoint=7'], 'step 7'),
    (['--batch_size=12'], '8 devices, got 12'),
    (['--workdir=w'], '--workdir=w does not exist'),
  ],
)
def test_wrong_arguments(arguments, message, digits_run, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'empty' / 'notes.txt').touch()
  (tmp_path / 'notes.txt').touch()
  defaults = [f'--workdir={digits_run}', '--out=a.npz']
  with pytest.raises(ValueError, match=message):
    small.command(embed, *defaults, *arguments)
  assert {*os.listdir(tmp_path)} == {'empty', 'notes.txt'}
