"""Tables and the HTML report of evaluated runs; no networks.

A study's report is one page with everything in it (`study_report`): it reads
the files that `clop_jax.study` leaves in its folder and draws with `figures`.
"""

import base64
from collections.abc import Iterator, Sequence
import csv
import dataclasses
import html
import itertools
import json
import os
import statistics

import numpy as np

from clop_jax import figures

_COLUMNS = (
  ('linear top-1', 'linear_top1', '{:.3f}'),
  ('kNN top-1', 'knn_top1', '{:.3f}'),
  ('effective rank', 'effective_rank', '{:.1f}'),
  ('prototype cosine', 'prototype_cosine', '{:.3f}'),
)
# Of a study: title, metric, factor (percent), digits.
_STUDY_COLUMNS = (
  ('linear top-1, %', 'linear_top1', 100, 1),
  ('kNN top-1, %', 'knn_top1', 100, 1),
  ('effective rank', 'effective_rank', 1, 1),
  ('prototype cosine', 'prototype_cosine', 1, 3),
)
_RATE, _BATCH = 'optimizer.learning_rate', 'train.batch_size'
_WEIGHT, _CLASSES = 'loss.clop_weight', 'data.num_classes'
_TITLES = {
  _RATE: 'base learning rate',
  _BATCH: 'batch size, images',
  _WEIGHT: 'CLOP weight',
  'loss.contrastive': 'contrastive loss',
  'loss.clop_distance': 'CLOP distance',
  'prototypes.kind': 'prototype kind',
  'data.label_fraction': 'label fraction',
  'data.label_noise': 'label noise',
  'data.imbalance_factor': 'imbalance factor',
}
_MAIN_FIELDS = (
  'data.name',
  'data.num_classes',
  'data.label_fraction',
  'augment.size',
  'model.depth',
  'model.embedding_dim',
  'loss.contrastive',
  'loss.temperature',
  'loss.clop_weight',
  'loss.clop_distance',
  'prototypes.kind',
  'optimizer.name',
  'optimizer.learning_rate',
  'optimizer.scaling',
  'train.batch_size',
  'train.num_epochs',
)
_NONE = '–'  # noqa: RUF001 (as tables have it)
_STATUSES = ('done', 'diverged', 'failed')
_MOST_PANELS = 8
_TSNE_POINTS = 1000
_TSNE_LEAST = 20  # different points; fewer show nothing that PCA does not
_CURVES = {
  'loss': 'loss',
  'clop_loss': 'CLOP loss',
  'effective_rank': 'effective rank',
}
_CSS = """
body {font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 1060px; margin: 0 auto; padding: 0 16px 48px}
h1 {font-size: 1.6em; line-height: 1.25}
h2 {font-size: 1.25em; margin-top: 2em; border-bottom: 1px solid #ccc}
h3 {font-size: 1.05em; margin-bottom: .3em}
figure {margin: 1.2em 0}
figcaption, .note {color: #444; font-size: .92em; max-width: 75ch}
.scroll {overflow-x: auto}
img {max-width: 100%; height: auto}
table {border-collapse: collapse; font-size: .92em; margin: .6em 0}
th, td {padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: left;
  vertical-align: top}
thead th {border-bottom: 2px solid #888}
th.number {text-align: right}
td.number {text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums}
pre {overflow-x: auto; background: #f5f5f5; padding: .6em; font-size: .85em}
@media (max-width: 700px) {.scroll img {max-width: none}}
"""


@dataclasses.dataclass(frozen=True)
class _Cell:
  """A row of results.csv."""

  name: str
  status: str
  error: str
  settings: dict  # of every grid field but the seed
  seed: object
  row: dict[str, str]

  def number(self, column: str) -> float:
    """NaN where there is none."""
    try:
      return float(self.row.get(column) or 'nan')
    except ValueError:
      return float('nan')


@dataclasses.dataclass(frozen=True)
class _Study:
  workdir: str
  config: dict  # dotted names
  grid: dict[str, list]
  cells: list[_Cell]
  notes: list[str]  # what the page has to say about missing files
  num_classes: int | None = None  # None: not known, or not the same in all

  @property
  def fields(self):
    """Grid fields that vary, but for the seed."""
    return [f for f, v in self.grid.items() if f != 'seed' and len(v) > 1]

  @property
  def size(self):
    """Cells of the whole grid."""
    return int(np.prod([len(v) for v in self.grid.values()], dtype=int))

  def path(self, cell: _Cell, file: str) -> str:
    return os.path.join(self.workdir, 'cells', cell.name, file)

  def where(self, **settings) -> list[_Cell]:
    """Counted cells (done or diverged) of these settings."""
    return [
      c
      for c in self.cells
      if c.status != 'failed' and settings.items() <= c.settings.items()
    ]


