"""The figure of `evaluate`, and the style that all figures share.

Lines differ in colour, marker and dashes, classes in colour and marker, so
nobody depends on colour alone.
"""

from collections.abc import Iterator, Sequence
import contextlib
import math
import os
import pathlib
import textwrap
from typing import Any

import numpy as np

try:
  import matplotlib
  from matplotlib import backend_bases
  from matplotlib import figure as figure_lib
except ImportError:  # an optional dependency, see `check_path`
  pass

from clop_jax.runtime import extras
from clop_jax.runtime import parallel

_PALETTE = 'petroff10'  # made for the colour-blind
REFERENCE: dict[str, Any] = {'color': '0.35', 'linestyle': '--', 'linewidth': 1}
_MARKERS = 'os^DvPX<>*'
_DASHES = ('-', (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
_STYLE = {
  'font.size': 10,
  'axes.titlesize': 10,
  'grid.alpha': 0.3,
  'axes.spines.top': False,
  'axes.spines.right': False,
}
_DPI = 130


def embedding_figure(
  path: str,
  names: Sequence[str],
  embeddings: Sequence[np.ndarray],
  labels: np.ndarray,
  spectra: Sequence[np.ndarray],
  effective_ranks: Sequence[float],
) -> bool:
  """Draws the embeddings of each run, and all singular spectra.

  The axes are the first two principal components. All runs have one scale, so
  the embeddings of a collapsed run are a heap or a line.

  Args:
    path: File to write. Missing folders are created.
    names: Names of the runs.
    embeddings: Normalized embeddings `[n, dim]` of each run.
    labels: Class of each example, `[n]`.
    spectra: Singular values of each run's embeddings, largest first.
    effective_ranks: Effective rank of each run's embeddings.

  Returns:
    True, or False after a warning if matplotlib is not installed.
  """
  if not extras.is_installed('matplotlib'):
    parallel.warn(f"{path} is left out: pip install 'clop-jax[report]'")
    return False
  planes = [principal_plane(z) for z in embeddings]
  classes, columns = np.unique(labels), len(names) + 1
  size = (4.2 * columns, 4.4)
  with drawn(path, (1, columns), size, grid=False) as (figure, (axes,)):
    for axis, name, plane, rank in zip(
      axes[:-1], names, planes, effective_ranks, strict=True
    ):
      scatter(axis, plane, labels, classes, extent_of(planes))
      axis.set_title(f'{textwrap.fill(name, 30)}\neffective rank {rank:.1f}')
      axis.set_xlabel('first principal component')
    axes[0].set_ylabel('second principal component')
    class_legend(figure, axes[:-1], classes)
    draw_spectra(axes[-1], names, spectra)
    axes[-1].grid(alpha=0.3)
    axes[-1].legend()
  return True


def check_path(path: str, flag: str) -> None:
  """Raises ValueError if no figure can be written to the path of a flag."""
  extras.check(f'--{flag}', 'report', 'matplotlib')
  kinds = sorted(backend_bases.FigureCanvasBase.get_supported_filetypes())
  if os.path.isdir(path):
    raise ValueError(f'--{flag} must be a file *.png, got the folder {path}')
  if pathlib.Path(path).suffix.lower()[1:] not in kinds:
    raise ValueError(
      f'--{flag} must be a file *.png (or {", ".join(kinds)}), got {path}'
    )
  parents = pathlib.Path(path).absolute().parents
  above = next(parent for parent in parents if os.path.lexists(parent))
  if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
    raise ValueError(f'--{flag}={path}: {above} is not a writable folder')


def principal_plane(embeddings: np.ndarray) -> np.ndarray:
  """Returns the first two principal components of `[n, dim]` as `[n, 2]`.

  If `dim` is 1, the second one is 0.
  """
  centred = np.asarray(embeddings, np.float32)
  centred = centred - centred.mean(axis=0)
  _, _, vt = np.linalg.svd(centred, full_matrices=False)
  plane = centred @ vt[:2].T
  return np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))


