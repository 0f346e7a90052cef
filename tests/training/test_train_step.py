"""The step on one, two and eight devices, under shard_map, pmap and jit."""

import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clop_jax import loss
from clop_jax import prototypes
from clop_jax.data import augment
from clop_jax.data import loader
from clop_jax.models import heads
from clop_jax.runtime import parallel
from clop_jax.training import prototype_rules
from clop_jax.training import train_step
from tests import small

FIXED = prototype_rules.Fixed()
RULES = {
  'learned': prototype_rules.Learned(0.5),
  'aligned': prototype_rules.Aligned(
    lambda means, before: prototypes.align_prototypes(means), 2, None, 2
  ),
}
TRUE_LABELS = jnp.arange(40) % 5
STEPS = 3
BATCH = 16
KEY = 7
RECIPE = augment.Recipe(
  size=8,
  mean=(0.3,),
  std=(0.4,),
  crop_area=(0.4, 1.0),
  flip_probability=0.0,
  jitter_probability=0.0,
)


class Network(nn.Module):
  """Stands for a backbone: one layer with batch normalization."""

  axis_name: str | None

  @nn.compact
  def __call__(self, images, train):
    x = nn.Dense(8)(images.reshape(len(images), -1))
    x = nn.BatchNorm(not train, momentum=0.9, axis_name=self.axis_name)(x)
    return nn.tanh(x)


def _data():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, size=(40, 8, 8, 1), dtype=np.uint8)
  labels = rng.integers(0, 5, size=40).astype(np.int32)
  labels[rng.random(40) < 0.6] = -1
  return images, labels


def _batch(step, devices=None):
  """Returns the batch of a step as a mapped or an unmapped step takes it."""
  images, labels = _data()
  index = loader.Order(40, batch_size=BATCH, seed=0).indices(step)
  index = index if devices is None else index.reshape(devices, -1)
  return {'image': images[index], 'label': labels[index], 'index': index}


def _parts(axis_name=parallel.DATA_AXIS, **changes):
  return small.training(
    Network(axis_name),
    heads.ProjectionHead(dim=8, hidden_dim=8, axis_name=axis_name),
    learning_rate=0.05,
    recipe=RECIPE,
    contrastive=lambda z, y, axis_name: loss.nt_xent_loss(
      z, axis_name=axis_name
    ),
    axis_name=axis_name,
    **changes,
  )


def _initial_state(create, rule=FIXED):
  c = prototypes.orthonormal_prototypes(jax.random.key(1), 5, 8)
  return create(prototypes=c, prototype_statistics=rule.statistics(c))


@functools.cache
def run_on(devices, **changes):
  """Returns the last state and the metrics of a few steps."""
  small.need_devices(devices)
  mesh = parallel.make_mesh(jax.devices()[:devices])
  create, step = _parts(**changes)
  data = loader.ResidentLoader(*_data(), batch_size=BATCH, seed=0, mesh=mesh)

  def one(state, resident, batch, key):
    examples = loader.unpack(resident, jax.tree.map(lambda x: x[0], batch))
    true_label = TRUE_LABELS[examples['index']]
    return step(state, examples | {'true_label': true_label}, key)

  mapped = parallel.map_step(one, mesh, batch_axes=(None, None, 1, None))
  rule = changes.get('prototype_rule', FIXED)
  state = parallel.replicate(mesh, _initial_state(create, rule))
  key = parallel.replicate(mesh, jax.random.key(KEY))
  history = []
  for batch in data.batches([range(i, i + 1) for i in range(STEPS)]):
    state, metrics = mapped(state, data.resident, batch, key)
    history.append(jax.device_get(metrics))
  return jax.device_get(state), history


