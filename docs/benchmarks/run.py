"""Benchmarks of clop_jax against its peers, in one table.

python -m docs.benchmarks.run --suite=cpu
python -m docs.benchmarks.run --suite=gpu --out=benchmarks --only=steps,input

Rewrites `<out>/<suite>.json` and `<out>/<suite>.md` after each contest, so an
interrupted run keeps its results. The next run on the same machine adds to them
and replaces repeated rows. Needs jax, flax, optax and dm-pix. The section
`protocol` needs scikit-learn, the peers' rows need PyTorch (the extra `bench`).
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

# Leaves GPU memory to PyTorch.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax

from docs.benchmarks import contest
from docs.benchmarks import losses
from docs.benchmarks import machine
from docs.benchmarks import startup
from docs.benchmarks import steps


def _protocol(suite, small):
  # The other sections do not need scikit-learn.
  from docs.benchmarks import protocol

  return protocol.contests(suite, small)


# In order of importance, because a run may be interrupted.
SECTIONS = {
  'ceilings': machine.contests,
  'steps': steps.contests,
  'input': steps.input_contests,
  'losses': losses.contests,
  'start': startup.contests,
  'protocol': _protocol,
}


@dataclasses.dataclass(frozen=True)
class Choice:
  """The part of a suite to run: sections and regular expressions."""

  sections: Sequence[str] = tuple(SECTIONS)
  case: str = ''
  contestants: str = ''
  turns: int | None = None  # None: those of each contest
  small: bool = False  # the smallest sizes and one turn

  def part_of(self, held: contest.Contest) -> contest.Contest:
    """Returns the contest with the chosen contestants and turns."""
    kept = {
      name: make
      for name, make in held.contestants.items()
      # Other sections refer to the ceilings.
      if held.section == 'ceilings'
      or (re.search(self.case, held.case) and re.search(self.contestants, name))
    }
    turns = 1 if self.small else self.turns or held.turns
    return dataclasses.replace(held, contestants=kept, turns=turns)


def run(suite: str, out: str, choice: Choice) -> dict:
  """Runs the chosen contests of a suite and returns the JSON content.

  Args:
    suite: 'cpu' or 'gpu', which sets the sizes. The device is JAX's default.
    out: Folder of the results.
    choice: Part of the suite to run.

  Raises:
    ValueError: If a section is unknown, or the folder has results of another
      machine or other versions.
  """
  for name in choice.sections:
    if name not in SECTIONS:
      raise ValueError(f'--only must be of {list(SECTIONS)}, got {name!r}')
  results = {
    'suite': suite + (' (smallest sizes)' if choice.small else ''),
    'machine': machine.facts(),
    'rows': [],
  }
  path = pathlib.Path(out) / f'{suite}.json'
  if path.exists():
    _add_to(results, path)
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec='minutes')
  run_at = {'commit': _commit(), 'time': now}
  for name in choice.sections:
    for held in map(choice.part_of, SECTIONS[name](suite, choice.small)):
      if not held.contestants:
        continue
      rows = []
      for row in contest.hold(held):
        rows.append(row | run_at)
        print(_line(row), flush=True)
      others = [
        row
        for row in results['rows']
        if (row['section'], row['case']) != (held.section, held.case)
      ]
      results['rows'] = sorted(others + rows, key=_position)
      _finish(results, machine.copied_bytes(suite, choice.small))
      _write(results, path)
  return results


def _position(row):
  return list(SECTIONS).index(row['section'])


def _add_to(results, path):
  """Adds the rows of an earlier run."""
  earlier = json.loads(path.read_text())
  for name in ('suite', 'machine'):
    if earlier[name] != results[name]:
      raise ValueError(
        f'--out: {path} has results of {earlier[name]}, not of '
        f'{results[name]}; use another --out'
      )
  results['rows'] = earlier['rows']


def _commit():
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
  """Adds the columns that refer to the ceilings, if those were measured."""
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
  texts = {
    '.json': json.dumps(results, indent=1) + '\n',
    '.md': markdown(results),
  }
  for suffix, text in texts.items():
    partial = path.with_suffix('.partial')
    partial.write_text(text)
    partial.replace(path.with_suffix(suffix))


def _time(seconds):
  for factor, unit in ((1, 's'), (1e3, 'ms')):
    if seconds * factor >= 1:
      return f'{seconds * factor:.3g} {unit}'
  return f'{seconds * 1e6:.3g} µs'


def _spread(row):
  smallest, largest = _time(row['smallest']), _time(row['largest'])
  return f'{_time(row["seconds"])} ({smallest} to {largest})'


_COLUMNS = {
  'case': lambda r: r['case'],
  'contestant': lambda r: r['contestant'],
  'time': _spread,
  'turns': lambda r: str(r['turns']),
  'times the first': lambda r: f'{r["ratio"]:.2f}',
  'images/s': lambda r: f'{r["images_per_second"]:,.0f}',
  'TFLOP/s': lambda r: f'{r["tflops"]:.3g}',
  'share of peak': lambda r: f'{100 * r["share_of_peak"]:.0f} %',
  'GB/s': lambda r: f'{r["gigabytes_per_second"]:.0f}',
  'memory, MB': lambda r: f'{r["temporaries"] / 1e6:,.1f}',
}


def _cell(name, row):
  if 'left_out' in row and name == 'time':
    return row['left_out'].replace('|', '/')
  try:
    return _COLUMNS[name](row)
  except (KeyError, TypeError):
    return ''


def _line(row):
  figures = [_cell(x, row) for x in ('time', 'times the first', 'images/s')]
  return ' | '.join([row['section'], row['case'], row['contestant'], *figures])


def markdown(results: dict) -> str:
  """Returns the results as a page with a table for each section."""
  facts = results['machine']
  lines = [
    f'# Benchmark suite: {results["suite"]}',
    '',
    ', '.join(f'{name}: {value}' for name, value in facts.items()) + '.',
    '',
    'Median of the turns (smallest to largest). Contestants take turns, and '
    '"times the first" divides the time of a call by that of the first '
    'contestant of the case. TFLOP/s count the products of convolutions and '
    'dense layers. Memory, beside the arguments: temporaries as the compiler '
    'plans them (JAX), allocations (PyTorch on a GPU) or growth of the process '
    '(others on a CPU).',
  ]
  for section in dict.fromkeys(row['section'] for row in results['rows']):
    rows = [row for row in results['rows'] if row['section'] == section]
    used = [x for x in _COLUMNS if any(_cell(x, row) for row in rows)]
    table = [used, ['---'] * len(used)]
    table += [[_cell(x, row) for x in used] for row in rows]
    runs = dict.fromkeys(f'{row["commit"]} ({row["time"]})' for row in rows)
    lines += ['', f'## {section}', '']
    lines += [f'| {" | ".join(line)} |' for line in table]
    lines += ['', f'Measured at commit {" and ".join(runs)}.']
  return '\n'.join(lines) + '\n'


def parser() -> argparse.ArgumentParser:
  """Returns the parser of the command's flags."""
  made = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  made.add_argument('--suite', choices=('cpu', 'gpu'), required=True)
  made.add_argument('--out', default='benchmarks', help='folder of results')
  made.add_argument(
    '--only', default=','.join(SECTIONS), help='sections, by commas'
  )
  made.add_argument('--case', default='', help='regular expression of cases')
  made.add_argument(
    '--contestants', default='', help='regular expression of contestants'
  )
  made.add_argument('--turns', type=int, help='timed turns of each')
  made.add_argument('--small', action='store_true', help='smallest sizes')
  return made


def main():
  """Runs the command."""
  made = parser()
  flags = made.parse_args()
  if flags.suite != jax.default_backend() and not flags.small:
    made.error(
      f'--suite={flags.suite} needs a {flags.suite.upper()}, and JAX runs on '
      f'{jax.default_backend()}; use --small to test the suite'
    )
  sections = flags.only.split(',')
  choice = Choice(
    sections, flags.case, flags.contestants, flags.turns, flags.small
  )
  run(flags.suite, flags.out, choice)
  print(f'results: {flags.out}/{flags.suite}.md')


if __name__ == '__main__':
  main()
