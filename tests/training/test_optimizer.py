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


def constant(_):
  return RATE


@pytest.fixture(params=['default', 'cuda'])
def platform(request, monkeypatch):
  """Runs what a platform would run, on this one."""

  def choose(*args, **branches):
    return branches[request.param](*args)

  monkeypatch.setattr(lax, 'platform_dependent', choose)
  return request.param


on_all_platforms = pytest.mark.usefixtures('platform')


@functools.cache
def resnet_params():
  """A real tree of names and shapes; no leaf is 0, so that decay shows."""
  x = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
  init = functools.partial(resnet.ResNet8(width=2).init, train=False)
  shapes = jax.eval_shape(init, jax.random.key(0), x)['params']
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda s: rng.normal(size=s.shape).astype(np.float32) + 0.25, shapes
  )


def flat(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    '/'.join(entry.key for entry in path): np.asarray(leaf, np.float64)
    for path, leaf in leaves
  }


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


def test_unknown_scaling_names_the_valid_ones():
  with pytest.raises(
    ValueError, match=r"one of \['linear', 'none', 'sqrt'\], got 'cubic'"
  ):
    optimizer.scaled_learning_rate(0.3, 512, 'cubic')


@pytest.mark.parametrize(
  ('step', 'expected'),
  [
    (0, 0.0),
    (5, 1.0),
    (10, 2.0),
    (35, 1 + math.cos(math.pi / 4)),
    (60, 1.0),
    (110, 0.0),
    (200, 0.0),
  ],
)
def test_warmup_then_cosine_by_hand(step, expected):
  schedule = optimizer.warmup_cosine(2.0, total_steps=110, warmup_steps=10)
  np.testing.assert_allclose(schedule(step), expected, atol=1e-6)


@pytest.mark.parametrize(
  ('step', 'expected'), [(0, 2.0), (50, 1.0), (100, 0.0)]
)
def test_cosine_without_warmup_starts_at_the_peak(step, expected):
  schedule = optimizer.warmup_cosine(2.0, total_steps=100, warmup_steps=0)
  np.testing.assert_allclose(schedule(step), expected, atol=1e-6)


@pytest.mark.parametrize('warmup', [-1, 10, 11])
def test_warmup_that_does_not_end_in_the_run_is_refused(warmup):
  with pytest.raises(
    ValueError, match=rf'\[0, total_steps=10\), got {warmup}; shorten'
  ):
    optimizer.warmup_cosine(1.0, total_steps=10, warmup_steps=warmup)


def test_kernel_mask_has_every_kernel_and_nothing_else():
  mask = flat(optimizer.kernel_mask(resnet_params()))
  chosen = {name for name, value in mask.items() if value}
  assert chosen == {name for name in mask if name.endswith('/kernel')}
  assert len(chosen) == 9  # stem, two a block, two shortcuts
  assert len(mask) > len(chosen)


@on_all_platforms
@pytest.mark.parametrize('name', ['lars', 'sgd', 'adamw'])
def test_weight_decay_moves_kernels_only(name):
  params = resnet_params()
  tx = optimizer.create(name, constant, weight_decay=0.5)
  zeros = jax.tree.map(jnp.zeros_like, params)
  (after,) = run(tx, params, [zeros])
  before, after = flat(params), flat(after)
  for path, value in before.items():
    if path.endswith('/kernel'):
      # LARS: the decayed gradient 0.5 w, rescaled to 0.001 |w|.
      factor = 0.001 if name == 'lars' else 0.5
      expected = value * (1 - RATE * factor)
      np.testing.assert_allclose(after[path], expected, rtol=1e-5, atol=1e-7)
      assert (after[path] != value).any()
    else:
      np.testing.assert_array_equal(after[path], value)


@on_all_platforms
def test_trust_ratio_leaves_biases_and_scales_alone():
  params = resnet_params()
  tx = optimizer.create('lars', constant, weight_decay=0.5)
  ones = jax.tree.map(jnp.ones_like, params)
  (after,) = run(tx, params, [ones])
  before, after = flat(params), flat(after)
  for path, value in before.items():
    if path.endswith('/kernel'):
      gradient = 1 + 0.5 * value
      ratio = 0.001 * np.linalg.norm(value) / np.linalg.norm(gradient)
      expected = value - RATE * ratio * gradient
    else:
      expected = value - RATE
    np.testing.assert_allclose(after[path], expected, rtol=1e-5, atol=1e-6)


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


