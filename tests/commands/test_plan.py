"""Plans: counted work, memory and advice; topologies that do not exist."""

import dataclasses
import json
import sys

import jax
from jax import lax
import jax.numpy as jnp
import pytest

from clop_jax import plan
from clop_jax.runtime import topologies
from tests import small

_CONV = {'window_strides': (2, 2), 'padding': 'SAME'}


def _conv(x, w):
  return lax.conv_general_dilated(
    x, w, **_CONV, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )


# A convolution of [2, 8, 8, 3] with [3, 3, 3, 5] at stride 2 has 2 * 4 * 4 * 5
# outputs of 27 products each. Its two gradients have as many products.
ONE_CONV = 2 * (2 * 4 * 4 * 5) * 27


@pytest.mark.parametrize(
  ('function', 'shapes', 'expected'),
  [
    (jnp.matmul, [(3, 4), (4, 5)], 2 * 3 * 4 * 5),
    (jnp.matmul, [(7, 3, 4), (7, 4, 5)], 7 * 2 * 3 * 4 * 5),
    (_conv, [(2, 8, 8, 3), (3, 3, 3, 5)], ONE_CONV),
    (
      jax.grad(lambda x, w: jnp.sum(_conv(x, w) ** 2), argnums=(0, 1)),
      [(2, 8, 8, 3), (3, 3, 3, 5)],
      3 * ONE_CONV,
    ),
    (
      lambda x: lax.scan(lambda c, _: (c @ c, None), x, length=6)[0],
      [(4, 4)],
      6 * 2 * 4**3,
    ),
    (jax.jit(lambda x: x @ x), [(4, 4)], 2 * 4**3),
    (lambda x: lax.cond(x[0, 0] > 0, lambda: x @ x, lambda: x), [(4, 4)], 0),
    (
      lambda x: lax.platform_dependent(
        x, tpu=lambda x: x @ x, default=lambda x: x @ x
      ),
      [(4, 4)],
      2 * 4**3,
    ),
  ],
  ids=[
    'product',
    'batched',
    'conv',
    'conv backward',
    'loop',
    'jit',
    'branch',
    'platform',
  ],
)
def test_flop_of_known_programs(function, shapes, expected):
  arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
  assert plan._flop(jax.make_jaxpr(function)(*arguments).jaxpr) == expected


@pytest.fixture(scope='module')
def config(digits_dir):
  return small.digits_config(digits_dir, train__batch_size=64)


@pytest.fixture(scope='module')
def on_cpu(config):
  return plan.plan(config)


