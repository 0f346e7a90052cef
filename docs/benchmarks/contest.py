"""Times contestants that do the same work.

The speed of a machine changes from minute to minute. Contestants therefore take
turns (A B A B), and ratios compare the times of one contest.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import resource
import statistics
import time
import traceback
from typing import Any

import jax

# Short calls are repeated for this many seconds.
_SHORTEST = 0.05
# Pause before each turn, because threads of the previous one may still spin.
_PAUSE = 0.5


class LeftOut(Exception):  # noqa: N818 (not an error)
  """The reason why a contestant does not run on this machine."""


@dataclasses.dataclass(frozen=True)
class Program:
  """A contestant that is ready to run.

  Attributes:
    run: Does the work once and waits for its end.
    temporaries: Bytes of temporary memory, if known without running.
    result: Returns the result, which must agree with the other contestants.
    close: Releases resources.
    seconds: Returns the time of the work, if it is not the time of `run`.
  """

  run: Callable[[], Any]
  temporaries: int | None = None
  result: Callable[[], Any] | None = None
  close: Callable[[], None] = lambda: None
  seconds: Callable[[], float] | None = None


@dataclasses.dataclass(frozen=True)
class Contest:
  """The same work for several contestants.

  Attributes:
    section: Section of the table.
    case: Description of the work and its size.
    contestants: Factories by name; the first one is the baseline. A factory may
      raise `LeftOut`.
    images: Images of a call, for images/s.
    flop: Operations of a call, for TFLOP/s.
    dtype: Dtype of the peak that `flop` is compared with.
    turns: Timed turns of each contestant. With several turns, there is also a
      warmup that does not count.
    check: Raises AssertionError if the results differ, which ends the contest.
  """

  section: str
  case: str
  contestants: dict[str, Callable[[], Program]]
  images: float | None = None
  flop: float | None = None
  dtype: str = 'float32'
  turns: int = 7
  check: Callable[[dict[str, Any]], None] | None = None


def hold(contest: Contest) -> Iterator[dict]:
  """Runs a contest and yields one row for each contestant.

  Yields:
    `section`, `case`, `contestant` and either `left_out` (the reason) or the
    median, smallest and largest `seconds` of a call, `turns`, `temporaries`
    (bytes), `images_per_second`, `tflops`, and `ratio`: the median divided by
    that of the first contestant.
  """
  left_out = {}
  with contextlib.ExitStack() as stack:
    programs = _ready(contest, left_out, stack)
    _compare(contest, programs, left_out)
    seconds = {name: [] for name in programs}
    for _ in range(contest.turns):
      for name, (program, _) in programs.items():
        if name not in left_out:
          with _excused(left_out, name):
            time.sleep(_PAUSE if contest.turns > 1 else 0)
            seconds[name].append(_seconds(program))
  first = next(iter(contest.contestants))
  base = statistics.median(seconds[first]) if seconds.get(first) else None
  for name in contest.contestants:
    row = {'section': contest.section, 'case': contest.case, 'contestant': name}
    if name in left_out:
      yield row | {'left_out': left_out[name]}
      continue
    median = statistics.median(seconds[name])
    row |= {
      'seconds': median,
      'smallest': min(seconds[name]),
      'largest': max(seconds[name]),
      'turns': contest.turns,
      'temporaries': programs[name][1],
    }
    if base is not None:
      row['ratio'] = median / base
    if contest.images:
      row['images_per_second'] = contest.images / median
    if contest.flop:
      row |= {'tflops': contest.flop / median / 1e12, 'dtype': contest.dtype}
    yield row


def _ready(contest, left_out, stack):
  """Makes the contestants and runs each once: `(program, memory)` by name."""
  programs = {}
  for name, make in contest.contestants.items():
    with _excused(left_out, name):
      program = make()
      stack.callback(program.close)
      memory = program.temporaries
      if memory is None and jax.default_backend() == 'cpu':
        memory = _resident_growth(program.run)
      elif contest.turns > 1:
        program.run()
      programs[name] = (program, memory)
  return programs


def _compare(contest, programs, left_out):
  if contest.check is None:
    return
  results = {
    name: program.result()
    for name, (program, _) in programs.items()
    if program.result is not None
  }
  try:
    contest.check(results)
  except AssertionError as error:
    text = ' '.join(str(error).split())
    left_out |= dict.fromkeys(programs, f'results differ: {text[:200]}')


@contextlib.contextmanager
def _excused(left_out, name):
  """Makes a contestant that cannot run a row of the table."""
  try:
    yield
  except LeftOut as reason:
    left_out[name] = str(reason)
  except Exception as error:  # of any library, most often out of memory
    traceback.print_exc()
    text = ' '.join(f'{type(error).__name__}: {error}'.split())
    left_out[name] = f'failed: {text[:200]}'


def _seconds(program):
  if program.seconds is not None:
    return program.seconds()
  calls, passed = 0, 0.0
  began = time.perf_counter()
  while passed < _SHORTEST:
    program.run()
    calls += 1
    passed = time.perf_counter() - began
  return passed / calls


def _resident_growth(run):
  """Returns the bytes by which the peak memory of this process grew."""
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # The first run: an allocator that keeps freed memory grows no more later.
  run()
  return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def compiled(function, *arguments) -> Program:
  """Returns a jitted JAX function of these arguments as a contestant."""
  program = jax.jit(function).lower(*arguments).compile()
  return Program(
    run=lambda: jax.block_until_ready(program(*arguments)),
    temporaries=program.memory_analysis().temp_size_in_bytes,
    result=lambda: jax.device_get(program(*arguments)),
  )