def table(names: Sequence[str], results: Sequence[dict]) -> str:
  """A Markdown table of evaluation results, one row a run.

  Args:
    names: of the runs.
    results: each run's `eval.json`.

  Returns:
    The lines, aligned for a terminal.
  """
  header = ['method', *(title for title, _, _ in _COLUMNS)]
  rows = [
    [name, *(f.format(result[key]) for _, key, f in _COLUMNS)]
    for name, result in zip(names, results, strict=True)
  ]
  return _markdown(header, rows)


def study_report(workdir: str) -> str:
  """Writes a study's page, its figures and its table.

  `report.html` has all figures inside and needs neither network nor script;
  `figures/*.png` are the same figures, `table.md` the tables for documents.
  A diverged cell counts as chance accuracy and effective rank 0 in every mean;
  a failed cell is listed and left out. The page says so.

  Args:
    workdir: of a study, finished or not.

  Returns:
    The path of `report.html`.

  Raises:
    ValueError: if the folder is no study's, or its files cannot be read.
  """
  study = _read(workdir)
  body, markdown = _header(study), []
  if study.where():
    body += _sweep_section(study)
    body += _cell_section(study)
    tables = [_results_table(study), *_settling_tables(study)]
    body.append('<h2>Tables</h2>')
    for title, header, rows, caption in tables:
      body.append(f'<h3>{_text(title)}</h3>')
      body.append(_html_table(header, rows))
      body.append(f'<p class="note">{_text(caption)}</p>')
      markdown.append(f'{title}\n\n{_markdown(header, rows)}\n\n{caption}\n')
  else:
    failed = len(study.cells)
    line = (
      f'Nothing to show: all {failed} cells that ran have failed.'
      if failed
      else 'Nothing to show: no cell has a result yet.'
    )
    body.append(f'<p>{line}</p>')
    markdown.append(f'{line}\n')
  if study.notes:
    body.append('<h2>Left out</h2>')
    body.append(_list(dict.fromkeys(study.notes)))
  body.append('<h2>Base config</h2>')
  config = json.dumps(study.config, indent=1)
  body.append(
    f'<details><summary>all fields</summary><pre>{_text(config)}</pre>'
    '</details>'
  )
  _write(os.path.join(workdir, 'table.md'), '\n'.join(markdown))
  path = os.path.join(workdir, 'report.html')
  _write(path, _page(_title(study), body))
  return path


# Reading a study's folder.


def _read(workdir):
  path = os.path.join(workdir, 'study.json')
  if not os.path.exists(path):
    raise ValueError(
      f'workdir={workdir} holds no study.json, so it is not the folder of a '
      'study; make one: python -m clop_jax.study --config=... '
      f'--workdir={workdir} --grid ...'
    )
  try:
    with open(path) as file:
      content = json.load(file)
    config, grid = _flat(content['config']), content['grid']
    grid = {field: list(values) for field, values in grid.items()}
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise ValueError(
      f'{path} must hold "config" and "grid", a list of values for each '
      f'field; got {error!r}'
    ) from error
  cells = _read_cells(os.path.join(workdir, 'results.csv'), grid)
  study = _Study(workdir, config, grid, cells, [])
  return dataclasses.replace(study, num_classes=_num_classes(study))


def _read_cells(path, grid):
  if not os.path.exists(path):
    return []
  with open(path, newline='') as file:
    reader = csv.DictReader(file)
    rows = list(reader)
  missing = {'cell', 'status', *grid} - set(reader.fieldnames or ())
  if missing:
    raise ValueError(
      f'{path} must have a column of every grid field, cell and status; it '
      f'lacks {", ".join(sorted(missing))}'
    )
  cells = []
  for row in rows:
    if row['status'] not in _STATUSES:
      raise ValueError(
        f'{path}: status must be one of {", ".join(_STATUSES)}, got '
        f'{row["status"]!r} for cell {row["cell"]!r}'
      )
    settings = {f: _grid_value(row[f], values) for f, values in grid.items()}
    seed = settings.pop('seed', row.get('seed'))
    cells.append(
      _Cell(
        row['cell'],
        row['status'],
        row.get('error') or '',
        settings,
        seed,
        row,
      )
    )

  def place(cell):
    return [_position(grid[f], v) for f, v in cell.settings.items()]

  # In the order of the grid, whatever order they were run in.
  return sorted(cells, key=place)


