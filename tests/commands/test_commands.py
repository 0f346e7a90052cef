"""The commands as a user calls them: output, errors and exit codes."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from clop_jax import cli
from clop_jax import evaluate
from clop_jax import prepare
from clop_jax import train
from clop_jax.experiment import checkpoint
from tests import small

CONFIG = str(small.ROOT / 'configs' / 'digits.py')


@pytest.mark.parametrize(
  ('module', 'arguments', 'message'),
  [
    (train, ['--workdir=w'], '--config must'),
    (train, [f'--config={CONFIG}'], '--workdir must'),
    (prepare, ['--name=folder'], '--name=folder'),
    (prepare, ['--name=digits', f'--data_dir={CONFIG}'], f'data_dir.*{CONFIG}'),
    (prepare, [], '--name must'),
    (evaluate, ['--workdir=nowhere'], '--workdir=nowhere .*train first'),
    (evaluate, [], '--workdir must'),
  ],
)
def test_wrong_flags_are_one_line(
  module, arguments, message, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  assert re.search(message, small.refused(module, *arguments))
  assert not os.listdir(tmp_path)


def test_a_closed_pipe_does_not_end_the_work():
  # As in `train ... | head -1`.
  reader, writer = os.pipe()
  with open(writer, 'w') as file:
    output = cli._Output(file)
    print('first', file=output, flush=True)
    os.close(reader)
    for _ in range(3):
      print('not read', file=output, flush=True)
    print('not read', end='', file=output)


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
def test_user_errors_are_one_line(error, code, message, monkeypatch):
  def main():
    raise error

  monkeypatch.setattr(evaluate, 'main', main)
  assert re.search(message, small.refused(evaluate, code=code))


def test_traceback_flag_prints_the_traceback(tmp_path):
  result = small.call(
    'clop_jax.evaluate', '--workdir=x', '--traceback', cwd=tmp_path
  )
  assert result.returncode == 1
  assert 'Traceback (most recent call last)' in result.stderr
  assert result.stderr.splitlines()[-1].startswith('error: --workdir=x ')


def test_quickstart_shortened(digits_dir, tmp_path):
  # A checkout whose environment is the one of this test, without pip.
  checkout, runs = tmp_path / 'checkout', tmp_path / 'with a space'
  shutil.copytree(small.ROOT / 'launch', checkout / 'launch')
  for name in ('configs', 'pyproject.toml', 'setup.cfg'):
    (checkout / name).symlink_to(small.ROOT / name)
  python = checkout / '.venv' / 'bin' / 'python'
  python.parent.mkdir(parents=True)
  python.write_text(
    f'#!/bin/sh\n[ "$2" = pip ] || exec {sys.executable} "$@"\n'
  )
  python.chmod(0o755)
  result = subprocess.run(
    [
      'bash',
      str(checkout / 'launch' / 'quickstart.sh'),
      f'--config.data.data_dir={digits_dir}',
      '--config.model.width_multiplier=0.0625',
      '--config.model.head_layers=1',
      '--config.train.batch_size=1024',
      '--config.train.num_epochs=1',
      '--config.train.log_every_steps=1',
      '--config.watch.tensorboard=False',
      '--config.watch.images_every_epochs=0',
      '--config.eval.knn_neighbours=(1,)',
      '--config.eval.probe_l2=(0.1,)',
      '--config.eval.probe_iterations=1',
    ],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env=small.environment()
    | {'RUNS': str(runs), 'PYTHONPATH': str(small.ROOT)},
  )
  assert (result.returncode, result.stderr) == (0, '')
  for line in (
    '1,438 examples, 143 labelled (9.9%)',
    'step 1/1: loss',
    '| method      | linear top-1 | kNN top-1 | effective rank |',
    '| simclr      |',
    '| simclr+clop |',
  ):
    assert line in result.stdout
  assert (runs / 'comparison.png').read_bytes().startswith(b'\x89PNG')
  for name, weight in (('simclr', 0), ('simclr+clop', 1)):
    content = json.loads((runs / name / 'eval.json').read_text())
    assert content['config']['loss']['clop_weight'] == weight


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
def test_an_unsuitable_python_is_one_line(script, python3, message, tmp_path):
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
  assert re.fullmatch(f'error: .*{message}.*\n', result.stderr)
  assert not (tmp_path / '.venv').exists()
