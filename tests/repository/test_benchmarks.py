"""The benchmark suite runs, says what it measured, and compares like with like.

Nothing here is timed.
"""

import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests.benchmarks import contest
from tests.benchmarks import losses
from tests.benchmarks import run
from tests.benchmarks import startup
from tests.benchmarks import steps

ROOT = pathlib.Path(__file__).parents[2]
PEERS = {
  'steps': {"PyTorch, authors' form", 'PyTorch, expert form'},
  'losses': {'optax.losses.ntxent', "PyTorch, authors' form"},
  'prototypes': {'PyTorch, orthogonal_', 'PyTorch, polar factor by SVD'},
  'protocol': {'scikit-learn'},
  'start': {'empty cache', 'second start'},
  'input': {'a constant batch'},
}


# PyTorch's compiler uses, where it is imported, what PyTorch has deprecated.
@pytest.mark.filterwarnings(
  'ignore:.torch.jit.script_method:DeprecationWarning'
)
def test_the_suite_runs_at_its_smallest_size(tmp_path, monkeypatch):
  # Started is one process, for all turns of both contestants.
  started = functools.cache(startup._start_in_process)
  monkeypatch.setattr(
    startup,
    '_start_in_process',
    lambda small, folder, part: started(small, str(tmp_path), part),
  )
  run.run(
    'cpu',
    str(tmp_path),
    sections=[name for name in run.SECTIONS if name != 'changes'],
    small=True,
  )
  # Each compiles a step; the others of this section differ in an argument.
  few = 'lax.scan|micro-batches|remat|not donated|augmentation'
  run.run(
    'cpu', str(tmp_path), sections=['changes'], contestants=few, small=True
  )
  results = json.loads((tmp_path / 'cpu.json').read_text())
  rows = results['rows']
  assert [*dict.fromkeys(row['section'] for row in rows)] == [*run.SECTIONS]
  assert results['machine']['jax'] == jax.__version__
  check_rows(rows)
  for section in run.SECTIONS:
    names = {row['contestant'] for row in rows if row['section'] == section}
    assert PEERS.get(section, set()) <= names
  page = (tmp_path / 'cpu.md').read_text()
  for row in rows:
    assert row['contestant'] in page
    assert row['case'] in page


def check_rows(rows):
  for row in rows:
    assert row['commit'] != 'not known'
    if 'left_out' in row:
      # Nothing fails but what is not installed.
      assert row['left_out'].startswith('PyTorch is not installed'), row
    else:
      assert 0 < row['smallest'] <= row['seconds'] <= row['largest']
      assert row['ratio'] > 0


def test_the_gpu_script_runs_on_a_cpu_and_keeps_what_it_has(tmp_path):
  rng = np.random.default_rng(0)
  arrays = {}
  for split, count in (('train', 32), ('test', 16)):
    shape = (count, 32, 32, 1)
    arrays[f'{split}_images'] = rng.integers(0, 256, shape, np.uint8)
    arrays[f'{split}_labels'] = np.arange(count) % 4
  np.savez(tmp_path / 'data.npz', **arrays)
  out = tmp_path / 'out'

  def start(parts):
    command = ['bash', 'tests/benchmarks/gpu.sh', '--small', f'--parts={parts}']
    # One device, and programs that are no better compiled than the tests'.
    flags = [x for x in os.environ['XLA_FLAGS'].split() if 'count' not in x]
    environment = os.environ | {
      'PYTHON': sys.executable,
      'XLA_FLAGS': ' '.join(flags),
    }
    return subprocess.Popen(
      [*command, out, tmp_path / 'data.npz'],
      cwd=ROOT,
      env=environment,
      start_new_session=True,
      stdout=subprocess.DEVNULL,
    )

  def sections():
    rows = json.loads((out / 'gpu.json').read_text())['rows']
    check_rows(rows)
    return {row['section'] for row in rows}

  log, summary = out / 'log.txt', out / 'summary.md'
  process = start('losses,nonsense,tests')
  try:
    while process.poll() is None:
      if log.exists() and '=== tests' in log.read_text():
        break
      time.sleep(0.1)
  finally:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
  assert sections() == {'losses'}
  assert '| losses | finished |' in summary.read_text()
  assert '| nonsense | failed (exit status 1) |' in summary.read_text()

  assert start('steps18,training,tests').wait() == 0, log.read_text()
  assert sections() == {'ceilings', 'steps', 'losses'}
  text = summary.read_text()
  for part in ('steps18', 'training', 'tests'):
    assert f'| {part} | finished |' in text
  assert {'ours, float32', 'ours, as training chooses'} <= set(
    re.findall(r'\| (ours[^|]*) \|', text)
  )
  assert re.search(r'\d+ passed, \d+ skipped', text)
  evaluations = json.loads((out / 'evaluation.json').read_text())
  assert set(evaluations) == {'without_clop', 'with_clop'}
  for name, evaluation in evaluations.items():
    lines = (out / f'{name}.jsonl').read_text().splitlines()
    assert json.loads(lines[-1])['step'] == evaluation['step'] == 2
  # No more come back from a machine that is lent.
  assert len(list(out.iterdir())) <= 8