def test_a_plan_for_the_devices_at_hand(on_cpu, config):
  assert on_cpu.devices == 8
  assert on_cpu.total_steps == 2 * (1438 // 64)
  assert on_cpu.memory['data'] == 1438 * (8 * 8 + 4)
  # Parameters and momentum in float32, and some statistics.
  assert 8 < on_cpu.memory['state'] / on_cpu.parameters < 9
  assert on_cpu.memory['temporaries'] > 0
  assert on_cpu.fits
  # Gradients are reduced in float32 over the 8 devices.
  assert on_cpu.sent['all-reduce'] > 4 * on_cpu.parameters
  names = [part.name for part in on_cpu.parts]
  assert {'networks forward', 'networks backward', 'optimizer'} <= {*names}
  assert 'diagnostics' in [part.name for part in on_cpu.logged]
  # Nobody publishes the peak of a CPU.
  assert on_cpu.roofline is None
  assert 'no estimate of speed' in plan.to_text(on_cpu)


def test_a_plan_that_does_not_fit_says_by_how_much_and_what_helps(
  on_cpu, config, monkeypatch, capsys
):
  short = dataclasses.replace(on_cpu, capacity=on_cpu.memory['total'] - 2**29)
  monkeypatch.setattr(plan, 'plan', lambda *_, **__: short)
  with pytest.raises(ValueError, match=r'0\.50 GiB more') as error:
    plan.report(config)
  assert 'does not fit, 0.50 too much' in capsys.readouterr().out
  for field in ('num_micro_batches', 'batch_size', 'loader'):
    assert field in str(error.value)


def test_the_roofline_is_bound_by_its_largest_part():
  chip = topologies.CHIPS['h100']
  parts = [plan.Part('losses', kernels=10, moved=int(chip.bandwidth))]
  times = plan._roofline(chip, 2 * chip.flops, parts, 450e9 * 0.5, 8)
  assert times == pytest.approx(
    {
      'compute': 2,
      'memory': 1,
      'launches': 10 * 2e-6,
      'network': 0.5,
      'step': 2.5,
    }
  )
  # Beyond a node of 8 the slower network decides.
  assert plan._roofline(chip, 0, parts, 50e9, 16)['network'] == 1
  assert plan._roofline(chip, 0, parts, 0, 1)['network'] == 0


# ml_collections loads a config file by what Python has deprecated.
@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')
def test_the_command_prints_json(digits_dir, capsys, monkeypatch):
  arguments = [
    '--config=configs/digits.py',
    f'--config.data.data_dir={digits_dir}',
    '--config.model.width_multiplier=0.25',
    '--config.train.batch_size=64',
    '--num_examples=1000',
    '--json',
  ]
  # ml_collections looks for overrides there, whatever it is passed.
  monkeypatch.setattr(sys, 'argv', ['plan', *arguments])
  small.command(plan, *arguments)
  values = json.loads(capsys.readouterr().out)
  assert values['batch_size'] == 64
  assert values['images'] == 20 * (1000 // 64) * 64
  assert values['fits'] is True


@pytest.mark.parametrize(
  ('topology', 'message'),
  [
    ('v9:2x2', r"\['v5e', 'v5p', 'v6e', 'h100', 'h200'\].*'v9:2x2'"),
    ('h100', r"CHIP:SHAPE.*'h100'"),
    ('h100:2x4', r'number of GPUs'),
    ('h100:0', r'h100:0 has no device'),
  ],
)
def test_a_topology_that_does_not_exist_is_refused(config, topology, message):
  with pytest.raises(ValueError, match=message):
    plan.plan(config, topology)


@pytest.mark.parametrize(
  ('topology', 'extra'), [('v5e:2x2', 'tpu'), ('h100:1', 'cuda')]
)
def test_a_compiler_that_is_not_installed_is_named(
  config, topology, extra, monkeypatch
):
  monkeypatch.setattr(topologies, '_is_installed', lambda module: False)
  with pytest.raises(ValueError, match=rf'clop-jax\[{extra}\]'):
    plan.plan(config, topology)


def test_a_batch_that_the_devices_cannot_share_is_refused(digits_dir):
  config = small.digits_config(digits_dir, train__batch_size=100)
  with pytest.raises(ValueError, match='multiple of the 8 devices, got 100'):
    plan.plan(config)


def test_what_a_compiler_says_of_too_large_a_program_becomes_advice(config):
  said = (
    'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in '
    'memory space hbm. Used 31.26G of 15.75G hbm. Exceeded hbm capacity by '
    '15.51G.'
  )
  text = plan._too_large(jax.errors.JaxRuntimeError(said), 'v5e:2x2', config)
  for word in (
    '--topology=v5e:2x2',
    '31.26G',
    '15.75G',
    '15.51G',
    'batch_size',
  ):
    assert word in text


@pytest.mark.parametrize('topology', ['v5e:2x2', 'h100:2'])
def test_a_step_compiles_for_devices_that_are_not_attached(
  digits_dir, topology
):
  chip = topologies.CHIPS[topology.split(':')[0]]
  modules = topologies._COMPILERS[chip.platform]
  if not any(topologies._is_installed(module) for module in modules):
    pytest.skip(f'the compiler for {chip.name} is not installed')
  config = small.digits_config(digits_dir, train__batch_size=64)
  result = plan.plan(config, topology)
  assert result.dtype == 'bfloat16'
  assert result.fits
  assert result.roofline['step'] > 0
  assert {'losses', 'optimizer'} <= {part.name for part in result.parts}
  assert result.sent['all-reduce'] > 4 * result.parameters * 0.9
