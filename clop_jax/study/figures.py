"""The figures of a study."""

import math
import os
import textwrap
from typing import NamedTuple

from matplotlib import ticker
import numpy as np
import pandas as pd

from clop_jax.evaluation import figures
from clop_jax.study import results

# Axis label and factor (percent) of each metric that is swept.
_SWEPT = {
  'linear_top1': ('linear top-1 accuracy, %', 100),
  'effective_rank': ('effective rank', 1),
}
_CURVES = ('loss', 'clop_loss', 'effective_rank')
_WIDTH = 10.4  # inches
_COLUMNS, _MOST_PANELS = 4, 8
_MOST_POINTS = 1000
_TSNE_LEAST = 20  # distinct points; fewer show nothing that PCA does not


class StudyFigure(NamedTuple):
  """A drawn figure; the title is also its alternative text."""

  title: str
  caption: str
  path: str


def sweep_figures(study: results.Study) -> list[StudyFigure]:
  """Draws accuracy and effective rank against each number of the grid.

  For a grid without numbers, draws dots for its first field.
  """
  # Two CLOP weights are compared, not swept.
  pair = (
    [results.WEIGHT] if len(study.grid.get(results.WEIGHT, [])) == 2 else []
  )
  others = [f for f in study.fields if f not in pair]
  swept = [f for f in others if study.is_numeric(f)]
  swept = swept or others[:1] or study.fields
  return [_sweep(study, x, metric) for x in swept for metric in _SWEPT]


def cell_figures(study: results.Study) -> list[StudyFigure]:
  """Draws curves, spectra and embeddings of a few done cells."""
  names = study.examples()
  if not names:
    return []
  arrays = {name: study.arrays(cell) for cell, name in names.items()}
  drawn = [_draw_curves(study, names, arrays)]
  planes = {
    name: _planes(a['embeddings'], a['labels'])
    for name, a in arrays.items()
    if a and np.isfinite(a['embeddings']).all(axis=1).any()
  }
  return [*drawn, _draw_planes(study, planes)] if planes else drawn


def _path(study, name):
  return os.path.join(study.workdir, 'figures', f'{name}.png')


def _sweep(study, x, metric):
  rest = [f for f in study.fields if f != x]
  # The first makes the lines: the CLOP weights, else a field of names.
  rest.sort(key=lambda f: (f != results.WEIGHT, study.is_numeric(f)))
  settings = results.groups(study.counted, rest[1:])
  panels = settings[:_MOST_PANELS]
  rows = math.ceil(len(panels) / _COLUMNS)
  columns = math.ceil(len(panels) / rows)
  width = min(_WIDTH, 4.8 * columns)
  label = _SWEPT[metric][0]
  path = _path(study, f'sweep_{x.replace(".", "_")}_{metric}')
  shape, size = (rows, columns), (width, 2.7 * rows + 0.7)
  with figures.drawn(path, shape, size, sharey=True) as (figure, axes):
    used = axes.flat[: len(panels)]
    for axis, (setting, panel) in zip(used, panels, strict=True):
      _draw_panel(study, axis, panel, x, rest[:1], metric)
      _label_x(study, axis, x, width / columns - 0.6)
      axis.set_title(textwrap.fill(results.settings_name(setting), 30))
      if axis.get_subplotspec().is_first_col():
        axis.set_ylabel(label)
    low, high = used[0].get_ylim()
    name, value = 'number of classes', study.num_classes or math.nan
    if metric == 'linear_top1':
      name, value = 'chance', 100 / value
    # Farther away it would flatten the curves.
    if low - 3 * (high - low) <= value <= high + 3 * (high - low):
      for axis in used:
        axis.axhline(value, label=name, **figures.REFERENCE)
    for axis in axes.flat[len(panels) :]:
      axis.remove()
    figures.legend(figure, handlelength=3.2)
  title = f'{label.split(",")[0].capitalize()} against {results.title(x)}'
  caption = (
    'Means over the seeds, and the range from the smallest to the largest.'
  )
  if len(panels) < len(settings):
    caption += f' The first {len(panels)} of {len(settings)} settings.'
  if 'diverged' in set(study.cells['status']):
    caption += ' A cross is a diverged run.'
  return StudyFigure(title, caption, path)


def _draw_panel(study, axis, panel, x, line, metric):
  """Draws a line with its range over the seeds for each value of a field."""
  numeric = study.is_numeric(x)
  levels = study.grid[line[0]] if line else ['']
  for setting, cells in results.groups(panel, line):
    index = levels.index(setting.get(line[0])) if line else 0
    style = figures.line_style(index)
    style['label'] = results.settings_name(setting)
    values = _SWEPT[metric][1] * cells[metric]
    # The dots of a name stand side by side.
    side = 0.5 * (index - (len(levels) - 1) / 2) / max(2, len(levels))
    places = cells[x].cat.codes + side
    if numeric:
      places = cells[x].astype(str).astype(float)
    stats = values.groupby(places).agg(['mean', 'min', 'max']).dropna()
    at, (mean, low, high) = stats.index, stats.to_numpy().T
    if numeric:
      band = {'color': style['color'], 'alpha': 0.18, 'linewidth': 0}
      axis.fill_between(at, low, high, **band)
      axis.plot(at, mean, zorder=3, **style)
    else:
      style['linestyle'] = 'none'
      ends = np.stack([mean - low, high - mean])
      axis.errorbar(at, mean, ends, capsize=4, zorder=3, **style)
    diverged = cells['status'] == 'diverged'
    if diverged.any():
      style |= {'marker': 'x', 'linestyle': 'none', 'markersize': 9}
      style |= {'label': 'a diverged run', 'zorder': 4}
      # Not clipped: the rank of a diverged run lies on the axis.
      axis.plot(places[diverged], values[diverged], clip_on=False, **style)


