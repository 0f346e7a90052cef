"""The process of a job, which runs one cell of a study after another.

Jobs share the study's folder. A job claims a cell by a lock on a file, which
ends with its process, and adds a line to the file for each attempt.
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
from clop_jax.runtime import locks
from clop_jax.runtime import preemption
from clop_jax.study import cell

# Attempts at a cell in one call of `study`.
ATTEMPTS = 2
# Files of a local job's command: locked while it runs; tells jobs to end.
ALIVE, END = 'alive', 'end'
_CLAIM = '.claim'


def call(
  command: str | None,
  environment: dict[str, str | None],
  function: Callable[..., Any],
  *arguments: Any,
) -> Any:
  """Calls a function in a process that submitit has started.

  Args:
    command: Folder with `ALIVE` and `END` of the command, with which the
      process ends. None for a process that outlives the command.
    environment: Environment variables to set, or to delete if None.
    function: Function to call.
    *arguments: Its arguments.
  """
  for name, value in environment.items():
    os.environ.pop(name, None)
    if value is not None:
      os.environ[name] = value
  # Orbax and TFDS log every file they touch.
  logging.set_verbosity(logging.FATAL)
  if command is not None:
    threading.Thread(target=_follow, args=(command,), daemon=True).start()
  return function(*arguments)


def _follow(command):
  """Ends this process with the command, or preempts it if the command asks."""
  asked = False
  while True:
    try:
      with open(os.path.join(command, ALIVE), 'r+') as file:
        locks.take(file)
      os._exit(1)
    except BlockingIOError:
      pass
    except OSError:  # removed by the command
      os._exit(1)
    if not asked and os.path.exists(os.path.join(command, END)):
      # A signal could be the second one, after that of a scheduler, and end the
      # process while it saves.
      asked = True
      preemption.ask()
    time.sleep(0.2)


def work(cells: dict[str, tuple[dict, str]], study: str, owner: str) -> None:
  """Runs the cells that no other job runs, until none is left.

  Args:
    cells: Config (as JSON has it) and workdir of each cell, by name.
    study: Identifier of the call of `study`, whose attempts count.
    owner: Identifier of this job.
  """
  # Blocked while the command started this process.
  signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
  preemption.listen()
  # Sent by Slurm before the time limit. submitit's handler would not save.
  limit = signal.Signals[f'SIG{submitit.JobEnvironment.USR_SIG}']
  signal.signal(limit, lambda *_: preemption.ask())
  faulthandler.enable()
  compilation_cache.enable()
  # Cells that differ only in numbers share a program.
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
    preemption.PreemptionError: After SIGTERM, once the state is saved.
  """
  # Every cell has its first attempt before any has its second.
  for attempt in range(1, ATTEMPTS + 1):
    for values, workdir in cells.values():
      with _claimed(workdir, study, owner, attempt) as claimed:
        if claimed:
          cell.run(values, workdir, attempt=attempt)


@contextlib.contextmanager
def _claimed(workdir, study, owner, attempt):
  """Claims a cell for an attempt; gives False if it is not available."""
  os.makedirs(workdir, exist_ok=True)
  with open(os.path.join(workdir, _CLAIM), 'a') as file:
    try:
      locks.take(file)
    except BlockingIOError:
      yield False
      return
    record = cell.read_record(workdir)
    ended = record is not None and record['status'] in cell.FINAL
    if ended or len(owners(workdir, study)) != attempt - 1:
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
