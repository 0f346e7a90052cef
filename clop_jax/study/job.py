"""The process of a study's job: it runs cells until none is left.

Several jobs, on one machine or several, share the study's folder. Each claims a
cell by a lock, which ends with the process that holds it, and signs a line in
the locked file, which remains: it counts the attempts.
"""

from collections.abc import Callable
import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from typing import Any

from absl import logging
import jax
import submitit

from clop_jax.runtime import compilation_cache
from clop_jax.runtime import files
from clop_jax.runtime import locks
from clop_jax.runtime import preemption
from clop_jax.study import cell

# A cell that fails is tried again this often by one call of `study`, in total.
ATTEMPTS = 2
# In a lifeline: locked while the command runs; exists when jobs should end.
ALIVE, END = 'alive', 'end'
_CLAIM = '.claim'


def call(
  lifeline: str | None,
  environment: dict[str, str | None],
  function: Callable[..., Any],
  *arguments: Any,
) -> Any:
  """Calls a function in a new process that submitit has started.

  Args:
    lifeline: Folder of the command that started the process, which ends with
      it; see `ALIVE`. None for a process that outlives the command.
    environment: Environment variables to set, or to delete if None.
    function: Function to call.
    *arguments: Its arguments.

  Returns:
    The function's value.
  """
  for name, value in environment.items():
    if value is None:
      os.environ.pop(name, None)
    else:
      os.environ[name] = value
  # Orbax and TFDS log every file they touch.
  logging.set_verbosity(logging.FATAL)
  if lifeline is not None:
    threading.Thread(target=_follow, args=(lifeline,), daemon=True).start()
  return function(*arguments)


def _follow(lifeline):
  """Ends this process when the command has ended, or asks for it."""
  asked = False
  while True:
    try:
      with open(os.path.join(lifeline, ALIVE), 'r+') as file:
        ended = locks.take(file)
    except BlockingIOError:
      ended = False
    except OSError:
      ended = True  # the command has removed it
    if ended:
      os._exit(1)
    if not asked and os.path.exists(os.path.join(lifeline, END)):
      # Not by a signal, which could be the second SIGTERM after a scheduler's
      # and end the process while it saves.
      asked = True
      preemption.ask()
    time.sleep(0.2)


def work(
  cells: dict[str, tuple[dict, str]],
  study: str,
  owner: str,
) -> None:
  """Runs the cells that no other job runs, until none is left.

  Args:
    cells: Config (as JSON has it) and workdir of each cell, by name.
    study: Identifier of the call of `study`. Attempts of other calls do not
      count.
    owner: Identifier of this job.
  """
  # Blocked when the command started this process, for submitit's controller.
  signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
  preemption.listen()
  # Sent by Slurm before the time limit. submitit's own handler would ask for a
  # new time, and not save.
  limit = signal.Signals[f'SIG{submitit.JobEnvironment.USR_SIG}']
  signal.signal(limit, lambda *_: preemption.ask())
  faulthandler.enable()
  compilation_cache.enable()
  # Cells that differ in numbers only are one program, compiled once.
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
  try:
    take_cells(cells, study, owner)
  except preemption.PreemptionError as error:
    print(error, file=sys.stderr)


def take_cells(
  cells: dict[str, tuple[dict, str]], study: str, owner: str
) -> None:
  """Runs the cells that no other process runs; see `work`.

  Raises:
    preemption.PreemptionError: After SIGTERM, when the state has been saved.
  """
  # First each cell once, then those that have failed or lost their process.
  for attempt in range(1, ATTEMPTS + 1):
    for values, workdir in cells.values():
      with _claimed(workdir, study, owner, attempt) as claimed:
        if claimed:
          cell.run(values, workdir, attempt=attempt)


@contextlib.contextmanager
def _claimed(workdir, study, owner, attempt):
  """Claims a cell for its n-th attempt; gives False if it is not available."""
  os.makedirs(workdir, exist_ok=True)
  with open(os.path.join(workdir, _CLAIM), 'a') as file:
    try:
      locks.take(file)
    except BlockingIOError:
      yield False
      return
    if is_through(workdir) or len(owners(workdir, study)) != attempt - 1:
      yield False
      return
    size = os.fstat(file.fileno()).st_size
    file.write(f'{study} {owner}\n')
    file.flush()
    try:
      yield True
    except preemption.PreemptionError:
      # This was no attempt: another job resumes it.
      file.truncate(size)
      raise


def is_through(workdir: str) -> bool:
  """Returns True if a cell needs no further attempt."""
  path = os.path.join(workdir, cell.RECORD)
  try:
    return files.read_json(path, fix='')['status'] in cell.THROUGH
  except (OSError, ValueError, KeyError):
    return False


def owners(workdir: str, study: str) -> list[str]:
  """Returns the job of each attempt at a cell by one call of `study`."""
  try:
    with open(os.path.join(workdir, _CLAIM)) as file:
      lines = [line.split() for line in file]
  except (FileNotFoundError, NotADirectoryError):
    return []
  return [line[1] for line in lines if len(line) == 2 and line[0] == study]


def is_claimed(workdir: str) -> bool:
  """Returns True if a process holds a cell."""
  try:
    with open(os.path.join(workdir, _CLAIM), 'a') as file:
      locks.take(file)
  except BlockingIOError:
    return True
  return False
