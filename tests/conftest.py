"""Eight virtual CPU devices for every test, and data that is made once."""

import os

# Read when jax is imported, so it stands before everything else.
os.environ['JAX_PLATFORMS'] = 'cpu'
# Most of the time goes into compiling programs that run once, so the machine
# code is not optimized here; the tests that call the commands in a process of
# their own run with XLA's defaults.
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true',
  ]
)

import jax
import pytest


@pytest.fixture(scope='session', autouse=True)
def compilation_cache(tmp_path_factory):
  # Many tests compile the same step; a fresh cache each session stays honest.
  folder = str(tmp_path_factory.mktemp('jax_cache'))
  jax.config.update('jax_compilation_cache_dir', folder)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = folder  # for subprocesses


@pytest.fixture(scope='session')
def digits_dir(tmp_path_factory):
  return str(tmp_path_factory.mktemp('tensorflow_datasets'))
