import functools
import math

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from clop_jax.models import resnet
from clop_jax.runtime import parallel
from clop_jax.training import optimizer

RATE = 0.1


@pytest.fixture(params=['default', 'cuda'])
def platform(request, monkeypatch):
  """Runs what a platform would run, on this one."""

  def choose(*args, **branches):
    return branches[request.param](*args)

  monkeypatch.setattr(lax, 'platform_dependent', choose)
  return request.param


on_all_platforms = pytest.mark.usefixtures('platform')


def run(tx, params, gradients):
  """The parameters after each of the gradients."""
  state, history = tx.init(params), []
  update = jax.jit(tx.update)
  for gradient in gradients:
    updates, state = update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    history.append(params)
  return history


def problem(steps=3, seed=0):
  rng = np.random.default_rng(seed)

  def draw():
    return {
      'dense': {
        'kernel': rng.normal(size=(4, 3)).astype(np.float32),
        'bias': rng.normal(size=3).astype(np.float32),
      }
    }

  return draw(), [draw() for _ in range(steps)]


@pytest.mark.parametrize(
  ('scaling', 'expected'),
  [('linear', 0.3 * 2), ('sqrt', 0.3 * 22.627417), ('none', 0.3)],
)
def test_scaling_of_the_learning_rate(scaling, expected):
  got = optimizer.scaled_learning_rate(0.3, 512, scaling)
  np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize(
  ('warmup', 'step', 'expected'),
  [
    (10, 0, 0.0),
    (10, 5, 1.0),
    (10, 10, 2.0),
    (10, 35, 1 + math.cos(math.pi / 4)),
    (10, 60, 1.0),
    (10, 110, 0.0),
    (10, 200, 0.0),
    (0, 0, 2.0),
    (0, 55, 1.0),
  ],
)
def test_warmup_then_cosine_by_hand(warmup, step, expected):
  schedule = optimizer.warmup_cosine(2.0, total_steps=110, warmup_steps=warmup)
  np.testing.assert_allclose(schedule(step), expected, atol=1e-6)


@pytest.mark.parametrize('warmup', [-1, 10])
def test_warmup_must_end_within_the_run(warmup):
  with pytest.raises(ValueError, match=rf'warmup_steps.*got {warmup};'):
    optimizer.warmup_cosine(1.0, total_steps=10, warmup_steps=warmup)


def test_kernel_mask_has_every_kernel_and_nothing_else():
  x = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
  init = functools.partial(resnet.ResNet8(width=2).init, train=False)
  params = jax.eval_shape(init, jax.random.key(0), x)['params']
  mask = jax.tree_util.tree_leaves_with_path(optimizer.kernel_mask(params))
  chosen = [path[-1].key for path, value in mask if value]
  assert chosen == ['kernel'] * 9  # stem, two per block, two shortcuts
  assert 'kernel' not in [path[-1].key for path, value in mask if not value]


@on_all_platforms
@pytest.mark.parametrize('rate_in_momentum', [True, False])
def test_lars_by_hand_over_three_steps(rate_in_momentum):
  params, gradients = problem()
  # The rate changes: it belongs to the step whose gradient it scales.
  rates = [0.3, 0.2, 0.1]
  tx = optimizer.create(
    'lars',
    lambda step: jnp.array(rates)[step],
    momentum=0.8,
    weight_decay=0.01,
    trust_coefficient=0.02,
    rate_in_momentum=rate_in_momentum,
  )
  w = params['dense']['kernel'].astype(np.float64)
  b = params['dense']['bias'].astype(np.float64)
  velocity_w, velocity_b = 0.0, 0.0
  for rate, gradient, got in zip(
    rates, gradients, run(tx, params, gradients), strict=True
  ):
    g = gradient['dense']['kernel'].astype(np.float64) + 0.01 * w
    ratio = 0.02 * np.sqrt((w**2).sum()) / np.sqrt((g**2).sum())
    inside, outside = (rate, 1) if rate_in_momentum else (1, rate)
    velocity_w = 0.8 * velocity_w + inside * ratio * g
    velocity_b = 0.8 * velocity_b + inside * gradient['dense']['bias']
    w, b = w - outside * velocity_w, b - outside * velocity_b
    np.testing.assert_allclose(got['dense']['kernel'], w, atol=1e-6)
    np.testing.assert_allclose(got['dense']['bias'], b, atol=1e-6)


