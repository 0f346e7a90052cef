"""Steps with a predictor, a target or a classifier."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clop_jax import loss
from clop_jax import prototypes
from clop_jax.data import augment
from clop_jax.models import heads
from clop_jax.runtime import parallel
from clop_jax.training import train_state
from tests import lowering
from tests import small
from tests.training.test_train_step import RECIPE

KEY = jax.random.key(7)
PREDICTOR = heads.ProjectionHead(
  dim=6, hidden_dim=5, use_bn=False, axis_name=parallel.DATA_AXIS
)
RATE = 0.5


def invariance(z, y, *, axis_name):
  del y
  return loss.invariance_loss(z, axis_name=axis_name)


def batch():
  rng = np.random.default_rng(0)
  return {
    'image': rng.integers(0, 256, (16, 8, 8, 1), np.uint8),
    'label': np.full(16, -1, np.int32),
    'index': np.arange(16, dtype=np.int32),
  }


def training(target, axis_name=parallel.DATA_AXIS, **changes):
  """Returns the initial state and the step; SGD without momentum."""
  create, step = small.training(
    small.Dense(10, axis_name),
    heads.ProjectionHead(dim=6, hidden_dim=8, axis_name=axis_name),
    learning_rate=RATE,
    momentum=0.0,
    recipe=RECIPE,
    contrastive=invariance,
    predictor=PREDICTOR,
    target=target,
    axis_name=axis_name,
    **{'target_momentum': lambda step: jnp.float32(0.75)} | changes,
  )
  state = create(
    prototypes=prototypes.orthonormal_prototypes(jax.random.key(1), 3, 6),
    others={'predictor': PREDICTOR},
    has_target=target == 'moving_average',
  )
  return state, step


def expected_loss(params, state, target):
  """The loss by the equations, on one device."""
  b = batch()
  keys = augment.example_keys(KEY, state.step, b['index'])
  views = augment.two_views(keys, b['image'], RECIPE).reshape(-1, 8, 8, 1)

  def embed(params):
    return train_state.apply_networks(
      small.Dense(10, None),
      heads.ProjectionHead(dim=6, hidden_dim=8),
      params,
      state.batch_stats,
      views,
      train=True,
    )[1].reshape(2, 16, 6)

  z = embed(params)
  t = embed(state.target) if target == 'moving_average' else z
  if target != 'none':
    t = jax.lax.stop_gradient(t)
  p = PREDICTOR.apply({'params': params['predictor']}, z, train=True)

  def distance(a, b):
    a, b = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    return jnp.mean(1 - jnp.sum(a * b, axis=-1))

  return (distance(p[0], t[1]) + distance(p[1], t[0])) / 2


@pytest.mark.parametrize('devices', [1, 8])
@pytest.mark.parametrize('target', ['none', 'stop_gradient', 'moving_average'])
def test_the_step_follows_the_equations(target, devices):
  small.need_devices(devices)
  state, step = training(target)
  if target == 'moving_average':  # not the trained parameters
    state = state.replace(target=jax.tree.map(lambda x: 1.5 * x, state.target))
  value, gradients = jax.value_and_grad(expected_loss)(
    state.params, state, target
  )
  mesh = parallel.make_mesh(jax.devices()[:devices])
  mapped = parallel.map_step(step, mesh, batch_axes=(None, 0, None))
  after, metrics = mapped(
    parallel.replicate(mesh, jax.tree.map(jnp.copy, state)), batch(), KEY
  )
  np.testing.assert_allclose(metrics['contrastive_loss'], value, rtol=1e-5)
  params = jax.tree.map(lambda p, g: p - RATE * g, state.params, gradients)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
    after.params,
    params,
  )
  if target == 'moving_average':
    expected = {
      name: jax.tree.map(
        lambda t, p: 0.75 * t + 0.25 * p, state.target[name], after.params[name]
      )
      for name in ('backbone', 'projection_head')
    }
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
      after.target,
      expected,
    )
  else:
    assert after.target is None


@pytest.mark.parametrize(
  ('changes', 'match'),
  [
    ({'target': 'ema'}, r"target.*moving_average.*'ema'"),
    ({'target': 'moving_average', 'target_momentum': None}, 'momentum.*None'),
  ],
)
def test_wrong_targets_are_named(changes, match):
  with pytest.raises(ValueError, match=match):
    training(**changes)


@pytest.mark.parametrize(('devices', 'parts'), [(1, 1), (1, 4), (8, 1)])
def test_a_classifier_adds_the_cross_entropy_of_the_labelled(devices, parts):
  small.need_devices(devices)
  head = heads.ProjectionHead(dim=6, hidden_dim=8, use_bn=False)
  # Without batch statistics, which would be those of a micro-batch.
  backbone = small.Pixels(10)
  classifier = heads.LinearHead(3)
  create, step = small.training(
    backbone,
    head,
    learning_rate=RATE,
    momentum=0.0,
    recipe=RECIPE,
    contrastive=invariance,
    clop_weight=0.0,
    classifier=classifier,
    cross_entropy_weight=0.5,
    num_micro_batches=parts,
  )
  state = create(prototypes=jnp.eye(3, 6), others={'classifier': classifier})
  kernel = jax.random.normal(KEY, (10, 3))
  state.params['classifier']['Dense_0']['kernel'] = kernel
  given = batch()
  given['label'][:5] = [0, 2, 1, 1, 0]

  def expected(params):
    keys = augment.example_keys(KEY, state.step, given['index'])
    views = augment.two_views(keys, given['image'], RECIPE)
    features = backbone.apply(
      {'params': params['backbone']}, views.reshape(-1, 8, 8, 1), train=True
    )
    z = head.apply(
      {'params': params['projection_head']}, features, train=True
    ).reshape(2, 16, 6)
    dense = params['classifier']['Dense_0']
    logits = features @ dense['kernel'] + dense['bias']
    logs = jax.nn.log_softmax(logits).reshape(2, 16, 3)
    labels = given['label'][:5]
    entropy = -jnp.mean(logs[:, np.arange(5), labels])
    z /= jnp.linalg.norm(z, axis=-1, keepdims=True)
    return jnp.mean(1 - jnp.sum(z[0] * z[1], -1)) + 0.5 * entropy, entropy

  (total, entropy), gradients = jax.value_and_grad(expected, has_aux=True)(
    state.params
  )
  mesh = parallel.make_mesh(jax.devices()[:devices])
  mapped = parallel.map_step(step, mesh, batch_axes=(None, 0, None))
  after, metrics = mapped(
    parallel.replicate(mesh, jax.tree.map(jnp.copy, state)), given, KEY
  )
  np.testing.assert_allclose(metrics['loss'], total, rtol=1e-5)
  np.testing.assert_allclose(metrics['cross_entropy'], entropy, rtol=1e-5)
  jax.tree.map(
    lambda new, old, gradient: np.testing.assert_allclose(
      new, old - RATE * gradient, atol=2e-5
    ),
    after.params,
    state.params,
    gradients,
  )


def test_the_step_lowers_on_every_platform():
  small.need_devices(8)
  state, step = training('moving_average', num_micro_batches=2)
  mapped = parallel.map_step(step, lowering.mesh(), batch_axes=(None, 0, None))
  lowering.check(mapped, state, batch(), KEY)
