"""Eight virtual CPU devices for every test, and data that is made once.

If CLOP_TEST_PLATFORM is set, the tests run on the devices of that platform (a
value of JAX_PLATFORMS, such as `cuda,cpu`), compiled with XLA's defaults. Tests
that need eight devices are skipped where there are fewer. See
docs/benchmarks/gpu.sh.
"""

import contextlib
import functools
import importlib.metadata
import inspect
import os
import types

# Read when jax is imported, so they stand before everything else.
os.environ['JAX_PLATFORMS'] = os.environ.get('CLOP_TEST_PLATFORM', 'cpu')
# Keeps small programs too: commands in processes of their own spend half of
# their time on hundreds of programs of some milliseconds each.
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
if 'CLOP_TEST_PLATFORM' not in os.environ:
  # Most of the time goes into compiling programs that run once, so the machine
  # code is not optimized here.
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

_COMPARE_NETWORKS = {
  'test_fast_paths',
  'test_finetune',
  'test_grad_cache',
  'test_models',
  'test_train_step',
}


# Modules that start processes. A test is slow if it, a fixture of it, or a
# helper that they call, uses one of them.
_PROCESSES = {
  'subprocess',
  'multiprocessing',
  'tests.forked',
  'clop_jax.study.__main__',
  'clop_jax.study.run',
}


def pytest_collection_modifyitems(items):
  slow = [item for item in items if _is_slow(item)]
  for item in slow:
    item.add_marker('slow')
  # First, so that none of them is left to run alone at the end.
  order = {id(item) for item in slow}
  items.sort(key=lambda item: id(item) not in order)


def _is_slow(item):
  if not isinstance(item, pytest.Function):
    return False
  fixtures = item._fixtureinfo.name2fixturedefs.values()
  functions = [item.function, *(x[-1].func for x in fixtures)]
  return any(_starts_processes(inspect.unwrap(x)) for x in functions)


@functools.cache
def _starts_processes(function, depth=8):
  """True if a function of the tests uses one of `_PROCESSES`."""
  names, codes = set(), [function.__code__]
  for code in codes:
    names |= {*code.co_names}
    codes += [x for x in code.co_consts if isinstance(x, types.CodeType)]
  used = [function.__globals__.get(name) for name in names]
  for module in [x for x in used if isinstance(x, types.ModuleType)]:
    if module.__name__ in _PROCESSES:
      return True
    if module.__name__.startswith('tests.'):
      used += [getattr(module, name, None) for name in names]
  return depth > 0 and any(_starts_processes(x, depth - 1) for x in _ours(used))


def _ours(values):
  """Yields the functions and methods among values that the tests define."""
  for value in values:
    value = inspect.unwrap(value) if callable(value) else value
    methods = vars(value).values() if inspect.isclass(value) else [value]
    for function in methods:
      if isinstance(function, types.FunctionType) and str(
        function.__module__
      ).startswith('tests.'):
        yield function


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
def networks_in_float32(request):
  # By default a GPU computes float32 convolutions and dense layers in TF32, and
  # these tests compare networks more closely. The modules of the method ask for
  # float32 where they need it, so their tests run with the default.
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
