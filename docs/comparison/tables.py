"""Prints the tables of docs/comparison.md and draws its figure.

python -m docs.comparison.tables --studies=runs/comparison \
  --figure=docs/comparison.png

With `--studies` it first collects what `docs.comparison.studies` has written
in docs/comparison/results.csv.
"""

import argparse
import pathlib

import matplotlib

matplotlib.use('agg')

from matplotlib import lines
from matplotlib import pyplot as plt
import pandas as pd

RESULTS = pathlib.Path(__file__).with_name('results.csv')
CLASSES = {'digits': 10, 'glyphs100': 100, 'cifar100': 100}
RATE, WEIGHT = 'optimizer.learning_rate', 'loss.clop_weight'
# Order and title of the methods.
TITLES = {
  'invariance': 'invariance only',
  'simsiam': 'SimSiam',
  'byol': 'BYOL',
  'alignment_uniformity': 'alignment + uniformity',
  'nt_xent': 'NT-Xent',
  'dcl': 'DCL',
  'spectral': 'spectral',
  'sigmoid': 'sigmoid',
  'vicreg': 'VICReg',
  'barlow_twins': 'Barlow Twins',
  'w_mse': 'W-MSE',
  'supcon': 'SupCon (a tenth labelled)',
  'nt_xent+ce': 'NT-Xent + cross-entropy',
}
METRICS = {
  'linear_top1': ('Linear accuracy, %', 100),
  'knn_top1': ('kNN accuracy, %', 100),
  'effective_rank': ('Effective rank of the embeddings', 1),
  'prototype_cosine': ('Cosine to the own prototype', 1),
}
# Okabe and Ito's colours.
ALONE, CLOP, GREY = '#D55E00', '#0072B2', '#999999'
DRAWN = ('linear_top1', 'effective_rank')


def collect(studies: pathlib.Path) -> pd.DataFrame:
  """Returns the cells of all studies: one row for each run."""
  frames = []
  for path in sorted(studies.glob('*/*/results.csv')):
    frame = pd.read_csv(path)
    if 'loss.contrastive' not in frame:
      frame['loss.contrastive'] = path.parent.name
    frame.insert(0, 'data', path.parents[1].name)
    frames.append(frame.rename(columns={'loss.contrastive': 'method'}))
  cells = pd.concat(frames, ignore_index=True)
  columns = ['data', 'method', RATE, WEIGHT, 'seed', 'status', *METRICS]
  return cells[[*columns, 'train_seconds', 'evaluate_seconds']]


def read(path: pathlib.Path = RESULTS) -> dict[str, pd.DataFrame]:
  """Returns the cells of each data set.

  Diverged cells count with the accuracy of chance and effective rank 0.
  """
  cells = pd.read_csv(path)
  classes = cells['data'].map(CLASSES)
  diverged = cells['status'] == 'diverged'
  for metric in ('linear_top1', 'knn_top1'):
    cells.loc[diverged, metric] = 1 / classes[diverged]
  cells.loc[diverged, ['effective_rank', 'prototype_cosine']] = 0.0
  cells['diverged'] = diverged
  # The rule of the warning during training, `watch.collapse_share`.
  cells['collapsed'] = cells['effective_rank'] < classes / 2
  return dict(list(cells.groupby('data')))


def pair(group: pd.DataFrame, metric: str, digits: int, factor: float) -> str:
  """Returns `alone -> CLOP`, means over the seeds."""
  texts = []
  for weight in (0, 1):
    part = group[group[WEIGHT] == weight]
    text = f'{factor * part[metric].mean():.{digits}f}'
    if metric == 'effective_rank' and part['collapsed'].sum() * 2 > len(part):
      text += '*'
    if part['diverged'].any():
      text += f' ({part["diverged"].sum()} diverged)'
    texts.append(text)
  return ' -> '.join(texts)


def gain(group: pd.DataFrame) -> tuple[float, float]:
  """Returns mean and standard error over seeds of CLOP's gain, in points."""
  wide = group.pivot_table(index='seed', columns=WEIGHT, values='linear_top1')
  difference = 100 * (wide[1] - wide[0])
  return difference.mean(), difference.std() / len(difference) ** 0.5


