"""Runs the cells of a study in jobs, on this machine or on Slurm."""

from collections.abc import Iterator, Sequence
import contextlib
import datetime
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
SECONDS_TO_SAVE = 120
# Jobs that may fail in a row before they take a cell.
_MAX_EMPTY_JOBS = 3
# submitit's local executor has no "forever".
_LOCAL = {'timeout_min': 60 * 24 * 365}
# In minutes; submitit's own default is 5.
_SLURM = {'job_name': 'clop_jax', 'time': 24 * 60}
# A job is one process, which uses all devices that it sees.
_NOT_SLURM = {'nodes', 'ntasks_per_node', 'array_parallelism'}


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
    workdir: Local folder, created if missing. It gets `study.json`,
      `results.csv` and `cells/<name>/`. All Slurm jobs must reach it under the
      same path.
    config: Config that all cells share. None takes that of the study.
    grid: Values of each field, see `grid.parse`. None takes that of the study.
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
    preemption.PreemptionError: After SIGTERM, once the running cells have
      saved. They are killed after `SECONDS_TO_SAVE`.
  """
  if jax.distributed.is_initialized():
    raise ValueError(
      'a study runs in one process, but this process is one of several; start '
      'it on one machine without a cluster, or in a Slurm job of one task'
    )
  plan = plan_lib.Plan(workdir, config, grid)
  _check_executor(executor, slurm or {})
  files.check_writable(
    os.path.join(workdir, plan_lib.FILE), f'--workdir={workdir}'
  )
  with preemption.Notice() as notice:
    todo = plan.todo()
    platform = _check_cells(todo, notice) if todo else ''
    with workdir_lib.locked(workdir):
      # Read again, now that no other command can write there.
      plan = plan_lib.Plan(workdir, config, grid)
      plan.save()
      if count := len(plan.todo()):
        folder = os.path.join(workdir, 'jobs')
        with _command_folder(os.path.join(folder, uuid.uuid4().hex)) as (
          own,
          has_locks,
        ):
          # Without locks, two jobs could take the same cell.
          limit = count if has_locks else 1
          crew: _Jobs
          if executor == 'slurm':
            crew = _SlurmJobs(own, min(jobs or 1, limit), slurm or {})
          else:
            crew = _LocalJobs(own, jobs, limit, platform)
          with contextlib.closing(crew):
            _Execution(plan, crew).run(notice)
        # Only the logs of the cells are worth keeping.
        shutil.rmtree(folder, ignore_errors=True)
  return plan.rows()


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
      f'--executor=slurm needs {" and ".join(missing)} on PATH; start the '
      'study on a machine of the cluster'
    )
  if refused := ', '.join(sorted(_NOT_SLURM & {*slurm})):
    raise ValueError(f'--slurm {refused}: a job is one process; use --jobs')
  with tempfile.TemporaryDirectory() as folder:
    try:
      submitit.SlurmExecutor(folder).update_parameters(**slurm)
    except ValueError as error:
      raise ValueError(f'--slurm: {error}') from error


def _check_cells(todo, notice):
  """Checks the cells in another process; returns JAX's platform there.

  This process must leave the devices to the jobs.
  """
  with (
    tempfile.TemporaryDirectory(prefix='clop_jax_study_') as folder,
    _command_folder(folder),
    contextlib.closing(_LocalJobs(folder, 1, 1, '')) as crew,
  ):
    job = crew.start(cell.check, todo)
    while not job.done():
      if notice.came():
        raise preemption.PreemptionError(
          'preempted before the first cell; rerun the same command'
        )
      time.sleep(0.05)
    if not job.paths.result_pickle.exists():
      raise ChildProcessError(
        f'the process that checks the cells died: {_last_line(job.stderr())}'
      )
    platform, fault = job.result()
  if fault:
    raise ValueError(fault)
  return platform


@contextlib.contextmanager
def _command_folder(folder) -> Iterator[tuple[str, bool]]:
  """Creates a folder whose local jobs end with this process.

  Yields:
    The folder, and True if its file system has locks.
  """
  os.makedirs(folder, exist_ok=True)
  with open(os.path.join(folder, job_lib.ALIVE), 'a') as file:
    yield folder, locks.take(file)


class _Jobs:
  """Starts and ends the jobs of one command.

  Attributes:
    study: Identifier of the command.
    count: Number of jobs at a time.
    where: Where the jobs run.
    pause: Seconds between two looks at the cells.
  """

  pause = 0.2
  _followed: str | None = None

  def __init__(self, executor, count, where):
    self.study, self.count, self.where = executor.folder.name, count, where
    self._executor = executor

  def environment(self):
    """Returns the environment variables to change in a job."""
    return {}

  def start(self, function, *arguments):
    """Submits a function and returns its job."""
    return self._executor.submit(
      job_lib.call, self._followed, self.environment(), function, *arguments
    )

  def has_ended(self, job):
    return job.done()


class _LocalJobs(_Jobs):
  """Processes on this machine; on CPU, each has its own cores."""

  def __init__(self, folder, count, limit, platform):
    cores = _cores()
    self._accelerated = platform not in ('', 'cpu')
    count = min(count or (1 if self._accelerated else len(cores)), limit)
    executor = submitit.LocalExecutor(folder)
    executor.update_parameters(**_LOCAL)
    super().__init__(executor, count, f'on {platform}')
    self._followed = folder
    each = len(cores) if self._accelerated else max(1, len(cores) // count)
    starts = (i * each % len(cores) for i in range(count))
    self._places = [cores[start : start + each] for start in starts]
    self._started = []

  def environment(self):
    # submitit hides the GPUs that it was not asked for.
    name = 'CUDA_VISIBLE_DEVICES'
    values = {name: os.environ.get(name)}
    memory = 'XLA_PYTHON_CLIENT_MEM_FRACTION'
    if self._accelerated and self.count > 1 and memory not in os.environ:
      values[memory] = f'{0.9 / self.count:.3f}'
    return values

  def start(self, function, *arguments):
    taken = [cores for job, cores in self._started if not job.done()]
    cores = next(x for x in self._places if x not in taken)
    with _inherited(cores):
      job = super().start(function, *arguments)
    self._started.append((job, cores))
    return job

  def stop(self):
    """Asks the jobs to save and end; returns the number that do not."""
    with open(os.path.join(self._followed, job_lib.END), 'w'):
      pass
    return self._wait()

  def _wait(self):
    limit = time.monotonic() + SECONDS_TO_SAVE
    while count := sum(not job.done() for job, _ in self._started):
      if time.monotonic() > limit:
        break
      time.sleep(0.05)
    return count

  def died(self, job):
    """Returns why a job may have ended in the middle of a cell."""
    del job
    return 'its process died, most often for lack of memory: try fewer --jobs'

  def close(self):
    # The jobs end without it.
    with contextlib.suppress(OSError):
      os.remove(os.path.join(self._followed, job_lib.ALIVE))
    self._wait()


class _SlurmJobs(_Jobs):
  """Jobs of Slurm, which outlive a command that is killed."""

  pause = 2.0
  # Only sacct knows of killed jobs, and submitit calls it every 10 minutes.
  sacct_pause = 30.0

  def __init__(self, folder, count, parameters):
    executor = submitit.SlurmExecutor(folder)
    executor.update_parameters(**_SLURM | parameters)
    super().__init__(executor, count, 'on Slurm')
    self._started, self._asked = [], {}

  def start(self, function, *arguments):
    try:
      job = super().start(function, *arguments)
    except (utils.FailedJobError, utils.FailedSubmissionError) as error:
      text = ' '.join(str(error).split())
      raise ValueError(f'Slurm refused a job: {text}') from error
    self._started.append(job)
    return job

  def has_ended(self, job):
    now = time.monotonic()
    force = now > self._asked.setdefault(job.job_id, now) + self.sacct_pause
    if force:
      self._asked[job.job_id] = now
    return job.done(force_check=force)

  def stop(self):
    """Cancels the jobs, which have Slurm's KillWait to save; returns 0."""
    for job in self._started:
      if not job.done():
        job.cancel(check=False)
    return 0

  def died(self, job):
    """Returns why a job may have ended in the middle of a cell."""
    return f'its Slurm job {job.job_id} ended ({job.state})'

  def close(self):
    self.stop()


