"""Runs the cells of a study in jobs, on this machine or on Slurm."""

from collections.abc import Iterator, Sequence
import contextlib
import itertools
import os
import shutil
import signal
import tempfile
import time
from typing import Any
import uuid

import jax
import ml_collections
import submitit
from submitit.core import utils

from clop_jax.experiment import workdir as workdir_lib
from clop_jax.runtime import files
from clop_jax.runtime import locks
from clop_jax.runtime import preemption
from clop_jax.study import cell
from clop_jax.study import job as job_lib
from clop_jax.study import plan as plan_lib

EXECUTORS = ('local', 'slurm')
# A training that is told to end saves its state first.
SECONDS_TO_END = 120
# So many jobs in a row may end before they take a cell.
_MOST_BARREN = 3
# submitit's local executor has no "forever".
_LONG = {'timeout_min': 60 * 24 * 365}
# sbatch needs a time; submitit's own default is 5 minutes.
_SLURM = {'job_name': 'clop_jax', 'time': 24 * 60}
# A job is one process, which uses all devices that it sees.
_NOT_SLURM = ('nodes', 'ntasks_per_node', 'array_parallelism')
_JOBS = 'jobs'


def study(
  workdir: str,
  config: ml_collections.ConfigDict | None = None,
  grid: dict[str, list] | None = None,
  *,
  jobs: int | None = None,
  executor: str = 'local',
  slurm: dict[str, Any] | None = None,
) -> list[dict]:
  """Runs the cells of a grid that are neither done nor diverged.

  Args:
    workdir: Local folder, made if missing. It gets `study.json`, `results.csv`
      and `cells/<name>/`. All Slurm jobs must reach it under the same path.
    config: Config that all cells have in common. None takes the study's own.
    grid: Values of each field, see `grid.parse`. None takes the study's own.
      Values that the study does not have yet are added to it.
    jobs: Number of jobs at a time. Default: one per core on local CPUs, else 1.
    executor: 'local' or 'slurm'.
    slurm: Parameters of Slurm jobs, by the names of
      `submitit.SlurmExecutor.update_parameters`.

  Returns:
    The rows of `results.csv` of these cells.

  Raises:
    ValueError: If the config is invalid, or the workdir holds something else or
      another study or is in use. Nothing has been written then.
    preemption.PreemptionError: After SIGTERM, when the running cells have
      saved. Those that have not after `SECONDS_TO_END` are killed.
  """
  if jax.distributed.is_initialized():
    raise ValueError(
      'a study runs in one process, and this is one of several; start it '
      'on one machine without a cluster, or SLURM with one task'
    )
  plan = plan_lib.Plan(workdir, config, grid)
  _check_executor(executor, slurm)
  files.check_writable(
    os.path.join(workdir, plan_lib.FILE), f'--workdir={workdir}'
  )
  with preemption.Notice() as notice:
    todo = plan.todo()
    platform = _check_cells(todo, notice) if todo else ''

    def make(folder, limit):
      if executor == 'slurm':
        return _SlurmJobs(folder, min(jobs or 1, limit), slurm or {})
      return _LocalJobs(folder, jobs, limit, platform)

    with workdir_lib.locked(workdir):
      # Only now can no other command write there.
      plan = plan_lib.Plan(workdir, config, grid)
      plan.save()
      if plan.todo():
        _execute(plan, os.path.join(workdir, _JOBS), notice, make)
  return plan.rows()


def _execute(plan, folder, notice, make):
  """Runs the cells of a plan in the jobs that `make` makes."""
  own = os.path.join(folder, uuid.uuid4().hex[:12])
  with _lifeline(own) as has_locks:
    # Without locks two jobs could take the same cell.
    limit = len(plan.todo()) if has_locks else 1
    with make(own, limit) as jobs:
      _Execution(plan, jobs).run(notice)
  # The logs of jobs say nothing that those of their cells do not.
  shutil.rmtree(folder, ignore_errors=True)


def slurm_parameters(texts: Sequence[str]) -> dict[str, Any]:
  """Returns the parameters of `--slurm=KEY=VALUE` texts.

  Raises:
    ValueError: If a text has no `=`.
  """
  values: dict[str, Any] = {}
  for text in texts:
    key, equals, value = text.partition('=')
    if not (key and equals):
      raise ValueError(f'--slurm must be KEY=VALUE, got {text!r}')
    if key in ('setup', 'srun_args'):
      values.setdefault(key, []).append(value)
    else:
      values[key] = int(value) if value.isdecimal() else value
  return values


