"""Eight virtual CPU devices for every test, and shared data.

If CLOP_TEST_PLATFORM is set to a value of JAX_PLATFORMS, such as `cuda,cpu`,
tests run on that platform with XLA's default options. Tests that need eight
devices are then skipped. See docs/benchmarks/gpu.sh.
"""

import contextlib
import importlib.metadata
import inspect
import os
import re
import types

# Must be set before jax is imported.
os.environ['JAX_PLATFORMS'] = os.environ.get('CLOP_TEST_PLATFORM', 'cpu')
# Commands compile hundreds of small programs in each process.
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
if 'CLOP_TEST_PLATFORM' not in os.environ:
  # Compiling takes longer than running. From JAX 0.11 on, level 0 rounds
  # differently inside loops, and level 1 fails to compile some programs.
  old = importlib.metadata.version('jax').startswith(('0.8.', '0.9.', '0.10.'))
  os.environ['XLA_FLAGS'] = ' '.join(
    [
      os.environ.get('XLA_FLAGS', ''),
      '--xla_force_host_platform_device_count=8',
      f'--xla_backend_optimization_level={0 if old else 2}',
      '--xla_llvm_disable_expensive_passes=true',
    ]
  )

import jax
import pytest

_COMPARE_NETWORKS = {
  'test_fast_paths',
  'test_finetune',
  'test_grad_cache',
  'test_models',
  'test_train_step',
}


# Tests are slow if they start processes, in these modules or by these names.
_SLOW_MODULES = {'test_processes', 'test_study', 'test_wheel', 'test_launch'}
_SLOW_NAMES = re.compile(r'\b(subprocess|forked)\.|\bsmall\.call\b')


def pytest_collection_modifyitems(items):
  slow = [item for item in items if _is_slow(item)]
  for item in slow:
    item.add_marker('slow')
  # First, so that none of them runs alone at the end.
  order = {id(item) for item in slow}
  items.sort(key=lambda item: id(item) not in order)


def _is_slow(item):
  if not isinstance(item, pytest.Function):
    return False
  text = inspect.getsource(item.function)
  for name in {*re.findall(r'\w+', text)}:
    helper = inspect.unwrap(vars(item.module).get(name, None))
    if isinstance(helper, types.FunctionType):
      text += inspect.getsource(helper)
  return item.path.stem in _SLOW_MODULES or bool(_SLOW_NAMES.search(text))


@pytest.fixture(scope='session', autouse=True)
def compilation_cache(tmp_path_factory):
  # Many tests compile the same step.
  folder = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    folder = folder.parent  # one cache for all workers
  folder = str(folder / 'jax_cache')
  jax.config.update('jax_compilation_cache_dir', folder)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = folder  # for subprocesses


@pytest.fixture(autouse=True)
def networks_in_float32(request):
  # GPUs use TF32 by default, which is too coarse to compare networks.
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
  """A small run on digits with checkpoints 5 and 10. Read only."""
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
