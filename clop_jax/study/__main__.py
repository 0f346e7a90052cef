"""Trains and evaluates every cell of a grid, and puts the results in one table.

python -m clop_jax.study --config=configs/digits.py --workdir=runs/study \
  --grid optimizer.learning_rate=0.001,0.01,0.1,1,10 \
  --grid loss.clop_weight=0,1 --grid seed=0,1,2

Each cell has a workdir of its own, `<workdir>/cells/<name>`, as of `train` and
`evaluate`; `<workdir>/results.csv` has a line for each that is done, diverged
or failed, and `report.html` shows them. The same command again (or `--workdir`
alone) goes on where it was stopped, and tries failed cells again; more values
of the same fields make the study larger.
"""

import contextlib
import csv
import io
import json
import os
import sys
import tempfile
import time

from absl import flags
import jax
import ml_collections
from ml_collections import config_flags

from clop_jax import cli
from clop_jax.experiment import build
from clop_jax.experiment import workdir as workdir_lib
from clop_jax.runtime import files
from clop_jax.runtime import preemption
from clop_jax.study import cell
from clop_jax.study import ensemble
from clop_jax.study import grid as grid_lib
from clop_jax.study import report
from clop_jax.study import workers

_WORKER = cell.__name__
_FILE = 'study.json'
# What a kill can leave of a study that had not begun.
_NOTHING = {'.lock', f'{_FILE}.partial'}
# What a line about a cell shows of its eval.json.
_SHOWN = dict.fromkeys(
  ('linear_top1', 'knn_top1', 'effective_rank'), int | float
)
# Diverged is a result: the same cell would diverge again.
_THROUGH = ('done', 'diverged')


def study(
  workdir: str,
  config: ml_collections.ConfigDict | None = None,
  grid: dict[str, list] | None = None,
  *,
  jobs: int | None = None,
  vmap: int = 0,
) -> list[dict]:
  """Runs the cells of a grid that are not through yet.

  Args:
    workdir: a local folder; made if missing. Gets `study.json`, `results.csv`
      and `cells/<name>/`.
    config: that all cells have in common; None: the study's own.
    grid: values of each field, see `grid.parse`; None: the study's own. Values
      that the study does not have yet are added to it.
    jobs: processes at the same time. Default: one per core on CPU, else 1.
    vmap: the most cells, alike but for numbers, to train in one program; 0:
      each in its own.

  Returns:
    The rows of `results.csv` of these cells.

  Raises:
    ValueError: for a wrong config, a workdir of something else or of another
      study, or one that is in use; nothing has been written then.
    preemption.PreemptionError: after SIGTERM, when running cells have saved;
      those that have not after `workers.SECONDS_TO_END` are killed, which it
      says.
  """
  if jax.distributed.is_initialized():
    raise ValueError(
      'a study runs in one process, and this is one of several; start it '
      'on one machine without a cluster, or SLURM with one task'
    )
  plan = _Plan(workdir, config, grid)
  files.check_writable(os.path.join(workdir, _FILE), f'--workdir={workdir}')
  todo = plan.todo()
  with contextlib.ExitStack() as stack:
    notice = stack.enter_context(preemption.Notice())
    pool = None
    if todo:
      try:
        pool = stack.enter_context(_Pool(todo, jobs, len(_groups(todo, vmap))))
      except ChildProcessError as error:
        if notice.reached(range(0)):
          # So was the process, which had nothing to save.
          raise preemption.PreemptionError(
            'preempted before it began; rerun the same command'
          ) from error
        raise
    stack.enter_context(workdir_lib.locked(workdir))
    # Only now can no other process write to it.
    plan = _Plan(workdir, config, grid)
    plan.save()
    todo = plan.todo()
    if todo:
      _run(plan, todo, _groups(todo, vmap), pool, notice)
  return plan.rows()


def _groups(todo, vmap):
  """The names of cells that one process takes on at once."""
  if not vmap:
    return [[name] for name in todo]
  groups = {}
  for name, config in todo.items():
    alike = json.dumps(ensemble.shared_part(config), sort_keys=True)
    groups.setdefault(alike, []).append(name)
  return [
    group[first : first + vmap]
    for group in groups.values()
    for first in range(0, len(group), vmap)
  ]


