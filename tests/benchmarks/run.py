"""The benchmark suite: ours against its peers, in one table.

python -m tests.benchmarks.run --suite=cpu
python -m tests.benchmarks.run --suite=gpu --out=benchmarks --only=steps,input

Writes `<out>/<suite>.json` and `<out>/<suite>.md` anew after each contest, so a
run that is cut off keeps what it has measured; the next one in that folder, on
the same machine, adds to it and replaces what it measures again. Needs jax,
flax, optax and dm-pix; scikit-learn for one section, PyTorch (the extra
`bench`) for the peers' rows.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import datetime
import json
import os
import pathlib
import re
import subprocess

# PyTorch shares the GPU's memory, which JAX would take at the start.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax

from tests.benchmarks import changes
from tests.benchmarks import contest
from tests.benchmarks import losses
from tests.benchmarks import machine
from tests.benchmarks import prototypes
from tests.benchmarks import startup
from tests.benchmarks import steps


def _protocol(suite, small):
  # Only here: the other sections do without scikit-learn.
  from tests.benchmarks import protocol

  return protocol.contests(suite, small)


# The most telling first: a run may be cut off.
SECTIONS = {
  'ceilings': machine.contests,
  'steps': steps.contests,
  'input': steps.input_contests,
  'losses': losses.contests,
  'changes': changes.contests,
  'start': startup.contests,
  'prototypes': prototypes.contests,
  'protocol': _protocol,
}


def run(
  suite: str,
  out: str,
  *,
  sections: Sequence[str] | None = None,
  case: str = '',
  contestants: str = '',
  turns: int | None = None,
  small: bool = False,
) -> dict:
  """Holds all contests of a suite.

  Args:
    suite: 'cpu' or 'gpu', for its sizes; what it runs on is JAX's default.
    out: folder of the results, made if missing.
    sections: of `SECTIONS`; None: all.
    case: regular expression; only cases with a match in their name are held.
    contestants: regular expression; only contestants with a match in their
      name take part.
    turns: number of timed turns of each contestant; None: each contest's own.
    small: the smallest sizes, to see that all of it works; one turn each.

  The ceilings are always held, and by all, where their section is.

  Returns:
    What the JSON file holds: `suite`, `machine` and `rows`, each of which has
    the `commit` and `time` at which it was measured.

  Raises:
    ValueError: for an unknown section, or a folder with results of another
      machine, or other versions.
  """
  sections = list(SECTIONS) if sections is None else sections
  for name in sections:
    if name not in SECTIONS:
      raise ValueError(f'--only must be of {list(SECTIONS)}, got {name!r}')
  results = {
    'suite': suite + (' (smallest sizes)' if small else ''),
    'machine': machine.facts(),
    'rows': [],
  }
  path = pathlib.Path(out) / f'{suite}.json'
  if path.exists():
    _add_to(results, path)
  run_at = {
    'commit': _commit(),
    'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='minutes'),
  }
  for name in sections:
    for held in SECTIONS[name](suite, small):
      if name != 'ceilings':
        held = _part_of(held, case, contestants)
      if not held.contestants:
        continue
      if small or turns is not None:
        held = dataclasses.replace(held, turns=1 if small else turns)
      rows = []
      for row in contest.hold(held):
        rows.append(row | run_at)
        print(_line(row), flush=True)
      again = (held.section, held.case)
      results['rows'] = sorted(
        [r for r in results['rows'] if (r['section'], r['case']) != again]
        + rows,
        key=lambda row: list(SECTIONS).index(row['section']),
      )
      _finish(results, machine.copied_bytes(suite, small))
      _write(results, path)
  return results


def _part_of(held, case, contestants):
  """The contest without whom, or what, the patterns leave out."""
  kept = {
    name: make
    for name, make in held.contestants.items()
    if re.search(case, held.case) and re.search(contestants, name)
  }
  return dataclasses.replace(held, contestants=kept)


def _add_to(results, path):
  """Takes over the rows of an earlier run."""
  earlier = json.loads(path.read_text())
  for name in ('suite', 'machine'):
    if earlier[name] != results[name]:
      raise ValueError(
        f'--out: {path} holds results of {earlier[name]}, and this is '
        f'{results[name]}; use another --out'
      )
  results['rows'] = earlier['rows']


def _commit():
  # A copy of the files may have another history, or none.
  if 'COMMIT' in os.environ:
    return os.environ['COMMIT']
  result = subprocess.run(
    ['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'],
    cwd=pathlib.Path(__file__).parent,
    capture_output=True,
    text=True,
  )
  return result.stdout.strip() or 'not known'


def _finish(results, copied):
  """Adds what needs the ceilings, if they have been measured."""
  peaks = {
    row['dtype']: row['tflops']
    for row in results['rows']
    if row['section'] == 'ceilings' and 'dtype' in row
  }
  for row in results['rows']:
    if 'tflops' in row and row['dtype'] in peaks:
      row['share_of_peak'] = row['tflops'] / peaks[row['dtype']]
    if row['section'] == 'ceilings' and 'copy' in row['case']:
      row['gigabytes_per_second'] = copied / row['seconds'] / 1e9


def _write(results, path):
  path.parent.mkdir(parents=True, exist_ok=True)
  for suffix, text in (
    ('.json', json.dumps(results, indent=1) + '\n'),
    ('.md', markdown(results)),
  ):
    partial = path.with_suffix('.partial')
    partial.write_text(text)
    partial.replace(path.with_suffix(suffix))


def _line(row):
  what = row.get('left_out') or ', '.join(_figures(row))
  return f'{row["section"]} | {row["case"]} | {row["contestant"]}: {what}'


def _figures(row):
  yield f'{_time(row["seconds"])} ({_spread(row)})'
  if 'ratio' in row:
    yield f'{row["ratio"]:.2f} x'
  if 'images_per_second' in row:
    yield f'{row["images_per_second"]:,.0f} images/s'


def _time(seconds):
  for factor, unit in ((1, 's'), (1e3, 'ms')):
    if seconds * factor >= 1:
      return f'{seconds * factor:.3g} {unit}'
  return f'{seconds * 1e6:.3g} µs'


def _spread(row):
  return f'{_time(row["smallest"])} to {_time(row["largest"])}'


def markdown(results: dict) -> str:
  """The results as a page: a table for each section."""
  facts = results['machine']
  lines = [
    f'# Benchmark suite: {results["suite"]}',
    '',
    ', '.join(f'{name}: {value}' for name, value in facts.items()) + '.',
    '',
    'Median of the turns (smallest to largest); contestants take turns, and '
    '"times the first" is how often as long a call takes as that of the first '
    'one of the same case. TFLOP/s count the products of convolutions and '
    'dense layers. Memory: temporaries as the compiler plans them (JAX), or '
    'what was allocated (PyTorch on a GPU) or grew (others on CPU) beside '
    'arguments.',
  ]
  for section in dict.fromkeys(row['section'] for row in results['rows']):
    lines += ['', f'## {section}', '']
    rows = [row for row in results['rows'] if row['section'] == section]
    lines += _table(rows)
    runs = dict.fromkeys(f'{row["commit"]} ({row["time"]})' for row in rows)
    lines += ['', f'Measured at commit {" and ".join(runs)}.']
  return '\n'.join(lines) + '\n'


def _table(rows):
  columns = {
    'case': lambda r: r['case'],
    'contestant': lambda r: r['contestant'],
    'time': lambda r: f'{_time(r["seconds"])} ({_spread(r)})',
    'turns': lambda r: str(r['turns']),
    'times the first': lambda r: f'{r["ratio"]:.2f}',
    'images/s': lambda r: f'{r["images_per_second"]:,.0f}',
    'TFLOP/s': lambda r: f'{r["tflops"]:.3g}',
    'share of peak': lambda r: f'{100 * r["share_of_peak"]:.0f} %',
    'GB/s': lambda r: f'{r["gigabytes_per_second"]:.0f}',
    'memory, MB': lambda r: f'{r["temporaries"] / 1e6:,.1f}',
  }

  def cell(name, row):
    if 'left_out' in row and name == 'time':
      return row['left_out'].replace('|', '/')
    try:
      return columns[name](row)
    except (KeyError, TypeError):
      return ''

  used = [c for c in columns if any(cell(c, row) for row in rows)]
  lines = [used, ['---'] * len(used)]
  lines += [[cell(c, row) for c in used] for row in rows]
  return [f'| {" | ".join(line)} |' for line in lines]


def main():
  """The command."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--suite', choices=('cpu', 'gpu'), required=True)
  parser.add_argument('--out', default='benchmarks', help='folder of results')
  parser.add_argument('--only', help=f'sections, of {",".join(SECTIONS)}')
  parser.add_argument(
    '--case', default='', help='cases whose name matches (regular expression)'
  )
  parser.add_argument(
    '--contestants',
    default='',
    help='contestants whose name matches (regular expression)',
  )
  parser.add_argument('--turns', type=int, help='timed turns of each')
  parser.add_argument(
    '--small', action='store_true', help='smallest sizes: does it all work?'
  )
  arguments = parser.parse_args()
  if arguments.suite != jax.default_backend() and not arguments.small:
    parser.error(
      f'--suite={arguments.suite} needs a {arguments.suite.upper()}, and JAX '
      f'runs on {jax.default_backend()} here; with --small it can be tried'
    )
  sections = arguments.only.split(',') if arguments.only else None
  run(
    arguments.suite,
    arguments.out,
    sections=sections,
    case=arguments.case,
    contestants=arguments.contestants,
    turns=arguments.turns,
    small=arguments.small,
  )
  print(f'results: {arguments.out}/{arguments.suite}.md')


if __name__ == '__main__':
  main()
