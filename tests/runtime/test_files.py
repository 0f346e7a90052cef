"""Checks and writes of files, and the home folder in paths."""

import os
import sys

from absl import flags
import pytest

from clop_jax import cli
from clop_jax import embed
from clop_jax import evaluate
from clop_jax import export
from clop_jax import prepare
from clop_jax import preview
from clop_jax import train
from clop_jax.runtime import files
from clop_jax.study import __main__ as study
from clop_jax.study import grid
from tests import small


def tree(folder):
  return {p: p.is_file() and p.read_bytes() for p in folder.rglob('*')}


@pytest.mark.parametrize('name', ['new.json', 'there.json', 'a/b/new.json'])
def test_the_check_of_a_writable_path_leaves_no_trace(name, tmp_path):
  (tmp_path / 'there.json').write_text('old')
  before = tree(tmp_path)
  files.check_writable(tmp_path / name, '--out=x')
  assert tree(tmp_path) == before


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('folder', 'it is a folder'),
    ('there.json/new.json', 'Not a directory'),
    ('loop/new.json', 'Too many levels'),
    ('/proc/new.json', 'No such file|denied'),
    ('/dev/full/new.json', 'Not a directory'),
  ],
)
def test_a_path_that_cannot_be_written_is_named(name, message, tmp_path):
  (tmp_path / 'there.json').write_text('old')
  (tmp_path / 'folder').mkdir()
  (tmp_path / 'loop').symlink_to('loop')
  before = tree(tmp_path)
  with pytest.raises(OSError, match=rf'--out=x: .*{name}.*({message})'):
    files.check_writable(tmp_path / name, '--out=x')
  assert tree(tmp_path) == before


def test_a_failed_write_leaves_nothing(tmp_path):
  (tmp_path / 'folder').mkdir()
  with pytest.raises(OSError):
    files.write_whole(tmp_path / 'folder', b'data')
  assert os.listdir(tmp_path) == ['folder']


def test_a_file_that_cannot_be_seen_is_not_missing(tmp_path):
  (tmp_path / 'loop').symlink_to('loop')
  assert not files.exists(tmp_path / 'no' / 'where')
  assert files.is_folder(tmp_path) and not files.is_folder(tmp_path / 'no')
  for look in (files.exists, files.is_folder):
    with pytest.raises(OSError, match='Too many levels'):
      look(tmp_path / 'loop')


# Every flag that is a path.
PATHS = [
  (train, 'workdir'),
  (evaluate, 'workdir'),
  (evaluate, 'out'),
  (evaluate, 'figure'),
  (evaluate, 'table'),
  (evaluate, 'data_dir'),
  (embed, 'workdir'),
  (embed, 'source'),
  (embed, 'data_dir'),
  (embed, 'out'),
  (export, 'workdir'),
  (export, 'out'),
  (study, 'workdir'),
  (prepare, 'data_dir'),
  (preview, 'out'),
]


@pytest.mark.parametrize(
  ('module', 'name'), PATHS, ids=[f'{m.__name__} {n}' for m, n in PATHS]
)
def test_the_home_folder_is_expanded_in_every_flag(
  module, name, monkeypatch, tmp_path
):
  monkeypatch.setenv('HOME', str(tmp_path))
  seen = []
  monkeypatch.setattr(
    module, 'main', lambda: seen.append(flags.FLAGS[name].value)
  )
  small.command(module, f'--{name}=~/x')
  assert seen in ([f'{tmp_path}/x'], [[f'{tmp_path}/x']])
  with pytest.raises(flags.Error, match=r'~nobody-here/x'):
    small.command(module, f'--{name}=~nobody-here/x')


@pytest.mark.filterwarnings('ignore:the load_module')  # of ml_collections
def test_the_home_folder_is_expanded_in_the_config(monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'mine.py').write_text(
    'from clop_jax import defaults\nget_config = defaults.get_config\n'
  )
  argv = ['train', '--config=~/mine.py', '--config.data.data_dir=~/x']
  argv.append('--config.model.initial_weights=~/y.safetensors')
  monkeypatch.setattr(sys, 'argv', argv)
  before = {*flags.FLAGS}
  train.define_flags()
  try:
    cli._parse(argv)
    config = flags.FLAGS.config
  finally:
    for name in {*flags.FLAGS} - before:
      delattr(flags.FLAGS, name)
  assert config.data.data_dir == f'{tmp_path}/x'
  assert config.model.initial_weights == f'{tmp_path}/y.safetensors'
  cells = grid.parse(['data.data_dir=~/a,b'], config)
  assert cells == {'data.data_dir': [f'{tmp_path}/a', 'b']}