def _grid_value(text, values):
  """The value of the grid that a cell of the CSV shows."""
  for value in values:
    if text == str(value) or text == json.dumps(value):
      return value
  for value in values:
    try:
      if _is_number(value) and float(text) == value:
        return value
    except ValueError:
      break
  return text


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


def _evaluations(study) -> Iterator[dict]:
  """The eval.json of each cell that is done and has one."""
  for cell in study.cells:
    if cell.status == 'done':
      try:
        with open(study.path(cell, 'eval.json')) as file:
          yield json.load(file)
      except (OSError, ValueError) as error:
        study.notes.append(f'eval.json of cell {cell.name}: {_short(error)}')


def _arrays(study, cell):
  """The arrays of embeddings.npz, or None with a note."""
  try:
    # np.load would leave a damaged file open.
    with (
      open(study.path(cell, 'embeddings.npz'), 'rb') as file,
      np.load(file) as archive,
    ):
      arrays = {name: archive[name] for name in archive.files}
    return {
      'embeddings': arrays['embeddings'].astype(np.float32),
      'labels': arrays['labels'],
      'spectrum': arrays['spectrum'].astype(np.float32),
      'class_mean_cosines': arrays['class_mean_cosines'].astype(np.float32),
      'prototypes': arrays['prototypes'],
    }
  # What np.load raises for a damaged file depends on where the damage is.
  except Exception as error:
    study.notes.append(f'embeddings.npz of cell {cell.name}: {_short(error)}')
    return None


def _curves(study, cell):
  """'step' and the measures of metrics.jsonl, or None with a note."""
  entries = []
  try:
    with open(study.path(cell, 'metrics.jsonl')) as file:
      for line in file:
        entries.append(json.loads(line))
  except (OSError, ValueError) as error:
    study.notes.append(f'metrics.jsonl of cell {cell.name}: {_short(error)}')
  if not entries:
    return None
  return {
    name: np.array([x.get(name) for x in entries], float)
    for name in ('step', *_CURVES)
  }


def _short(error):
  if isinstance(error, FileNotFoundError):
    return 'there is none'
  return f'cannot be read ({type(error).__name__}: {error})'[:200]


def _num_classes(study):
  if {'data.name', _CLASSES} & set(study.fields):
    return None
  known = [*study.grid.get(_CLASSES, ()), study.config.get(_CLASSES)]
  if known[0]:
    return int(known[0])
  # 0 in the config: as many as the data have, which the prototypes know.
  for cell in study.cells:
    path = study.path(cell, 'embeddings.npz')
    if cell.status == 'done' and os.path.exists(path):
      arrays = _arrays(study, cell)
      if arrays is not None:
        return len(arrays['prototypes'])
  return None


# Numbers.


def _values(study, cells, metric):
  """The metric of each cell that has it; a diverged one counts as collapsed."""
  num_classes = study.num_classes
  values = []
  for cell in cells:
    value = cell.number(metric)
    if cell.status == 'diverged':
      classes = cell.settings.get(_CLASSES) or num_classes
      chance = 1 / classes if classes else np.nan
      value = {
        'linear_top1': chance,
        'knn_top1': chance,
        'effective_rank': 0.0,
      }.get(metric, np.nan)
    if np.isfinite(value):
      values.append(value)
  return values


def _mean(study, metric, **settings):
  values = _values(study, study.where(**settings), metric)
  return statistics.fmean(values) if values else np.nan


def _combinations(study, fields) -> list[dict]:
  """Every combination of the grid's values of these fields, in its order."""
  return [
    dict(zip(fields, values, strict=True))
    for values in itertools.product(*(study.grid[f] for f in fields))
  ]


def _results_table(study):
  fields = study.fields
  seeds = len(study.grid.get('seed', [0]))
  header = [_TITLES.get(f, f) for f in fields]
  header += [title for title, *_ in _STUDY_COLUMNS] + ['seeds', 'diverged']
  rows = []
  for settings in _combinations(study, fields):
    cells = study.where(**settings)
    if not cells:
      continue
    row = [_show(v) for v in settings.values()]
    for _, metric, factor, digits in _STUDY_COLUMNS:
      row.append(
        _mean_and_deviation(
          [factor * v for v in _values(study, cells, metric)], digits
        )
      )
    count = f'{len(cells)}' + (f' of {seeds}' if len(cells) < seeds else '')
    diverged = sum(c.status == 'diverged' for c in cells)
    rows.append([*row, count, str(diverged)])
  caption = (
    'Mean ± standard deviation over the seeds (n - 1 in the denominator; '
    f'{_NONE} with one seed). {_rule(study)}'
  )
  return 'Mean and standard deviation', header, rows, caption


