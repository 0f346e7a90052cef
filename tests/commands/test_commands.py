"""The commands as a user calls them: what they print and how they exit."""

import errno
import json
import os
import pathlib
import re
import shutil
import subprocess

import pytest

from clop_jax import cli
from clop_jax import evaluate
from clop_jax import prepare
from clop_jax import train
from clop_jax.experiment import checkpoint
from tests import small

CONFIG = str(small.ROOT / 'configs' / 'digits.py')
SMALL = [
  '--config.model.width_multiplier=0.25',
  '--config.model.embedding_dim=16',
  '--config.train.batch_size=256',
  '--config.train.num_epochs=2',
  '--config.train.log_every_steps=2',
  '--config.eval.probe_iterations=30',
]


@pytest.mark.parametrize(
  ('module', 'arguments', 'message'),
  [
    (train, ['--workdir=w'], '--config must'),
    (train, [f'--config={CONFIG}'], '--workdir must'),
    (prepare, ['--name=folder'], '--name=folder'),
    (prepare, ['--name=npz'], '--name=npz'),
    (
      prepare,
      ['--name=digits', f'--data_dir={CONFIG}'],
      f'--data_dir .*{CONFIG}',
    ),
    (prepare, [], '--name must'),
    (evaluate, ['--workdir=nowhere'], '--workdir=nowhere .*train first'),
    (evaluate, [], '--workdir must'),
  ],
)
def test_a_command_refuses_in_one_clear_line(
  module, arguments, message, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  assert re.search(message, small.refused(module, *arguments))
  assert not os.listdir(tmp_path)


def test_a_reader_that_leaves_does_not_end_the_work():
  # As `train ... | head -1` does.
  reader, writer = os.pipe()
  with open(writer, 'w') as file:
    output = cli._Output(file)
    print('first', file=output, flush=True)
    os.close(reader)
    for _ in range(3):
      print('nobody reads this', file=output, flush=True)
    print('nor this', end='', file=output)


@pytest.mark.parametrize(
  ('error', 'code', 'message'),
  [
    (KeyboardInterrupt(), 130, 'error: interrupted'),
    (
      OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'checkpoints/5'),
      1,
      "No space left.*'checkpoints/5'; free some space",
    ),
    (OSError(errno.EACCES, 'denied', 'x'), 1, "denied: 'x'$"),
    (checkpoint.DamagedCheckpointError('step 5'), 1, 'error: step 5$'),
  ],
)
def test_an_error_of_the_user_is_one_line(error, code, message, monkeypatch):
  def main():
    raise error

  monkeypatch.setattr(evaluate, 'main', main)
  assert re.search(message, small.refused(evaluate, code=code))


def test_a_traceback_can_be_asked_for(tmp_path):
  result = small.call(
    'clop_jax.evaluate', '--workdir=x', '--traceback', cwd=tmp_path
  )
  assert result.returncode == 1
  assert 'Traceback (most recent call last)' in result.stderr
  assert result.stderr.splitlines()[-1].startswith('error: --workdir=x ')


def test_quickstart_shortened_trains_evaluates_and_draws(digits_dir, tmp_path):
  runs = tmp_path / 'with a space'
  result = subprocess.run(
    [
      'bash',
      str(small.ROOT / 'launch' / 'quickstart.sh'),
      *SMALL,
      f'--config.data.data_dir={digits_dir}',
    ],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env=small.environment() | {'RUNS': str(runs)},
  )
  assert result.returncode == 0, result.stderr
  # Ten steps at a rate where the plain loss collapses: it says so, and no more.
  assert len(result.stderr.splitlines()) == 1, result.stderr
  warning = result.stderr
  assert warning.startswith('warning: the embeddings are collapsing: ')
  for line in (
    '1,438 examples, 143 labelled (9.9%)',
    'step 10/10: loss',
    '| method      | linear top-1 | kNN top-1 | effective rank |',
    '| simclr      |',
    '| simclr+clop |',
  ):
    assert line in result.stdout
  figure = runs / 'comparison.png'
  assert figure.read_bytes().startswith(b'\x89PNG')
  results = {}
  for name in ('simclr', 'simclr+clop'):
    path = runs / name / 'eval.json'
    results[name] = json.loads(path.read_text())
    assert results[name]['step'] == 10
    assert (runs / name / 'figures' / 'embeddings.png').exists()
  plain, clop = results['simclr'], results['simclr+clop']
  assert plain['config']['loss']['clop_weight'] == 0
  assert clop['config']['loss']['clop_weight'] == 1
  assert plain['seed'] == clop['seed']
  assert clop['prototype_cosine'] > plain['prototype_cosine'] + 0.02


@pytest.mark.parametrize('script', ['launch/quickstart.sh', 'tests/run.sh'])
@pytest.mark.parametrize(
  ('python3', 'message'),
  [
    (
      'case "$2" in *version_info*) exit 1;; *) echo 3.9.1;; esac',
      'Python 3.11 or newer is needed',
    ),
    ('case "$2" in *ensurepip*) exit 1;; esac', 'has no venv module'),
  ],
)
def test_a_python_that_will_not_do_is_named(script, python3, message, tmp_path):
  for part in ('launch', 'tests'):
    (tmp_path / part).mkdir()
  for file in ('launch/venv.sh', script):
    shutil.copy(small.ROOT / file, tmp_path / file)
  fake = tmp_path / 'python3'
  fake.write_text(f'#!/bin/sh\n{python3}\n')
  fake.chmod(0o755)
  result = subprocess.run(
    ['bash', str(tmp_path / script)],
    capture_output=True,
    text=True,
    env=os.environ | {'PYTHON3': str(fake)},
  )
  assert result.returncode == 1
  assert result.stderr.startswith('error: ') and message in result.stderr
  assert len(result.stderr.strip().splitlines()) == 1
  assert not pathlib.Path(tmp_path / '.venv').exists()
