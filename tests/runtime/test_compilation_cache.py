"""Folder of the compilation cache, and that commands enable it."""

import os

import jax
import pytest

from clop_jax import export
from clop_jax.runtime import compilation_cache
from tests import small


@pytest.fixture
def config(monkeypatch, tmp_path):
  """Restores JAX's config, and starts without a folder."""
  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  monkeypatch.setenv('HOME', str(tmp_path))
  names = ('jax_compilation_cache_dir', 'jax_enable_compilation_cache')
  before = {name: getattr(jax.config, name) for name in names}
  jax.config.update('jax_compilation_cache_dir', None)
  yield jax.config
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.mark.parametrize(
  ('variable', 'expected'),
  [
    (None, '.cache/clop_jax/compiled'),
    ('not/absolute', '.cache/clop_jax/compiled'),
    ('{tmp}/mine', 'mine/clop_jax/compiled'),
  ],
)
def test_programs_are_cached_in_the_users_folder(
  variable, expected, tmp_path, config, monkeypatch
):
  if variable:
    monkeypatch.setenv('XDG_CACHE_HOME', variable.format(tmp=tmp_path))
  assert compilation_cache.enable() == str(tmp_path / expected)
  assert config.jax_compilation_cache_dir == str(tmp_path / expected)
  assert (tmp_path / expected).is_dir()


def test_a_folder_that_the_user_chose_stays(tmp_path, config):
  config.update('jax_compilation_cache_dir', str(tmp_path / 'own'))
  assert compilation_cache.enable() == str(tmp_path / 'own')


def test_the_cache_can_be_disabled(tmp_path, config):
  config.update('jax_enable_compilation_cache', False)
  assert compilation_cache.enable() is None
  assert not os.listdir(tmp_path)


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path, config, capsys):
  (tmp_path / '.cache').write_text('a file')
  assert compilation_cache.enable() is None
  assert config.jax_compilation_cache_dir is None
  assert 'JAX_COMPILATION_CACHE_DIR' in capsys.readouterr().err


def test_commands_enable_the_cache(tmp_path, config):
  small.refused(export, f'--workdir={tmp_path}/none', f'--out={tmp_path}/x')
  folder = config.jax_compilation_cache_dir
  assert folder == str(tmp_path / '.cache/clop_jax/compiled')