def _rule(study):
  statuses = [cell.status for cell in study.cells]
  diverged, failed = (statuses.count(s) for s in ('diverged', 'failed'))
  lines = []
  if diverged:
    lines.append(
      f'{_count(diverged, "diverged run")} counted at chance accuracy (1 / '
      'number of classes) and effective rank 0, and not at all in the '
      'prototype cosine.'
    )
  if failed:
    lines.append(f'{_count(failed, "failed run")} left out.')
  return ' '.join(lines)


def _count(number, noun):
  return f'{number} {noun} is' if number == 1 else f'{number} {noun}s are'


def _mean_and_deviation(values, digits):
  if not values:
    return _NONE
  deviation = _NONE
  if len(values) > 1:
    deviation = f'{statistics.stdev(values):.{digits}f}'
  return f'{statistics.fmean(values):.{digits}f} ± {deviation}'


def _settling_tables(study):
  """Tables for the questions a study of CLOP asks, where the grid allows."""
  fields = study.fields
  weights = study.grid.get(_WEIGHT, [])
  clop = _clop_weight(study)
  tables = []
  if _RATE in fields:
    tables.append(_spread_table(study, weights if _WEIGHT in fields else []))
  if clop is None:
    return tables
  if _BATCH in fields:
    tables.append(_batch_table(study, clop))
  if study.num_classes:
    tables.append(_rank_table(study, clop))
  return tables


def _clop_weight(study):
  """The weight that is held against 0: the paper's 1 if it is in the grid."""
  weights = study.grid.get(_WEIGHT, [])
  if 0 not in weights or len(weights) < 2:
    return None
  return 1 if 1 in weights else max(weights)


def _spread_table(study, weights):
  others = [f for f in study.fields if f not in (_RATE, _WEIGHT)]
  rates = study.grid[_RATE]
  lines = [{_WEIGHT: w} for w in weights] or [{}]
  clop = _clop_weight(study)
  header = [_TITLES.get(f, f) for f in others]
  header += [_line_name(line) or 'spread' for line in lines]
  header += [f'{_weight_name(clop)} / alone'] if clop is not None else []
  header += ['learning rates']
  rows = []
  for settings in _combinations(study, others):
    means = np.array(
      [
        [
          _mean(study, 'linear_top1', **settings, **line, **{_RATE: r})
          for r in rates
        ]
        for line in lines
      ]
    )
    # The same rates for every line, or the spreads could not be compared.
    shared = np.isfinite(means).all(axis=0)
    row = [_show(v) for v in settings.values()]
    if shared.sum() < 2:
      row += [_NONE] * (len(header) - len(row) - 1)
    else:
      spreads = 100 * np.ptp(means[:, shared], axis=1)
      row += [f'{s:.1f}' for s in spreads]
      if clop is not None:
        alone = spreads[weights.index(0)]
        ratio = spreads[weights.index(clop)] / alone if alone else np.nan
        row.append(f'{ratio:.2f}' if np.isfinite(ratio) else _NONE)
    rows.append([*row, f'{shared.sum()} of {len(rates)}'])
  caption = (
    'Largest minus smallest seed mean of the linear top-1 accuracy over the '
    'learning rates (those with results of every column), percentage points.'
  )
  return 'Spread over the learning rates, points', header, rows, caption


def _batch_table(study, clop):
  others = [f for f in study.fields if f not in (_BATCH, _WEIGHT)]
  small, large = min(study.grid[_BATCH]), max(study.grid[_BATCH])
  header = [
    *(_TITLES.get(f, f) for f in others),
    f'{_weight_name(clop)}, batch {small}, %',
    f'alone, batch {large}, %',
    'difference, points',
  ]
  rows = []
  for settings in _combinations(study, others):
    ours, theirs = (
      100
      * _mean(
        study, 'linear_top1', **settings, **{_WEIGHT: weight, _BATCH: batch}
      )
      for weight, batch in ((clop, small), (0, large))
    )
    numbers = [f'{ours:.1f}', f'{theirs:.1f}', f'{ours - theirs:+.1f}']
    numbers = [_NONE if n.endswith('nan') else n for n in numbers]
    rows.append([*(_show(v) for v in settings.values()), *numbers])
  caption = 'Seed means of the linear top-1 accuracy.'
  return (
    'Smallest batch with CLOP against the largest without',
    header,
    rows,
    caption,
  )


