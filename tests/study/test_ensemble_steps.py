"""Each step of runs in one program is the step of one alone."""

import functools
import json

import jax
import numpy as np
import pytest

from clop_jax.data import loader
from clop_jax.data import sources
from clop_jax.experiment import build
from clop_jax.experiment import checkpoint
from clop_jax.experiment import inputs
from clop_jax.runtime import parallel
from clop_jax.study import ensemble
from tests import small

DEVICES = jax.devices()[:1]
STEPS = 6


def configs_of(*changes):
  # Labels that depend on the seed, steps that log nothing, and a checkpoint at
  # every step.
  tiny = {
    'data__name': 'synthetic',
    'data__options': {'num_examples': 80},
    'data__label_fraction': 0.5,
    'data__label_noise': 0.2,
    'model__width_multiplier': 1 / 16,
    'train__batch_size': 64,  # 1 step an epoch
    'train__num_epochs': STEPS,
    'train__keep_checkpoints': STEPS,
    'eval__batch_size': 64,
    'eval__probe_iterations': 3,
  }
  return [small.digits_config(None, **tiny | change) for change in changes]


def together(configs, workdirs):
  reported = {}
  ensemble.train_together(
    configs,
    [str(w) for w in workdirs],
    diverged=lambda number, error: reported.update({number: str(error)}),
    devices=DEVICES,
  )
  return reported


@functools.cache
def shared_parts():
  """The mesh, the experiment and the state's structure, alike for all."""
  mesh = parallel.make_mesh(DEVICES)
  run = build.build(configs_of({})[0], total_steps=STEPS, steps_per_epoch=1)
  return mesh, run, build.abstract_state(run, mesh)


def state_of(workdir, step=STEPS):
  *_, target = shared_parts()
  with checkpoint.Checkpoints(f'{workdir}/checkpoints', read_only=True) as c:
    return c.restore(step, target)


def log_of(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def assert_close(one, other):
  """Up to rounding, which is relative to all parameters, momenta and so on.

  Not leaf by leaf: the gradient of some leaves cancels all but a millionth.
  """
  for name in ('params', 'batch_stats', 'opt_state', 'prototypes'):
    parts = [
      np.concatenate(
        [np.float64(x).ravel() for x in jax.tree.leaves(getattr(tree, name))]
      )
      for tree in (one, other)
    ]
    error = np.linalg.norm(parts[0] - parts[1]) / np.linalg.norm(parts[1])
    assert error < 2e-5, (name, error)


@pytest.fixture(scope='module')
def trio(tmp_path_factory):
  """Three configs, and their workdirs trained together."""
  configs = configs_of(
    {'seed': 0, 'optimizer__learning_rate': 0.01, 'loss__clop_weight': 0.0},
    {'seed': 1, 'optimizer__learning_rate': 0.02, 'loss__clop_weight': 1.0},
    {'seed': 2, 'optimizer__learning_rate': 0.05, 'loss__clop_weight': 2.0},
  )
  folder = tmp_path_factory.mktemp('runs')
  workdirs = [folder / str(config.seed) for config in configs]
  assert together(configs, workdirs) == {}
  return configs, workdirs


@functools.cache
def step_alone():
  """`(state, shared, batch) -> (state, metrics)`, one run's step, jitted."""
  mesh, run, _ = shared_parts()

  def step(state, shared, batch):
    examples = loader.unpack(shared['resident'], batch)
    return run.step(state, examples, shared['key'], shared['numbers'])

  return parallel.map_step(step, mesh, batch_axes=(None, None, 0))


def alone(config):
  """`(state, step) -> (state, metrics)` of one run; donates the state."""
  mesh, *_ = shared_parts()
  source = inputs.training_source(config)
  labels = inputs.training_labels(config, sources.labels_of(source))
  reader = inputs.training_reader(config, source, labels)
  data = inputs.training_loader(config, reader, mesh)
  numbers = jax.tree.map(np.float32, build.numbers_of(config))
  shared = {'key': build.training_key(config), 'numbers': numbers}
  shared = parallel.replicate(mesh, shared) | {'resident': data.resident}

  def advance(state, step):
    batch = parallel.shard(mesh, {'index': data.indices(step)})
    return step_alone()(state, shared, batch)

  return advance


def test_from_equal_states_each_run_steps_as_if_alone(trio):
  # Not from start to end: rounding alone can set two runs on paths that part,
  # which tells nothing of the program. From equal states it cannot grow.
  mesh, run, _ = shared_parts()
  create = jax.jit(run.create_state)
  for config, workdir in zip(*trio, strict=True):
    advance = alone(config)
    lines = {line['step']: line for line in log_of(workdir)}
    assert sorted(lines) == [2, 4, 6]
    state = parallel.replicate(mesh, create(jax.random.key(config.seed)))
    for step in range(STEPS):
      expected, metrics = advance(state, step)
      state = state_of(workdir, step + 1)
      assert int(state.step) == step + 1
      assert_close(state, expected)
      line = lines.get(step + 1, {})
      for name in metrics.keys() & line.keys():
        value = float(metrics[name])
        assert line[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
