"""The benchmarks run and compare contestants fairly."""

import json
import os
import pathlib
import re
import shlex
import subprocess

import jax
import numpy as np
import pytest

from clop_jax import evaluate
from clop_jax import train
from docs.benchmarks import contest
from docs.benchmarks import losses
from docs.benchmarks import run
from docs.benchmarks import startup
from docs.benchmarks import steps
from tests import small


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
  monkeypatch.setattr(contest, '_PAUSE', 0)


@pytest.mark.filterwarnings(
  'ignore:.torch.jit.script_method:DeprecationWarning'
)
def test_each_section_runs_and_is_reported(tmp_path, monkeypatch):
  starts = []
  monkeypatch.setattr(
    startup, 'start_in_process', lambda *x: starts.append(x) or 1.0
  )
  for name, contests in list(run.SECTIONS.items()):
    first = next(iter(contests('cpu', True)))
    monkeypatch.setitem(run.SECTIONS, name, lambda *_, first=first: [first])
  # Every form of our step needs a compilation.
  forms = '^(?!a constant batch|ours, float32$)'
  choice = run.Choice(contestants=forms, small=True)
  results = run.run('cpu', str(tmp_path), choice)
  assert results == json.loads((tmp_path / 'cpu.json').read_text())
  page = (tmp_path / 'cpu.md').read_text()
  rows = results['rows']
  assert [*dict.fromkeys(row['section'] for row in rows)] == [*run.SECTIONS]
  for row in rows:
    assert row['contestant'] in page and row['case'] in page
    if 'left_out' in row:
      assert row['left_out'].startswith('PyTorch is not installed'), row
    else:
      assert 0 < row['smallest'] <= row['seconds'] <= row['largest']
  names = {row['contestant'] for row in rows}
  assert {'PyTorch, expert form', 'scikit-learn', 'second start'} <= names
  assert len(starts) == 3  # one to fill the cache, and one turn each

  again = run.run('cpu', str(tmp_path), run.Choice(['ceilings'], small=True))
  assert again['rows'][1:] == rows[1:]
  other = again | {'machine': again['machine'] | {'jax': '0.1'}}
  (tmp_path / 'cpu.json').write_text(json.dumps(other))
  with pytest.raises(ValueError, match=r'--out: .*cpu\.json'):
    run.run('cpu', str(tmp_path), choice)
  with pytest.raises(ValueError, match=r'--only.*nonsense'):
    run.run('cpu', str(tmp_path), run.Choice(['nonsense']))


@pytest.mark.parametrize('suite', ['cpu', 'gpu'])
def test_both_suites_have_all_sections(suite):
  for section in {*run.SECTIONS} - {'losses'}:
    first = next(iter(run.SECTIONS[section](suite, False)))
    assert first.section == section and first.contestants


def held(*contestants, **arguments):
  """Returns the rows of contestants, each a function or a list of seconds."""
  order = []

  def make(index, seconds):
    def one():
      order.append(index)
      return seconds.pop(0)

    return lambda: contest.Program(run=lambda: None, seconds=one)

  made = {
    str(i): x if callable(x) else make(i, x) for i, x in enumerate(contestants)
  }
  rows = list(contest.hold(contest.Contest('s', 'c', made, **arguments)))
  return rows, order


def test_contestants_take_turns():
  (ours, theirs), order = held(
    [3.0, 1.0, 2.0], [4.0, 8.0, 6.0], images=12, flop=6e12, turns=3
  )
  assert order == [0, 1] * 3
  assert (ours['seconds'], ours['smallest'], ours['largest']) == (2, 1, 3)
  assert (theirs['seconds'], theirs['ratio']) == (6.0, 3.0)
  assert (ours['images_per_second'], ours['tflops']) == (6.0, 3.0)


def test_a_failing_contestant_does_not_stop_the_others():
  def fails():
    raise RuntimeError('out of\nmemory')

  def leaves():
    raise contest.LeftOut('is not here')

  (failed, left, third), _ = held(fails, leaves, [1.0, 1.0], turns=2)
  assert failed['left_out'] == 'failed: RuntimeError: out of memory'
  assert left['left_out'] == 'is not here'
  assert third['seconds'] == 1.0 and 'ratio' not in third


def test_different_results_are_not_timed():
  z = jax.random.normal(jax.random.key(0), (2, 4, 8))

  def make(factor):
    value = jax.value_and_grad(lambda z: factor * (z**2).sum())(z)
    return contest.Program(run=lambda: None, result=lambda: value)

  rows, _ = held(lambda: make(1.0), lambda: make(1.01), check=losses._agree)
  assert all(row['left_out'].startswith('results differ') for row in rows)


@pytest.mark.parametrize(
  ('network', 'gigaflop'),
  [(steps.RESNET18_32, 6.67), (steps.Network(50, 224, 'imagenet'), 49.0)],
)
def test_flop_match_published_networks(network, gigaflop):
  counted = steps.flop_per_image(network) / 1e9
  np.testing.assert_allclose(counted, gigaflop, rtol=2e-3)


# Records its arguments and writes what the script reads. `losses` fails.
FAKE_PYTHON = """#!/bin/bash
printf '%q ' "$@" >>"$RECORD" && echo >>"$RECORD"
echo 'step 2: loss 1.0'
case "$*" in
*--only=losses*) exit 3 ;;
*clop_jax.train*)
  for flag in "$@"; do case "$flag" in --workdir=*) d="${flag#*=}" ;; esac; done
  mkdir -p "$d" && echo '{"step": 2}' | tee "$d/eval.json" >"$d/metrics.jsonl"
  ;;
*pytest*) echo '== 3 passed, 1 skipped in 1 s ==' ;;
esac
"""


@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')
def test_gpu_script_runs_all_parts_and_reports_failures(tmp_path):
  fake = tmp_path / 'python'
  fake.write_text(FAKE_PYTHON)
  fake.chmod(0o755)
  record, out = tmp_path / 'record', tmp_path / 'out'
  (tmp_path / 'data.npz').touch()
  result = subprocess.run(
    ['bash', 'docs/benchmarks/gpu.sh', out, tmp_path / 'data.npz'],
    cwd=small.ROOT,
    env=os.environ | {'PYTHON': str(fake), 'RECORD': str(record)},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 1
  summary = (out / 'summary.md').read_text()
  for part in ('steps18', 'training', 'steps50', 'tests'):
    assert f'| {part} | finished |' in summary
  assert '| losses | failed (exit status 3) |' in summary
  assert '3 passed, 1 skipped' in summary and '- with_clop: step 2' in summary
  evaluations = json.loads((out / 'evaluation.json').read_text())
  assert evaluations == {x: {'step': 2} for x in ('without_clop', 'with_clop')}
  assert len(list(out.iterdir())) <= 8

  lines = [shlex.split(line)[1:] for line in record.read_text().splitlines()]
  assert len(lines) == 7
  for module, *flags in lines:
    if module == 'docs.benchmarks.run':
      choice = run.parser().parse_args(flags)
      assert {*choice.only.split(',')} <= {*run.SECTIONS}
      cases = '\n'.join(f'{n}, batch {b:,}' for n, b in steps.BATCHES['gpu'])
      if 'steps' in choice.only:
        assert re.search(choice.case, cases, re.MULTILINE)
    elif module == 'pytest':
      for path in (x for x in flags if x.startswith('tests/')):
        assert pathlib.Path(small.ROOT, path).exists()
    else:
      command = train if module == 'clop_jax.train' else evaluate
      with small.flags_of(command, *flags):
        pass