def _rank_table(study, clop):
  others = [f for f in study.fields if f != _WEIGHT]
  num_classes = study.num_classes
  pairs = [
    [
      _mean(study, 'effective_rank', **settings, **{_WEIGHT: weight})
      for weight in (0, clop)
    ]
    for settings in _combinations(study, others)
  ]
  pairs = [p for p in pairs if np.isfinite(p).all()]
  below = [ours for alone, ours in pairs if alone < num_classes]
  held = sum(ours >= num_classes for ours in below)
  header = [
    'settings with both',
    f'alone below {num_classes}',
    f'of these, {_weight_name(clop)} at {num_classes} or above',
  ]
  rows = [[str(len(pairs)), str(len(below)), str(held)]]
  caption = (
    'Settings, by the seed mean of the effective rank of the embeddings.'
  )
  return (
    'Effective rank against the number of classes',
    header,
    rows,
    caption,
  )


# The page's parts.


def _title(study):
  return f'Study of CLOP on {study.config.get("data.name", "unnamed data")}'


def _header(study):
  statuses = [cell.status for cell in study.cells]
  evaluations = list(_evaluations(study))
  times = sorted(str(e['time']) for e in evaluations if 'time' in e)
  counts = ', '.join(f'{statuses.count(s)} {s}' for s in _STATUSES)
  seconds = sum(
    np.nansum([c.number(f'{part}_seconds') for c in study.cells])
    for part in ('train', 'evaluate')
  )
  facts = {
    'cells': f'{counts}, {max(0, study.size - len(statuses))} not yet run; '
    f'the grid has {study.size}',
    'commit': _distinct(cell.row.get('commit') for cell in study.cells),
    'jax': _distinct(e.get('versions', {}).get('jax') for e in evaluations),
    'device': _distinct(e.get('device') for e in evaluations),
    'evaluated': ' to '.join(dict.fromkeys([*times[:1], *times[-1:]])),
    'computing time': f'{seconds / 3600:.2f} hours of training and evaluating, '
    'summed over the cells',
  }
  body = [
    f'<h1>{_text(_title(study))}</h1>',
    _html_table(None, [[k, v or 'not known'] for k, v in facts.items()]),
    '<h2>What was run</h2>',
    '<p class="note">Every combination of these:</p>',
    _html_table(
      None,
      [[f, ', '.join(map(_show, v))] for f, v in study.grid.items()],
    ),
    '<p class="note">with these held fixed (all fields are at the end):</p>',
    _html_table(
      None,
      [
        [f, _show(study.config[f])]
        for f in _MAIN_FIELDS
        if f in study.config and f not in study.grid
      ],
    ),
  ]
  for status in ('diverged', 'failed'):
    cells = [c for c in study.cells if c.status == status]
    if cells:
      body.append(f'<h3>{status.capitalize()} cells</h3>')
      body.append(
        _html_table(
          ['cell', 'error'], [[c.name, c.error or _NONE] for c in cells]
        )
      )
  return body


def _sweep_section(study):
  body = []
  for x in _swept(study):
    body += _sweep(study, x)
  if not body:
    body = ['<p>The grid varies nothing but the seed: no sweep to draw.</p>']
  return ['<h2>Sweeps</h2>', *body]


def _swept(study):
  """The fields that get a figure: the numbers, else one field as dots."""
  fields = study.fields
  numeric = [
    f
    for f in fields
    if all(map(_is_number, study.grid[f]))
    # Two weights are a comparison, not a sweep.
    and not (f == _WEIGHT and len(study.grid[f]) == 2)
  ]
  numeric.sort(key=lambda f: (f != _RATE, f != _BATCH))
  return numeric or [f for f in fields if f != _WEIGHT][:1] or fields