def optax_own(name, schedule, clip_norm=None):
  mask = optimizer.kernel_mask
  tx = {
    'lars': optax.lars(
      schedule,
      weight_decay=0.01,
      weight_decay_mask=mask,
      trust_coefficient=0.02,
      trust_ratio_mask=mask,
      momentum=0.8,
    ),
    'sgd': optax.chain(
      optax.add_decayed_weights(0.01, mask=mask),
      optax.sgd(schedule, momentum=0.8),
    ),
    'adamw': optax.adamw(schedule, b1=0.8, weight_decay=0.01, mask=mask),
  }[name]
  if clip_norm is None:
    return tx
  return optax.chain(optax.clip_by_global_norm(clip_norm), tx)


def our_own(name, schedule, clip_norm=None):
  return optimizer.create(
    name,
    schedule,
    momentum=0.8,
    weight_decay=0.01,
    trust_coefficient=0.02,
    clip_norm=clip_norm,
  )


def layers(steps=4):
  """Parameters and gradients of several steps, with norms of 0 among them."""
  rng = np.random.default_rng(1)
  shapes = {
    'first': {'kernel': (3, 3, 2, 4), 'bias': (4,)},
    'second': {'kernel': (2, 4, 9), 'bias': (9,)},  # as large as the first
    'third': {'kernel': (60, 90), 'scale': (5,)},
    'fourth': {'kernel': (6, 7)},
  }

  def draw():
    return {
      layer: {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in arrays.items()
      }
      for layer, arrays in shapes.items()
    }

  params, gradients = draw(), [draw() for _ in range(steps)]
  params['first']['kernel'][:] = 0
  params['fourth']['kernel'][:] = 0
  gradients[0]['fourth']['kernel'][:] = 0  # not even decay is left
  gradients[1]['third']['kernel'][:] = 0
  return params, gradients


def steps_of(make, rate, params, gradients):
  """Parameters and state after all gradients, at a rate that falls."""

  @jax.jit
  def step(rate, params, state, gradient):  # rate is traced, as in training
    tx = make(lambda step: rate / (1 + step))
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  state = make(lambda step: rate).init(params)
  for gradient in gradients:
    params, state = step(rate, params, state, gradient)
  return params, state


def assert_close(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7),
    got,
    expected,
  )


@on_all_platforms
@pytest.mark.parametrize('clip_norm', [None, 0.5])
@pytest.mark.parametrize('name', ['lars', 'sgd', 'adamw'])
def test_updates_and_state_are_those_of_optax(name, clip_norm):
  got, expected = [
    steps_of(functools.partial(own, name, clip_norm=clip_norm), RATE, *layers())
    for own in (our_own, optax_own)
  ]
  assert_close(got, expected)


@on_all_platforms
def test_updates_in_shard_map_are_replicated():
  make = functools.partial(our_own, 'lars', clip_norm=0.5)
  run_steps = functools.partial(steps_of, make, RATE)
  mapped = jax.shard_map(
    run_steps,
    mesh=parallel.make_mesh(jax.devices()[:2]),
    in_specs=P(),
    out_specs=P(),
    check_vma=True,
  )
  arguments = layers(steps=2)
  assert_close(jax.jit(mapped)(*arguments), run_steps(*arguments))


def test_only_gpus_get_flat_leaves():
  params, (gradient, *_) = layers()
  tx = our_own('lars', lambda step: RATE)
  traced = jax.jit(tx.update).trace(gradient, tx.init(params), params)
  for platform, is_flat in (
    ('cpu', False),
    ('tpu', False),
    ('cuda', True),
    ('rocm', True),
  ):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ('optimization_barrier' in text) == is_flat
