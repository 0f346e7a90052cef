"""A study's files as objects, and what its cells say; no drawing, no page.

`clop_jax.study` leaves `study.json` (base config and grid), `results.csv` (a
row a cell) and a folder for each cell; `read_study` reads them. A diverged cell
counts as chance accuracy (0 where the number of classes is not known) and
effective rank 0, a failed one not at all.
"""

from collections.abc import Iterator, Sequence
import contextlib
import csv
import dataclasses
import functools
import itertools
import json
import os
import statistics
from typing import Any

import numpy as np

from clop_jax.runtime import files

RATE, BATCH = 'optimizer.learning_rate', 'train.batch_size'
WEIGHT = 'loss.clop_weight'
# Advice for a damaged file of a cell.
_AGAIN = 'evaluate that run again'
STATUSES = ('done', 'diverged', 'failed')
_CLASSES = 'data.num_classes'
# What decides how many classes there are if the config does not.
_SOURCE = (
  'data.name',
  'data.data_dir',
  'data.train_split',
  'data.unlabelled_split',
  'data.options',
)
_TITLES = {
  RATE: 'base learning rate',
  BATCH: 'batch size, images',
  WEIGHT: 'CLOP weight',
  'loss.contrastive': 'contrastive loss',
  'loss.clop_distance': 'CLOP distance',
  'prototypes.kind': 'prototype kind',
  'data.label_fraction': 'label fraction',
  'data.label_noise': 'label noise',
  'data.imbalance_factor': 'imbalance factor',
}


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run of a study.

  Attributes:
    name: of its folder.
    status: one of `STATUSES`.
    settings: its value of every grid field but the seed.
    seed: of the run.
    row: its line of results.csv, as text.
  """

  name: str
  status: str
  settings: dict
  seed: object
  row: dict[str, str]

  def number(self, column: str) -> float:
    """The number in this column; NaN where there is none."""
    try:
      return float(self.row.get(column) or 'nan')
    except ValueError:
      return float('nan')


@dataclasses.dataclass(frozen=True)
class Study:
  """What a study was to run and what came of it.

  Attributes:
    workdir: its folder.
    config: the base config by dotted names.
    grid: values of each field that was set; every combination is a cell.
    cells: those with a result, in the order of the grid.
    notes: one for each file that was asked for and could not be read.

  Example:
    >>> from clop_jax.study import results
    >>> grid = {'loss.clop_weight': [0, 1], 'seed': [0, 1]}
    >>> rows = ('done', {'knn_top1': '0.9'}), ('diverged', {})
    >>> cells = [
    ...   results.Cell(f'c{seed}', status, {'loss.clop_weight': 1}, seed, row)
    ...   for seed, (status, row) in enumerate(rows)
    ... ]
    >>> config = {'data.num_classes': 10}
    >>> study = results.Study('runs/a', config, grid, cells, [])
    >>> study.mean('knn_top1', {'loss.clop_weight': 1})
    0.5
  """

  workdir: str
  config: dict
  grid: dict[str, list]
  cells: list[Cell]
  notes: list[str]

  @property
  def fields(self) -> list[str]:
    """Grid fields that vary, but for the seed."""
    return [f for f, v in self.grid.items() if f != 'seed' and len(v) > 1]

  @property
  def size(self) -> int:
    """Cells of the whole grid."""
    return int(np.prod([len(v) for v in self.grid.values()], dtype=int))

  @property
  def clop_weight(self) -> float | None:
    """The weight that is held against 0: the paper's 1 if it is in the grid."""
    weights = self.grid.get(WEIGHT, [])
    if 0 not in weights or len(weights) < 2:
      return None
    return 1 if 1 in weights else max(weights)

  @functools.cached_property
  def num_classes(self) -> int | None:
    """None: not known, or not the same in all cells."""
    known = {self._classes[cell.name] for cell in self.where({})}
    return known.pop() if len(known) == 1 else None

  @functools.cached_property
  def _classes(self) -> dict[str, int | None]:
    """The number of classes of each cell, by its name; None: not known."""
    configs = {cell.name: self._config_of(cell) for cell in self.cells}
    numbers = {name: config.get(_CLASSES) for name, config in configs.items()}
    # 0 in the config: as many as the data have, which an evaluation knows.
    found = {}
    for cell in self.cells:
      if cell.status == 'done' and not numbers[cell.name]:
        evaluation = self.evaluation(cell) or {}
        number = evaluation.get(f'config.{_CLASSES}')
        found.setdefault(_source(configs[cell.name]), number)
    return {
      name: number or found.get(_source(configs[name])) or None
      for name, number in numbers.items()
    }

  @property
  def without_chance(self) -> int:
    """Diverged cells that count at accuracy 0: their classes are unknown."""
    return sum(
      cell.status == 'diverged' and not self._classes[cell.name]
      for cell in self.cells
    )

  def count(self, status: str) -> int:
    """Cells of this status."""
    return sum(cell.status == status for cell in self.cells)

  def is_numeric(self, field: str) -> bool:
    """Whether all values of a grid field are numbers."""
    return all(map(_is_number, self.grid[field]))

  def combinations(self, fields: Sequence[str]) -> list[dict]:
    """Every combination of the grid's values of these fields, in its order."""
    return [
      dict(zip(fields, values, strict=True))
      for values in itertools.product(*(self.grid[f] for f in fields))
    ]

  def where(self, settings: dict) -> list[Cell]:
    """Done and diverged cells of these settings."""
    return [
      cell
      for cell in self.cells
      if cell.status != 'failed' and settings.items() <= cell.settings.items()
    ]

  def values(self, cells: Sequence[Cell], metric: str) -> list[float]:
    """The metric of each cell that has it; a diverged one has collapsed."""
    values = [
      self._collapsed(cell, metric)
      if cell.status == 'diverged'
      else cell.number(metric)
      for cell in cells
    ]
    return [value for value in values if np.isfinite(value)]

  def mean(self, metric: str, settings: dict) -> float:
    """Of `values` over the cells of these settings; NaN if there are none."""
    values = self.values(self.where(settings), metric)
    return statistics.fmean(values) if values else np.nan

  def path(self, cell: Cell, file: str) -> str:
    """Of a cell's file."""
    return os.path.join(self.workdir, 'cells', cell.name, file)

  def evaluation(self, cell: Cell) -> dict | None:
    """A cell's eval.json by dotted names, or None with a note."""
    with self._noting(cell, 'eval.json') as path:
      return _flat(files.read_json(path, fix=_AGAIN))
    return None

  def evaluations(self) -> list[dict]:
    """`evaluation` of each done cell that has one."""
    done = [cell for cell in self.cells if cell.status == 'done']
    return [e for e in map(self.evaluation, done) if e is not None]

  def arrays(self, cell: Cell) -> dict[str, np.ndarray] | None:
    """The arrays of a cell's embeddings.npz, or None with a note."""
    names = ('embeddings', 'labels', 'spectrum', 'class_mean_cosines')
    with self._noting(cell, 'embeddings.npz') as path:
      arrays = files.read_npz(path, names, fix=_AGAIN)
      return {
        name: array if name == 'labels' else array.astype(np.float32)
        for name, array in arrays.items()
      }
    return None

  def curves(
    self, cell: Cell, measures: Sequence[str]
  ) -> dict[str, np.ndarray] | None:
    """'step' and these measures of metrics.jsonl, NaN where not logged.

    From a damaged line on it is left out, with a note; None: nothing is left.
    """
    entries = []
    with self._noting(cell, 'metrics.jsonl') as path:
      fix = 'the lines before it are used'
      for entry in files.read_json_lines(path, fix=fix):
        entries.append(entry)
      if not entries:
        raise ValueError('it has no whole line')
    if not entries:
      return None
    return {
      name: np.array([entry.get(name) for entry in entries], float)
      for name in ('step', *measures)
    }

  def _collapsed(self, cell, metric):
    if metric == 'effective_rank':
      return 0.0
    if metric in ('linear_top1', 'knn_top1'):
      number = self._classes[cell.name]
      return 1 / number if number else 0.0  # below any chance
    return np.nan

  def _config_of(self, cell):
    """The config that a cell ran with, by dotted names."""
    if cell.row.get('config'):
      try:
        return _flat(json.loads(cell.row['config']))
      except (ValueError, AttributeError) as error:
        self.notes.append(f'config of cell {cell.name}: {error}')
    return self.config | cell.settings

  @contextlib.contextmanager
  def _noting(self, cell, file) -> Iterator[str]:
    """Gives the file's path; an error while reading it becomes a note."""
    try:
      yield self.path(cell, file)
    except FileNotFoundError:
      self.notes.append(f'{file} of cell {cell.name}: there is none')
    except (ValueError, OSError) as error:
      reason = f'cannot be read ({type(error).__name__}: {error})'[:300]
      self.notes.append(f'{file} of cell {cell.name}: {reason}')