def _sweep(study, x):
  rest = [f for f in study.fields if f != x]
  line = next(
    iter(
      [f for f in rest if f == _WEIGHT]
      + sorted(rest, key=lambda f: all(map(_is_number, study.grid[f])))
    ),
    None,
  )
  panels, fixed = _panels(study, [f for f in rest if f != line])
  lines = _combinations(study, [line] if line else [])
  values = study.grid[x]
  numeric = all(map(_is_number, values))
  order = sorted(values) if numeric else values
  drawn = [
    figures.Panel(
      ', '.join(_setting_name(f, v) for f, v in panel.items()),
      {
        metric: [
          _band(study, metric, factor, x, order, panel | fixed | settings)
          for settings in lines
        ]
        for metric, factor in (('linear_top1', 100), ('effective_rank', 1))
      },
    )
    for panel in panels
  ]
  num_classes = study.num_classes
  references = {}
  if num_classes:
    chance = 100 / num_classes
    references = {
      'linear_top1': (f'chance ({chance:.3g} %)', chance),
      'effective_rank': (f'number of classes ({num_classes})', num_classes),
    }
  title = _TITLES.get(x, x)
  path = os.path.join('figures', f'sweep_{x.replace(".", "_")}.png')
  size = figures.sweep_figure(
    os.path.join(study.workdir, path),
    drawn,
    names=[_line_name(settings) or 'all runs' for settings in lines],
    measures={
      'linear_top1': 'linear top-1 accuracy, %',
      'effective_rank': 'effective rank',
    },
    references=references,
    x=order if numeric else list(map(_show, order)),
    xlabel=title,
  )
  caption = (
    f'Linear top-1 accuracy and effective rank against {title}. '
    + (
      'Lines: means over the seeds; bands'
      if numeric
      else 'Dots: means over the seeds; bars'
    )
    + ': from the smallest to the largest seed.'
  )
  if fixed:
    held = ', '.join(_setting_name(f, v) for f, v in fixed.items())
    caption += f' Drawn at {held}; the tables have the rest.'
  if any(c.status == 'diverged' for c in study.cells):
    caption += (
      ' A cross is a diverged run: it counts at chance accuracy and effective '
      'rank 0 in the means and bands.'
    )
  if any(c.status == 'failed' for c in study.cells):
    caption += ' Failed runs are left out.'
  return [
    f'<h3>Over {_text(title)}</h3>',
    _figure(
      study, path, size, f'Accuracy and effective rank over {title}', caption
    ),
  ]


