"""The HTML report of a study.

A study's report is one page with everything in it (`study_report`): tables of
its `results`, and its `study_figures`.
"""

import base64
import html
import json
import os
import statistics

import numpy as np

from clop_jax.evaluation import tables
from clop_jax.study import figures as study_figures
from clop_jax.study import results

# Of a study: title, metric, factor (percent), digits.
_STUDY_COLUMNS = (
  ('linear top-1, %', 'linear_top1', 100, 1),
  ('kNN top-1, %', 'knn_top1', 100, 1),
  ('effective rank', 'effective_rank', 1, 1),
  ('prototype cosine', 'prototype_cosine', 1, 3),
)
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


def study_report(workdir: str) -> str:
  """Writes a study's page, its figures and its table.

  `report.html` has all figures inside and needs neither network nor script;
  `figures/*.png` are the same figures, `table.md` the means for documents.
  A diverged cell counts as chance accuracy and effective rank 0 in every mean;
  a failed cell is listed and left out. The page says so.

  Args:
    workdir: of a study, finished or not.

  Returns:
    The path of `report.html`.

  Raises:
    ValueError: if the folder is no study's, or its files cannot be read.
  """
  study = results.read_study(workdir)
  title = f'Study of CLOP on {study.config.get("data.name", "unnamed data")}'
  body = [f'<h1>{_text(title)}</h1>', *_header(study)]
  if study.where({}):
    means = [_means_table(study), *_settling_tables(study)]
    body += [*_sweep_section(study), *_cell_section(study)]
    body.append('<h2>Tables</h2>')
    for name, header, rows, caption in means:
      body.append(f'<h3>{_text(name)}</h3>')
      body.append(_html_table(header, rows))
      body.append(f'<p class="note">{_text(caption)}</p>')
    # With each table: it may be pasted without the others.
    markdown = [
      f'{name}\n\n{_grid_line(study)}\n\n{tables.markdown(header, rows)}\n\n'
      f'{caption}\n'
      for name, header, rows, caption in means
    ]
  else:
    failed = len(study.cells)
    line = (
      f'Nothing to show: all {failed} cells that ran have failed.'
      if failed
      else 'Nothing to show: no cell has a result yet.'
    )
    body.append(f'<p>{line}</p>')
    markdown = [f'{line}\n']
  if study.notes:
    body += ['<h2>Left out</h2>', _html_list(dict.fromkeys(study.notes))]
  config = '\n'.join(
    f'{f}: {"None" if v is None else json.dumps(v)}'
    for f, v in study.config.items()
  )
  body.append('<h2>Base config</h2>')
  body.append(
    '<details><summary>all fields</summary>'
    f'<pre>{_text(config)}</pre></details>'
  )
  tables.write(os.path.join(workdir, 'table.md'), '\n'.join(markdown))
  path = os.path.join(workdir, 'report.html')
  tables.write(path, _page(title, body))
  return path


# Sections of the page: lists of pieces of HTML.


def _header(study):
  evaluations = study.evaluations()
  times = sorted(str(e['time']) for e in evaluations if 'time' in e)
  counts = ', '.join(f'{study.count(s)} {s}' for s in results.STATUSES)
  missing = max(0, study.size - len(study.cells))
  seconds = sum(
    np.nansum([c.number(f'{part}_seconds') for c in study.cells])
    for part in ('train', 'evaluate')
  )
  facts = {
    'cells': f'{counts}, {missing} not yet run; the grid has {study.size}',
    'commit': _distinct(cell.row.get('commit') for cell in study.cells),
    'jax': _distinct(e.get('versions.jax') for e in evaluations),
    'device': _distinct(e.get('device') for e in evaluations),
    'evaluated': ' to '.join(dict.fromkeys([*times[:1], *times[-1:]])),
    'computing time': f'{seconds / 3600:.2f} hours of training and evaluating, '
    'summed over the cells',
  }
  fixed = [f for f in _MAIN_FIELDS if f in study.config and f not in study.grid]
  body = [
    _html_facts({name: fact or 'not known' for name, fact in facts.items()}),
    '<h2>What was run</h2>',
    '<p class="note">Every combination of these:</p>',
    _html_facts(_grid_values(study)),
    '<p class="note">with these held fixed (all fields are at the end):</p>',
    _html_facts({f: results.show(study.config[f]) for f in fixed}),
  ]
  for status in ('diverged', 'failed'):
    cells = [c for c in study.cells if c.status == status]
    if cells:
      errors = [[c.name, c.row.get('error') or tables.NONE] for c in cells]
      body.append(f'<h3>{status.capitalize()} cells</h3>')
      body.append(_html_table(['cell', 'error'], errors))
  return body