def read_study(workdir: str) -> Study:
  """Reads a study, finished or not; the files of its cells when asked for.

  Args:
    workdir: of the study.

  Returns:
    The study; it has no cells while there is no results.csv.

  Raises:
    ValueError: if the folder is no study's, or its files cannot be read.
  """
  path = os.path.join(workdir, 'study.json')
  if not files.exists(path):
    raise ValueError(
      f'workdir={workdir} holds no study.json, so it is not the folder of a '
      'study; make one: python -m clop_jax.study --config=... '
      f'--workdir={workdir} --grid ...'
    )
  try:
    content = files.read_json(path, fix='put an intact copy back')
    config = _flat(content['config'])
    grid = {field: list(values) for field, values in content['grid'].items()}
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise ValueError(
      f'{path} must hold "config" and "grid", a list of values for each '
      f'field; got {error!r}'
    ) from error
  path = os.path.join(workdir, 'results.csv')
  cells = _read_cells(path, grid) if files.exists(path) else []
  return Study(workdir, config, grid, cells, [])


def telling_cells(study: Study) -> tuple[list[Cell], str]:
  """At most four done cells of one seed that show what happened.

  With weights of CLOP in the grid, two pairs of a cell without and one with it:
  the mildest setting, and the one in which CLOP changes the effective rank
  most. Without, the best and the worst cell.

  Returns:
    The cells, and the rule by which they were chosen, in a sentence.
  """
  done = [c for c in study.cells if c.status == 'done']
  if not done:
    return [], ''
  seeds = study.grid.get('seed', [])
  seed = min((c.seed for c in done), key=lambda s: _position(seeds, s))
  done = [c for c in done if c.seed == seed]
  clop = study.clop_weight
  pairs: list[tuple[Any, float, float]] = []
  if clop is not None:
    for settings in study.combinations(
      [f for f in study.fields if f != WEIGHT]
    ):
      pair = [
        c
        for weight in (0, clop)
        for c in done
        if (settings | {WEIGHT: weight}).items() <= c.settings.items()
      ]
      ranks = [c.number('effective_rank') for c in pair]
      if len(pair) == 2 and np.isfinite(ranks).all():
        pairs.append((pair, ranks[0], ranks[1]))
  if pairs:
    mildest = max(pairs, key=lambda pair: pair[1])[0]
    widest = max(pairs, key=lambda pair: abs(pair[2] - pair[1]))[0]
    return mildest + (widest if widest is not mildest else []), (
      f'Of seed {seed}, the setting at which the contrastive loss alone has '
      'the highest effective rank, and the one at which '
      f'{settings_name({WEIGHT: clop})} changes the effective rank most '
      '(which may be the same), each with both.'
    )
  done = [c for c in done if np.isfinite(c.number('linear_top1'))]
  done.sort(key=lambda c: c.number('linear_top1'))
  return [done[-1], done[0]] if len(done) > 1 else done, (
    f'Of seed {seed}, the cells of the highest and the lowest linear top-1 '
    'accuracy.'
  )