class _Execution:
  """Starts jobs until all cells have ended, and reports each cell."""

  def __init__(self, plan, jobs):
    self._plan, self._jobs = plan, jobs
    self._cells = {
      name: (config, plan.folder(name)) for name, config in plan.todo().items()
    }
    # The number of reported attempts at each cell that has not ended.
    self._left = dict.fromkeys(self._cells, 0)
    self._running, self._numbers = {}, itertools.count()
    self._empty_jobs = 0
    self._began = time.monotonic()

  def run(self, notice):
    """Returns when all cells have ended."""
    for name, (_, folder) in self._cells.items():
      try:
        os.makedirs(folder, exist_ok=True)
        self._plan.forget(name)
      except OSError as error:
        self._end(name, job_lib.ATTEMPTS, str(error))
    count = min(self._jobs.count, len(self._left))
    _say(
      f'{len(self._cells)} of {len(self._plan.cells)} cells to go, {count} at '
      f'a time {self._jobs.where}'
    )
    try:
      while self._left and not notice.came():
        self._step()
        time.sleep(self._jobs.pause)
    except KeyboardInterrupt:
      _say(self._stop('interrupted'))
      raise
    if self._left:
      raise preemption.PreemptionError(self._stop('preempted'))

  def _stop(self, why):
    _say(f'{why}: the running cells save their state')
    unsaved = self._jobs.stop()
    self._report({})
    note = f' ({unsaved} did not save in {SECONDS_TO_SAVE} s and were killed)'
    return (
      f'{why}: {len(self._left)} of {len(self._plan.cells)} cells are left'
      f'{note if unsaved else ""}; rerun the same command to resume'
    )

  def _step(self):
    # Before the records, which a job writes before it ends.
    ended = {
      owner: job
      for owner, job in self._running.items()
      if self._jobs.has_ended(job)
    }
    for owner in ended:
      del self._running[owner]
    self._check_empty_jobs(ended)
    self._report(ended)
    # One more job for each cell that no process has, nor will have when the
    # jobs that are starting have taken theirs.
    claimed = sum(map(job_lib.is_claimed, map(self._plan.folder, self._left)))
    busy = len(self._running)
    wanted = min(self._jobs.count - busy, len(self._left) - max(claimed, busy))
    for _ in range(wanted):
      owner = str(next(self._numbers))
      cells = {name: self._cells[name] for name in self._left}
      self._running[owner] = self._jobs.start(
        job_lib.work, cells, self._jobs.study, owner
      )

  def _check_empty_jobs(self, ended):
    """Gives up if one job after another fails before it takes a cell."""
    owners = {owner for name in self._cells for owner in self._owners(name)}
    for owner, job in ended.items():
      if owner in owners:
        self._empty_jobs = 0
      elif job.exception() is not None:
        self._empty_jobs += 1
      if self._empty_jobs == _MAX_EMPTY_JOBS:
        raise ChildProcessError(
          f'{_MAX_EMPTY_JOBS} jobs failed before they took a cell; see '
          f'{job.paths.stderr}: {_last_line(job.stderr())}'
        )

  def _report(self, ended):
    """Reports attempts that have a record, or whose job has ended without."""
    for name, reported in [*self._left.items()]:
      record = cell.read_record(self._plan.folder(name))
      owners = self._owners(name)
      if record is not None:
        final = record['status'] in cell.FINAL
        attempt = record.get('attempt', 0)
        if final or attempt > reported:
          self._end(name, job_lib.ATTEMPTS if final else attempt)
          continue
      if len(owners) > reported and owners[-1] in ended:
        self._end(name, len(owners), self._jobs.died(ended[owners[-1]]))

  def _end(self, name, attempt, death=None):
    """Reports an attempt, and saves the cell if it was the last one."""
    folder = self._plan.folder(name)
    log = os.path.join(folder, cell.LOG)
    if attempt < job_lib.ATTEMPTS:
      self._left[name] = attempt
      reason = death or cell.read_record(folder)['error']
      _say(f'{name}: failed, {reason}; see {log}; trying again')
      return
    del self._left[name]
    row = self._plan.finish(name, death and f'{death}; see {log}')
    left = len(self._left)
    ended = len(self._cells) - left
    seconds = round(left * (time.monotonic() - self._began) / ended)
    time_left = datetime.timedelta(seconds=seconds)
    rest = f'{left} left, about {time_left} h' if left else 'none left'
    _say(f'{name}: {row["status"]}, {_outcome(row, log)}; {rest}')

  def _owners(self, name):
    return job_lib.owners(self._plan.folder(name), self._jobs.study)