def table(header: list[str], rows: list[list[str]]) -> None:
  """Prints a table."""
  print('| ' + ' | '.join(header) + ' |')
  print('|' + '---|' * len(header))
  for row in rows:
    print('| ' + ' | '.join(row) + ' |')


def print_tables(name: str, cells: pd.DataFrame) -> None:
  """Prints one table for each metric."""
  rates = sorted(cells[RATE].unique())
  methods = [m for m in TITLES if m in set(cells['method'])]
  header = ['method', *(f'rate {rate:g}' for rate in rates)]
  groups = dict(list(cells.groupby(['method', RATE])))
  for metric, (title, factor) in METRICS.items():
    print(f'\n### {name}: {title.lower()}\n')
    digits = 2 if metric == 'prototype_cosine' else 1
    table(
      header,
      [
        [
          TITLES[method],
          *(
            pair(groups[method, rate], metric, digits, factor) for rate in rates
          ),
        ]
        for method in methods
      ],
    )
  print(f"\n### {name}: CLOP's gain of linear accuracy, points\n")
  rows = []
  for method in methods:
    row = [TITLES[method]]
    for rate in rates:
      mean, error = gain(groups[method, rate])
      row.append(f'{mean:+.1f} ± {error:.1f}')
    rows.append(row)
  table(header, rows)


def draw(sets: dict[str, pd.DataFrame], path: str) -> None:
  """Draws each method alone and with CLOP, for each rate and data set."""
  rates = sorted(next(iter(sets.values()))[RATE].unique())
  rows = [(name, metric) for name in sets for metric in DRAWN]
  figure, axes = plt.subplots(
    len(rows),
    len(rates),
    figsize=(10.4, 3.3 * len(rows)),
    sharey=True,
    sharex='row',
    layout='constrained',
    squeeze=False,
  )
  for row, (name, metric) in zip(axes, rows, strict=True):
    for ax, rate in zip(row, rates, strict=True):
      cells = sets[name]
      _panel(ax, cells[cells[RATE] == rate], metric)
      ax.set_title(f'{name}, learning rate {rate:g}', fontsize=10)
      ax.set_xlabel(METRICS[metric][0])
      if metric == 'effective_rank':
        ax.set_xscale('log')
        ax.axvline(CLASSES[name] / 2, color='black', lw=0.8, ls=':')
  legend = [
    lines.Line2D([], [], color=ALONE, marker='o', ls='', label='alone'),
    lines.Line2D([], [], color=CLOP, marker='D', ls='', label='with CLOP'),
    lines.Line2D(
      [], [], color='black', lw=0.8, ls=':', label='half the number of classes'
    ),
  ]
  figure.legend(handles=legend, loc='outside upper center', ncols=3)
  figure.savefig(path, dpi=130)
  print(f'\nwritten: {path}')


def _panel(ax, cells, metric):
  factor = METRICS[metric][1]
  for place, method in enumerate(reversed(TITLES)):
    own = cells[cells['method'] == method]
    by_weight = own.groupby(WEIGHT)
    word = 'diverged' if own['diverged'].any() else 'at chance'
    chance = 1 / own['data'].map(CLASSES).max()
    if by_weight['linear_top1'].mean().max() < 2 * chance:
      ax.text(
        0.02, place, word, transform=ax.get_yaxis_transform(), va='center'
      )
      continue
    values = factor * by_weight[metric].mean()
    ax.plot(values, [place] * len(values), color=GREY, lw=1, zorder=1)
    for weight, colour, marker in ((0, ALONE, 'o'), (1, CLOP, 'D')):
      ax.plot(values.get(weight), place, marker, color=colour, ms=5)
  ax.set_yticks(range(len(TITLES)), [*reversed(TITLES.values())], fontsize=9)
  ax.grid(axis='x', lw=0.4)


def main() -> None:
  """The command."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--studies', help='Folder of the studies to collect.')
  parser.add_argument('--figure', help='File to draw to.')
  options = parser.parse_args()
  if options.studies:
    cells = collect(pathlib.Path(options.studies))
    cells.round(4).to_csv(RESULTS, index=False)
  sets = read()
  for name, cells in sets.items():
    print_tables(name, cells)
  if options.figure:
    draw(sets, options.figure)


if __name__ == '__main__':
  main()