def lone_divergences(study: Study) -> list[str]:
  """Settings at which only the run without or only that with CLOP diverged.

  These have no embeddings of one side to draw, so no cell of `telling_cells`.

  Returns:
    At most two sentences, one for each side, with the seeds of each setting.
  """
  if study.clop_weight is None:
    return []
  alone, clop = {WEIGHT: 0}, {WEIGHT: study.clop_weight}
  name = settings_name(clop)

  def seeds(settings, status):
    return [c.seed for c in study.where(settings) if c.status == status]

  sentences = []
  for told, lost, kept in (
    (f'Diverged alone and not with {name}', alone, clop),
    (f'Diverged with {name} and not alone', clop, alone),
  ):
    found = []
    for settings in study.combinations(
      [f for f in study.fields if f != WEIGHT]
    ):
      survived = seeds(settings | kept, 'done')
      both = [s for s in seeds(settings | lost, 'diverged') if s in survived]
      if both:
        which = f'seed{"s"[: len(both) - 1]} {", ".join(map(show, both))}'
        where = settings_name(settings)
        found.append(f'{where} ({which})' if where else which)
    if found:
      sentences.append(f'{told}: {"; ".join(found)}.')
  return sentences


def title(field: str) -> str:
  """What a config field is called, with its unit."""
  return _TITLES.get(field, field)


