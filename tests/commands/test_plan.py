"""Work, memory and advice of plans, and errors of topologies."""

import dataclasses
import json

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


def test_a_plan_for_this_machine(on_cpu):
  assert on_cpu.devices == 8
  assert on_cpu.total_steps == 2 * (1438 // 64)
  assert on_cpu.memory['data'] == 1438 * (8 * 8 + 4)
  # Parameters and momentum in float32, and a few statistics.
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


def test_a_plan_that_does_not_fit_gives_advice(
  on_cpu, config, monkeypatch, capsys
):
  short = dataclasses.replace(on_cpu, capacity=on_cpu.memory['total'] - 2**29)
  monkeypatch.setattr(plan, 'plan', lambda *_, **__: short)
  with pytest.raises(ValueError, match=r'0\.50 GiB more') as error:
    plan.report(config)
  assert 'does not fit, 0.50 too much' in capsys.readouterr().out
  for field in ('num_micro_batches', 'batch_size', 'loader'):
    assert field in str(error.value)


def test_the_roofline_of_known_work():
  chip = topologies.CHIPS['h100']
  parts = [plan.Part('losses', kernels=10, moved=int(chip.bandwidth))]
  times = plan._roofline(chip, 2 * chip.flops, parts, 450e9 * 0.5, 8)
  assert times == pytest.approx(
    dict(compute=2, memory=1, launches=10 * 2e-6, network=0.5, step=2.5)
  )
  # Beyond a node of 8 the network is slower.
  assert plan._roofline(chip, 0, parts, 50e9, 16)['network'] == 1
  assert plan._roofline(chip, 0, parts, 0, 1)['network'] == 0


def test_the_command_prints_json(on_cpu, digits_dir, capsys, monkeypatch):
  calls = []

  def planned(config, topology, **options):
    calls.append((config.train.batch_size, topology, options))
    return on_cpu

  monkeypatch.setattr(plan, 'plan', planned)
  arguments = [
    f'--config={small.ROOT}/configs/digits.py',
    '--config.train.batch_size=64',
    '--num_examples=1000',
    '--json',
  ]
  small.command(plan, *arguments)
  assert calls == [(64, None, {'num_examples': 1000})]
  values = json.loads(capsys.readouterr().out)
  assert values['batch_size'] == 64 and values['fits'] is True
  assert values['images'] == 2 * (1438 // 64) * 64


@pytest.mark.parametrize(
  ('topology', 'message'),
  [
    ('v9:2x2', r"\['v5e', 'v5p', 'v6e', 'h100', 'h200'\].*'v9:2x2'"),
    ('h100', r"CHIP:SHAPE.*'h100'"),
    ('h100:2x4', r'number of GPUs'),
    ('h100:0', r'h100:0 has no device'),
    # Without their compilers.
    ('v5e:2x2', r'clop-jax\[tpu\]'),
    ('h100:1', r'clop-jax\[cuda\]'),
  ],
)
def test_an_impossible_topology_is_an_error(
  config, topology, message, monkeypatch
):
  monkeypatch.setattr(topologies.extras, 'is_installed', lambda module: False)
  with pytest.raises(ValueError, match=message):
    plan.plan(config, topology)


def test_a_batch_that_the_devices_cannot_share_is_an_error(digits_dir):
  config = small.digits_config(digits_dir, train__batch_size=100)
  with pytest.raises(ValueError, match='multiple of the 8 devices, got 100'):
    plan.plan(config)


def test_a_compiler_that_runs_out_of_memory_is_advice(config):
  message = (
    'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in '
    'memory space hbm. Used 31.26G of 15.75G hbm. Exceeded hbm capacity by '
    '15.51G.'
  )
  text = plan._too_large(jax.errors.JaxRuntimeError(message), 'v5e:2x2', config)
  for word in ('=v5e:2x2', '31.26G', '15.75G', '15.51G', 'batch_size'):
    assert word in text


@pytest.mark.parametrize('topology', ['v5e:2x2', 'h100:2'])
def test_a_step_compiles_for_devices_that_are_not_attached(config, topology):
  chip = topologies.CHIPS[topology.split(':')[0]]
  if not topologies.is_compiler_installed(chip):
    pytest.skip(f'the compiler for {chip.name} is not installed')
  result = plan.plan(config, topology)
  assert result.dtype == 'bfloat16'
  assert result.fits
  assert result.roofline['step'] > 0
  assert {'losses', 'optimizer'} <= {part.name for part in result.parts}
  assert result.sent['all-reduce'] > 4 * result.parameters * 0.9
