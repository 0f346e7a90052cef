"""Commands that run out of memory end in one line with advice."""

import sys
import types

from absl import flags
from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clop_jax import cli
from clop_jax import embed
from clop_jax import evaluate
from clop_jax import train
from clop_jax.experiment import memory
from tests import small

# ml_collections warns when it reads a file of configs/.
pytestmark = pytest.mark.filterwarnings(
  'ignore:the load_module:DeprecationWarning'
)
TRAIN = ['--workdir=w', f'--config={small.ROOT}/configs/digits.py']
FIELDS = [
  'config.train.batch_size (now 128)',
  'config.train.num_micro_batches (now 1)',
  'config.loss.block_size',
  "config.data.loader='stream'",
]


def on_device():
  jnp.zeros(2**46, jnp.uint8).block_until_ready()


def in_compiler():
  raise jax.errors.JaxRuntimeError('INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: ...')


def on_host():
  np.zeros(2**60, np.uint8)


def without_details():
  raise MemoryError


@pytest.fixture
def run(monkeypatch, capsys):
  """Runs a function as the main function of a command; returns its error."""
  monkeypatch.setattr(sys, 'unraisablehook', sys.unraisablehook)
  verbosity = logging.get_verbosity()

  def call(main, module, *arguments):
    def define_flags():
      module.define_flags()
      flags.DEFINE_bool('traceback', False, '')

    fake = types.SimpleNamespace(define_flags=define_flags)
    with small.flags_of(fake, *arguments), pytest.raises(SystemExit) as end:
      cli._guarded(main, False)
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line

  yield call
  logging.set_verbosity(verbosity)


@pytest.mark.parametrize(
  ('main', 'message', 'fields'),
  [
    (on_device, 'the devices are out of memory (RESOURCE_EXHAUSTED', FIELDS),
    (in_compiler, 'the devices are out of memory (INTERNAL: CUDA_', FIELDS),
    (
      on_host,
      'this machine is out of memory (Unable to allocate',
      ['config.data.num_workers (now -1)', 'config.train.batch_size (now 128)'],
    ),
    (without_details, 'this machine is out of memory. To', ['data.prefetch']),
  ],
)
def test_too_little_memory_is_one_line_with_advice(main, message, fields, run):
  line = run(main, train, *TRAIN)
  assert line.startswith(f'error: {message}')
  for field in fields:
    assert field in line


@pytest.mark.parametrize(
  ('module', 'example'),
  [(evaluate, '--config.eval.batch_size=64'), (embed, '--batch_size=64')],
)
def test_commands_without_a_config_name_their_own_flag(module, example, run):
  assert example in run(on_device, module, '--workdir=w')


def test_fields_that_are_already_set_are_not_advised():
  config = small.digits_config(
    None, model__dtype='bfloat16', loss__block_size=4, data__loader='stream'
  )
  advice = memory.device_advice(config, share=0.75)
  for name in ('dtype', 'block_size', 'loader'):
    assert name not in advice
  assert 'XLA_PYTHON_CLIENT_MEM_FRACTION' in advice and '0.75' in advice


def test_other_errors_of_xla_are_not_about_memory():
  error = jax.errors.JaxRuntimeError('INTERNAL: something broke')
  assert not memory.is_exhausted(error)