@contextlib.contextmanager
def drawn(
  path: str,
  shape: tuple[int, int],
  size: tuple[float, float],
  *,
  grid: bool = True,
  sharey: bool = False,
) -> Iterator[tuple[Any, np.ndarray]]:
  """Yields a figure and its axes, and saves the figure at the end.

  `shape` is the number of rows and columns of axes, `size` is the width and
  height in inches. Missing folders of the path are created.
  """
  with matplotlib.rc_context(_STYLE | {'axes.grid': grid}):
    figure = figure_lib.Figure(figsize=size, layout='constrained')
    yield figure, figure.subplots(*shape, squeeze=False, sharey=sharey)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    figure.savefig(path, dpi=_DPI)


def line_style(index: int) -> dict[str, Any]:
  """Returns the style of the line of a run."""
  return {
    'color': colour(index),
    'marker': _MARKERS[index % 10],
    'linestyle': _DASHES[index % 4],
    'markersize': 5,
    'linewidth': 1.6,
  }


def legend(figure: Any, **style: Any) -> None:
  """Draws one legend for all axes, below them."""
  handles = {}
  for axis in figure.axes:
    for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
      handles.setdefault(label, handle)
  if handles:
    entry = 0.085 * max(map(len, handles)) + 0.9  # width in inches
    rows = math.ceil(len(handles) / max(1, figure.get_figwidth() // entry))
    figure.legend(
      handles.values(),
      handles,
      loc='outside lower center',
      ncols=math.ceil(len(handles) / rows),
      frameon=False,
      **style,
    )


def draw_spectra(
  axis: Any, names: Sequence[str], spectra: Sequence[np.ndarray | None]
) -> None:
  """Draws singular values as shares of their sum; None is skipped."""
  lowest = 1e-3
  for index, (name, spectrum) in enumerate(zip(names, spectra, strict=True)):
    if spectrum is not None:
      shares = spectrum / max(spectrum.sum(), np.finfo(np.float32).tiny)
      style = line_style(index) | {'markevery': max(1, shares.size // 8)}
      places = 1 + np.arange(shares.size)
      axis.semilogy(places, np.maximum(shares, 1e-9), label=name, **style)
      lowest = min(lowest, shares.min(initial=1.0) / 2)
  axis.set(title='singular values of the embeddings', xlabel='index')
  axis.set(ylabel='share of their sum', ylim=(max(lowest, 1e-7), 1.5))


def scatter(
  axis: Any,
  plane: np.ndarray,
  labels: np.ndarray,
  classes: np.ndarray,
  extent: float,
) -> None:
  """Draws points `[n, 2]` by class, with axes from `-extent` to `extent`."""
  for position, label in enumerate(classes):
    axis.scatter(
      *plane[labels == label].T,
      s=10,
      color=colour(position, classes.size),
      marker=_MARKERS[position % 10],
      linewidths=0,
      label=str(label) if classes.size <= 10 else None,
    )
  limits = -extent, extent
  axis.set(xlim=limits, ylim=limits, aspect='equal')


def extent_of(planes: Sequence[np.ndarray]) -> float:
  """Returns half the side of a square around all points."""
  # Unit embeddings that differ by less have collapsed and must look like it.
  return 1.08 * max([0.01, *(np.abs(plane).max() for plane in planes)])


def class_legend(figure: Any, axes: Any, classes: np.ndarray) -> None:
  """Draws a legend for up to ten classes, a colour bar for more."""
  if classes.size <= 10:
    legend(figure, title='class', handletextpad=0.1, markerscale=2)
    return
  # Colours go by position, because labels may have gaps.
  norm = matplotlib.colors.Normalize(0, classes.size - 1)
  scale = matplotlib.cm.ScalarMappable(norm, 'viridis')
  bar = figure.colorbar(scale, ax=axes, label='class', shrink=0.8)
  places = np.linspace(0, classes.size - 1, 6).astype(int)
  bar.set_ticks(places, labels=map(str, classes[places]))


def colour(index: int, count: int = 10) -> Any:
  """Returns the colour of one of `count` runs or classes."""
  if count > 10:
    return matplotlib.colormaps['viridis'](index / (count - 1))
  return matplotlib.color_sequences[_PALETTE][index % 10]