def _run(plan, todo, groups, pool, notice):
  began = time.monotonic()
  _say(
    f'{len(todo)} of {len(plan.cells)} cells to go, {pool.jobs} at the same '
    f'time on {pool.platform}'
  )
  tasks = [
    (names, ('run', {name: (todo[name], plan.folder(name)) for name in names}))
    for names in groups
  ]
  count = 0
  outcomes = pool.run(tasks, told=lambda: notice.reached(range(0)))
  with contextlib.closing(outcomes):
    for names, reply, death in outcomes:
      count += len(names)
      each = (time.monotonic() - began) / count
      for name in names:
        if death:
          error = _advice(death, os.path.join(plan.folder(names[0]), cell.LOG))
        else:
          error = reply[name]['error']
        row = plan.finish(name, error)
        _say(_progress(name, row, len(todo) - count, each))
  if count < len(todo):
    killed = pool.killed()
    unsaved = (
      f' ({killed} of their processes had not saved after '
      f'{workers.SECONDS_TO_END} s and were killed: these resume from an '
      'earlier checkpoint)'
    )
    raise preemption.PreemptionError(
      f'preempted: {len(todo) - count} of {len(plan.cells)} cells are left'
      f'{unsaved if killed else ""}; rerun the same command to resume'
    )


def _advice(death, log):
  """What is known of a process's death, in a line."""
  if 'SIGKILL' in death:
    death += (
      ', most often because memory has run out: try fewer --jobs (or a '
      'smaller --vmap)'
    )
  return f'{death}; see {log}'


def _progress(name, row, left, seconds_a_cell):
  """A line about a cell that is through."""
  if row['status'] == 'done':
    seconds = row['train_seconds'] + row['evaluate_seconds']
    what = (
      f'linear {row["linear_top1"]:.3f}, kNN {row["knn_top1"]:.3f}, '
      f'effective rank {row["effective_rank"]:.1f}, {seconds:.0f} s'
    )
  else:
    what = row['error']
  after = f'{left} left, about {_duration(left * seconds_a_cell)}'
  return f'{name}: {row["status"]}, {what}; {after if left else "none left"}'


def _duration(seconds):
  if seconds < 100:
    return f'{seconds:.0f} s'
  minutes = round(seconds / 60)
  if minutes < 100:
    return f'{minutes} min'
  return f'{minutes // 60} h {minutes % 60} min'


