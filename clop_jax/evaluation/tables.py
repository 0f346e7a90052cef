"""Tables of evaluation results, in Markdown or as CSV."""

from collections.abc import Sequence
import csv
import io
import os

from clop_jax.runtime import files

NONE = '–'  # noqa: RUF001 (the dash of an empty field)
_SUMMARY = (
  ('linear top-1', 'linear_top1', '{:.3f}'),
  ('kNN top-1', 'knn_top1', '{:.3f}'),
  ('effective rank', 'effective_rank', '{:.1f}'),
  ('prototype cosine', 'prototype_cosine', '{:.3f}'),
)
# Title, key and format.
_COLUMNS = (
  ('run', 'run', '{}'),
  ('step', 'step', '{:,}'),
  ('data', 'data', '{}'),
  ('labels', 'num_labels', '{:,}'),
  ('of all', 'label_fraction', '{:.4g}'),
  *_SUMMARY[:2],
  ('fine-tuned top-1', 'finetune_top1', '{:.3f}'),
  *_SUMMARY[2:],
)


def table(names: Sequence[str], evaluations: Sequence[dict]) -> str:
  """Returns a Markdown table of the names and `eval.json` of each run.

  Example:
    >>> from clop_jax.evaluation import tables
    >>> result = {'linear_top1': 0.5, 'knn_top1': 0.25}
    >>> result |= {'effective_rank': 3.0, 'prototype_cosine': 0.125}
    >>> print(tables.table(['a'], [result]))
    | method | linear top-1 | kNN top-1 | effective rank | prototype cosine |
    |--------|--------------|-----------|----------------|------------------|
    | a      | 0.500        | 0.250     | 3.0            | 0.125            |
  """
  rows = [
    evaluation | {'method': name}
    for name, evaluation in zip(names, evaluations, strict=True)
  ]
  return _table((('method', 'method', '{}'), *_SUMMARY), rows)


def evaluation_table(rows: Sequence[dict]) -> str:
  """Returns a Markdown table with a row for each run, step and fraction.

  Columns without any value are left out.

  Example:
    >>> from clop_jax.evaluation import tables
    >>> row = {'run': 'a', 'step': 50, 'data': 'digits', 'num_labels': 143}
    >>> row |= {'label_fraction': 0.1, 'finetune_top1': 0.875}
    >>> print(tables.evaluation_table([row]))
    | run | step | data   | labels | of all | fine-tuned top-1 |
    |-----|------|--------|--------|--------|------------------|
    | a   | 50   | digits | 143    | 0.1    | 0.875            |
  """
  return _table([c for c in _COLUMNS if any(c[1] in x for x in rows)], rows)


def _table(columns, rows):
  cells = [
    [form.format(row[key]) if key in row else NONE for _, key, form in columns]
    for row in rows
  ]
  return markdown([title for title, _, _ in columns], cells)


def check_table(path: str) -> None:
  """Raises ValueError if `write_table` cannot write to the path."""
  folder = os.path.dirname(os.path.abspath(path))
  if not path.endswith(('.csv', '.md')):
    raise ValueError(f'--table must end in .csv or .md, got {path}')
  if not os.path.isdir(folder):
    raise ValueError(f'--table={path}: folder {folder} does not exist')


def write_table(path: str, text: str, rows: Sequence[dict]) -> None:
  """Writes the text to a .md file, or the rows with all digits to a .csv."""
  if path.endswith('.csv'):
    file = io.StringIO()
    keys = [key for _, key, _ in _COLUMNS if any(key in x for x in rows)]
    writer = csv.DictWriter(file, keys, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    text = file.getvalue().removesuffix('\n')
  write(path, text + '\n')


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Returns a Markdown table, aligned for a terminal."""
  rows = [[c.replace('|', r'\|') for c in row] for row in [header, *rows]]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    ' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True))
    for row in rows
  ]
  rule = '|'.join('-' * (width + 2) for width in widths)
  head, *body = [f'| {line} |' for line in lines]
  return '\n'.join([head, f'|{rule}|', *body])


def write(path: str, text: str) -> None:
  """Writes a text file; a partial file never exists."""
  files.write_whole(path, text.encode('utf-8', 'backslashreplace'))
