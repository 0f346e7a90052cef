import contextlib
import dataclasses
import os
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
from pyarrow import parquet
import pytest

import clop_jax
from clop_jax import embed
from clop_jax import evaluate
from clop_jax.data import arrays
from tests import small

ONE = slice(0, 1)


@pytest.fixture
def take(digits_run):
  """Calls `embed.embed` on one device."""

  def call(out, **arguments):
    return embed.embed(
      embed.Request(
        str(digits_run), str(out), devices=jax.devices()[ONE], **arguments
      )
    )

  return call


@pytest.fixture(scope='module')
def run(digits_run):
  return clop_jax.load(str(digits_run), devices=jax.devices()[ONE])


def picture(seed, height=8, width=8, channels=1):
  rng = np.random.default_rng(seed)
  pixels = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
  return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def unit(x):
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_the_runs_own_test_split_is_what_evaluation_measures(
  take, run, digits_run, digits_dir, tmp_path
):
  out = tmp_path / 'own.npz'
  # 359 images in batches of 64: the last one is not full.
  assert take(out, batch_size=64) == 359
  assert os.listdir(tmp_path) == ['own.npz']
  images, labels = small.digits_arrays(digits_dir, 'test')
  with np.load(out) as file:
    assert file.files == ['name', 'label', 'features', 'embeddings', 'step']
    assert file['step'] == 10
    assert file['name'].tolist() == [str(n) for n in range(359)]
    np.testing.assert_array_equal(file['label'], labels)
    features, embeddings = run.apply(images)
    assert file['features'].dtype == file['embeddings'].dtype == np.float32
    np.testing.assert_allclose(file['features'], features, atol=1e-4)
    np.testing.assert_allclose(file['embeddings'], embeddings, atol=1e-4)
    request = evaluate.Request(str(digits_run), devices=jax.devices()[ONE])
    found = evaluate.evaluate(request).arrays
    np.testing.assert_allclose(
      unit(file['embeddings']), found['embeddings'], atol=1e-5
    )


def test_parquet_has_the_same_columns_row_group_by_row_group(
  take, tmp_path, monkeypatch
):
  monkeypatch.setattr(embed, '_ROW_GROUP', 100)
  split = {'split': 'train[:250]', 'batch_size': 50}
  assert take(tmp_path / 'a.npz', **split) == 250
  assert take(tmp_path / 'a.parquet', **split) == 250
  file = parquet.ParquetFile(tmp_path / 'a.parquet')
  groups = [file.metadata.row_group(i).num_rows for i in range(3)]
  assert groups == [100, 100, 50]
  assert file.schema_arrow.metadata[b'step'] == b'10'
  table = file.read()
  with np.load(tmp_path / 'a.npz') as expected:
    assert table.column_names == expected.files[:-1]
    for name in table.column_names:
      column = np.array(table[name].to_pylist())
      np.testing.assert_array_equal(column, expected[name])
    assert str(table['features'].type.value_type) == 'float'


@pytest.fixture
def photos(tmp_path):
  """Images of several sizes, depths and colours, and what is no image."""
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
def test_a_folder_at_any_depth_with_its_names(
  take, run, photos, tmp_path, suffix
):
  root, files = photos
  out = tmp_path / f'out.{suffix}'
  assert take(out, source=str(root), batch_size=3) == 4
  if suffix == 'npz':
    with np.load(out) as file:
      columns = dict(file)
  else:
    table = parquet.read_table(out)
    columns = {x: np.array(table[x].to_pylist()) for x in table.column_names}
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


def test_a_split_of_a_folder_gives_the_labels(take, tmp_path):
  for split, label, count in (('train', 'a', 2), ('train', 'b', 1)):
    folder = tmp_path / 'set' / split / label
    folder.mkdir(parents=True)
    for number in range(count):
      picture(number).save(folder / f'{number}.png')
  out = tmp_path / 'out.npz'
  take(out, source=str(tmp_path / 'set'), split='train', what=['features'])
  with np.load(out) as file:
    names = ['train/a/0.png', 'train/a/1.png', 'train/b/0.png']
    assert file['name'].tolist() == names
    assert file['label'].tolist() == [0, 0, 1]
    assert 'embeddings' not in file.files


def test_a_npz_file_and_examples_of_ones_own(take, tmp_path):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
  labels = np.array([4, -1, 0, 0, 1])
  path = tmp_path / 'images.npz'
  np.savez(path, some_images=images, some_labels=labels)
  take(tmp_path / 'a.npz', source=str(path))
  take(tmp_path / 'b.npz', source=arrays.Arrays(images, labels))
  with np.load(tmp_path / 'a.npz') as a, np.load(tmp_path / 'b.npz') as b:
    np.testing.assert_array_equal(a['label'], labels)
    for name in a.files:
      np.testing.assert_array_equal(a[name], b[name])
  np.savez(path, some_images=images, other_images=images)
  with pytest.raises(ValueError, match=r"must be one of .*some.*got 'test'"):
    take(tmp_path / 'c.npz', source=str(path))


@pytest.fixture
def broken(tmp_path):
  root = tmp_path / 'broken'
  root.mkdir()
  for number in range(6):
    picture(number).save(root / f'{number}.png')
  for number in (2, 3, 5):
    path = root / f'{number}.png'
    path.write_bytes(path.read_bytes()[:60])
  return root


