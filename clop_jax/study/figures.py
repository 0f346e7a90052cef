"""A study's figures: which settings and cells go on which axis and panel.

`results` gives the numbers, `figures` draws them; this says what of a study is
drawn, and tells the reader.
"""

from collections.abc import Sequence
import dataclasses
import os
import statistics

import numpy as np

from clop_jax.evaluation import figures
from clop_jax.study import results

# Of a sweep: metric, axis label, factor (percent).
_SWEPT_MEASURES = (
  ('linear_top1', 'linear top-1 accuracy, %', 100),
  ('effective_rank', 'effective rank', 1),
)
_CURVES = {
  'loss': 'loss',
  'clop_loss': 'CLOP loss',
  'effective_rank': 'effective rank',
}
_MOST_PANELS = 8
_TSNE_POINTS = 1000
_TSNE_LEAST = 20  # different points; fewer show nothing that PCA does not


@dataclasses.dataclass(frozen=True)
class StudyFigure:
  """A drawn figure and what the page says of it.

  Attributes:
    title: its heading.
    description: in place of the picture.
    path: of the PNG, in the study's `figures`.
    size: width and height in inches.
    caption: what is to be seen.
  """

  title: str
  description: str
  path: str
  size: tuple[float, float]
  caption: str


def sweep_figures(study: results.Study) -> list[StudyFigure]:
  """Draws accuracy and effective rank over the fields that the grid varies."""
  return [_sweep(study, field) for field in _swept(study)]


def cell_figures(
  study: results.Study, cells: Sequence[results.Cell]
) -> list[StudyFigure]:
  """Draws spectra, class means, embeddings and training curves of done cells.

  What a cell has no file for is left out, with a note in the study.
  """
  names = cell_names(study, cells)
  arrays = [study.arrays(cell) for cell in cells]
  curves = [study.curves(cell, list(_CURVES)) for cell in cells]
  drawn = []

  def draw(function, title, file, caption, **keywords):
    path = _path(study, file)
    size = function(path, names, **keywords)
    drawn.append(StudyFigure(title, title, path, size, caption))

  def each(name):
    return [None if a is None else a[name] for a in arrays]

  if any(a is not None for a in arrays):
    draw(
      figures.spectra_figure,
      'Singular values of the embeddings',
      'spectra',
      'Singular values of the normalized test embeddings, largest first, each '
      'as a share of their sum. A steep fall is a collapse of dimensions.',
      spectra=each('spectrum'),
      num_classes=study.num_classes,
    )
    draw(
      figures.cosine_figure,
      'Cosines between the class means',
      'class_mean_cosines',
      'Cosines between the mean test embeddings of the classes, not centred. '
      'CLOP asks for 0 off the diagonal; all 1 is a collapse. Grey: a class '
      'without test examples.',
      matrices=each('class_mean_cosines'),
    )
  rows, labels = _planes(study, cells, arrays)
  if rows:
    draw(
      figures.planes_figure,
      'Embeddings in two dimensions',
      'embeddings_2d',
      f'Normalized test embeddings, at most {_TSNE_POINTS:,} of each cell. '
      'PCA: the first two principal components, on one scale for all cells. '
      't-SNE keeps neighbours together; its distances and axes have no unit.',
      rows=rows,
      labels=labels,
    )
  if any(c is not None for c in curves):
    draw(
      figures.curves_figure,
      'Training curves',
      'curves',
      'As logged while training, on training batches.',
      curves=curves,
      measures=_CURVES,
      references=_rank_reference(study),
    )
  return drawn


def cell_names(
  study: results.Study, cells: Sequence[results.Cell]
) -> list[str]:
  """What the cells differ in, CLOP first."""
  fields = [
    f
    for f in sorted(study.fields, key=lambda f: f != results.WEIGHT)
    if f == results.WEIGHT
    or len({results.show(c.settings[f]) for c in cells}) > 1
  ]
  return [
    results.settings_name({f: c.settings[f] for f in fields}) or c.name
    for c in cells
  ]


def unknown_chance(study: results.Study) -> str:
  """What a caption adds about diverged cells whose chance is not known."""
  number = study.without_chance
  return (
    f' ({number} at accuracy 0, as the number of classes is not known)'
    if number
    else ''
  )


def _path(study, name):
  return os.path.join(study.workdir, 'figures', f'{name}.png')


def _rank_reference(study):
  number = study.num_classes
  return (
    {'effective_rank': (f'number of classes ({number})', number)}
    if number
    else {}
  )


# Sweeps.


def _swept(study):
  """The fields that get a figure: the numbers, else one field as dots."""
  numeric = [
    f
    for f in study.fields
    if study.is_numeric(f)
    # Two weights are a comparison, not a sweep.
    and not (f == results.WEIGHT and len(study.grid[f]) == 2)
  ]
  numeric.sort(key=lambda f: (f != results.RATE, f != results.BATCH))
  others = [f for f in study.fields if f != results.WEIGHT]
  return numeric or others[:1] or study.fields