class _Pool:
  """Processes for the cells; a context manager that ends them."""

  def __init__(self, cells, jobs, limit):
    """Looks for faults of the cells in the first of at most `limit` processes.

    Raises:
      ValueError: if one is found.
    """
    self._cores = workers.cores()
    self._started = []
    self._environment = dict(os.environ)
    self.jobs = min(jobs or len(self._cores), limit)
    with contextlib.ExitStack() as stack:
      if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        # Cells that differ in numbers only are one program, compiled once.
        folder = jax.config.jax_compilation_cache_dir
        if not folder:
          folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix='clop_jax_study_')
          )
        self._environment |= {
          'JAX_COMPILATION_CACHE_DIR': folder,
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
        }
      self.platform, self._first = 'cpu', []
      self._first.append(self._start(0))
      stack.callback(lambda: workers.stop(self._first))
      self._first[0].send(('check', cells))
      self.platform, fault = self._first[0].receive()
      if fault:
        raise ValueError(fault)
      if self.platform != 'cpu':
        self._use_accelerator(jobs)
      self._stack = stack.pop_all()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self._stack.close()

  def _use_accelerator(self, jobs):
    """The processes have all cores, and share the accelerator's memory."""
    self.jobs = min(jobs or 1, self.jobs)
    if self.jobs > 1:
      self._environment.setdefault(
        'XLA_PYTHON_CLIENT_MEM_FRACTION', f'{0.9 / self.jobs:.3f}'
      )
    # The first one has a few cores and too much memory.
    workers.stop([self._first.pop()])

  def _start(self, place):
    """A worker, on CPU on cores that no other place has."""
    if self._first:
      return self._first.pop()
    cores = self._cores
    if self.platform == 'cpu':
      each = max(1, len(cores) // self.jobs)
      first = place * each % len(cores)
      cores = cores[first : first + each]
    worker = workers.Worker(_WORKER, cores=cores, environment=self._environment)
    self._started.append(worker)
    return worker

  def killed(self):
    """How many processes did not end when told to."""
    return sum(worker.killed for worker in self._started)

  def run(self, tasks, told):
    """See `workers.run`."""
    return workers.run(tasks, self._start, self.jobs, told=told)


class _Plan:
  """What a study's folder holds and what it is to hold; see `study`."""

  def __init__(self, workdir, config, grid):
    """Reads the folder and writes nothing."""
    self._workdir = workdir
    saved = _load(workdir)
    if saved is None:
      if config is None:
        raise ValueError('--config must name a file of configs/, got none')
      if not grid:
        raise ValueError(
          '--grid must name a field and its values, as '
          '--grid optimizer.learning_rate=0.1,1; got none'
        )
      saved = {'config': workdir_lib.to_json(config), 'grid': grid}
    grid = grid or saved['grid']
    _check_same(workdir, saved, config, grid)
    self._config = saved['config']
    # In the order of the study, new values last.
    self._grid = {
      field: values + [v for v in grid[field] if v not in values]
      for field, values in saved['grid'].items()
    }
    self._every = grid_lib.cells(self._grid)
    self.cells = {
      name: grid_lib.applied(self._config, values)
      for name, values in self._every.items()
      if all(value in grid[field] for field, value in values.items())
    }
    self._outcomes, self._results, self._broken = {}, {}, []
    for name in self._every:
      self._read(name)

  def folder(self, name):
    """The workdir of a cell."""
    return os.path.join(self._workdir, 'cells', name)

  def todo(self):
    """The configs of the cells that are to run, by name."""
    return {
      name: config
      for name, config in self.cells.items()
      if self._status(name) not in _THROUGH
    }

  def _status(self, name):
    return self._outcomes.get(name, {}).get('status')

  def save(self):
    """Writes `study.json` and `results.csv`."""
    saved = {'config': self._config, 'grid': self._grid}
    _write(self._workdir, _FILE, json.dumps(saved, indent=2) + '\n')
    self._write_results()
    for path in self._broken:
      _warn(f'{path} is empty or damaged; that cell is taken as not through')

  def finish(self, name, error=None):
    """Takes in how a cell ended, and gives its row.

    Args:
      name: of the cell.
      error: what the cell's process says, or was ended by; it may not have come
        to write that down.
    """
    self._read(name)
    known = self._outcomes.get(name, {})
    if not error and not known:
      error = f'{self.folder(name)}: its results cannot be read'
    # In a group it may have diverged before its process died.
    through = known.get('status') in _THROUGH
    if error and not through and known.get('error') != error:
      self._fail(name, error)
    self._write_results()
    return self._row(name)

  def _fail(self, name, error):
    outcome = {'status': 'failed', 'error': error}
    self._outcomes[name] = outcome | {'commit': build.commit()}
    self._results[name] = {}
    # Where even this cannot be written, the other cells still can go on.
    with contextlib.suppress(OSError):
      os.makedirs(self.folder(name), exist_ok=True)
      cell.record(self.folder(name), outcome)

  def rows(self):
    """The rows of this grid's cells that are through or failed."""
    return [self._row(name) for name in self.cells if name in self._outcomes]

  def _read(self, name):
    outcome = self._load_of(name, cell.RECORD, cell.FIELDS)
    if outcome is None:
      return
    self._results[name] = {}
    if outcome['status'] == 'done':
      result = self._load_of(name, 'eval.json', _SHOWN)
      if result is None:
        return
      self._results[name] = {
        k: v
        for k, v in result.items()
        if isinstance(v, (int, float)) and k != 'seed'
      }
    self._outcomes[name] = outcome

  def _load_of(self, name, file, fields):
    """What a cell's file holds, or None if it is missing or cut."""
    path = os.path.join(self.folder(name), file)
    if not files.exists(path):
      return None
    try:
      found = files.read_json(path, fix='that cell runs again')
    except ValueError:
      found = {}
    if all(isinstance(found.get(x, ()), kind) for x, kind in fields.items()):
      return found
    self._broken.append(path)
    return None

  def _row(self, name):
    values = self._every[name]
    config = grid_lib.applied(self._config, values)
    outcome = self._outcomes[name]
    return {
      'cell': name,
      'status': outcome['status'],
      'error': outcome['error'],
      **{field: grid_lib.text(value) for field, value in values.items()},
      'seed': config['seed'],
      **self._results[name],
      'train_seconds': outcome.get('train_seconds'),
      'evaluate_seconds': outcome.get('evaluate_seconds'),
      'commit': outcome['commit'],
      'config': json.dumps(config, separators=(',', ':')),
    }

  def _write_results(self):
    rows = [self._row(name) for name in self._every if name in self._outcomes]
    last = ('train_seconds', 'evaluate_seconds', 'commit', 'config')
    columns = ['cell', 'status', 'error', *self._grid, 'seed']
    for row in rows:
      columns += [name for name in row if name not in {*columns, *last}]
    columns = list(dict.fromkeys([*columns, *last]))
    text = io.StringIO()
    table = csv.DictWriter(text, columns, restval='')
    table.writeheader()
    table.writerows(rows)
    _write(self._workdir, 'results.csv', text.getvalue())


def _load(workdir):
  """`study.json` of a folder, or None if there is nothing yet.

  Raises:
    ValueError: if the folder holds something else.
  """
  if '://' in workdir:
    raise ValueError(
      f'--workdir of a study must be a local folder, got {workdir}'
    )
  path = os.path.join(workdir, _FILE)
  if not files.exists(path):
    if files.exists(workdir) and not files.is_folder(workdir):
      raise ValueError(f'--workdir={workdir} is a file, not a folder')
    names = os.listdir(workdir) if files.exists(workdir) else []
    names = sorted({*names} - _NOTHING)
    if 'config.json' in names:
      raise ValueError(
        f'--workdir={workdir} is the workdir of a run, not of a study; use '
        'another --workdir'
      )
    if names:
      raise ValueError(
        f'--workdir={workdir} holds no {_FILE}, so it is not the workdir of a '
        f'study; it has: {", ".join(names)}. Use another --workdir'
      )
    return None
  fix = 'put an intact copy back, or use another --workdir'
  saved = files.read_json(path, fix=fix)
  grid = saved.get('grid')
  if not isinstance(grid, dict) or not all(
    isinstance(values, list) and values for values in grid.values()
  ):
    raise ValueError(
      f'{path}: grid must be an object of lists, got {grid!r:.40}; {fix}'
    )
  config = workdir_lib.completed(saved.get('config'), path)
  return saved | {'config': config}


def _check_same(workdir, saved, config, grid):
  """Refuses another config, or other fields, than a study has."""
  unlike = []
  if config is not None:
    unlike = workdir_lib.differences(
      saved['config'], workdir_lib.to_json(config)
    )
  if set(saved['grid']) != set(grid):
    unlike.append(
      f'the fields of --grid are {", ".join(saved["grid"])} there and '
      f'{", ".join(grid)} here'
    )
  if unlike:
    raise ValueError(
      f'--workdir={workdir} is of another study: {"; ".join(unlike)}. Use '
      'another --workdir, or the same config and fields (values may be added)'
    )


def _write(folder, name, text):
  files.write_whole(os.path.join(folder, name), text.encode())


def _warn(message):
  print(f'warning: {message}', file=sys.stderr, flush=True)


def _say(message):
  print(message, flush=True)


def define_flags() -> None:
  """Defines the command's flags; importing this module defines none."""
  config_flags.DEFINE_config_file('config', None, 'A file of configs/.')
  flags.DEFINE(cli.PATH, 'workdir', None, 'Folder of the study.')
  flags.DEFINE_multi_string(
    'grid', [], 'FIELD=VALUE,VALUE of the config; repeat it for more fields.'
  )
  flags.DEFINE_integer(
    'jobs',
    None,
    'Cells at the same time; default: one per core on CPU, else one.',
    lower_bound=1,
  )
  flags.DEFINE_integer(
    'vmap',
    0,
    'Train up to so many cells that differ in learning rate, CLOP weight and '
    'seed alone in one program; 0: each in its own.',
    lower_bound=0,
  )
  flags.DEFINE_bool('report', True, 'Make report.html at the end.')


def main() -> None:
  """The command."""
  values = flags.FLAGS
  if not values.workdir:
    raise ValueError('--workdir must name a folder for the study, got none')
  fields = None
  if values.grid:
    saved = _load(values.workdir)
    base = values.config
    if base is None and saved:
      base = ml_collections.ConfigDict(saved['config'])
    if base is None:
      raise ValueError('--config must name a file of configs/, got none')
    fields = grid_lib.parse(values.grid, base)
  rows = study(
    values.workdir, values.config, fields, jobs=values.jobs, vmap=values.vmap
  )
  _say(f'results: {os.path.join(values.workdir, "results.csv")}')
  by_status = {status: [] for status in ('done', 'diverged', 'failed')}
  for row in rows:
    by_status[row['status']].append(row)
  if values.report and rows:
    _say(f'report: {report.study_report(values.workdir)}')
  for status in ('diverged', 'failed'):
    for row in by_status[status]:
      print(
        f'{status}: {row["cell"]}: {row["error"]}', file=sys.stderr, flush=True
      )
  if by_status['failed']:
    sys.exit(1)


if __name__ == '__main__':
  cli.run(main, define_flags)
