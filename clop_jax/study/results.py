"""The results of a study as data frames and rows of tables."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
import os

import numpy as np
import pandas as pd

from clop_jax.evaluation import tables
from clop_jax.runtime import files
from clop_jax.study import grid as grid_lib
from clop_jax.study import plan

WEIGHT = 'loss.clop_weight'
_STATUSES = ('failed', 'diverged', 'done')
# Title, factor (percent) and digits of each metric in tables.
_METRICS = {
  'linear_top1': ('linear top-1, %', 100, 1),
  'knn_top1': ('kNN top-1, %', 100, 1),
  'effective_rank': ('effective rank', 1, 1),
  'prototype_cosine': ('prototype cosine', 1, 3),
}
_TITLES = {
  'optimizer.learning_rate': 'base learning rate',
  'train.batch_size': 'batch size, images',
  WEIGHT: 'CLOP weight',
  'loss.contrastive': 'contrastive loss',
  'loss.clop_distance': 'CLOP distance',
  'prototypes.kind': 'prototype kind',
  'data.label_fraction': 'label fraction',
  'data.label_noise': 'label noise',
  'data.imbalance_factor': 'imbalance factor',
}

_number = functools.partial(pd.to_numeric, errors='coerce')


@dataclasses.dataclass(frozen=True)
class Study:
  """A study and its results so far.

  Attributes:
    workdir: Folder of the study.
    config: Base config, by dotted names.
    grid: Values of each field, as text. Every combination is a cell.
    cells: Cells with a result, in the order of the grid. Each field of the grid
      is a categorical column, each metric a column of numbers.
    notes: Descriptions of files that could not be read.
  """

  workdir: str
  config: dict
  grid: dict[str, list[str]]
  cells: pd.DataFrame
  notes: list[str]

  @property
  def fields(self) -> list[str]:
    """Fields of the grid that vary, without the seed."""
    return [f for f, v in self.grid.items() if f != 'seed' and len(v) > 1]

  @property
  def num_classes(self) -> int | None:
    """Number of classes, or None if it is unknown or differs between cells."""
    numbers = self.cells['num_classes'].unique()
    return int(numbers[0]) if len(numbers) == 1 and numbers[0] > 0 else None

  @functools.cached_property
  def counted(self) -> pd.DataFrame:
    """Cells as they count in means.

    Diverged cells have effective rank 0 and the accuracy of chance, or 0 if the
    number of classes is unknown. Failed cells have no metrics.
    """
    cells = self.cells.copy()
    diverged = cells['status'] == 'diverged'
    cells.loc[cells['status'] != 'done', [*_METRICS]] = np.nan
    for metric in ('linear_top1', 'knn_top1'):
      cells.loc[diverged, metric] = (1 / cells['num_classes']).fillna(0)
    cells.loc[diverged, 'effective_rank'] = 0
    return cells

  def is_numeric(self, field: str) -> bool:
    """Returns True if all values of a field of the grid are numbers."""
    return all(math.isfinite(_number(text)) for text in self.grid[field])

  def examples(self) -> dict[str, str]:
    """Returns the names of at most four done cells of one seed.

    These are the first two and the last two settings, with the first and the
    last of the CLOP weights only.
    """
    done = self.cells[self.cells['status'] == 'done']
    fields = sorted(self.fields, key=lambda field: field == WEIGHT)
    done = done[done['seed'] == done['seed'].min()]
    done = done.sort_values(fields, kind='stable') if fields else done
    if WEIGHT in fields:
      done = done[done[WEIGHT].isin([self.grid[WEIGHT][i] for i in (0, -1)])]
    done = pd.concat([done[:2], done[2:][-2:]])
    fields = [f for f in fields if f == WEIGHT or done[f].nunique() > 1]
    settings = done[fields[::-1]].astype(str).to_dict('records')
    names = map(settings_name, settings)
    return {c: n or c for c, n in zip(done['cell'], names, strict=True)}

  def arrays(self, cell: str) -> dict[str, np.ndarray]:
    """Returns the arrays of a cell's embeddings.npz, or {} with a note."""
    names = ('embeddings', 'labels', 'spectrum')
    read = functools.partial(files.read_npz, names=names)
    return self._read(cell, 'embeddings.npz', read)

  def curves(self, cell: str) -> pd.DataFrame:
    """Returns a cell's metrics.jsonl up to a damaged line, with a note."""
    rows: list[dict] = []

    def read(path, fix):
      rows.extend(files.read_json_lines(path, fix=fix))

    self._read(cell, 'metrics.jsonl', read)
    return pd.DataFrame(rows, dtype=float)

  def evaluation(self, cell: str) -> dict:
    """Returns a cell's eval.json by dotted names, or {} with a note."""
    return _flat(self._read(cell, 'eval.json', files.read_json))

  def _read(self, cell: str, file: str, read: Callable) -> dict:
    try:
      path = os.path.join(self.workdir, 'cells', cell, file)
      return read(path, fix='evaluate that cell or run it again')
    except FileNotFoundError:
      self.notes.append(f'{file} of cell {cell}: does not exist')
    except (ValueError, OSError) as error:
      self.notes.append(f'{file} of cell {cell}: cannot be read ({error})')
    return {}


