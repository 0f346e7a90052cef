"""Contestants that do the same work, timed in turns; the suites' only clock.

A machine's speed changes from minute to minute, so no contestant runs twice
before the others have run once (A B A B), and ratios are those of one contest.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import os
import statistics
import threading
import time
import traceback
from typing import Any

import jax

# Shorter calls are repeated until so much time has passed, in seconds.
_SHORTEST = 0.05
# Before each turn: threads of the last contestant's library go on spinning for
# a while, and its worker processes on preparing what comes next.
_PAUSE = 0.5


class LeftOut(Exception):  # noqa: N818 (it is no error)
  """Why a contestant does not run here, as a sentence's end."""


@dataclasses.dataclass(frozen=True)
class Program:
  """A contestant that is ready.

  Attributes:
    run: does the work once and waits for its end.
    temporaries: bytes that it needs beside its arguments and results, if they
      are known without running.
    result: gives what is to agree with the other contestants' (or nothing).
    close: called at the end.
    seconds: runs it and tells how long that took, where that is not the time
      from call to return.
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
    section: of the table.
    case: what is done, and how large.
    contestants: makes each; the first is the one that the others are held
      against. One may raise `LeftOut`.
    images: of a call, for images/s.
    flop: of a call, for TFLOP/s.
    dtype: of the matrix peak that `flop` is held against.
    turns: how often each runs, after one that does not count (but for a single
      turn, of what takes minutes).
    check: of the results; raises AssertionError where they differ, and then
      none of them is timed.
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
  """Runs a contest.

  Yields:
    For each contestant `section`, `case`, `contestant` and either `left_out`
    (why) or the median, smallest and largest `seconds` of a call, `turns`, what
    follows from them (`images_per_second`, `tflops`), `temporaries` (bytes) and
    `ratio`, how often as long as the first contestant's call it took.
  """
  programs, left_out = {}, {}
  with contextlib.ExitStack() as stack:
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
    if contest.check is not None:
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
    row = {
      'section': contest.section,
      'case': contest.case,
      'contestant': name,
    }
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
      row['tflops'] = contest.flop / median / 1e12
      row['dtype'] = contest.dtype
    yield row


@contextlib.contextmanager
def _excused(left_out, name):
  """A contestant that cannot run is a line of the table, not the end."""
  try:
    yield
  except LeftOut as reason:
    left_out[name] = str(reason)
  except Exception as error:  # of any library, out of memory most often
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
  """Bytes by which this process's memory grew, at most, while it ran.

  The first run counts and is not thrown away: an allocator that keeps what it
  once had would show nothing in the second one.
  """
  page = os.sysconf('SC_PAGE_SIZE')

  def resident():
    with open('/proc/self/statm') as file:
      return int(file.read().split()[1]) * page

  before = largest = resident()
  done = threading.Event()

  def watch():
    nonlocal largest
    while not done.wait(0.001):
      largest = max(largest, resident())

  thread = threading.Thread(target=watch)
  thread.start()
  try:
    run()
  finally:
    done.set()
    thread.join()
  return max(largest, resident()) - before


def compiled(function, *arguments) -> Program:
  """The contestant that is a JAX function of these arguments, jitted."""
  program = jax.jit(function).lower(*arguments).compile()
  return Program(
    run=lambda: jax.block_until_ready(program(*arguments)),
    temporaries=program.memory_analysis().temp_size_in_bytes,
    result=lambda: jax.device_get(program(*arguments)),
  )