def _panels(study, fields):
  """Combinations that get a panel, and fields held fixed if these are many."""
  if len(_combinations(study, fields)) <= _MOST_PANELS:
    return _combinations(study, fields), {}
  numeric = [f for f in fields if all(map(_is_number, study.grid[f]))]
  fixed = {}
  for field in numeric:
    values = sorted(study.grid[field])
    base = study.config.get(field)
    fixed[field] = base if base in values else values[len(values) // 2]
  return _combinations(study, [f for f in fields if f not in fixed]), fixed


def _band(study, metric, factor, x, order, settings):
  groups = [study.where(**settings, **{x: value}) for value in order]
  if not any(groups):
    return None
  values = [
    [factor * v for v in _values(study, cells, metric)] for cells in groups
  ]
  crosses = [
    (position, factor * value)
    for position, cells in enumerate(groups)
    for value in _values(
      study, [c for c in cells if c.status == 'diverged'], metric
    )
  ]
  mean, low, high = (
    np.array([take(v) if v else np.nan for v in values])
    for take in (statistics.fmean, min, max)
  )
  return figures.Band(mean, low, high, crosses)


def _cell_section(study):
  """Pictures of a few cells that show what happened."""
  cells, rule = _telling_cells(study)
  if not cells:
    return [
      '<h2>Single cells</h2><p>Every cell that ran has diverged: there are no '
      'embeddings to draw.</p>'
    ]
  names = _cell_names(study, cells)
  arrays = [_arrays(study, cell) for cell in cells]
  curves = [_curves(study, cell) for cell in cells]
  body = ['<h2>Single cells</h2>', f'<p>{_text(rule)} These are:</p>']
  body.append(
    _list(
      f'{name} (seed {cell.seed}): linear top-1 '
      f'{100 * cell.number("linear_top1"):.1f} %, effective rank '
      f'{cell.number("effective_rank"):.1f}; cells/{cell.name}'
      for name, cell in zip(names, cells, strict=True)
    )
  )
  num_classes = study.num_classes

  def add(title, file, draw, caption, **keywords):
    path = os.path.join('figures', f'{file}.png')
    size = draw(os.path.join(study.workdir, path), names, **keywords)
    body.append(f'<h3>{title}</h3>')
    body.append(_figure(study, path, size, title, caption))

  if any(a is not None for a in arrays):
    add(
      'Singular values of the embeddings',
      'spectra',
      figures.spectra_figure,
      'Singular values of the normalized test embeddings, largest first, each '
      'as a share of their sum. A steep fall is a collapse of dimensions.',
      spectra=_of(arrays, 'spectrum'),
      num_classes=num_classes,
    )
    add(
      'Cosines between the class means',
      'class_mean_cosines',
      figures.cosine_figure,
      'Cosines between the mean test embeddings of the classes, not centred. '
      'CLOP asks for 0 off the diagonal; all 1 is a collapse. Grey: a class '
      'without test examples.',
      matrices=_of(arrays, 'class_mean_cosines'),
    )
    rows, labels = _planes(study, cells, arrays)
    if rows:
      add(
        'Embeddings in two dimensions',
        'embeddings_2d',
        figures.planes_figure,
        'Normalized test embeddings, at most '
        f'{_TSNE_POINTS:,} of each cell. PCA: the first two principal '
        'components, on one scale for all cells. t-SNE keeps neighbours '
        'together; its distances and axes have no unit.',
        rows=rows,
        labels=labels,
      )
  if any(c is not None for c in curves):
    references = {}
    if num_classes:
      references['effective_rank'] = (
        f'number of classes ({num_classes})',
        num_classes,
      )
    add(
      'Training curves',
      'curves',
      figures.curves_figure,
      'As logged while training, on training batches.',
      curves=curves,
      measures=_CURVES,
      references=references,
    )
  return body


def _of(arrays, name):
  return [None if a is None else a[name] for a in arrays]


def _telling_cells(study):
  """At most four done cells, and the rule by which they were chosen."""
  done = [c for c in study.cells if c.status == 'done']
  if not done:
    return [], ''
  seeds = study.grid.get('seed', sorted({c.seed for c in done}))
  seed = next(s for s in seeds if any(c.seed == s for c in done))
  done = [c for c in done if c.seed == seed]
  clop = _clop_weight(study)
  if clop is not None:
    pairs = []
    for settings in _combinations(
      study, [f for f in study.fields if f != _WEIGHT]
    ):
      pair = [
        c
        for weight in (0, clop)
        for c in done
        if (settings | {_WEIGHT: weight}).items() <= c.settings.items()
      ]
      ranks = [c.number('effective_rank') for c in pair]
      if len(pair) == 2 and np.isfinite(ranks).all():
        pairs.append((pair, *ranks))
    if pairs:
      mildest = max(pairs, key=lambda pair: pair[1])[0]
      widest = max(pairs, key=lambda pair: abs(pair[2] - pair[1]))[0]
      return mildest + (widest if widest is not mildest else []), (
        f'Of seed {seed}, the setting at which the contrastive loss alone has '
        f'the highest effective rank, and the one at which '
        f'{_weight_name(clop)} changes the effective rank most (which may be '
        'the same), each with both.'
      )
  done = [c for c in done if np.isfinite(c.number('linear_top1'))]
  done.sort(key=lambda c: c.number('linear_top1'))
  chosen = [done[-1], done[0]] if len(done) > 1 else done
  return chosen, (
    f'Of seed {seed}, the cells of the highest and the lowest linear top-1 '
    'accuracy.'
  )


def _cell_names(study, cells):
  """What the cells differ in, CLOP first."""
  fields = [f for f in study.fields if f == _WEIGHT] + [
    f
    for f in study.fields
    if f != _WEIGHT and len({_show(c.settings[f]) for c in cells}) > 1
  ]
  return [
    ', '.join(_setting_name(f, c.settings[f]) for f in fields) or c.name
    for c in cells
  ]


def _planes(study, cells, arrays):
  """Rows for `figures.planes_figure`, and the labels of their points."""
  pca, tsne, labels = [], [], []
  for cell, a in zip(cells, arrays, strict=True):
    points = None if a is None else np.isfinite(a['embeddings']).all(axis=1)
    if points is None or not points.any():
      if points is not None:
        study.notes.append(
          f'embeddings of cell {cell.name}: none of them is finite'
        )
      pca.append(None)
      tsne.append(None)
      labels.append(None)
      continue
    order = np.random.default_rng(0).permutation(np.flatnonzero(points))
    chosen = order[:_TSNE_POINTS]
    embeddings = a['embeddings'][chosen]
    labels.append(a['labels'][chosen])
    pca.append(figures.principal_plane(embeddings))
    different = len(np.unique(embeddings, axis=0))
    if different < _TSNE_LEAST:
      study.notes.append(
        f't-SNE of cell {cell.name}: needs at least {_TSNE_LEAST} different '
        f'embeddings, got {different}'
      )
      tsne.append(None)
    else:
      tsne.append(_tsne(embeddings, pca[-1]))
  rows = [('PCA', pca), ('t-SNE', tsne)]
  return [r for r in rows if any(p is not None for p in r[1])], labels


def _tsne(embeddings, plane):
  # Only here: evaluating a single run need not wait for these imports.
  from sklearn import manifold
  import threadpoolctl

  perplexity = min(30.0, (len(embeddings) - 1) / 3)
  # As scikit-learn would begin, from the plane that is there already.
  init = 1e-4 * plane / plane[:, 0].std()
  fit = manifold.TSNE(
    perplexity=perplexity,
    init=init.astype(np.float32),
    random_state=0,
    learning_rate='auto',
  )
  # Its many short parallel loops come to a crawl where cores are shared.
  with threadpoolctl.threadpool_limits(1, user_api='openmp'):
    return fit.fit_transform(embeddings)


# Names, and pieces of HTML and Markdown.


def _is_number(value):
  return isinstance(value, int | float) and not isinstance(value, bool)


def _show(value):
  if _is_number(value):
    return f'{value:g}' if isinstance(value, float) else str(value)
  return value if isinstance(value, str) else json.dumps(value)


def _weight_name(weight):
  return 'alone' if weight == 0 else f'CLOP (weight {_show(weight)})'


def _setting_name(field, value):
  if field == _WEIGHT:
    return _weight_name(value)
  if isinstance(value, str):
    return value
  return f'{_TITLES.get(field, field)} {_show(value)}'.replace(', images', '')


def _line_name(settings):
  return ', '.join(_setting_name(f, v) for f, v in settings.items())


def _distinct(values):
  return ', '.join(sorted({str(v) for v in values if v}))


def _text(text):
  return html.escape(str(text))


def _list(items):
  return '<ul>' + ''.join(f'<li>{_text(i)}</li>' for i in items) + '</ul>'


def _html_table(header, rows):
  """Without a header, the first cell of each row heads it."""
  parts = ['<div class="scroll"><table>']
  marks = [''] * max(map(len, rows), default=0)
  if header is not None:
    marks = [
      ' class="number"' if all(map(_looks_numeric, column)) else ''
      for column in zip(*rows, strict=True)
    ] or [''] * len(header)
    parts.append('<thead><tr>')
    parts += [
      f'<th scope="col"{mark}>{_text(cell)}</th>'
      for cell, mark in zip(header, marks, strict=True)
    ]
    parts.append('</tr></thead>')
  parts.append('<tbody>')
  for row in rows:
    parts.append('<tr>')
    for place, (cell, mark) in enumerate(zip(row, marks, strict=True)):
      if header is None and place == 0:
        parts.append(f'<th scope="row">{_text(cell)}</th>')
      else:
        parts.append(f'<td{mark}>{_text(cell)}</td>')
    parts.append('</tr>')
  parts.append('</tbody></table></div>')
  return ''.join(parts)


def _looks_numeric(cell):
  return cell.lstrip('+-')[:1].isdigit() or cell == _NONE


def _markdown(header, rows):
  rows = [[c.replace('|', r'\|') for c in row] for row in [header, *rows]]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    '| '
    + ' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True))
    + ' |'
    for row in rows
  ]
  lines.insert(1, '|' + '|'.join('-' * (width + 2) for width in widths) + '|')
  return '\n'.join(lines)


def _figure(study, path, size, alt, caption):
  with open(os.path.join(study.workdir, path), 'rb') as file:
    data = base64.b64encode(file.read()).decode()
  # The width of the page's text is that of the widest figure.
  width, height = (round(100 * inches) for inches in size)
  return (
    '<figure><div class="scroll">'
    f'<img src="data:image/png;base64,{data}" alt="{_text(alt)}" '
    f'width="{width}" height="{height}"></div>'
    f'<figcaption>{_text(caption)}</figcaption></figure>'
  )


def _page(title, body):
  content = '\n'.join(body)
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{_text(title)}</title>\n<style>{_CSS}</style>\n</head>\n'
    f'<body>\n{content}\n</body>\n</html>\n'
  )


def _write(path, text):
  """Never there in part: a page may be open while the study goes on."""
  with open(f'{path}.partial', 'w', encoding='utf-8') as file:
    file.write(text)
  os.replace(f'{path}.partial', path)