@on_all_platforms
def test_sgd_with_momentum_by_hand():
  params, gradients = problem()
  tx = optimizer.create('sgd', constant, momentum=0.7, weight_decay=0.01)
  w = params['dense']['kernel'].astype(np.float64)
  b = params['dense']['bias'].astype(np.float64)
  velocity_w, velocity_b = 0.0, 0.0
  for gradient, got in zip(gradients, run(tx, params, gradients), strict=True):
    velocity_w = 0.7 * velocity_w + gradient['dense']['kernel'] + 0.01 * w
    velocity_b = 0.7 * velocity_b + gradient['dense']['bias']
    w, b = w - RATE * velocity_w, b - RATE * velocity_b
    np.testing.assert_allclose(got['dense']['kernel'], w, atol=1e-6)
    np.testing.assert_allclose(got['dense']['bias'], b, atol=1e-6)


@on_all_platforms
def test_adamw_by_hand():
  params, gradients = problem()
  tx = optimizer.create('adamw', constant, momentum=0.8, weight_decay=0.05)
  w = params['dense']['kernel'].astype(np.float64)
  first, second = 0.0, 0.0
  history = run(tx, params, gradients)
  for t, (gradient, got) in enumerate(
    zip(gradients, history, strict=True), start=1
  ):
    g = gradient['dense']['kernel'].astype(np.float64)
    first = 0.8 * first + 0.2 * g
    second = 0.999 * second + 0.001 * g**2
    step = first / (1 - 0.8**t) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
    w = w - RATE * (step + 0.05 * w)
    np.testing.assert_allclose(got['dense']['kernel'], w, atol=1e-5)


@on_all_platforms
@pytest.mark.parametrize(('scale', 'clipped'), [(100.0, True), (0.01, False)])
def test_clip_norm_bounds_the_whole_gradient_only_when_it_is_above(
  scale, clipped
):
  params, (gradient, *_) = problem()
  gradient = jax.tree.map(lambda g: scale * g, gradient)
  norm = np.sqrt(sum((g**2).sum() for g in flat(gradient).values()))
  tx = optimizer.create('sgd', constant, momentum=0.0, clip_norm=0.5)
  updates, _ = tx.update(gradient, tx.init(params), params)
  factor = 0.5 / norm if clipped else 1.0
  for name, value in flat(updates).items():
    expected = -RATE * factor * flat(gradient)[name]
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize('clip_norm', [0, -1.0, float('nan')])
def test_clip_norm_that_stops_all_learning_is_refused(clip_norm):
  with pytest.raises(ValueError, match='clip_norm must be None or above 0'):
    optimizer.create('sgd', constant, clip_norm=clip_norm)


def test_unknown_optimizer_names_the_valid_ones():
  with pytest.raises(
    ValueError, match=r"one of \['adamw', 'lars', 'sgd'\], got 'adam'"
  ):
    optimizer.create('adam', constant)


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
@pytest.mark.parametrize('clip_norm', [None, 0.5, 1e6])
@pytest.mark.parametrize('name', ['lars', 'sgd', 'adamw'])
def test_updates_and_state_are_those_of_optax(name, clip_norm):
  got, expected = [
    steps_of(functools.partial(own, name, clip_norm=clip_norm), RATE, *layers())
    for own in (our_own, optax_own)
  ]
  assert_close(got, expected)


@on_all_platforms
@pytest.mark.parametrize('name', ['lars', 'sgd', 'adamw'])
def test_updates_mapped_over_runs_are_those_of_each(name):
  make = functools.partial(our_own, name, clip_norm=0.5)
  params, gradients = layers(steps=2)
  rates = jnp.array([0.1, 0.3])

  def run_steps(rate):
    scaled = jax.tree.map(lambda x: x * rate, gradients)
    return steps_of(make, rate, params, scaled)

  got = jax.vmap(run_steps)(rates)
  for i, rate in enumerate(rates):
    of_one = jax.tree.map(lambda x, i=i: x[i], got)
    assert_close(of_one, run_steps(rate))


@on_all_platforms
@pytest.mark.parametrize('name', ['lars', 'sgd', 'adamw'])
def test_updates_in_shard_map_are_replicated(name):
  make = functools.partial(our_own, name, clip_norm=0.5)
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


@pytest.mark.parametrize('name', ['lars', 'sgd', 'adamw'])
def test_only_gpus_get_flat_leaves(name):
  params, (gradient, *_) = layers()
  tx = our_own(name, constant)
  traced = jax.jit(tx.update).trace(gradient, tx.init(params), params)
  for platform, is_flat in (
    ('cpu', False),
    ('tpu', False),
    ('cuda', True),
    ('rocm', True),
  ):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ('optimization_barrier' in text) == is_flat
