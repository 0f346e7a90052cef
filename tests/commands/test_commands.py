"""The commands as a user calls them: what they print and how they exit."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests import forked
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
  ('arguments', 'message'),
  [
    (
      [f'--config={CONFIG}', '--config.loss.clop_wieght=0', '--workdir=w'],
      "--config.loss.clop_wieght: config.loss has no field 'clop_wieght'; it "
      'has: barlow_weight, block_size, clop_after_epochs, clop_distance, '
      'clop_repulsion, clop_temperature, clop_weight',
    ),
    (
      [f'--config={CONFIG}', '--config.los.clop_weight=0', '--workdir=w'],
      "config has no field 'los'; it has: augment, data, eval",
    ),
    (
      [f'--config={CONFIG}', '--config.train.batch_size=abc', '--workdir=w'],
      'config.train.batch_size=abc',
    ),
    (
      [f'--config={CONFIG}', '--config.data.name=cifra10', '--workdir=w'],
      "or a data set of TFDS, got 'cifra10'; near it: cifar10",
    ),
    (
      [f'--config={CONFIG}', '--config.train.batch_size=None', '--workdir=w'],
      'config.train.batch_size must be a whole number from 1 to',
    ),
    (
      ['--config=nowhere.py', '--workdir=w'],
      '--config=nowhere.py: there is no such file; the package has '
      'configs/cifar10.py, configs/cifar100.py, configs/digits.py',
    ),
    ([f'--config={CONFIG}'], '--workdir must name a folder'),
    (['--workdir=w'], '--config must name a file'),
    (
      [f'--config={CONFIG}', '--workdir=w', '--profile=0'],
      'flag --profile=0: 0 is not a positive integer',
    ),
    (
      [f'--config={CONFIG}', '--wrokdir=w'],
      "Unknown command line flag 'wrokdir'",
    ),
  ],
)
def test_train_refuses_in_one_clear_line(arguments, message, tmp_path):
  assert message in forked.refused('clop_jax.train', *arguments, cwd=tmp_path)
  assert not os.listdir(tmp_path)


def test_an_optional_field_can_be_unset(capfd):
  argv = ['train', f'--config={CONFIG}', '--config.data.image_size=32']
  code = f"""
import os, sys
from absl import flags
from clop_jax import cli, train
train.define_flags()
for unset in ([], ['--config.data.image_size=None']):
  if not os.fork():
    cli._parse({argv!r} + unset)
    sys.exit(print(flags.FLAGS.config.data.image_size))
  os.wait()
"""
  subprocess.run([sys.executable, '-c', code], check=True)
  assert capfd.readouterr().out.split() == ['32', 'None']


@pytest.mark.parametrize('stream', ['stdout', 'stderr'])
def test_who_stops_listening_does_not_end_the_work(stream, tmp_path):
  # As `train ... | head -1` does.
  code = f"""
import sys
from clop_jax import cli
def main():
  print('first', file=sys.{stream}, flush=True)
  sys.stdin.readline()
  for _ in range(3):
    print('nobody reads this', file=sys.{stream}, flush=True)
  print('nor this', end='', file=sys.{stream})
  open('done', 'w').close()
cli.run(main, lambda: None)
"""
  pipes = {'stdin': subprocess.PIPE, stream: subprocess.PIPE}
  process = subprocess.Popen(
    [sys.executable, '-c', code], cwd=tmp_path, text=True, **pipes
  )
  listener = getattr(process, stream)
  assert listener.readline() == 'first\n'
  listener.close()
  process.stdin.write('\n')
  process.stdin.close()
  assert process.wait(timeout=60) == 0
  assert (tmp_path / 'done').exists()


def test_an_interrupt_is_one_line(tmp_path):
  code = (
    'from clop_jax import cli\n'
    'def main():\n'
    '  raise KeyboardInterrupt\n'
    'command.run(main, lambda: None)\n'
  )
  result = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path
  )
  assert result.returncode == 130
  assert result.stderr == 'error: interrupted\n'


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--name=folder'], '--name=folder needs no preparing; train with it'),
    (['--name=npz'], '--name=npz needs no preparing'),
    (
      ['--name=digits', f'--data_dir={CONFIG}'],
      f'--data_dir must be a folder, got the file {CONFIG}',
    ),
    ([], '--name must name a data set'),
  ],
)
def test_prepare_refuses_in_one_clear_line(arguments, message, tmp_path):
  assert message in forked.refused('clop_jax.prepare', *arguments, cwd=tmp_path)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--workdir=nowhere'], '--workdir=nowhere does not exist; train first'),
    ([], '--workdir must name the folder of a run'),
  ],
)
def test_evaluate_refuses_in_one_clear_line(arguments, message, tmp_path):
  assert message in forked.refused(
    'clop_jax.evaluate', *arguments, cwd=tmp_path
  )


def test_a_traceback_can_be_asked_for(tmp_path):
  result = subprocess.run(
    [
      *[sys.executable, '-m', 'clop_jax.evaluate'],
      *['--workdir=x', '--traceback'],
    ],
    capture_output=True,
    text=True,
    cwd=tmp_path,
  )
  assert result.returncode == 1
  assert 'Traceback (most recent call last)' in result.stderr


def test_a_full_disk_is_one_clear_line(tmp_path):
  code = """
import errno, os
from clop_jax import cli

def main():
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'checkpoints/5')

cli.run(main, lambda: None)
"""
  result = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path
  )
  assert result.returncode == 1
  assert result.stderr == (
    "error: [Errno 28] No space left on device: 'checkpoints/5'; free some "
    'space and run the same command again\n'
  )


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
