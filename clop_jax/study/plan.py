"""The folder of a study: what is to be run, and what is saved."""

import contextlib
import csv
import io
import json
import os
import sys

import ml_collections

from clop_jax.experiment import build
from clop_jax.experiment import workdir as workdir_lib
from clop_jax.runtime import files
from clop_jax.study import cell
from clop_jax.study import grid as grid_lib

FILE, RESULTS = 'study.json', 'results.csv'
# A study killed before it began may leave these.
_NOTHING = {'.lock', f'{FILE}.partial'}
_FIX = 'put an intact copy back, or use another --workdir'
# What the line about a cell shows of its eval.json.
_SHOWN = dict.fromkeys(
  ('linear_top1', 'knn_top1', 'effective_rank'), int | float
)


class Plan:
  """The cells of a study, and the outcomes of those that ended.

  Attributes:
    cells: Config of each requested cell (as JSON has it), by name.
  """

  def __init__(
    self,
    workdir: str,
    config: ml_collections.ConfigDict | None,
    grid: dict[str, list] | None,
  ):
    """Reads the folder, and writes nothing; see `run.study`.

    Raises:
      ValueError: If the folder holds something else or another study, or the
        config or grid is missing.
    """
    self._workdir = workdir
    saved = load(workdir)
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

  def folder(self, name: str) -> str:
    """Returns the workdir of a cell."""
    return os.path.join(self._workdir, 'cells', name)

  def todo(self) -> dict[str, dict]:
    """Returns the configs of the cells that are neither done nor diverged."""
    return {
      name: config
      for name, config in self.cells.items()
      if self._outcomes.get(name, {}).get('status') not in cell.THROUGH
    }

  def save(self) -> None:
    """Writes `study.json` and `results.csv`."""
    saved = {'config': self._config, 'grid': self._grid}
    _write(self._workdir, FILE, json.dumps(saved, indent=2) + '\n')
    self._write_results()
    for path in self._broken:
      print(
        f'warning: {path} is empty or damaged; that cell runs again',
        file=sys.stderr,
        flush=True,
      )

  def forget(self, name: str) -> None:
    """Removes the record of a cell that is to run again, if it has one."""
    with contextlib.suppress(FileNotFoundError):
      os.remove(os.path.join(self.folder(name), cell.RECORD))

  def record(self, name: str) -> dict | None:
    """Returns the record that a cell's job has written, or None."""
    return self._load_of(name, cell.RECORD, cell.FIELDS)

  def finish(self, name: str, error: str | None = None) -> dict:
    """Adds the outcome of a cell to the results.

    Args:
      name: Name of the cell.
      error: Reason why its job could not write a record. None if it did.

    Returns:
      The cell's row of `results.csv`.
    """
    self._outcomes.pop(name, None)
    self._read(name)
    outcome = self._outcomes.get(name)
    if outcome is None:
      error = error or f'{self.folder(name)}: its results cannot be read'
    if error and (outcome is None or outcome['status'] not in cell.THROUGH):
      outcome = {'status': 'failed', 'error': error}
      self._outcomes[name] = outcome | {'commit': build.commit()}
      self._results[name] = {}
      # Where even this cannot be written, the other cells can still run.
      with contextlib.suppress(OSError):
        cell.write_record(self.folder(name), outcome)
    self._write_results()
    return self._row(name)

  def rows(self) -> list[dict]:
    """Returns the rows of the requested cells that have ended."""
    return [self._row(name) for name in self.cells if name in self._outcomes]

  def _read(self, name):
    outcome = self.record(name)
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
    """Returns the content of a cell's file, None if missing or damaged."""
    path = os.path.join(self.folder(name), file)
    if not files.exists(path):
      return None
    try:
      content = files.read_json(path, fix='that cell runs again')
    except ValueError:
      content = {}
    if all(isinstance(content.get(x, ()), kind) for x, kind in fields.items()):
      return content
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
    _write(self._workdir, RESULTS, text.getvalue())


def load(workdir: str) -> dict | None:
  """Returns `study.json` of a folder, or None if the folder is empty.

  Raises:
    ValueError: If the folder holds something else.
  """
  if files.is_remote(workdir):
    raise ValueError(
      f'--workdir of a study must be a local folder, got {workdir}'
    )
  path = os.path.join(workdir, FILE)
  if not files.exists(path):
    _check_empty(workdir)
    return None
  saved = files.read_json(path, fix=_FIX)
  grid = saved.get('grid')
  if not isinstance(grid, dict) or not all(
    isinstance(values, list) and values for values in grid.values()
  ):
    raise ValueError(
      f'{path}: grid must be an object of lists, got {grid!r:.40}; {_FIX}'
    )
  config = workdir_lib.completed(saved.get('config'), path)
  return saved | {'config': config}


def _check_empty(workdir):
  """Refuses a folder that holds something other than a study."""
  if not files.exists(workdir):
    return
  if not files.is_folder(workdir):
    raise ValueError(f'--workdir={workdir} is a file, not a folder')
  names = sorted({*os.listdir(workdir)} - _NOTHING)
  if 'config.json' in names:
    raise ValueError(
      f'--workdir={workdir} is the workdir of a run, not of a study; use '
      'another --workdir'
    )
  if names:
    raise ValueError(
      f'--workdir={workdir} holds no {FILE}, so it is not the workdir of a '
      f'study; it has: {", ".join(names)}. Use another --workdir'
    )


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
