"""Eight virtual CPU devices for every test, and data that is made once.

With CLOP_TEST_PLATFORM set the tests run on the devices of that platform (a
value of JAX_PLATFORMS, as `cuda,cpu`) instead, compiled as XLA does by itself;
those that need eight devices are skipped where there are fewer. See
tests/benchmarks/gpu.sh.
"""

import contextlib
import importlib.metadata
import os

# Read when jax is imported, so they stand before everything else.
os.environ['JAX_PLATFORMS'] = os.environ.get('CLOP_TEST_PLATFORM', 'cpu')
# What is compiled at all is kept: the commands in processes of their own spend
# half of their time on hundreds of programs of some milliseconds each.
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
if 'CLOP_TEST_PLATFORM' not in os.environ:
  # Most of the time goes into compiling programs that run once, so the machine
  # code is not optimized here; the tests that call the commands in a process of
  # their own run with XLA's defaults.
  os.environ['XLA_FLAGS'] = ' '.join(
    [
      os.environ.get('XLA_FLAGS', ''),
      '--xla_force_host_platform_device_count=8',
      # From JAX 0.11 on, code without any optimization rounds otherwise in a
      # loop than outside, enough to turn the gradient of a ReLU where its input
      # is 0; with little of it, LLVM cannot make all programs.
      '--xla_backend_optimization_level='
      + str(
        0
        if importlib.metadata.version('jax').startswith(
          ('0.8.', '0.9.', '0.10.')
        )
        else 2
      ),
      '--xla_llvm_disable_expensive_passes=true',
    ]
  )

import jax
import pytest

from clop_jax.data import reader

_COMPARE_NETWORKS = {
  'test_fast_paths',
  'test_finetune',
  'test_grad_cache',
  'test_models',
  'test_train_step',
}


@pytest.fixture(scope='session', autouse=True)
def compilation_cache(tmp_path_factory):
  # Many tests compile the same step; a fresh cache each session stays honest.
  folder = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    folder = folder.parent  # one cache for all of pytest-xdist's processes
  folder = str(folder / 'jax_cache')
  jax.config.update('jax_compilation_cache_dir', folder)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = folder  # for subprocesses


@pytest.fixture(autouse=True)
def nothing_was_reported(monkeypatch):
  # What a process warns of once, each test hears once.
  monkeypatch.setattr(reader, '_reported', set())


@pytest.fixture(autouse=True)
def networks_in_float32(request):
  # By default a GPU cuts the float32 of convolutions and dense layers to TF32,
  # and these tests compare networks more closely. The method's own modules ask
  # for float32 where they need it; their tests run with the default.
  platform = 'CLOP_TEST_PLATFORM' in os.environ
  with contextlib.ExitStack() as stack:
    if platform and request.path.stem in _COMPARE_NETWORKS:
      stack.enter_context(jax.default_matmul_precision('highest'))
    yield


@pytest.fixture(scope='session')
def digits_dir(tmp_path_factory):
  return str(tmp_path_factory.mktemp('tensorflow_datasets'))


@pytest.fixture(scope='session')
def digits_run(digits_dir, tmp_path_factory):
  """A small run on digits with the checkpoints 5 and 10; read it only."""
  # Here, so that JAX is imported with the settings above.
  from clop_jax import train
  from tests import small

  workdir = tmp_path_factory.mktemp('runs') / 'digits'
  config = small.digits_config(
    digits_dir,
    eval__finetune_learning_rates=[0.1, 0.5],
    eval__finetune_batch_size=64,
    eval__finetune_epochs=2,
    eval__finetune_min_steps=30,
  )
  train.train(config, str(workdir), devices=jax.devices()[:1])
  return workdir
