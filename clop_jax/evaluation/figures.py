"""All drawing: arrays in, one PNG out; knows no files of runs and no tables.

Colours never stand alone: lines differ in marker and dashes too, classes in
marker.
"""

from collections.abc import Sequence
import dataclasses
import math
import os
import textwrap
from typing import Any

import matplotlib
from matplotlib import backend_bases
from matplotlib import figure as figure_lib
from matplotlib import lines as lines_lib
from matplotlib import ticker
import numpy as np

# Ten colours that colour-blind people can tell apart.
_COLOURS = matplotlib.color_sequences['petroff10']
_MARKERS = ('o', 's', '^', 'D', 'v', 'P', '*')
_DASHES = ('-', (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
_CLASS_MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X', '<', '>', '*')
_REFERENCE: dict[str, Any] = {
  'color': '0.35',
  'linestyle': (0, (4, 3)),
  'linewidth': 1.0,
}
_STYLE = {
  'font.size': 10,
  'axes.titlesize': 10,
  'axes.grid': True,
  'grid.alpha': 0.3,
  'axes.spines.top': False,
  'axes.spines.right': False,
}
_PAGE_WIDTH = 10.4  # inches
_COLUMNS = 4  # at most so many panels beside each other at that width
_DPI = 130


@dataclasses.dataclass(frozen=True)
class Band:
  """A measure at each value of x: its mean over seeds and their range.

  Attributes:
    mean: `[n]`, NaN where there is no run.
    low: `[n]`, the smallest of the seeds.
    high: `[n]`, the largest of the seeds.
    crosses: (index into x, value) of each diverged run.
  """

  mean: np.ndarray
  low: np.ndarray
  high: np.ndarray
  crosses: Sequence[tuple[int, float]] = ()


@dataclasses.dataclass(frozen=True)
class Panel:
  """Axes of a sweep: for each measure, a band of each line (None: no runs)."""

  title: str
  bands: dict[str, Sequence[Band | None]]


def sweep_figure(
  path: str,
  panels: Sequence[Panel],
  *,
  names: Sequence[str],
  measures: dict[str, str],
  references: dict[str, tuple[str, float]],
  x: Sequence,
  xlabel: str,
) -> tuple[float, float]:
  """Draws each measure against x: mean lines in bands, or dots with ranges.

  Numbers make lines, on a logarithmic axis where they span more than a factor
  of ten (with a linear piece about 0 if it is among them); other values of x
  make dots beside each other.

  Args:
    path: of the PNG; its folder is made.
    panels: one for each setting of the fields that are neither x nor lines.
    names: of the lines.
    measures: axis label of each measure, in the order of the rows.
    references: for a measure, the name and value of its dashed line.
    x: `[n]` values, numbers or names.
    xlabel: axis label of x.

  Returns:
    Width and height in inches.
  """
  blocks = math.ceil(len(panels) / _COLUMNS)
  columns = 2 if len(panels) == 1 else math.ceil(len(panels) / blocks)
  rows = 1 if len(panels) == 1 else blocks * len(measures)
  numeric = all(isinstance(v, int | float) for v in x)
  with matplotlib.rc_context(_STYLE):
    height = 3.6 if rows == 1 else 2.7  # the legend has its share
    figure, axes = _grid(rows, columns, height=height, widest=4.6)
    used, limits = set(), {}
    for measure in measures:
      bands = [b for p in panels for b in p.bands[measure] if b is not None]
      limits[measure] = _limits(bands, references.get(measure))
    for number, panel in enumerate(panels):
      for row, (measure, ylabel) in enumerate(measures.items()):
        if len(panels) == 1:
          axis = axes[0, row]
        else:
          block, column = divmod(number, columns)
          axis = axes[block * len(measures) + row, column]
        used.add(axis)
        for index, band in enumerate(panel.bands[measure]):
          if band is not None:
            _draw_band(axis, x if numeric else None, band, index, len(names))
        if measure in references:
          axis.axhline(references[measure][1], **_REFERENCE)
        axis.set(ylim=limits[measure], xlabel=xlabel)
        if axis.get_subplotspec().is_first_col() or len(panels) == 1:
          axis.set_ylabel(ylabel)
        else:
          axis.tick_params(labelleft=False)
        if row == 0 or len(panels) == 1:
          axis.set_title('\n'.join(textwrap.wrap(panel.title, 30)))
        width = figure.get_figwidth() / columns - 0.5
        if numeric:
          _number_axis(axis, x, width)
        else:
          _category_axis(axis, x, width)
    for axis in set(axes.flat) - used:
      axis.remove()
    handles = [
      lines_lib.Line2D([], [], label=name, **_line_style(i, dots=not numeric))
      for i, name in enumerate(names)
    ]
    for measure, (name, value) in references.items():
      if not limits[measure][0] <= value <= limits[measure][1]:
        name += ', outside the axis'
      handles.append(lines_lib.Line2D([], [], label=name, **_REFERENCE))
    if any(
      b and b.crosses for p in panels for bs in p.bands.values() for b in bs
    ):
      handles.append(
        lines_lib.Line2D([], [], label='a diverged run', **_cross('0.2'))
      )
    _legend(figure, handles)
    return _save(figure, path)


def spectra_figure(
  path: str,
  names: Sequence[str],
  spectra: Sequence[np.ndarray | None],
  num_classes: int | None,
) -> tuple[float, float]:
  """Draws singular values as shares of their sum, one line a run.

  Args:
    path: of the PNG; its folder is made.
    names: of the runs.
    spectra: singular values of each run's embeddings, largest first; None
      leaves the run out.
    num_classes: where a dashed line stands; None: nowhere.

  Returns:
    Width and height in inches.
  """
  with matplotlib.rc_context(_STYLE):
    figure, axes = _grid(1, 1, height=3.4, widest=6.4)
    axis = axes[0, 0]
    handles = _draw_spectra(axis, names, spectra)
    if num_classes:
      axis.axvline(num_classes, **_REFERENCE)
      handles.append(
        lines_lib.Line2D([], [], label='number of classes', **_REFERENCE)
      )
    _legend(figure, handles)
    return _save(figure, path)


def cosine_figure(
  path: str, names: Sequence[str], matrices: Sequence[np.ndarray | None]
) -> tuple[float, float]:
  """Draws matrices of cosines between class means on one scale from -1 to 1.

  Args:
    path: of the PNG; its folder is made.
    names: of the runs.
    matrices: `[num_classes, num_classes]` of each run, NaN (grey) for a class
      without examples; None leaves the run out.

  Returns:
    Width and height in inches.
  """
  colours = matplotlib.colormaps['PuOr_r'].with_extremes(bad='0.75')
  with matplotlib.rc_context(_STYLE | {'axes.grid': False}):
    figure, axes = _grid(1, len(names), height=2.9, widest=3.4)
    for axis, name, matrix in zip(axes[0], names, matrices, strict=True):
      axis.set_title(_wrapped(name))
      if matrix is None:
        _say_left_out(axis)
        continue
      image = axis.imshow(
        np.ma.masked_invalid(matrix), cmap=colours, vmin=-1, vmax=1
      )
      for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(ticker.MaxNLocator(6, integer=True))
      axis.set(xlabel='class')
      if axis.get_subplotspec().is_first_col():
        axis.set_ylabel('class')
    if any(matrix is not None for matrix in matrices):
      figure.colorbar(
        image, ax=list(axes[0]), label='cosine of the class means', shrink=0.8
      )
    return _save(figure, path)


def planes_figure(
  path: str,
  names: Sequence[str],
  rows: Sequence[tuple[str, Sequence[np.ndarray | None]]],
  labels: Sequence[np.ndarray | None],
) -> tuple[float, float]:
  """Draws embeddings in two dimensions: a row a method, a column a run.

  Args:
    path: of the PNG; its folder is made.
    names: of the runs.
    rows: the method's name and `[n, 2]` of each run; None leaves it out. The
      runs of 'PCA' share one scale; other methods have none to share.
    labels: `[n]` of each run: colour and marker.

  Returns:
    Width and height in inches.
  """
  classes = np.unique(np.concatenate([x for x in labels if x is not None]))
  with matplotlib.rc_context(_STYLE | {'axes.grid': False}):
    figure, axes = _grid(len(rows), len(names), height=2.6, widest=3.4)
    for row, (method, planes) in enumerate(rows):
      shared = _extent([p for p in planes if p is not None])
      for column, (name, plane) in enumerate(zip(names, planes, strict=True)):
        axis = axes[row, column]
        if row == 0:
          axis.set_title(_wrapped(name))
        if plane is None:
          _say_left_out(axis)
          continue
        _scatter_classes(axis, plane, labels[column], classes, size=12)
        extent = shared if method == 'PCA' else _extent([plane])
        axis.set(
          xlim=(-extent, extent),
          ylim=(-extent, extent),
          aspect='equal',
          xlabel=f'{method}, first axis',
        )
        if column == 0:
          axis.set_ylabel(f'{method}, second axis')
        if method != 'PCA':
          axis.set(xticks=[], yticks=[])  # t-SNE's coordinates mean nothing
    _class_legend(figure, list(axes.flat), classes)
    return _save(figure, path)


def curves_figure(
  path: str,
  names: Sequence[str],
  curves: Sequence[dict[str, np.ndarray] | None],
  *,
  measures: dict[str, str],
  references: dict[str, tuple[str, float]],
) -> tuple[float, float]:
  """Draws measures over the training steps, one line a run.

  Args:
    path: of the PNG; its folder is made.
    names: of the runs.
    curves: 'step' and the measures of each run, `[n]` each, NaN where nothing
      was logged; None leaves the run out.
    measures: axis label of each measure, one axis each.
    references: for a measure, the name and value of its dashed line.

  Returns:
    Width and height in inches.
  """
  with matplotlib.rc_context(_STYLE):
    figure, axes = _grid(1, len(measures), height=3.0, widest=3.6)
    for axis, (measure, ylabel) in zip(axes[0], measures.items(), strict=True):
      parts = [np.zeros(0)]
      for index, curve in enumerate(curves):
        if curve is not None:
          values = np.where(np.isfinite(curve[measure]), curve[measure], np.nan)
          parts.append(values[np.isfinite(values)])
          style = _line_style(index) | {'marker': _MARKERS[index]}
          every = max(1, len(values) // 8)
          axis.plot(curve['step'], values, markevery=every, **style)
      if measure in references:
        axis.axhline(references[measure][1], **_REFERENCE)
      seen = np.concatenate(parts)
      # Losses of different kinds are on scales of their own.
      if seen.size and 0 < np.min(seen) < np.max(seen) / 30:
        axis.set_yscale('log')
      axis.set(xlabel='training step', ylabel=ylabel)
      axis.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
    handles = [
      lines_lib.Line2D([], [], label=name, **_line_style(index))
      for index, (name, curve) in enumerate(zip(names, curves, strict=True))
      if curve is not None
    ]
    for name, _ in references.values():
      handles.append(lines_lib.Line2D([], [], label=name, **_REFERENCE))
    _legend(figure, handles)
    return _save(figure, path)


def embedding_figure(
  path: str,
  names: Sequence[str],
  embeddings: Sequence[np.ndarray],
  labels: np.ndarray,
  spectra: Sequence[np.ndarray],
  effective_ranks: Sequence[float],
) -> None:
  """Draws each run's embeddings in two dimensions, and all spectra.

  The two dimensions are the first two principal components of the normalized
  embeddings, on one scale for all runs: a collapsed run is a heap or a line.

  Args:
    path: of the PNG; its folder is made.
    names: of the runs.
    embeddings: `[n, dim]` of each run, normalized.
    labels: `[n]`, the colour.
    spectra: singular values of each run's embeddings, largest first.
    effective_ranks: of each run.
  """
  runs = len(names)
  classes = np.unique(labels)
  planes = [principal_plane(z) for z in embeddings]
  extent = _extent(planes)
  with matplotlib.rc_context(_STYLE | {'axes.grid': False}):
    figure, axes = _grid(1, runs + 1, height=4.4, widest=4.2, page=math.inf)
    for axis, name, plane, rank in zip(
      axes[0], names, planes, effective_ranks, strict=False
    ):
      _scatter_classes(axis, plane, labels, classes, size=9)
      axis.set(
        title=f'{name}\neffective rank {rank:.1f}',
        xlabel='first principal component',
        xlim=(-extent, extent),
        ylim=(-extent, extent),
        aspect='equal',
      )
    axes[0, 0].set_ylabel('second principal component')
    _class_legend(figure, list(axes[0, :-1]), classes)
    axis = axes[0, -1]
    handles = _draw_spectra(axis, names, spectra)
    axis.set_title('singular values of the embeddings')
    axis.grid(alpha=0.3)
    axis.legend(handles=handles)
    _save(figure, path)


def principal_plane(embeddings: np.ndarray) -> np.ndarray:
  """The first two principal components of `[n, dim]`: `[n, 2]`.

  What has fewer than two dimensions is filled up with zeros.

  Example:
    >>> import numpy as np
    >>> from clop_jax.evaluation import figures
    >>> x = np.array([[0, 0, 5], [0, 4, 5], [0, 8, 5]])
    >>> print(np.abs(figures.principal_plane(x)).round(3))
    [[4. 0.]
     [0. 0.]
     [4. 0.]]
  """
  centred = np.asarray(embeddings, np.float32)
  centred = centred - centred.mean(axis=0)
  _, _, vt = np.linalg.svd(centred, full_matrices=False)
  plane = centred @ vt[:2].T
  return np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))


def _grid(rows, columns, *, height, widest, page=_PAGE_WIDTH):
  """A figure of panels as wide as the page, or as `widest` each, in inches."""
  width = min(page, widest * columns)
  figure = figure_lib.Figure(
    figsize=(width, height * rows), layout='constrained'
  )
  return figure, figure.subplots(rows, columns, squeeze=False)


def check_path(path: str, flag: str) -> None:
  """Raises ValueError unless a figure could be written there.

  Args:
    path: of the file; its folders need not be there yet.
    flag: that has it, for the error.
  """
  kinds = sorted(backend_bases.FigureCanvasBase.get_supported_filetypes())
  ending = os.path.splitext(path)[1].removeprefix('.').lower()
  if ending not in kinds or os.path.isdir(path):
    got = f'the folder {path}' if os.path.isdir(path) else path
    raise ValueError(
      f'--{flag} must be a file *.png (or {", ".join(kinds)}), got {got}'
    )
  above = os.path.dirname(os.path.abspath(path))
  while not os.path.lexists(above):
    above = os.path.dirname(above)
  if not os.path.isdir(above) or not os.access(above, os.W_OK | os.X_OK):
    wrong = 'cannot be written to' if os.path.isdir(above) else 'is no folder'
    raise ValueError(f'--{flag}={path}: {above} {wrong}')


def _save(figure, path):
  os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
  figure.savefig(path, dpi=_DPI)
  return figure.get_figwidth(), figure.get_figheight()


def _legend(figure, handles):
  """Below all axes, in as few rows as its longest entry allows, and even."""
  if not handles:
    return
  longest = max(len(handle.get_label()) for handle in handles)
  entry = 0.085 * longest + 0.9  # inches, with its line
  columns = max(1, int(figure.get_figwidth() / entry))
  rows = math.ceil(len(handles) / columns)
  figure.legend(
    handles=handles,
    loc='outside lower center',
    ncols=math.ceil(len(handles) / rows),
    frameon=False,
    handlelength=3.2,
  )


def _line_style(index, *, dots=False) -> dict[str, Any]:
  style = {
    'color': _COLOURS[index % len(_COLOURS)],
    'marker': _MARKERS[index % len(_MARKERS)],
    'linestyle': _DASHES[index % len(_DASHES)],
    'markersize': 5,
    'linewidth': 1.6,
  }
  return style | {'linestyle': 'none', 'markersize': 6} if dots else style


def _cross(colour) -> dict[str, Any]:
  return {
    'color': colour,
    'marker': 'x',
    'linestyle': 'none',
    'markersize': 9,
    'markeredgewidth': 1.8,
  }


def _draw_band(axis, x, band, index, of):
  """A line in its band, or (x is None) dots with ranges side by side."""
  style = _line_style(index, dots=x is None)
  if x is None:
    side = 0.5 * (index - (of - 1) / 2) / max(2, of)
    x = np.arange(len(band.mean)) + side
    ends = np.stack([band.mean - band.low, band.high - band.mean])
    axis.errorbar(x, band.mean, ends, capsize=4, zorder=3, **style)
  else:
    x = np.asarray(x, float)
    # A gap in the middle is bridged: the dots say what was measured.
    known = np.isfinite(band.mean)
    axis.fill_between(
      x[known],
      band.low[known],
      band.high[known],
      color=style['color'],
      alpha=0.18,
      linewidth=0,
    )
    axis.plot(x[known], band.mean[known], zorder=3, **style)
  for position, value in band.crosses:
    # Not clipped: a diverged run's rank is 0, on the axis itself.
    axis.plot(
      x[position], value, zorder=4, clip_on=False, **_cross(style['color'])
    )


def _limits(bands, reference):
  """Of the y axis: with the dashed line, unless that would press the data."""
  ends = [np.r_[b.low, b.high, [v for _, v in b.crosses]] for b in bands]
  ends = np.concatenate([np.zeros(0), *ends])
  ends = ends[np.isfinite(ends)]
  low, high = (ends.min(), ends.max()) if ends.size else (0.0, 1.0)
  if reference is not None:
    with_line = min(low, reference[1]), max(high, reference[1])
    if high - low >= 0.25 * (with_line[1] - with_line[0]):
      low, high = with_line
  margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
  return low - margin, high + margin


def _number_axis(axis, values, width):
  values = sorted(set(values))
  sizes = [abs(v) for v in values if v != 0]
  if sizes and max(sizes) > 10 * min(sizes):
    if values[0] > 0:
      axis.set_xscale('log')
    else:
      axis.set_xscale('symlog', linthresh=min(sizes), linscale=0.7)
  transform = axis.xaxis.get_transform()
  places = transform.transform(np.asarray(values, float))
  labels, end = [], -math.inf
  for value, place in zip(values, places, strict=True):
    label = f'{value:g}'
    half = 0.04 * (len(label) + 1) / width * (places[-1] - places[0])
    shown = place - half >= end
    labels.append(label if shown else '')
    end = place + half if shown else end
  axis.set_xticks(values, labels)
  axis.xaxis.set_minor_locator(ticker.NullLocator())
  margin = 0.06 * np.ptp(places) or 1.0
  ends = np.array([places[0] - margin, places[-1] + margin])
  axis.set_xlim(*transform.inverted().transform(ends))


def _category_axis(axis, values, width):
  labels = [str(v) for v in values]
  long = 0.09 * max(map(len, labels)) > width / len(labels)
  axis.set_xticks(
    range(len(labels)),
    labels,
    rotation=30 if long else 0,
    ha='right' if long else 'center',
  )
  axis.set_xlim(-0.5, len(labels) - 0.5)


def _draw_spectra(axis, names, spectra):
  """The lines; their legend's handles."""
  handles, lowest = [], 1e-3
  for index, (name, spectrum) in enumerate(zip(names, spectra, strict=True)):
    if spectrum is None:
      continue
    shares = spectrum / max(spectrum.sum(), np.finfo(np.float32).tiny)
    handles += axis.semilogy(
      1 + np.arange(shares.size),
      np.maximum(shares, 1e-9),
      label=name,
      markevery=max(1, shares.size // 8),
      **_line_style(index),
    )
    lowest = min(lowest, shares.min(initial=1.0) / 2)
  axis.set(xlabel='index', ylabel='share of their sum')
  axis.set_ylim(max(lowest, 1e-7), 1.5)
  return handles


def _scatter_classes(axis, plane, labels, classes, *, size):
  for position, label in enumerate(classes):
    axis.scatter(
      *plane[labels == label].T,
      s=size,
      color=_class_colour(position, classes.size),
      marker=_CLASS_MARKERS[position % len(_CLASS_MARKERS)],
      linewidths=0,
    )


def _class_colour(position, classes):
  if classes <= len(_COLOURS):
    return _COLOURS[position]
  return matplotlib.colormaps['viridis'](position / (classes - 1))


def _class_legend(figure, axes, classes):
  if classes.size <= len(_COLOURS):
    handles = [
      lines_lib.Line2D(
        [],
        [],
        label=str(label),
        color=_class_colour(position, classes.size),
        marker=_CLASS_MARKERS[position],
        linestyle='none',
        markersize=6,
      )
      for position, label in enumerate(classes)
    ]
    figure.legend(
      handles=handles,
      title='class',
      loc='outside lower center',
      ncols=len(handles),
      frameon=False,
      handletextpad=0.1,
      columnspacing=1.2,
    )
    return
  # By position as the points are: labels may have gaps.
  last = classes.size - 1
  scale = matplotlib.cm.ScalarMappable(
    matplotlib.colors.Normalize(0, last), 'viridis'
  )
  bar = figure.colorbar(scale, ax=axes, label='class', shrink=0.8)
  places = ticker.MaxNLocator(6, integer=True).tick_values(0, last).astype(int)
  places = places[(places >= 0) & (places <= last)]
  bar.set_ticks(places, labels=map(str, classes[places]))


def _extent(planes):
  """Half the side of a square about all planes; never 0."""
  # Unit embeddings: what is smaller than this is a heap, and shall look it.
  return 1.08 * max([0.01, *(np.abs(plane).max() for plane in planes)])


def _wrapped(name):
  return '\n'.join(textwrap.wrap(name, 28))


def _say_left_out(axis):
  axis.axis('off')
  axis.text(0.5, 0.5, 'left out', ha='center', va='center', color='0.35')