def _label_x(study, axis, x, width):
  """Labels each value, on a logarithmic axis if they span a factor of ten."""
  texts = study.grid[x]
  places = list(map(float, texts if study.is_numeric(x) else range(len(texts))))
  sizes = [abs(p) for p in places if p]
  if not study.is_numeric(x):
    axis.set_xlim(-0.5, len(texts) - 0.5)
  elif sizes and max(sizes) > 10 * min(sizes):
    if min(places) > 0:
      axis.set_xscale('log')
    else:
      axis.set_xscale('symlog', linthresh=min(sizes), linscale=0.7)
  crowded = 0.09 * sum(len(text) + 1 for text in texts) > width
  turn = {'rotation': 40, 'ha': 'right'} if crowded else {}
  axis.set_xticks(places, texts, rotation_mode='anchor', **turn)
  axis.xaxis.set_minor_locator(ticker.NullLocator())
  axis.set_xlabel(results.title(x))


def _draw_curves(study, names, arrays):
  path = _path(study, 'curves')
  curves = [study.curves(cell) for cell in names]
  line = {'label': 'number of classes', **figures.REFERENCE}
  with figures.drawn(path, (2, 2), (_WIDTH, 6.2)) as (figure, axes):
    for axis, metric in zip(axes.flat, _CURVES, strict=False):
      seen = pd.Series(dtype=float)
      for index, (name, curve) in enumerate(zip(arrays, curves, strict=True)):
        curve = curve.reindex(columns=['step', metric])
        curve = curve.replace([np.inf, -np.inf], np.nan)
        style = figures.line_style(index) | {'label': name}
        every = max(1, len(curve) // 8)
        axis.plot(curve['step'], curve[metric], markevery=every, **style)
        seen = pd.concat([seen, curve[metric].dropna()])
      # Losses of different kinds differ in scale.
      if 0 < seen.min() < seen.max() / 30:
        axis.set_yscale('log')
      label = metric.replace('_', ' ').replace('clop', 'CLOP')
      axis.set(xlabel='training step', ylabel=label)
      axis.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
    spectra = [a.get('spectrum') for a in arrays.values()]
    figures.draw_spectra(axes[1, 1], list(arrays), spectra)
    if study.num_classes:
      axes[1, 0].axhline(study.num_classes, **line)
      axes[1, 1].axvline(study.num_classes, **line)
    figures.legend(figure, handlelength=3.2)
  return StudyFigure(
    'Training curves and singular values',
    'Losses and effective rank as logged during training, on training batches. '
    'Singular values of the normalized test embeddings, as shares of their '
    'sum: a steep fall is a collapse of dimensions.',
    path,
  )


def _planes(embeddings, labels):
  """Returns labels and the embeddings in a plane, by method."""
  finite = np.flatnonzero(np.isfinite(embeddings).all(axis=1))
  chosen = np.random.default_rng(0).permutation(finite)[:_MOST_POINTS]
  embeddings = embeddings[chosen].astype(np.float32)
  planes = {'PCA': figures.principal_plane(embeddings)}
  if len(np.unique(embeddings, axis=0)) >= _TSNE_LEAST:
    # Slow to import.
    from sklearn import manifold
    import threadpoolctl

    perplexity = min(30.0, (len(embeddings) - 1) / 3)
    # Its short parallel loops are very slow on shared cores.
    with threadpoolctl.threadpool_limits(1, user_api='openmp'):
      fit = manifold.TSNE(perplexity=perplexity, random_state=0)
      planes['t-SNE'] = fit.fit_transform(embeddings)
  return labels[chosen], planes


def _draw_planes(study, planes):
  path = _path(study, 'embeddings_2d')
  classes = np.unique(np.concatenate([labels for labels, _ in planes.values()]))
  shared = figures.extent_of([found['PCA'] for _, found in planes.values()])
  shape, size = (2, len(planes)), (min(_WIDTH, 3.4 * len(planes)), 6.0)
  with figures.drawn(path, shape, size, grid=False) as (figure, axes):
    for row, method in enumerate(['PCA', 't-SNE']):
      for axis, name in zip(axes[row], planes, strict=True):
        labels, found = planes[name]
        axis.set_title(textwrap.fill(name, 30))
        if method not in found:
          axis.axis('off')
          axis.text(0.5, 0.5, 'too few points for t-SNE', ha='center')
          continue
        plane = found[method]
        extent = shared if method == 'PCA' else figures.extent_of([plane])
        figures.scatter(axis, plane, labels, classes, extent)
        axis.set_xlabel(f'{method}, first axis')
        if method == 't-SNE':
          axis.set(xticks=[], yticks=[])  # its coordinates mean nothing
      axes[row, 0].set_ylabel(f'{method}, second axis')
    figures.class_legend(figure, list(axes.flat), classes)
  return StudyFigure(
    'Embeddings in a plane',
    f'Normalized test embeddings, at most {_MOST_POINTS:,} of each cell. PCA: '
    'the first two principal components, on one scale for all cells. t-SNE '
    'keeps neighbours together; its distances and axes have no unit.',
    path,
  )
