"""Where compiled programs are kept, and that the commands do keep them."""

import os
import subprocess
import sys
import textwrap

import pytest

# In a process of its own: the cache is one of a process.
SCRIPT = """
from clop_jax.runtime import compilation_cache
print(compilation_cache.enable())
import jax
import jax.numpy as jnp
print(jax.config.jax_compilation_cache_dir)
jax.jit(lambda x: x @ x + 1)(jnp.ones((3, 3)))
"""


def environment(tmp_path, **changes):
  kept = {
    k: v
    for k, v in os.environ.items()
    if k not in ('JAX_COMPILATION_CACHE_DIR', 'XDG_CACHE_HOME')
  }
  return kept | {'HOME': str(tmp_path)} | changes


def run(tmp_path, **changes):
  return subprocess.run(
    [sys.executable, '-c', textwrap.dedent(SCRIPT)],
    env=environment(tmp_path, **changes),
    capture_output=True,
    text=True,
    check=True,
  )


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    ({}, '.cache/clop_jax/compiled'),
    ({'XDG_CACHE_HOME': 'not/absolute'}, '.cache/clop_jax/compiled'),
    ({'XDG_CACHE_HOME': '{tmp}/mine'}, 'mine/clop_jax/compiled'),
    ({'JAX_COMPILATION_CACHE_DIR': '{tmp}/own'}, 'own'),
  ],
)
def test_what_is_compiled_lies_in_the_users_cache_folder(
  tmp_path, changes, expected
):
  changes = {k: v.format(tmp=tmp_path) for k, v in changes.items()}
  folder = str(tmp_path / expected)
  assert run(tmp_path, **changes).stdout.split() == [folder, folder]
  assert any('lambda' in name for name in os.listdir(folder))


def test_it_can_be_switched_off(tmp_path):
  result = run(tmp_path, JAX_ENABLE_COMPILATION_CACHE='false')
  assert result.stdout.split() == ['None', 'None']
  assert not (tmp_path / '.cache').exists()


def test_a_folder_that_cannot_be_made_is_a_warning_and_no_end(tmp_path):
  (tmp_path / '.cache').write_text('a file')
  result = run(tmp_path)
  assert result.stdout.split() == ['None', 'None']
  assert result.stderr.startswith('warning: what is compiled is not kept (')
  assert 'set JAX_COMPILATION_CACHE_DIR' in result.stderr


def test_a_command_keeps_what_it_compiles(tmp_path):
  subprocess.run(
    [
      sys.executable,
      '-m',
      'clop_jax.preview',
      '--config=configs/synthetic.py',
      f'--out={tmp_path / "preview.png"}',
    ],
    env=environment(tmp_path),
    check=True,
    capture_output=True,
  )
  assert os.listdir(tmp_path / '.cache/clop_jax/compiled')