def _check_executor(executor, slurm):
  """Refuses an executor, or parameters of it, that cannot work."""
  if executor not in EXECUTORS:
    raise ValueError(
      f'executor must be one of {", ".join(EXECUTORS)}, got {executor!r}'
    )
  if executor == 'local':
    if slurm:
      raise ValueError('--slurm needs --executor=slurm')
    return
  missing = [name for name in ('sbatch', 'srun') if not shutil.which(name)]
  if missing:
    raise ValueError(
      f'--executor=slurm needs {" and ".join(missing)}, not found on PATH; '
      'start the study on a machine of the cluster'
    )
  with tempfile.TemporaryDirectory() as folder:
    refused = {*(slurm or {})} & {*_NOT_SLURM}
    if refused:
      raise ValueError(
        f'--slurm {", ".join(sorted(refused))}: each job is one process; use '
        '--jobs'
      )
    try:
      submitit.SlurmExecutor(folder).update_parameters(**(slurm or {}))
    except ValueError as error:
      raise ValueError(f'--slurm: {error}') from error


def _check_cells(todo, notice):
  """Checks the cells in a process of its own; returns JAX's platform there."""
  with (
    tempfile.TemporaryDirectory(prefix='clop_jax_study_') as folder,
    _lifeline(folder),
    _LocalJobs(folder, 1, 1, '') as jobs,
  ):
    job = jobs.start(cell.check, todo)
    while not job.done():
      if notice.reached(range(0)):
        raise preemption.PreemptionError(
          'preempted before it began; rerun the same command'
        )
      time.sleep(0.05)
    if not job.paths.result_pickle.exists():
      raise ChildProcessError(
        f'the process that checks the cells died: {_tail(job.stderr())}'
      )
    platform, fault = job.result()
  if fault:
    raise ValueError(fault)
  return platform


@contextlib.contextmanager
def _lifeline(folder) -> Iterator[bool]:
  """Makes a folder whose local jobs end with this process.

  Yields:
    True if the file system has locks.
  """
  os.makedirs(folder, exist_ok=True)
  with open(os.path.join(folder, job_lib.ALIVE), 'a') as file:
    yield locks.take(file)


class _Jobs:
  """The jobs of one command; a context manager that ends them.

  Attributes:
    study: Identifier of the command.
    count: Number of jobs at a time.
    running: The jobs that have not ended, by the name that they sign with.
  """

  lifeline: str | None = None
  # Seconds between two looks at the cells.
  pause = 0.2
  where = ''

  def __init__(self, executor, count):
    self.study = executor.folder.name
    self.count = count
    self.running = {}
    self._executor = executor
    self._numbers = itertools.count()

  def __enter__(self):
    return self

  def environment(self):
    """Returns the environment variables to change in a job."""
    return {}

  def start(self, function, *arguments):
    """Submits a function, and returns its job."""
    return self._executor.submit(
      job_lib.call, self.lifeline, self.environment(), function, *arguments
    )

  def add(self, cells):
    """Starts another job for cells."""
    owner = str(next(self._numbers))
    self.running[owner] = self.start(job_lib.work, cells, self.study, owner)

  def remove_ended(self):
    """Returns the jobs that have ended, and removes them from `running`."""
    ended = {owner: job for owner, job in self.running.items() if job.done()}
    for owner in ended:
      self.running.pop(owner)
    return ended