def _sweep_section(study):
  drawn = [_html_figure(f) for f in study_figures.sweep_figures(study)]
  if not drawn:
    drawn = ['<p>The grid varies nothing but the seed: no sweep to draw.</p>']
  return ['<h2>Sweeps</h2>', *drawn]


def _cell_section(study):
  cells, rule = results.telling_cells(study)
  if not cells:
    return [
      '<h2>Single cells</h2><p>Every cell that ran has diverged: there are no '
      'embeddings to draw.</p>'
    ]
  names = study_figures.cell_names(study, cells)
  return [
    '<h2>Single cells</h2>',
    f'<p>{_text(rule)} These are:</p>',
    _html_list(
      f'{name} (seed {cell.seed}): linear top-1 '
      f'{100 * cell.number("linear_top1"):.1f} %, effective rank '
      f'{cell.number("effective_rank"):.1f}; cells/{cell.name}'
      for name, cell in zip(names, cells, strict=True)
    ),
    *(f'<p>{_text(s)}</p>' for s in results.lone_divergences(study)),
    *map(_html_figure, study_figures.cell_figures(study, cells)),
  ]


# Tables: title, header, rows of text, caption.


def _means_table(study):
  seeds = len(study.grid.get('seed', [0]))
  header = [
    *map(results.title, study.fields),
    *(title for title, *_ in _STUDY_COLUMNS),
    'seeds',
    'diverged',
  ]
  rows = []
  for settings in study.combinations(study.fields):
    cells = study.where(settings)
    if cells:
      means = [
        _mean_and_deviation(
          [factor * v for v in study.values(cells, metric)], digits
        )
        for _, metric, factor, digits in _STUDY_COLUMNS
      ]
      count = f'{len(cells)}' + (f' of {seeds}' if len(cells) < seeds else '')
      diverged = sum(c.status == 'diverged' for c in cells)
      rows.append([*_shown(settings), *means, count, str(diverged)])
  caption = (
    'Mean ± standard deviation over the seeds (n - 1 in the denominator; '
    f'{tables.NONE} with one seed).'
  )
  diverged, failed = study.count('diverged'), study.count('failed')
  if diverged:
    caption += (
      f' {_are(diverged, "diverged run")} counted at chance accuracy (1 / '
      'number of classes) and effective rank 0'
      f'{study_figures.unknown_chance(study)}, and not at all in the '
      'prototype cosine.'
    )
  if failed:
    caption += f' {_are(failed, "failed run")} left out.'
  return 'Mean and standard deviation', header, rows, caption


def _settling_tables(study):
  """Tables for the questions a study of CLOP asks, where the grid allows."""
  tables = []
  if results.RATE in study.fields:
    tables.append(_spread_table(study))
  if study.clop_weight is not None:
    if results.BATCH in study.fields:
      tables.append(_batch_table(study))
    if study.num_classes:
      tables.append(_rank_table(study))
  return tables


def _spread_table(study):
  weights = [f for f in study.fields if f == results.WEIGHT]
  others = [f for f in study.fields if f not in (results.RATE, *weights)]
  lines, rates = study.combinations(weights), study.combinations([results.RATE])
  clop = study.clop_weight
  header = [
    *map(results.title, others),
    *(results.settings_name(line) or 'spread' for line in lines),
    *([f'{_clop_name(study)} / alone'] if clop is not None else []),
    'learning rates',
  ]
  rows = []
  for settings in study.combinations(others):
    means = np.array(
      [
        [study.mean('linear_top1', settings | line | rate) for rate in rates]
        for line in lines
      ]
    )
    # The same rates for every line, or the spreads could not be compared.
    shared = np.isfinite(means).all(axis=0)
    numbers = [tables.NONE] * (len(header) - len(others) - 1)
    if shared.sum() >= 2:
      spreads = 100 * np.ptp(means[:, shared], axis=1)
      numbers[: len(lines)] = [f'{s:.1f}' for s in spreads]
      if clop is not None:
        ours, alone = (
          spreads[lines.index({results.WEIGHT: w})] for w in (clop, 0)
        )
        numbers[-1] = f'{ours / alone:.2f}' if alone else tables.NONE
    count = f'{shared.sum()} of {len(rates)}'
    rows.append([*_shown(settings), *numbers, count])
  caption = (
    'Largest minus smallest seed mean of the linear top-1 accuracy over the '
    'learning rates (those with results of every column), percentage points.'
  )
  return 'Spread over the learning rates, points', header, rows, caption


