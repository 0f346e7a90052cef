"""Small configs and models, and commands run in this process."""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import os
import pathlib
import subprocess
import sys
import warnings

from absl import flags
from absl import logging
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clop_jax import cli
from clop_jax.data import arrays
from clop_jax.data import sources
from clop_jax.runtime import parallel
from clop_jax.training import train_state
from clop_jax.training import train_step

ROOT = pathlib.Path(__file__).parents[1]


class Dense(nn.Module):
  """A backbone for tests: a ResNet takes much longer to compile.

  Set `config.model.name='tests.small:Dense'`.
  """

  dim: int = 32
  axis_name: str | None = parallel.DATA_AXIS

  @nn.compact
  def __call__(self, images, train):
    x = nn.Dense(self.dim)(images.reshape(images.shape[0], -1))
    axis_name = self.axis_name if train else None
    x = nn.BatchNorm(use_running_average=not train, axis_name=axis_name)(x)
    return nn.relu(x)


class Pixels(nn.Module):
  """A backbone without batch statistics."""

  dim: int = 32

  @nn.compact
  def __call__(self, images, train):
    del train
    return nn.tanh(nn.Dense(self.dim)(images.reshape(images.shape[0], -1)))


def align(embeddings, labels, *, axis_name, weight=1.0):
  """A loss for tests: `config.loss.contrastive='tests.small:align'`."""
  del labels
  total = jnp.sum(jnp.square(embeddings[0] - embeddings[1]))
  count = jnp.float32(embeddings.shape[1])
  if axis_name is not None:
    total, count = jax.lax.psum((total, count), axis_name)
  return weight * total / count


def squares(split, data_dir, *, count=64):
  """A source for tests: `config.data.name='tests.small:squares'`."""
  del data_dir
  rng = np.random.default_rng(len(split))
  labels = np.arange(count) % 4
  images = rng.integers(0, 60, (count, 8, 8, 1), np.uint8)
  for image, label in zip(images, labels, strict=True):
    row, column = 4 * (label // 2), 4 * (label % 2)
    image[row : row + 4, column : column + 4] += 150
  return arrays.Arrays(images, labels)


def digits_config(digits_dir, **changes):
  """Returns a small configs/digits.py with changes `group__field=value`."""
  path = ROOT / 'configs' / 'digits.py'
  spec = importlib.util.spec_from_file_location('digits_config', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  defaults = {
    'data__data_dir': digits_dir,
    'model__width_multiplier': 0.25,
    'model__embedding_dim': 16,
    'model__head_hidden_dim': 16,
    'optimizer__learning_rate': 0.2,
    'train__batch_size': 256,  # 5 steps an epoch
    'train__num_epochs': 2,
    'train__log_every_steps': 2,
    'train__checkpoint_every_epochs': 1,
    'watch__images_every_epochs': 0,
    'eval__probe_l2': [1e-3, 1e-1],
    'eval__probe_iterations': 30,
  }
  for name, value in (defaults | changes).items():
    group = config
    *path, field = name.split('__')
    for part in path:
      group = group[part]
    group[field] = value
  return config


def environment(devices=1):
  """Returns the environment of a process with this number of CPU devices.

  Programs are not optimized, as in tests/conftest.py.
  """
  flags = os.environ.get('XLA_FLAGS', '').split()
  ours = [x for x in flags if 'device_count' not in x]
  count = f'--xla_force_host_platform_device_count={devices}'
  return os.environ | {
    'XLA_FLAGS': ' '.join([count, *ours]),
    'JAX_PLATFORMS': 'cpu',
  }


def source_of(command):
  """Returns the path of the module that `python -m` runs."""
  path = ROOT / command.replace('.', '/')
  return path / '__main__.py' if path.is_dir() else path.with_suffix('.py')


def call(*arguments, cwd=None):
  """Runs a command in a new process with one device."""
  return subprocess.run(
    [sys.executable, '-m', *arguments],
    capture_output=True,
    text=True,
    cwd=cwd,
    env=environment(),
  )


def need_devices(count):
  """Skips the test if there are fewer devices, see tests/conftest.py."""
  if jax.device_count() < count:
    pytest.skip(f'needs {count} devices, {jax.device_count()} here')


def training(
  backbone, projection_head, *, learning_rate, momentum=0.9, **arguments
):
  """Returns `(create, step)` for images of 8 px.

  `create` returns a state for some prototypes. The arguments are those of
  `train_step.Parts` and `train_step.train_step`.
  """
  schedule = optax.constant_schedule(learning_rate)
  networks = {
    'backbone': backbone,
    'projection_head': projection_head,
    'tx': optax.sgd(schedule, momentum=momentum),
  }
  create = functools.partial(
    train_state.create, jax.random.key(0), image_shape=(8, 8, 1), **networks
  )
  names = {field.name for field in dataclasses.fields(train_step.Parts)}
  own = {name: arguments.pop(name) for name in names & arguments.keys()}
  parts = train_step.Parts(
    schedule=schedule, **networks, **{'clop_weight': 1.0} | own
  )
  step = functools.partial(train_step.train_step, parts=parts, **arguments)
  return create, step


@contextlib.contextmanager
def flags_of(module, *arguments, parse=flags.FLAGS):
  """Defines and parses the flags of a command, and removes them at the end."""
  before = {*flags.FLAGS}
  verbosity = logging.get_verbosity()
  sys.modules.pop('config_config', None)  # ml_collections would reuse it
  argv, sys.argv = sys.argv, ['command', *arguments]
  try:
    module.define_flags()
    # Excludes flags of libraries that the command is the first to import.
    ours = {*flags.FLAGS} - before
    with warnings.catch_warnings():
      warnings.filterwarnings('ignore', 'the load_module')  # of ml_collections
      parse(sys.argv)
    yield
  finally:
    sys.argv = argv
    logging.set_verbosity(verbosity)
    for name in {*flags.FLAGS} - before:
      if name in ours or name.startswith('config.'):
        delattr(flags.FLAGS, name)


def command(module, *arguments):
  """Runs a command in this process."""
  with flags_of(module, *arguments):
    module.main()


def refused(module, *arguments, code=1):
  """Returns the one error line of a command that fails in this process."""
  errors = io.StringIO()
  hook = sys.unraisablehook
  flags.DEFINE_bool('traceback', False, '')
  try:
    with (
      contextlib.redirect_stderr(errors),
      pytest.raises(SystemExit) as end,
      flags_of(module, *arguments, parse=cli._parse),
    ):
      cli._guarded(module.main, joins=False)
  finally:
    delattr(flags.FLAGS, 'traceback')
    sys.unraisablehook = hook
  assert end.value.code == code
  (line,) = errors.getvalue().splitlines()
  assert line.startswith('error: ')
  return line


def digits_arrays(digits_dir, split):
  """Returns images `[n, 8, 8, 1]` and labels `[n]` of a split of digits."""
  source = sources.load('digits', split, digits_dir)
  images = [np.asarray(source[i]['image']) for i in range(len(source))]
  return np.stack(images)[..., None], np.asarray(source.labels)