def _cores():
  """Returns the CPU cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count() or 1))  # macOS


@contextlib.contextmanager
def _inherited(cores):
  """Sets what processes that start now inherit from this thread.

  They are bound to cores. SIGINT and SIGTERM are blocked: a terminal or a
  scheduler may send them to all processes, and this one ends the others in
  order. `job.work` allows SIGTERM again.
  """
  signals = {signal.SIGINT, signal.SIGTERM}
  before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
  allowed = _cores()
  bind = getattr(os, 'sched_setaffinity', lambda *_: None)
  try:
    bind(0, cores)
    yield
  finally:
    bind(0, allowed)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _last_line(text):
  lines = (text or '').strip().splitlines()
  return lines[-1] if lines else 'it printed nothing'


def _outcome(row, log):
  """Describes how a cell ended."""
  if row['status'] != 'done':
    shown = row['status'] == 'failed' and log not in row['error']
    return f'{row["error"]}; see {log}' if shown else row['error']
  seconds = row['train_seconds'] + row['evaluate_seconds']
  return (
    f'linear {row["linear_top1"]:.3f}, kNN {row["knn_top1"]:.3f}, '
    f'effective rank {row["effective_rank"]:.1f}, {seconds:.0f} s'
  )


def _say(message):
  print(message, flush=True)