def assert_trees_close(a, b, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize('devices', [2, 8])
def test_result_does_not_depend_on_the_number_of_devices(devices):
  one, history = run_on(1)
  several, several_history = run_on(devices)
  assert_trees_close(several.params, one.params, atol=1e-5)
  assert_trees_close(several.batch_stats, one.batch_stats, atol=1e-5)
  assert_trees_close(several_history, history, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('rule', RULES)
def test_prototypes_move_the_same_on_one_and_eight_devices(rule):
  one, history = run_on(1, prototype_rule=RULES[rule])
  several, _ = run_on(8, prototype_rule=RULES[rule])
  np.testing.assert_allclose(several.prototypes, one.prototypes, atol=1e-4)
  assert_trees_close(several.params, one.params, atol=1e-4)
  fixed, _ = run_on(1)
  assert np.abs(one.prototypes - fixed.prototypes).max() > 1e-2
  assert history[-1]['orthonormality_error'] < 1e-6


def test_pmap_with_averaged_gradients_equals_shard_map():
  small.need_devices(8)
  rule = RULES['learned']
  create, step = _parts(pmean_gradients=True, prototype_rule=rule)
  mapped = jax.pmap(
    step, axis_name=parallel.DATA_AXIS, in_axes=(None, 0, None), out_axes=None
  )
  state = _initial_state(create)
  for i in range(STEPS):
    state, metrics = mapped(state, _batch(i, devices=8), jax.random.key(KEY))
  expected, history = run_on(8, prototype_rule=rule)
  state = jax.device_get(state)
  assert_trees_close(state.params, expected.params, atol=1e-5)
  np.testing.assert_allclose(state.prototypes, expected.prototypes, atol=1e-5)
  assert metrics['loss'] == pytest.approx(float(history[-1]['loss']), rel=1e-5)


def test_jit_without_an_axis_equals_shard_map_and_logs_only_on_logged_steps():
  create, step = _parts(axis_name=None, log_every=2)
  state, jitted, ranks = _initial_state(create), jax.jit(step), []
  for i in range(STEPS):
    state, metrics = jitted(state, _batch(i), jax.random.key(KEY))
    assert metrics['loss'] > 0
    ranks.append(metrics['effective_rank'])
  assert_trees_close(
    jax.device_get(state.params), run_on(1)[0].params, atol=1e-5
  )
  assert ranks[0] == ranks[2] == 0 and ranks[1] > 1


def test_learned_prototypes_follow_the_gradient_of_the_clop_loss():
  slope = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)

  def clop(z, labels, c, axis_name):
    return jnp.sum(slope * c) + 0 * jnp.sum(z)

  rule = RULES['learned']
  create, step = _parts(axis_name=None, prototype_rule=rule, clop=clop)
  before = _initial_state(create)
  state, _ = jax.jit(step)(before, _batch(0), jax.random.key(KEY))
  expected = prototypes.orthonormalize(before.prototypes - 0.5 * slope)
  np.testing.assert_allclose(state.prototypes, expected, atol=1e-6)


def test_aligned_prototypes_have_no_clop_term_before_the_first_alignment():
  _, history = run_on(1, prototype_rule=RULES['aligned'])
  for metrics in history[:2]:
    assert metrics['loss'] == metrics['contrastive_loss']
  assert history[2]['loss'] == pytest.approx(
    history[2]['contrastive_loss'] + history[2]['clop_loss'], rel=1e-6
  )


def test_pseudo_labels_are_counted_over_the_global_batch():
  def label_first_step(embeddings, labels, prototypes, step):
    del embeddings, prototypes
    return jnp.where((labels < 0) & (step == 0), 2, labels)

  _, history = run_on(8, pseudo_labels=label_first_step)
  batch = _batch(0)
  truth = np.asarray(TRUE_LABELS)[batch['index']]
  expected = (truth[batch['label'] < 0] == 2).mean()
  assert history[0]['pseudo_label_share'] == 1
  assert history[0]['pseudo_label_accuracy'] == pytest.approx(expected)
  assert history[0]['clop_loss'] != run_on(8)[1][0]['clop_loss']
  # Without a pseudo-label there is no accuracy.
  assert history[1]['pseudo_label_share'] == 0
  assert np.isnan(history[1]['pseudo_label_accuracy'])


def test_metrics_agree_with_the_state_and_each_other():
  state, history = run_on(1)
  metrics = history[-1]
  assert set(metrics) == {
    'loss',
    'contrastive_loss',
    'clop_loss',
    'learning_rate',
    'gradient_norm',
    'update_norm',
    'parameter_norm',
    'effective_rank',
    'embedding_std',
    'prototype_cosine',
    'orthonormality_error',
  }
  assert metrics['orthonormality_error'] < 1e-6
  assert metrics['loss'] == pytest.approx(
    metrics['contrastive_loss'] + metrics['clop_loss'], rel=1e-6
  )
  assert metrics['prototype_cosine'] == pytest.approx(
    1 - metrics['clop_loss'], abs=1e-5
  )
  squares = sum((x**2).sum() for x in jax.tree.leaves(state.params))
  assert metrics['parameter_norm'] == pytest.approx(squares**0.5, rel=1e-5)
  assert metrics['learning_rate'] == pytest.approx(0.05)
  assert 1 < metrics['effective_rank'] <= 8
  assert state.step == STEPS


def test_clop_weight_zero_leaves_only_the_contrastive_gradient():
  create, step = _parts(axis_name=None)
  state = _initial_state(create)

  @jax.jit
  def run(weight, labels):
    parts = dataclasses.replace(step.keywords['parts'], clop_weight=weight)
    after, metrics = train_step.train_step(
      state,
      _batch(0) | {'label': labels},
      jax.random.key(0),
      parts,
      axis_name=None,
    )
    return after.params, metrics['clop_loss']

  labels = jnp.arange(BATCH) % 5
  unlabelled, _ = run(1.0, jnp.full(BATCH, -1))
  off, clop_loss = run(0.0, labels)
  on, _ = run(1.0, labels)
  assert_trees_close(off, unlabelled, atol=1e-7)
  assert clop_loss > 0
  moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), on, off)
  assert max(jax.tree.leaves(moved)) > 1e-4