class _LocalJobs(_Jobs):
  """Processes on this machine, on CPU each on its own cores."""

  def __init__(self, folder, count, limit, platform):
    cores = _cores()
    accelerated = platform not in ('', 'cpu')
    count = min(count or (1 if accelerated else len(cores)), limit)
    executor = submitit.LocalExecutor(folder)
    executor.update_parameters(**_LONG)
    super().__init__(executor, count)
    self.lifeline = folder
    self.where = f'on {platform}'
    self._accelerated = accelerated
    each = len(cores) if accelerated else max(1, len(cores) // count)
    starts = (i * each % len(cores) for i in range(count))
    self._places = [cores[start : start + each] for start in starts]
    self._all = []

  def environment(self):
    # submitit hides the GPUs that it was not asked for.
    name = 'CUDA_VISIBLE_DEVICES'
    values = {name: os.environ.get(name)}
    memory = 'XLA_PYTHON_CLIENT_MEM_FRACTION'
    if self._accelerated and self.count > 1 and memory not in os.environ:
      values[memory] = f'{0.9 / self.count:.3f}'
    return values

  def start(self, function, *arguments):
    # Those of the job that has ended.
    taken = [cores for job, cores in self._all if not job.done()]
    cores = next(x for x in self._places if x not in taken)
    with _shielded(), _bound_to(cores):
      job = super().start(function, *arguments)
    self._all.append((job, cores))
    return job

  def stop(self):
    """Asks the jobs to save and end; returns the number that do not."""
    with open(os.path.join(self.lifeline, job_lib.END), 'w'):
      pass
    return self._wait(SECONDS_TO_END)

  def _wait(self, seconds):
    limit = time.monotonic() + seconds
    while count := sum(not job.done() for job, _ in self._all):
      if time.monotonic() > limit:
        break
      time.sleep(0.05)
    return count

  def died(self, job):
    """Returns why a job may have ended in the middle of a cell."""
    del job
    return (
      'its process died, most often because memory has run out: try fewer '
      '--jobs'
    )

  def __exit__(self, *exception):
    # The jobs end without it, at the latest when they have imported JAX.
    with contextlib.suppress(OSError):
      os.remove(os.path.join(self.lifeline, job_lib.ALIVE))
    self._wait(SECONDS_TO_END)


class _SlurmJobs(_Jobs):
  """Jobs of Slurm, which outlive a command that is killed."""

  pause = 2.0
  where = 'on Slurm'
  # Only sacct knows of a job that was killed, and submitit asks it less and
  # less often.
  force_after = 30.0

  def __init__(self, folder, count, parameters):
    executor = submitit.SlurmExecutor(folder)
    executor.update_parameters(**_SLURM | parameters)
    super().__init__(executor, count)
    self._asked = time.monotonic()

  def start(self, function, *arguments):
    try:
      return super().start(function, *arguments)
    except (utils.FailedJobError, utils.FailedSubmissionError) as error:
      text = ' '.join(str(error).split())
      raise ValueError(f'Slurm refused a job: {text}') from error

  def remove_ended(self):
    if time.monotonic() > self._asked + self.force_after:
      self._asked = time.monotonic()
      for job in self.running.values():
        job.done(force_check=True)
    return super().remove_ended()

  def stop(self):
    """Cancels the jobs, which have Slurm's KillWait to save; returns 0."""
    for job in self.running.values():
      job.cancel(check=False)
    return 0

  def died(self, job):
    """Returns why a job may have ended in the middle of a cell."""
    return f'its Slurm job {job.job_id} ended ({job.state})'

  def __exit__(self, *exception):
    self.stop()


class _Execution:
  """The cells that are to be run, and the jobs that run them."""

  def __init__(self, plan, jobs):
    self._plan, self._jobs = plan, jobs
    self._todo = plan.todo()
    # The attempts of each cell that have been reported.
    self._left = dict.fromkeys(self._todo, 0)
    self._began = time.monotonic()
    self._barren = 0

  def run(self, notice):
    """Returns when all cells have ended."""
    self._prepare()
    count = min(self._jobs.count, len(self._left))
    _say(
      f'{len(self._todo)} of {len(self._plan.cells)} cells to go, {count} at a '
      f'time {self._jobs.where}'
    )
    try:
      while self._left:
        if notice.reached(range(0)):
          raise preemption.PreemptionError('preempted')
        self._step()
        if self._left:
          time.sleep(self._jobs.pause)
    except (preemption.PreemptionError, KeyboardInterrupt) as error:
      text = self._stop(
        'interrupted' if isinstance(error, KeyboardInterrupt) else 'preempted'
      )
      if isinstance(error, KeyboardInterrupt):
        _say(text)
        raise
      raise preemption.PreemptionError(text) from None

  def _prepare(self):
    """Makes the folders of the cells, and removes records of failures."""
    for name in [*self._left]:
      try:
        os.makedirs(self._plan.folder(name), exist_ok=True)
        self._plan.forget(name)
      except OSError as error:
        self._end(name, job_lib.ATTEMPTS, str(error))

  def _stop(self, why):
    _say(f'{why}: the running cells save their state')
    unsaved = self._jobs.stop()
    for name in [*self._left]:
      self._look_at(name)
    note = (
      f' ({unsaved} of their processes had not saved after {SECONDS_TO_END} s '
      'and were killed: these resume from an earlier checkpoint)'
    )
    return (
      f'{why}: {len(self._left)} of {len(self._plan.cells)} cells are left'
      f'{note if unsaved else ""}; rerun the same command to resume'
    )

  def _step(self):
    # Before the records, which a job writes before it ends.
    ended = self._jobs.remove_ended()
    for name in [*self._left]:
      self._look_at(name)
    for owner, job in ended.items():
      self._look_after(owner, job)
    self._start_jobs()

  def _look_at(self, name):
    """Reports a cell whose job has written a record."""
    record = self._plan.record(name)
    if record is None:
      return
    # Old records have no number.
    attempt = record.get('attempt', job_lib.ATTEMPTS)
    if record['status'] in cell.THROUGH:
      attempt = job_lib.ATTEMPTS
    if attempt > self._left[name]:
      self._end(name, attempt)

  def _look_after(self, owner, job):
    """Reports the cell that a job has left unfinished, if it died."""
    owners = {name: self._owners(name) for name in self._todo}
    if any(owner in names for names in owners.values()):
      self._barren = 0
    elif not job.paths.result_pickle.exists():
      self._barren += 1
      if self._barren == _MOST_BARREN:
        raise ChildProcessError(
          f'{_MOST_BARREN} jobs have ended before they took a cell; see '
          f'{job.paths.stderr}: {_tail(job.stderr())}'
        )
    for name in [*self._left]:
      names = owners[name]
      if names[-1:] == [owner] and len(names) > self._left[name]:
        self._end(name, len(names), self._jobs.died(job))

  def _end(self, name, attempt, death=None):
    """Reports an attempt, and takes in the cell if it was the last one."""
    log = os.path.join(self._plan.folder(name), cell.LOG)
    if attempt < job_lib.ATTEMPTS:
      self._left[name] = attempt
      reason = death or self._plan.record(name)['error']
      _say(f'{name}: failed, {reason}; see {log}; it is tried again')
      return
    self._left.pop(name)
    row = self._plan.finish(name, death and f'{death}; see {log}')
    ended = len(self._todo) - len(self._left)
    each = (time.monotonic() - self._began) / ended
    _say(_progress(name, row, log, len(self._left), each))

  def _owners(self, name):
    return job_lib.owners(self._plan.folder(name), self._jobs.study)

  def _start_jobs(self):
    """Starts jobs for the cells that no process has claimed."""
    running, count = self._jobs.running, self._jobs.count
    if len(running) >= count:
      return
    claimed = {
      name
      for name, reported in self._left.items()
      if len(owners := self._owners(name)) > reported and owners[-1] in running
    }
    free = [
      name
      for name in self._left
      if name not in claimed and not job_lib.is_claimed(self._plan.folder(name))
    ]
    idle = len(running) - len(claimed)
    cells = {
      name: (self._todo[name], self._plan.folder(name)) for name in self._left
    }
    for _ in range(min(count - len(running), len(free) - idle)):
      self._jobs.add(cells)


def _cores():
  """Returns the CPU cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return sorted(os.sched_getaffinity(0))
  # macOS binds no process to cores.
  return list(range(os.cpu_count() or 1))


@contextlib.contextmanager
def _bound_to(cores):
  """Binds this thread, and so the processes that it starts, to cores."""
  if not cores or not hasattr(os, 'sched_setaffinity'):
    yield
    return
  allowed = os.sched_getaffinity(0)
  os.sched_setaffinity(0, cores)
  try:
    yield
  finally:
    os.sched_setaffinity(0, allowed)


@contextlib.contextmanager
def _shielded():
  """Blocks SIGINT and SIGTERM for this thread and the processes it starts.

  A terminal or scheduler may send them to all of the processes. This one then
  ends the others in order; see `job.work`, which allows SIGTERM again.
  """
  before = signal.pthread_sigmask(
    signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM}
  )
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _tail(text):
  """Returns the last line of what a process has printed."""
  lines = (text or '').strip().splitlines()
  return lines[-1] if lines else 'it printed nothing'


def _progress(name, row, log, left, seconds_per_cell):
  """Returns the line about a cell that has ended."""
  if row['status'] == 'done':
    seconds = row['train_seconds'] + row['evaluate_seconds']
    text = (
      f'linear {row["linear_top1"]:.3f}, kNN {row["knn_top1"]:.3f}, '
      f'effective rank {row["effective_rank"]:.1f}, {seconds:.0f} s'
    )
  else:
    text = row['error']
    if row['status'] == 'failed' and log not in text:
      text += f'; see {log}'
  rest = f'{left} left, about {_duration(left * seconds_per_cell)}'
  return f'{name}: {row["status"]}, {text}; {rest if left else "none left"}'


def _duration(seconds):
  if seconds < 100:
    return f'{seconds:.0f} s'
  minutes = round(seconds / 60)
  if minutes < 100:
    return f'{minutes} min'
  return f'{minutes // 60} h {minutes % 60} min'


def _say(message):
  print(message, flush=True)
