"""Time from the start of a process to its first training step.

python -m docs.benchmarks.startup [--small]

Prints the seconds of one start as JSON. The suite runs it in new processes,
with an empty compilation cache and with a filled one.
"""

from collections.abc import Iterator
import functools
import json
import os
import subprocess
import sys
import tempfile
import time

from docs.benchmarks import contest


def start(small: bool) -> dict[str, float]:
  """Returns the seconds of imports, trace, compilation and the first step."""
  began = time.perf_counter()
  import jax

  from clop_jax.runtime import compilation_cache
  from docs.benchmarks import steps

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
  """Yields cold against cached: the compilation, and the whole start."""
  del suite
  name = 'the smallest network' if small else 'ResNet-18 at 32 px'
  parts = ['compilation', 'process to first step']
  for part in parts[: 1 if small else 2]:
    program = functools.partial(_program, small, part)
    yield contest.Contest(
      'start',
      f'{name}: {part}',
      {
        'empty cache': functools.partial(program, cached=False),
        'second start': functools.partial(program, cached=True),
      },
      turns=3,
    )


def _program(small, part, *, cached):
  folder = tempfile.TemporaryDirectory(prefix='clop_jax_start_')

  def seconds():
    if cached:
      return start_in_process(small, folder.name, part)
    with tempfile.TemporaryDirectory(prefix='clop_jax_start_') as empty:
      return start_in_process(small, empty, part)

  # The first run fills the folder.
  run = seconds if cached else lambda: None
  return contest.Program(run, close=folder.cleanup, seconds=seconds)


def start_in_process(small: bool, folder: str, part: str) -> float:
  """Returns the seconds of a part of a start with this cache folder."""
  environment = os.environ | {
    'JAX_COMPILATION_CACHE_DIR': folder,
    # Small programs count as well.
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
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
  parts = json.loads(result.stdout.splitlines()[-1])
  return parts.get(part, passed)


if __name__ == '__main__':
  print(json.dumps(start('--small' in sys.argv)))