@pytest.mark.parametrize('section', list(run.SECTIONS))
def test_both_suites_have_contests_at_their_sizes(section):
  # At the smallest size the suites are the same programs.
  for suite in ('cpu', 'gpu'):
    first = next(iter(run.SECTIONS[section](suite, False)))
    assert first.section == section and first.contestants


def test_the_benchmark_and_the_step_need_no_input_libraries(tmp_path):
  code = """
    import sys
    for name in ('tensorflow_datasets', 'grain', 'ml_collections', 'sklearn',
                 'matplotlib', 'orbax', 'tensorflow'):
      sys.modules[name] = None  # an import of it fails
    from tests.benchmarks import run
    run.run('cpu', sys.argv[1], sections=['ceilings', 'steps'], small=True)
  """
  code = '\n'.join(line[4:] for line in code.splitlines())
  result = subprocess.run(
    [sys.executable, '-c', code, str(tmp_path)],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  assert 'ours, float32' in (tmp_path / 'cpu.md').read_text()


def test_a_second_run_adds_to_the_first_and_replaces_what_it_repeats(tmp_path):
  def measure(*sections):
    return run.run('cpu', str(tmp_path), sections=sections, small=True)['rows']

  first = measure('prototypes')
  both = measure('ceilings')
  assert both[-len(first) :] == first
  assert {row['section'] for row in both} == {'ceilings', 'prototypes'}
  again = measure('ceilings')
  assert len(again) == len(both)
  assert again[0]['seconds'] != both[0]['seconds']
  path = tmp_path / 'cpu.json'
  other = json.loads(path.read_text())
  other['machine']['jax'] = '0.1'
  path.write_text(json.dumps(other))
  with pytest.raises(ValueError, match=r'--out: .*use another --out'):
    measure('ceilings')
  assert json.loads(path.read_text()) == other


def program(seconds, result=None):
  return contest.Program(
    run=lambda: None, seconds=lambda: next(seconds), result=result
  )


def test_contestants_take_turns_and_are_held_against_the_first(monkeypatch):
  monkeypatch.setattr(contest, '_PAUSE', 0)
  order = []

  def make(name, each):
    def seconds():
      order.append(name)
      return next(each)

    return lambda: contest.Program(run=lambda: None, seconds=seconds)

  rows = list(
    contest.hold(
      contest.Contest(
        's',
        'c',
        {
          'ours': make('ours', iter([3.0, 1.0, 2.0])),
          'theirs': make('theirs', iter([4.0, 8.0, 6.0])),
        },
        images=12,
        flop=6e12,
        turns=3,
      )
    )
  )
  assert order == ['ours', 'theirs'] * 3
  ours, theirs = rows
  assert (ours['seconds'], ours['smallest'], ours['largest']) == (2, 1, 3)
  assert (theirs['seconds'], theirs['ratio']) == (6.0, 3.0)
  assert (ours['images_per_second'], ours['tflops']) == (6.0, 3.0)


def test_a_contestant_that_fails_is_a_row_and_the_others_go_on(monkeypatch):
  monkeypatch.setattr(contest, '_PAUSE', 0)

  def fails():
    raise RuntimeError('out of\nmemory')

  def leaves():
    raise contest.LeftOut('is not here')

  rows = list(
    contest.hold(
      contest.Contest(
        's',
        'c',
        {
          'ours': fails,
          'theirs': leaves,
          'third': lambda: program(iter([1.0, 1.0])),
        },
        turns=2,
      )
    )
  )
  assert rows[0]['left_out'] == 'failed: RuntimeError: out of memory'
  assert rows[1]['left_out'] == 'is not here'
  assert rows[2]['seconds'] == 1.0
  assert 'ratio' not in rows[2]


def test_results_that_differ_are_not_timed():
  z = jax.random.normal(jax.random.key(0), (2, 4, 8))
  value = jax.value_and_grad(lambda z: (z**2).sum())(z)
  other = jax.value_and_grad(lambda z: 1.01 * (z**2).sum())(z)
  held = contest.Contest(
    's',
    'c',
    {
      'ours': lambda: program(iter([1.0]), lambda: jax.device_get(value)),
      'theirs': lambda: program(iter([1.0]), lambda: jax.device_get(other)),
    },
    check=losses._agree,
  )
  rows = list(contest.hold(held))
  assert len(rows) == 2
  for row in rows:
    assert row['left_out'].startswith('results differ: Not equal to tolerance')


@pytest.mark.parametrize(
  ('network', 'gigaflop'),
  [
    (steps.RESNET18_32, 6.67),
    (steps.RESNET50_32, 15.6),
    (steps.RESNET50_224, 49.0),
  ],
)
def test_the_flop_of_a_step_are_those_of_the_published_networks(
  network, gigaflop
):
  counted = steps.flop_per_image(network) / 1e9
  np.testing.assert_allclose(counted, gigaflop, rtol=2e-3)
