"""Small studies with made-up results, as files."""

import csv
import itertools
import json

import numpy as np

from clop_jax.study import grid as grid_lib

K, DIM, POINTS = 4, 8, 40
RATE, WEIGHT = 'optimizer.learning_rate', 'loss.clop_weight'
GRID = {RATE: [0.01, 1.0], WEIGHT: [0.0, 1.0], 'seed': [0, 1]}
EVALUATION = {
  'versions': {'jax': '0.0.7'},
  'device': '3 x abacus',
  'time': '2001-02-03T04:05:06+00:00',
}


def arrays(rng, *, points=POINTS, **changed):
  labels = np.arange(points, dtype=np.int32) % K
  z = rng.normal(size=(points, DIM)) + 3 * np.eye(K, DIM)[labels]
  z /= np.linalg.norm(z, axis=1, keepdims=True)
  means = np.stack([z[labels == k].mean(axis=0) for k in range(K)])
  means /= np.linalg.norm(means, axis=1, keepdims=True)
  return {
    'embeddings': z.astype(np.float16),
    'labels': labels,
    'spectrum': np.linalg.svd(z, compute_uv=False).astype(np.float32),
    'class_mean_cosines': (means @ means.T).astype(np.float32),
    'prototypes': np.eye(K, DIM, dtype=np.float32),
  } | changed


def make_study(folder, grid=GRID, *, num_classes=K, points=POINTS, changed=()):
  """Writes a study and returns its rows by cell; `changed` replaces values."""
  rng = np.random.default_rng(0)
  config = {'data': {'name': 'dice', 'num_classes': num_classes}, 'seed': 0}
  known = {'config': {'data': {'num_classes': num_classes or K}}}
  folder.mkdir(exist_ok=True)
  (folder / 'study.json').write_text(
    json.dumps({'config': config, 'grid': grid})
  )
  rows = {}
  for number, values in enumerate(itertools.product(*grid.values())):
    row = {'cell': f'c{number}', 'status': 'done', 'error': ''}
    row |= dict(zip(grid, map(grid_lib.text, values), strict=True))
    row |= {
      'linear_top1': rng.uniform(0.5, 1),
      'knn_top1': rng.uniform(0.5, 1),
      'effective_rank': rng.uniform(1, 8),
      'prototype_cosine': rng.uniform(-1, 1),
      'train_seconds': 1800,
      'evaluate_seconds': 60,
      'commit': 'f00ba4',
      'config': json.dumps(config),
    }
    row |= dict(changed).get(row['cell'], {})
    if row['status'] != 'done':
      for metric in ('linear_top1', 'knn_top1', 'effective_rank'):
        row[metric] = ''
      row['prototype_cosine'] = ''
    rows[row['cell']] = row
    cell = folder / 'cells' / row['cell']
    cell.mkdir(parents=True)
    if row['status'] == 'done':
      (cell / 'eval.json').write_text(json.dumps(EVALUATION | known))
      np.savez(cell / 'embeddings.npz', **arrays(rng, points=points))
      (cell / 'metrics.jsonl').write_text(
        ''.join(
          json.dumps(
            {'step': s, 'loss': 1 / s, 'clop_loss': None, 'effective_rank': s}
          )
          + '\n'
          for s in range(1, 5)
        )
      )
  write_rows(folder, rows.values())
  return rows


def write_rows(folder, rows):
  rows = list(rows)
  with open(folder / 'results.csv', 'w', newline='') as file:
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
