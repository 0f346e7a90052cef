"""Tables and figures of evaluated runs; knows files and arrays, no networks."""

from collections.abc import Sequence
import os

import matplotlib

matplotlib.use('agg')

from matplotlib import pyplot as plt
import numpy as np

_COLUMNS = (
  ('linear top-1', 'linear_top1', '{:.3f}'),
  ('kNN top-1', 'knn_top1', '{:.3f}'),
  ('effective rank', 'effective_rank', '{:.1f}'),
  ('prototype cosine', 'prototype_cosine', '{:.3f}'),
)


def table(names: Sequence[str], results: Sequence[dict]) -> str:
  """A Markdown table of evaluation results, one row a run.

  Args:
    names: of the runs.
    results: each run's `eval.json`.

  Returns:
    The lines, aligned for a terminal.
  """
  header = ['method', *(title for title, _, _ in _COLUMNS)]
  rows = [header]
  for name, result in zip(names, results, strict=True):
    rows.append([name, *(f.format(result[key]) for _, key, f in _COLUMNS)])
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    '| '
    + ' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True))
    + ' |'
    for row in rows
  ]
  lines.insert(1, '|' + '|'.join('-' * (width + 2) for width in widths) + '|')
  return '\n'.join(lines)


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
  figure, axes = plt.subplots(
    1, runs + 1, figsize=(4.2 * (runs + 1), 4.4), layout='constrained'
  )
  planes = [_principal_plane(z) for z in embeddings]
  extent = 1.08 * max(np.abs(plane).max() for plane in planes)
  classes = np.unique(labels)
  colours = plt.get_cmap('tab10' if classes.size <= 10 else 'nipy_spectral')
  for axis, name, plane, rank in zip(
    axes, names, planes, effective_ranks, strict=False
  ):
    for position, label in enumerate(classes):
      share = position / max(1, classes.size - 1)
      axis.scatter(
        *plane[labels == label].T,
        s=9,
        color=colours(position if classes.size <= 10 else share),
        label=str(label) if classes.size <= 10 else None,
      )
    axis.set(
      title=f'{name}\neffective rank {rank:.1f}',
      xlabel='first principal component',
      xlim=(-extent, extent),
      ylim=(-extent, extent),
      aspect='equal',
    )
  axes[0].set_ylabel('second principal component')
  if classes.size <= 10:
    handles, classes_shown = axes[0].get_legend_handles_labels()
    figure.legend(
      handles,
      classes_shown,
      title='class',
      loc='outside lower left',
      ncols=classes.size,
      markerscale=2,
    )
  for name, spectrum in zip(names, spectra, strict=True):
    shares = spectrum / max(spectrum.sum(), np.finfo(np.float32).tiny)
    axes[-1].semilogy(
      1 + np.arange(shares.size), np.maximum(shares, 1e-9), label=name
    )
  axes[-1].set(
    title='singular values of the embeddings',
    xlabel='index',
    ylabel='share of their sum',
    ylim=(1e-7, 1.5),
  )
  axes[-1].grid(alpha=0.3)
  axes[-1].legend()
  os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def _principal_plane(embeddings):
  centred = embeddings - embeddings.mean(axis=0)
  _, _, vt = np.linalg.svd(centred, full_matrices=False)
  return centred @ vt[:2].T