def show(value: object) -> str:
  """A value of a config field as text."""
  if isinstance(value, float):
    return f'{value:g}'
  # None, as `--grid` takes it, and not JSON's null.
  text = value is None or isinstance(value, str)
  return str(value) if text else json.dumps(value)


def settings_name(settings: dict) -> str:
  """What cells of these settings are called.

  Example:
    >>> from clop_jax.study import results
    >>> results.settings_name({'loss.clop_weight': 0, 'train.batch_size': 64})
    'alone, batch size 64'
  """
  names = []
  for field, value in settings.items():
    if field == WEIGHT:
      names.append('alone' if value == 0 else f'CLOP (weight {show(value)})')
    elif isinstance(value, str):
      names.append(value)
    else:
      # A name says what, not in which unit.
      names.append(f'{title(field).split(",")[0]} {show(value)}')
  return ', '.join(names)


def _read_cells(path, grid):
  try:
    with open(path, newline='', encoding='utf-8') as file:
      reader = csv.DictReader(file)
      rows = list(reader)
    if any(None in row or None in row.values() for row in rows):
      raise ValueError('a line has more or fewer columns than the first one')
  except (ValueError, csv.Error) as error:
    raise ValueError(
      f'{path} is damaged ({error}); run the study again, which writes it anew'
    ) from error
  missing = {'cell', 'status', *grid} - set(reader.fieldnames or ())
  if missing:
    raise ValueError(
      f'{path} must have a column of every grid field, cell and status; it '
      f'lacks {", ".join(sorted(missing))}'
    )
  cells = []
  for row in rows:
    if row['status'] not in STATUSES:
      raise ValueError(
        f'{path}: status must be one of {", ".join(STATUSES)}, got '
        f'{row["status"]!r} for cell {row["cell"]!r}'
      )
    settings = {f: _grid_value(row[f], values) for f, values in grid.items()}
    seed = settings.pop('seed', row.get('seed'))
    cells.append(Cell(row['cell'], row['status'], settings, seed, row))
  # In the order of the grid, whatever order they were run in.
  return sorted(
    cells, key=lambda c: [_position(grid[f], v) for f, v in c.settings.items()]
  )


def _grid_value(text, values):
  """The value of the grid that a cell of the CSV shows."""
  for value in values:
    if text in (str(value), json.dumps(value)):
      return value
  try:
    number = float(text)
  except ValueError:
    return text
  return next((v for v in values if _is_number(v) and v == number), text)


def _source(config):
  """What tells a cell's data from other data, to look them up by."""
  return json.dumps(
    {f: v for f, v in config.items() if f.startswith(_SOURCE)}, sort_keys=True
  )


def _position(values, value):
  return values.index(value) if value in values else len(values)


def _flat(config, prefix=''):
  fields = {}
  for name, value in config.items():
    if isinstance(value, dict) and value:
      fields |= _flat(value, f'{prefix}{name}.')
    else:
      fields[f'{prefix}{name}'] = value
  return fields


def _is_number(value):
  return isinstance(value, int | float) and not isinstance(value, bool)