def read_study(workdir: str) -> Study:
  """Reads a study, finished or not; without results.csv it has no cells.

  Raises:
    ValueError: If the folder holds no study, or its files are damaged.
  """
  saved = plan.load(workdir)
  if saved is None:
    raise ValueError(f'workdir={workdir} has no {plan.FILE}, so it is no study')
  grid = {f: list(map(grid_lib.text, v)) for f, v in saved['grid'].items()}
  cells = _read_cells(workdir, grid)
  study = Study(workdir, _flat(saved['config']), grid, cells, [])
  _add_evaluations(study)
  return study


def groups(
  cells: pd.DataFrame, fields: Sequence[str]
) -> list[tuple[dict[str, str], pd.DataFrame]]:
  """Returns each setting of these fields and the cells that have it."""
  if not fields:
    return [({}, cells)]
  grouped = cells.groupby(list(fields), observed=True)
  return [(dict(zip(fields, k, strict=True)), group) for k, group in grouped]


def means(study: Study) -> list[dict[str, str]]:
  """Returns a row for each setting, by column title: mean ± deviation."""
  rows, seeds = [], len(study.grid.get('seed', ['']))
  for settings, cells in groups(study.counted, study.fields):
    row = {title(field): text for field, text in settings.items()}
    for metric, (name, factor, digits) in _METRICS.items():
      mean, deviation = cells[metric].mean(), cells[metric].std()
      row[name] = _shown(factor * mean, digits)
      if row[name] != tables.NONE:
        row[name] += f' ± {_shown(factor * deviation, digits)}'
    count = cells['status'].value_counts().get
    ran = len(cells) - count('failed', 0)
    row['seeds'] = f'{ran}' if ran == seeds else f'{ran} of {seeds}'
    row['diverged'] = f'{count("diverged", 0)}'
    rows.append(row)
  return rows


def listed(study: Study) -> list[dict[str, str]]:
  """Returns a row for each cell, by column title; those not done are first."""
  cells = study.cells.sort_values(
    'status', key=lambda s: s.map(_STATUSES.index), kind='stable'
  ).astype(dict.fromkeys(study.grid, str))
  rows = {title(field): cells[field] for field in (*study.grid, 'status')}
  for metric, (name, factor, digits) in _METRICS.items():
    rows[name] = [_shown(factor * value, digits) for value in cells[metric]]
  return pd.DataFrame(rows | dict(cells[['error', 'cell']])).to_dict('records')


def title(field: str) -> str:
  """Returns the title of a config field, with its unit."""
  return _TITLES.get(field, field)


def settings_name(settings: dict[str, str]) -> str:
  """Returns a name for the cells with these settings.

  Example:
    >>> from clop_jax.study import results
    >>> results.settings_name({'loss.clop_weight': '0', 'seed': '8'})
    'without CLOP, seed 8'
  """
  names = []
  for field, text in settings.items():
    # A text stands for itself, a number needs its field but no unit.
    named = math.isnan(_number(text)) and text not in ('true', 'false', 'None')
    name = text if named else f'{title(field).split(",")[0]} {text}'
    names.append('without CLOP' if (field, text) == (WEIGHT, '0') else name)
  return ', '.join(names)


def _read_cells(workdir, grid):
  path = os.path.join(workdir, plan.RESULTS)
  columns = ['cell', 'status', *grid]
  damaged = f'{path} is damaged; run the study again to rewrite it: '
  try:
    cells = pd.read_csv(path, dtype=str, keep_default_na=False)
  except FileNotFoundError:
    cells = pd.DataFrame(columns=columns, dtype=str)
  except ValueError as error:
    raise ValueError(f'{damaged}{error}') from error
  missing = sorted(set(columns) - set(cells))
  if missing:
    raise ValueError(f'{damaged}it lacks {", ".join(missing)}')
  for cell, status in zip(cells['cell'], cells['status'], strict=True):
    if status not in _STATUSES:
      raise ValueError(f'{damaged}status is {status!r:.40} for cell {cell:.40}')
  for field, values in grid.items():
    levels = list(dict.fromkeys([*values, *cells[field]]))
    cells[field] = pd.Categorical(cells[field], levels, ordered=True)
  numbers = [*_METRICS, 'train_seconds', 'evaluate_seconds']
  columns = [*cells, 'error', 'commit', 'seed', *numbers]
  cells = cells.reindex(columns=list(dict.fromkeys(columns)), fill_value='')
  cells[numbers] = cells[numbers].apply(_number).astype(float)
  return cells.sort_values(list(grid), ignore_index=True)


def _add_evaluations(study):
  """Adds columns from eval.json, and the number of classes of every cell."""
  cells, field = study.cells, 'data.num_classes'
  evaluations = [
    study.evaluation(cell) if status == 'done' else {}
    for cell, status in zip(cells['cell'], cells['status'], strict=True)
  ]
  for column in ('versions.jax', 'device', 'time'):
    cells[column] = [str(e.get(column) or '') for e in evaluations]
  known = cells.get(field, pd.Series(study.config.get(field), cells.index))
  known = _number(known.astype(object)).astype(float)
  # If the config has no number, it is that of the data.
  known = known.where(
    known > 0, [_number(e.get(f'config.{field}')) for e in evaluations]
  )
  # A diverged cell has as many classes as done cells on the same data.
  of_data = ('data.name', 'data.data_dir', 'data.options', 'data.train_split')
  data = [cells[f] for f in study.fields if f.startswith(of_data)]
  same = known.groupby(data or [known.index >= 0], observed=True)
  cells['num_classes'] = known.fillna(same.transform('first'))


def _flat(config):
  return pd.json_normalize(config).to_dict('records')[0]


def _shown(value, digits):
  return f'{value:.{digits}f}' if math.isfinite(value) else tables.NONE