def _sweep(study, x):
  rest = [f for f in study.fields if f != x]
  # CLOP's weights make the lines, else names: they have no place on an axis.
  of_lines = sorted(
    rest, key=lambda f: (f != results.WEIGHT, study.is_numeric(f))
  )[:1]
  lines = study.combinations(of_lines)
  panels, fixed = _panels(study, [f for f in rest if f not in of_lines])
  numeric = study.is_numeric(x)
  values = sorted(study.grid[x]) if numeric else study.grid[x]
  references = {}
  if study.num_classes:
    chance = 100 / study.num_classes
    references = {'linear_top1': (f'chance ({chance:.3g} %)', chance)}
    references |= _rank_reference(study)
  title = results.title(x)
  path = _path(study, f'sweep_{x.replace(".", "_")}')
  size = figures.sweep_figure(
    path,
    [
      figures.Panel(
        results.settings_name(panel),
        {
          metric: [
            _band(study, metric, factor, x, values, panel | fixed | line)
            for line in lines
          ]
          for metric, _, factor in _SWEPT_MEASURES
        },
      )
      for panel in panels
    ],
    names=[results.settings_name(line) or 'all runs' for line in lines],
    measures={metric: label for metric, label, _ in _SWEPT_MEASURES},
    references=references,
    x=values if numeric else list(map(results.show, values)),
    xlabel=title,
  )
  mean, range_ = ('Lines', 'bands') if numeric else ('Dots', 'bars')
  caption = (
    f'Linear top-1 accuracy and effective rank against {title}. {mean}: means '
    f'over the seeds; {range_}: from the smallest to the largest seed.'
  )
  if fixed:
    held = results.settings_name(fixed)
    caption += f' Drawn at {held}; the tables have the rest.'
  if study.count('diverged'):
    caption += (
      ' A cross is a diverged run: it counts at chance accuracy and effective '
      'rank 0 in the means and bands'
    )
    caption += f'{unknown_chance(study)}.'
  if study.count('failed'):
    caption += ' Failed runs are left out.'
  return StudyFigure(
    f'Over {title}',
    f'Accuracy and effective rank over {title}',
    path,
    size,
    caption,
  )


def _panels(study, fields):
  """Combinations that get a panel, and fields held fixed if these are many."""
  if len(study.combinations(fields)) <= _MOST_PANELS:
    return study.combinations(fields), {}
  fixed = {}
  for field in filter(study.is_numeric, fields):
    values = sorted(study.grid[field])
    base = study.config.get(field)
    fixed[field] = base if base in values else values[len(values) // 2]
  # Names have no sweep of their own: only as many as need be, from the last.
  shown = [f for f in fields if f not in fixed]
  while len(study.combinations(shown)) > _MOST_PANELS:
    field = shown.pop()
    values, base = study.grid[field], study.config.get(field)
    fixed[field] = base if base in values else values[0]
  return study.combinations(shown), fixed


def _band(study, metric, factor, x, order, settings):
  """Of one line over the values of x; None without runs."""
  groups = [study.where(settings | {x: value}) for value in order]
  if not any(groups):
    return None

  def measured(cells):
    return [factor * value for value in study.values(cells, metric)]

  values = [measured(cells) for cells in groups]
  crosses = [
    (position, value)
    for position, cells in enumerate(groups)
    for value in measured([c for c in cells if c.status == 'diverged'])
  ]
  mean, low, high = (
    np.array([take(v) if v else np.nan for v in values])
    for take in (statistics.fmean, min, max)
  )
  return figures.Band(mean, low, high, crosses)


# Embeddings in two dimensions.


def _planes(study, cells, arrays):
  """Rows for `figures.planes_figure`, and the labels of their points."""
  pca, tsne, labels = ([None] * len(cells) for _ in range(3))
  for i, (cell, a) in enumerate(zip(cells, arrays, strict=True)):
    if a is None:
      continue
    finite = np.flatnonzero(np.isfinite(a['embeddings']).all(axis=1))
    if not finite.size:
      study.notes.append(
        f'embeddings of cell {cell.name}: none of them is finite'
      )
      continue
    chosen = np.random.default_rng(0).permutation(finite)[:_TSNE_POINTS]
    embeddings = a['embeddings'][chosen]
    labels[i] = a['labels'][chosen]
    pca[i] = figures.principal_plane(embeddings)
    different = len(np.unique(embeddings, axis=0))
    if different < _TSNE_LEAST:
      study.notes.append(
        f't-SNE of cell {cell.name}: needs at least {_TSNE_LEAST} different '
        f'embeddings, got {different}'
      )
    else:
      tsne[i] = _tsne(embeddings, pca[i])
  rows = [('PCA', pca), ('t-SNE', tsne)]
  return [r for r in rows if any(p is not None for p in r[1])], labels


def _tsne(embeddings, plane):
  # Only here: evaluating a single run need not wait for these imports.
  from sklearn import manifold
  import threadpoolctl

  fit = manifold.TSNE(
    perplexity=min(30.0, (len(embeddings) - 1) / 3),
    # As scikit-learn would begin, from the plane that is there already.
    init=(1e-4 * plane / plane[:, 0].std()).astype(np.float32),
    random_state=0,
  )
  # Its many short parallel loops come to a crawl where cores are shared.
  with threadpoolctl.threadpool_limits(1, user_api='openmp'):
    return fit.fit_transform(embeddings)