def test_a_corrupt_image_is_named_and_no_file_is_left(take, broken, tmp_path):
  (tmp_path / 'out').mkdir()
  with pytest.raises(ValueError, match=r'2.png cannot .*with --skip_corrupt'):
    take(tmp_path / 'out' / 'a.npz', source=str(broken))
  assert not os.listdir(tmp_path / 'out')


def test_corrupt_images_are_left_out_and_the_others_keep_their_names(
  take, broken, tmp_path, capsys
):
  out = tmp_path / 'a.npz'
  arguments = {'source': str(broken), 'batch_size': 4}
  assert take(out, skip_corrupt=True, **arguments) == 3
  warnings = capsys.readouterr().err.splitlines()
  assert len(warnings) == 3
  assert all(line.endswith('it is left out') for line in warnings)
  for number in (2, 3, 5):
    os.remove(broken / f'{number}.png')
  take(tmp_path / 'b.npz', **arguments)
  with np.load(out) as a, np.load(tmp_path / 'b.npz') as b:
    assert a['name'].tolist() == ['0.png', '1.png', '4.png']
    for name in a.files:
      if name == 'name':
        assert a[name].tolist() == b[name].tolist()
      else:
        np.testing.assert_allclose(a[name], b[name], atol=1e-5)


class Endless:
  """Images that are made when they are asked for, and counted."""

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


def test_only_a_few_batches_are_read_ahead_of_what_is_written(
  take, tmp_path, monkeypatch
):
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
  take(tmp_path / 'a.npz', source=source, batch_size=100, num_workers=0)
  assert written == 4000
  # 33 that the reader looks at first, two batches on the devices, some read.
  assert max(ahead) < 1000
  # The devices do have a batch while one is written.
  assert min(ahead[:-3]) >= 200


def test_a_failure_midway_leaves_the_old_file_and_nothing_else(take, tmp_path):
  for suffix in ('npz', 'parquet'):
    out = tmp_path / f'a.{suffix}'
    out.write_bytes(b'before')
    with pytest.raises(OSError, match='the disk is gone'):
      take(out, source=Endless(500, 333), batch_size=50, overwrite=True)
    assert out.read_bytes() == b'before'
  assert {*os.listdir(tmp_path)} == {'a.npz', 'a.parquet'}


def test_a_file_that_is_there_is_replaced_only_when_asked(take, tmp_path):
  out = tmp_path / 'a.npz'
  out.write_bytes(b'before')
  with pytest.raises(
    ValueError, match=r'a\.npz already exists; .* --overwrite'
  ):
    take(out, source=Endless(3))
  assert out.read_bytes() == b'before'
  take(out, source=Endless(3), overwrite=True)
  with np.load(out) as file:
    assert file['name'].tolist() == ['0', '1', '2']


def test_a_diverged_run_is_said(run, tmp_path, monkeypatch, take):
  nan = jax.tree.map(lambda x: x * np.nan, run.variables)
  diverged = dataclasses.replace(run, variables=nan)
  monkeypatch.setattr(embed.restored, 'load', lambda *_, **__: diverged)
  with pytest.raises(FloatingPointError, match='not finite at step 10'):
    take(tmp_path / 'a.npz', source=Endless(3))
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], '--out must be a file *.npz or *.parquet, got none'),
    (['--out=a.csv'], '--out must be a file *.npz or *.parquet, got a.csv'),
    (['--out=nowhere/a.npz'], '--out=nowhere/a.npz: there is no folder'),
    (['--what=logits'], "--what must be some of features, embeddings; got 'l"),
    (['--source=empty'], '--source=empty: empty has no image that Pillow can'),
    (['--source=notes.txt'], '--source=notes.txt: it is a file, expected a'),
    (['--source=no.npz'], '--source=no.npz: there is no such file'),
    (
      ['--source=digist'],
      '--source=digist: there is no such folder; a name must be folder, npz, ',
    ),
    (['--source=digist'], "or a data set of TFDS, got 'digist'"),
    (['--source=folder'], '--source=folder: --data_dir must be a folder'),
    (['--data_dir=d'], '--data_dir=d goes with --source=NAME'),
    (['--split=dev'], "got 'dev'"),
    (['--checkpoint=7'], 'no checkpoint of step 7'),
    (['--batch_size=12'], 'multiple of the 8 devices, got 12'),
    (['--workdir=w'], '--workdir=w does not exist; train first'),
  ],
)
def test_what_makes_no_sense_is_refused_and_nothing_is_written(
  arguments, message, digits_run, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'empty' / 'notes.txt').touch()
  (tmp_path / 'notes.txt').touch()
  given = [f'--workdir={digits_run}', *arguments]
  if arguments and not any(x.startswith('--out') for x in arguments):
    given.append('--out=a.npz')
  with pytest.raises(ValueError) as caught:
    small.command(embed, *given)
  assert message in str(caught.value)
  assert {*os.listdir(tmp_path)} == {'empty', 'notes.txt'}


def test_the_command_in_a_process_of_its_own(digits_run, photos, tmp_path):
  root, files = photos
  result = subprocess.run(
    [
      sys.executable,
      '-m',
      'clop_jax.embed',
      f'--workdir={digits_run}',
      f'--source={root}',
      '--out=a.npz',
    ],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env=small.environment(1),
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout.startswith('a.npz: 4 images in ')
  with np.load(tmp_path / 'a.npz') as file:
    assert {*file['name']} == {*files}
