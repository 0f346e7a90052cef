"""The folder of a study: the cells to run, and the results so far."""

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
# A study that was killed early may leave these.
_IGNORED = {'.lock', f'{FILE}.partial'}
_FIX = 'restore an intact copy or use another --workdir'
# Printed when a cell ends, so eval.json must have them.
_RESULTS = dict.fromkeys(
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
    """Reads the folder and writes nothing; see `run.study`.

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
          '--grid must name a field and its values, such as '
          '--grid optimizer.learning_rate=0.1,1; got none'
        )
      saved = {'config': workdir_lib.to_json(config), 'grid': grid}
    grid = grid or saved['grid']
    _check_same(workdir, saved, config, grid)
    self._config = saved['config']
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
    self._outcomes, self._damaged = {}, []
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
      if self._outcomes.get(name, {}).get('status') not in cell.FINAL
    }

  def save(self) -> None:
    """Writes `study.json` and `results.csv`."""
    saved = {'config': self._config, 'grid': self._grid}
    _write(self._workdir, FILE, json.dumps(saved, indent=2) + '\n')
    self._write_results()
    for path in self._damaged:
      print(
        f'warning: {path} is empty or damaged; that cell runs again',
        file=sys.stderr,
        flush=True,
      )

  def forget(self, name: str) -> None:
    """Removes the record of a cell that is to run again, if it has one."""
    with contextlib.suppress(FileNotFoundError):
      os.remove(os.path.join(self.folder(name), cell.RECORD))

  def finish(self, name: str, error: str | None = None) -> dict:
    """Adds the outcome of a cell to the results.

    Args:
      name: Name of the cell.
      error: Reason why its job could not write a record. None if it did.

    Returns:
      The cell's row of `results.csv`.
    """
    outcome = self._read(name)
    if outcome is None or (error and outcome['status'] not in cell.FINAL):
      error = error or f'{self.folder(name)}: its results cannot be read'
      outcome = {'status': 'failed', 'error': error}
      # If even this cannot be written, the other cells can still run.
      with contextlib.suppress(OSError):
        cell.write_record(self.folder(name), outcome)
      self._outcomes[name] = outcome | {'commit': build.commit()}
    self._write_results()
    return self._row(name)

  def rows(self) -> list[dict]:
    """Returns the rows of the requested cells that have ended."""
    return [self._row(name) for name in self.cells if name in self._outcomes]

  def _read(self, name):
    """Reads the outcome of a cell, None if it has not ended."""
    folder = self.folder(name)
    outcome = cell.read_record(folder)
    damaged = os.path.join(folder, cell.RECORD)
    if outcome is not None and outcome['status'] == 'done':
      damaged = os.path.join(folder, 'eval.json')
      numbers = cell.read(damaged, _RESULTS)
      outcome = numbers and outcome | {
        'results': {
          k: v
          for k, v in numbers.items()
          if isinstance(v, (int, float)) and k != 'seed'
        }
      }
    if outcome is not None:
      self._outcomes[name] = outcome
    elif files.exists(damaged):
      self._damaged.append(damaged)
    return outcome

  def _row(self, name):
    values, outcome = self._every[name], self._outcomes[name]
    config = grid_lib.applied(self._config, values)
    return {
      'cell': name,
      'status': outcome['status'],
      'error': outcome['error'],
      **{field: grid_lib.text(value) for field, value in values.items()},
      'seed': config['seed'],
      **outcome.get('results', {}),
      'train_seconds': outcome.get('train_seconds'),
      'evaluate_seconds': outcome.get('evaluate_seconds'),
      'commit': outcome['commit'],
      'config': json.dumps(config, separators=(',', ':')),
    }

  def _write_results(self):
    rows = [self._row(name) for name in self._every if name in self._outcomes]
    last = ('train_seconds', 'evaluate_seconds', 'commit', 'config')
    columns = ['cell', 'status', 'error', *self._grid, 'seed']
    columns += [x for row in rows for x in row if x not in last]
    text = io.StringIO()
    table = csv.DictWriter(text, dict.fromkeys([*columns, *last]), restval='')
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
  if not files.exists(workdir):
    return
  if not files.is_folder(workdir):
    raise ValueError(f'--workdir={workdir} is a file, not a folder')
  names = sorted({*os.listdir(workdir)} - _IGNORED)
  if 'config.json' in names:
    raise ValueError(
      f'--workdir={workdir} is the workdir of a run, not of a study; use '
      'another --workdir'
    )
  if names:
    raise ValueError(
      f'--workdir={workdir} has no {FILE}, so it is not the workdir of a '
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
      f'--workdir={workdir} belongs to another study: {"; ".join(unlike)}. Use '
      'another --workdir, or the same config and fields (values may be added)'
    )


def _write(folder, name, text):
  files.write_whole(os.path.join(folder, name), text.encode())
