"""From the start of a process to its first training step, cold and cached.

python -m tests.benchmarks.startup [--small]

prints one start's seconds as JSON; the suite calls it in processes of their
own, with an empty cache folder and then again with the same.
"""

from collections.abc import Iterator
import functools
import json
import os
import subprocess
import sys
import tempfile
import time

from tests.benchmarks import contest


def start(small: bool) -> dict[str, float]:
  """Seconds of imports, trace and compilation, and the first step."""
  began = time.perf_counter()
  import jax

  from clop_jax.runtime import compilation_cache
  from tests.benchmarks import steps

  compilation_cache.enable()
  network, batch = (steps.SMALL, 8) if small else (steps.RESNET18_32, 64)
  create_state, step = steps.our_step(
    network, steps.default_dtype(), axis_name=None
  )
  imported = time.perf_counter()
  state = jax.jit(create_state)()
  arguments = (
    state,
    steps.constant_batch(network, batch, True),
    jax.random.key(0),
  )
  lowered = jax.jit(step, donate_argnums=0).lower(*arguments)
  traced = time.perf_counter()
  compiled = lowered.compile()
  ready = time.perf_counter()
  jax.block_until_ready(compiled(*arguments))
  return {
    'imports': imported - began,
    'state and trace': traced - imported,
    'compilation': ready - traced,
    'first step': time.perf_counter() - ready,
  }


def contests(suite: str, small: bool) -> Iterator[contest.Contest]:
  """Cold against cached: the compilation alone, and the whole start."""
  del suite
  name = 'the smallest network' if small else 'ResNet-18 at 32 px'
  parts = {'compilation': 'compilation', 'all': 'process to first step'}
  for part in list(parts)[: 1 if small else 2]:
    yield contest.Contest(
      'start',
      f'{name}: {parts[part]}',
      {
        'empty cache': functools.partial(_program, small, part, cached=False),
        'second start': functools.partial(_program, small, part, cached=True),
      },
      turns=3,
    )


def _program(small, part, *, cached):
  folder = tempfile.TemporaryDirectory(prefix='clop_jax_start_')

  def seconds():
    if cached:
      return _start_in_process(small, folder.name, part)
    with tempfile.TemporaryDirectory(prefix='clop_jax_start_') as empty:
      return _start_in_process(small, empty, part)

  # The first run fills the folder; without one there is nothing to fill.
  run = seconds if cached else lambda: None
  return contest.Program(run, close=folder.cleanup, seconds=seconds)


def _start_in_process(small, folder, part):
  environment = os.environ | {
    'JAX_COMPILATION_CACHE_DIR': folder,
    # The second largest program counts as well.
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
  }
  began = time.perf_counter()
  result = subprocess.run(
    [sys.executable, '-m', __name__, *(['--small'] if small else [])],
    env=environment,
    capture_output=True,
    text=True,
    check=True,
  )
  passed = time.perf_counter() - began
  if part == 'all':
    return passed
  return json.loads(result.stdout.splitlines()[-1])[part]


if __name__ == '__main__':
  print(json.dumps(start('--small' in sys.argv)))