def _batch_table(study):
  batches = study.grid[results.BATCH]
  pair = [
    {results.WEIGHT: study.clop_weight, results.BATCH: min(batches)},
    {results.WEIGHT: 0, results.BATCH: max(batches)},
  ]
  others = [f for f in study.fields if f not in pair[0]]
  header = [
    *map(results.title, others),
    f'{_clop_name(study)}, batch {min(batches)}, %',
    f'alone, batch {max(batches)}, %',
    'difference, points',
  ]
  rows = []
  for settings in study.combinations(others):
    ours, theirs = (
      100 * study.mean('linear_top1', settings | side) for side in pair
    )
    numbers = [f'{ours:.1f}', f'{theirs:.1f}', f'{ours - theirs:+.1f}']
    numbers = [tables.NONE if n.endswith('nan') else n for n in numbers]
    rows.append([*_shown(settings), *numbers])
  caption = 'Seed means of the linear top-1 accuracy.'
  name = 'Smallest batch with CLOP against the largest without'
  return name, header, rows, caption


def _rank_table(study):
  others = [f for f in study.fields if f != results.WEIGHT]
  pairs = [
    [
      study.mean('effective_rank', settings | {results.WEIGHT: weight})
      for weight in (0, study.clop_weight)
    ]
    for settings in study.combinations(others)
  ]
  pairs = [p for p in pairs if np.isfinite(p).all()]
  number = study.num_classes
  below = [ours for alone, ours in pairs if alone < number]
  held = sum(ours >= number for ours in below)
  header = [
    'settings with both',
    f'alone below {number}',
    f'of these, {_clop_name(study)} at {number} or above',
  ]
  rows = [[str(len(pairs)), str(len(below)), str(held)]]
  caption = (
    'Settings, by the seed mean of the effective rank of the embeddings.'
  )
  name = 'Effective rank against the number of classes'
  return name, header, rows, caption


def _mean_and_deviation(values, digits):
  if not values:
    return tables.NONE
  deviation = tables.NONE
  if len(values) > 1:
    deviation = f'{statistics.stdev(values):.{digits}f}'
  return f'{statistics.fmean(values):.{digits}f} ± {deviation}'


def _grid_values(study):
  return {f: ', '.join(map(results.show, v)) for f, v in study.grid.items()}


def _grid_line(study):
  values = _grid_values(study)
  return f'Grid: {"; ".join(f"{f}: {v}" for f, v in values.items())}'


def _shown(settings):
  return list(map(results.show, settings.values()))


def _clop_name(study):
  return results.settings_name({results.WEIGHT: study.clop_weight})


def _are(number, noun):
  return f'{number} {noun} is' if number == 1 else f'{number} {noun}s are'


def _distinct(values):
  return ', '.join(sorted({str(v) for v in values if v}))


# Pieces of Markdown and HTML.


def _text(text):
  return html.escape(str(text))


def _html_list(items):
  return '<ul>' + ''.join(f'<li>{_text(i)}</li>' for i in items) + '</ul>'


def _html_facts(facts):
  """A table without a header: each row is headed by a name."""
  rows = ''.join(
    f'<tr><th scope="row">{_text(name)}</th><td>{_text(fact)}</td></tr>'
    for name, fact in facts.items()
  )
  return f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'


def _html_table(header, rows):
  # Columns of numbers are aligned to the right.
  marks = [
    ' class="number"' if cells and all(map(_looks_numeric, cells)) else ''
    for _, *cells in zip(header, *rows, strict=True)
  ]

  def line(tag, row):
    pairs = zip(marks, row, strict=True)
    cells = [f'<{tag}{mark}>{_text(c)}</{tag[:2]}>' for mark, c in pairs]
    return f'<tr>{"".join(cells)}</tr>'

  head = line('th scope="col"', header)
  body = ''.join(line('td', row) for row in rows)
  return (
    f'<div class="scroll"><table><thead>{head}</thead>'
    f'<tbody>{body}</tbody></table></div>'
  )


def _looks_numeric(cell):
  return cell.lstrip('+-')[:1].isdigit() or cell == tables.NONE


def _html_figure(figure):
  with open(figure.path, 'rb') as file:
    data = base64.b64encode(file.read()).decode()
  # The width of the page's text is that of the widest figure.
  width, height = (round(100 * inches) for inches in figure.size)
  return (
    f'<h3>{_text(figure.title)}</h3>\n'
    '<figure><div class="scroll">'
    f'<img src="data:image/png;base64,{data}" '
    f'alt="{_text(figure.description)}" '
    f'width="{width}" height="{height}"></div>'
    f'<figcaption>{_text(figure.caption)}</figcaption></figure>'
  )


def _page(title, body):
  content = '\n'.join(body)
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{_text(title)}</title>\n<style>{_CSS}</style>\n</head>\n'
    f'<body>\n{content}\n</body>\n</html>\n'
  )
