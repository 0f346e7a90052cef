"""The wheel installs and runs in an empty environment."""

import os
import pathlib
import re
import shlex
import subprocess
import sys
import venv
import zipfile

import numpy as np
import pytest
import safetensors.numpy

import clop_jax
from clop_jax.data import sources
from tests import small

COMMANDS = sorted(
  '.'.join(path.relative_to(small.ROOT).with_suffix('').parts).removesuffix(
    '.__main__'
  )
  for path in (small.ROOT / 'clop_jax').rglob('*.py')
  if 'cli.run(main, define_flags' in path.read_text()
)


SMALL = [
  '--config.model.width_multiplier=0.25',
  '--config.model.head_hidden_dim=16',
  '--config.train.batch_size=256',
  '--config.train.num_epochs=1',
  '--config.eval.probe_iterations=30',
]


# Neither pip nor the commands may find the checkout.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}


def run(*arguments, env=ENVIRONMENT, **options):
  result = subprocess.run(
    [str(argument) for argument in arguments],
    capture_output=True,
    text=True,
    env=env,
    **options,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  return result.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  folder = tmp_path_factory.mktemp('dist')
  run(sys.executable, '-m', 'build', '--wheel', '--outdir', folder, small.ROOT)
  (path,) = folder.glob('*.whl')
  return path


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
  """Returns the interpreter of an environment without extras."""
  folder = tmp_path_factory.mktemp('empty')
  venv.create(folder, with_pip=True)
  python = folder / 'bin' / 'python'
  pip = [python, '-m', 'pip', '--disable-pip-version-check', '--quiet']
  run(*pip, 'install', '--no-compile', wheel)
  run(*pip, 'check')
  return python


@pytest.fixture
def alone(tmp_path):
  """Returns options of a process that cannot import the checkout."""
  # As in conftest.py, but for one device.
  quick = '--xla_backend_optimization_level=0'
  return {'cwd': tmp_path, 'env': ENVIRONMENT | {'XLA_FLAGS': quick}}


def test_wheel_has_only_the_package_and_the_configs(wheel):
  assert wheel.name == f'clop_jax-{clop_jax.__version__}-py3-none-any.whl'
  names = zipfile.ZipFile(wheel).namelist()
  expected = {
    str(path.relative_to(small.ROOT))
    for path in (small.ROOT / 'clop_jax').rglob('*.py')
  } | {
    f'clop_jax/configs/{path.name}'
    for path in (small.ROOT / 'configs').glob('*.py')
  }
  expected |= {'clop_jax/py.typed', 'clop_jax/study/report.html.jinja'}
  assert {n for n in names if '.dist-info/' not in n} == expected
  assert any(name.endswith('licenses/LICENSE') for name in names)


# Forks, because imports take seconds.
HELP = """
import os, runpy, sys
import clop_jax.cli
for command in sys.argv[1:]:
  print('\f', end='', flush=True)
  if not os.fork():
    sys.argv = [command, '--help']
    runpy.run_module(command, run_name='__main__', alter_sys=True)
  assert not os.wait()[1]
"""


def test_every_command_has_help(installed, alone):
  assert {'clop_jax.train', 'clop_jax.evaluate', 'clop_jax.study'} < {*COMMANDS}
  printed = run(installed, '-c', HELP, *COMMANDS, **alone).split('\f')[1:]
  for command, text in zip(COMMANDS, printed, strict=True):
    assert f'python -m {command}' in text
    code = small.source_of(command).read_text().replace('config_flags.', '')
    flags = re.findall(r"DEFINE_\w+\(\s*'(\w+)'", code)
    assert flags
    for flag in flags:
      assert f'--{flag}' in text or f'--[no]{flag}' in text


def test_core_trains_and_extras_add_the_rest(
  installed, wheel, alone, digits_dir
):
  # Preparing digits needs scikit-learn, reading does not.
  sources.load('digits', 'train', digits_dir)
  code = 'import clop_jax; print(clop_jax.__file__)'
  files = run(installed, '-c', code, **alone)
  assert pathlib.Path(files.strip()).is_relative_to(installed.parents[1])
  readme = (small.ROOT / 'README.md').read_text()
  section = readme.partition('\n## Train, watch')[2].partition('\n## ')[0]
  commands = [
    shlex.split(command)
    for command in re.findall(
      r'^python (-m clop_jax\..*)$', section, re.MULTILINE
    )
  ]
  train, evaluate, embed, export = commands
  train = [*train, *SMALL, f'--config.data.data_dir={digits_dir}']
  run(installed, *train, **alone)
  assert 'already trained' in run(installed, *train, **alone)
  workdir = alone['cwd'] / 'runs' / 'digits'
  assert not (workdir / 'tensorboard').exists()
  study = ['-m', 'clop_jax.study', *train[2:], '--grid', 'seed=0,1']
  for command, extra in (
    (export, 'export'),
    (study, 'report'),
    ([*evaluate, '--figure=f.png'], 'report'),
    ([*train, '--wandb=offline'], 'wandb'),
  ):
    result = subprocess.run(
      [installed, *command], capture_output=True, text=True, **alone
    )
    assert result.returncode == 1, command
    (line,) = result.stderr.splitlines()
    assert f'clop-jax[{extra}]' in line
  printed = run(installed, *evaluate, **alone)
  assert '| digits' in printed and 'figure' not in printed
  assert (workdir / 'eval.json').exists()
  run(installed, *embed, **alone)
  with np.load(alone['cwd'] / 'embeddings.npz') as file:
    assert file['embeddings'].shape == (359, 128)

  pip = [installed, '-m', 'pip', '--disable-pip-version-check', '--quiet']
  run(*pip, 'install', '--no-compile', f'{wheel}[all]')
  run(*pip, 'check')
  again = [x.replace('runs/digits', 'runs/all') for x in train]
  run(installed, *again, **alone)
  assert [*(alone['cwd'] / 'runs' / 'all' / 'tensorboard').iterdir()]
  run(installed, *export, **alone)
  weights = safetensors.numpy.load_file(alone['cwd'] / 'backbone.safetensors')
  assert weights['conv1.weight'].ndim == 4
