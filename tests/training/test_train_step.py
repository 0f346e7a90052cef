"""The step on one, two and eight devices, under shard_map, pmap and jit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clop_jax import loss
from clop_jax import prototypes
from clop_jax.data import augment
from clop_jax.data import loader
from clop_jax.models import heads
from clop_jax.models import resnet
from clop_jax.runtime import parallel
from clop_jax.training import prototype_rules
from tests import small

_FIXED = prototype_rules.Fixed()
TRUE_LABELS = jnp.arange(40) % 5
STEPS = 3
BATCH = 16
RECIPE = augment.Recipe(
  size=8,
  mean=(0.3,),
  std=(0.4,),
  crop_area=(0.4, 1.0),
  flip_probability=0.0,
  blur_probability=0.5,
)


def _data():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, size=(40, 8, 8, 1), dtype=np.uint8)
  labels = rng.integers(0, 5, size=40).astype(np.int32)
  labels[rng.random(40) < 0.6] = -1
  return images, labels


@functools.cache
def _parts(axis_name=parallel.DATA_AXIS, bn_scope='global', **changes):
  shared = {'axis_name': axis_name, 'bn_scope': bn_scope}
  backbone = resnet.ResNet8(width_multiplier=0.25, **shared)
  projection_head = heads.ProjectionHead(dim=8, hidden_dim=16, **shared)
  return small.training(
    backbone,
    projection_head,
    learning_rate=0.05,
    recipe=RECIPE,
    contrastive=lambda z, y, axis_name: loss.nt_xent_loss(
      z, axis_name=axis_name
    ),
    axis_name=axis_name,
    bn_scope=bn_scope,
    **changes,
  )


def _initial_state(create, rule=_FIXED):
  c = prototypes.orthonormal_prototypes(jax.random.key(1), 5, 8)
  return create(prototypes=c, prototype_statistics=rule.statistics(c))


def with_true_labels(resident, batch):
  examples = loader.unpack(resident, jax.tree.map(lambda x: x[0], batch))
  return examples | {'true_label': TRUE_LABELS[examples['index']]}


@functools.cache
def run_on(devices, bn_scope='global', **changes):
  """States and metrics of a few steps on so many devices."""
  small.need_devices(devices)
  mesh = parallel.make_mesh(jax.devices()[:devices])
  create, step = _parts(bn_scope=bn_scope, **changes)
  data = loader.ResidentLoader(*_data(), batch_size=BATCH, seed=0, mesh=mesh)
  mapped = parallel.map_step(
    lambda state, resident, batch, key: step(
      state, with_true_labels(resident, batch), key
    ),
    mesh,
    batch_axes=(None, None, 1, None),
  )
  rule = changes.get('prototype_rule', _FIXED)
  state = parallel.replicate(mesh, _initial_state(create, rule))
  key = parallel.replicate(mesh, jax.random.key(7))
  history = []
  for batch in data.batches([range(i, i + 1) for i in range(STEPS)]):
    state, metrics = mapped(state, data.resident, batch, key)
    history.append(jax.device_get(metrics))
  return jax.device_get(state), history


def assert_trees_close(a, b, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize('devices', [2, 8])
def test_parameters_do_not_depend_on_the_number_of_devices(devices):
  one, history = run_on(1)
  several, several_history = run_on(devices)
  assert_trees_close(several.params, one.params, atol=1e-4)
  assert_trees_close(several.batch_stats, one.batch_stats, atol=1e-4)
  assert_trees_close(several_history, history, rtol=2e-3, atol=2e-4)


RULES = {
  'learned': prototype_rules.Learned(0.5),
  'aligned': prototype_rules.Aligned(
    lambda means, before: prototypes.align_prototypes(means), 2, None, 2
  ),
  'assigned': prototype_rules.Aligned(prototypes.assign_prototypes, 2, None, 2),
}


@pytest.mark.parametrize('rule', RULES)
def test_prototypes_move_alike_on_one_and_eight_devices(rule):
  one, history = run_on(1, prototype_rule=RULES[rule])
  several, _ = run_on(8, prototype_rule=RULES[rule])
  np.testing.assert_allclose(several.prototypes, one.prototypes, atol=1e-4)
  # Rounding can turn the gradient of a ReLU whose input is 0, which moves all
  # parameters before it: by 5e-4 with JAX 0.9.
  assert_trees_close(several.params, one.params, atol=1e-3)
  fixed, _ = run_on(1)
  assert np.abs(one.prototypes - fixed.prototypes).max() > 1e-2
  assert history[-1]['orthonormality_error'] < 1e-6


def test_learned_prototypes_move_alike_under_pmap():
  small.need_devices(8)
  rule = RULES['learned']
  create, step = _parts(pmean_gradients=True, prototype_rule=rule)
  images, labels = _data()
  index = loader.Order(40, batch_size=BATCH, seed=0).indices(0).reshape(8, -1)
  batch = {'image': images[index], 'label': labels[index], 'index': index}
  mapped = jax.pmap(
    step, axis_name=parallel.DATA_AXIS, in_axes=(None, 0, None), out_axes=None
  )
  before = _initial_state(create)
  state, metrics = mapped(before, batch, jax.random.key(7))
  alone, one = _parts(axis_name=None, prototype_rule=rule)
  flat = {k: v.reshape(-1, *v.shape[2:]) for k, v in batch.items()}
  expected, _ = jax.jit(one)(_initial_state(alone), flat, jax.random.key(7))
  np.testing.assert_allclose(state.prototypes, expected.prototypes, atol=1e-5)
  assert np.abs(state.prototypes - before.prototypes).max() > 1e-3
  assert metrics['orthonormality_error'] < 1e-6


def test_learned_prototypes_follow_the_gradient_of_the_whole_loss():
  embeddings = []

  def clop(z, labels, c, axis_name):
    embeddings.append(z)
    return loss.clop_loss(z, labels, c, axis_name=axis_name)

  rule = RULES['learned']
  create, step = _parts(axis_name=None, prototype_rule=rule, clop=clop)
  images, labels = _data()
  batch = {'image': images, 'label': labels, 'index': np.arange(40)}
  before = _initial_state(create)
  state, _ = step(before, batch, jax.random.key(7))
  # Not traced: the call that the prototypes' gradient makes has the numbers.
  z = [x for x in embeddings if not isinstance(x, jax.core.Tracer)][-1]
  gradient = jax.grad(loss.clop_loss, argnums=2)(z, labels, before.prototypes)
  expected = prototypes.orthonormalize(before.prototypes - 0.5 * gradient)
  np.testing.assert_allclose(state.prototypes, expected, atol=1e-6)
  assert np.abs(expected - before.prototypes).max() > 1e-2


def test_aligned_prototypes_have_no_clop_term_before_they_are_set():
  _, history = run_on(1, prototype_rule=RULES['aligned'])
  for metrics in history[:2]:
    assert metrics['loss'] == metrics['contrastive_loss']
  assert history[2]['loss'] == pytest.approx(
    history[2]['contrastive_loss'] + history[2]['clop_loss'], rel=1e-6
  )


@pytest.mark.parametrize('devices', [1, 8])
def test_pseudo_labels_are_counted_over_the_global_batch(devices):
  def label_all_as_two(embeddings, labels, prototypes, step):
    del embeddings, prototypes, step
    return jnp.where(labels < 0, 2, labels)

  _, history = run_on(devices, pseudo_labels=label_all_as_two)
  order = loader.Order(40, batch_size=BATCH, seed=0).indices(0)
  labels = _data()[1][order]
  truth = np.asarray(TRUE_LABELS)[order]
  expected = (truth[labels < 0] == 2).mean()
  assert history[0]['pseudo_label_share'] == 1
  assert history[0]['pseudo_label_accuracy'] == pytest.approx(expected)
  assert history[0]['clop_loss'] != run_on(devices)[1][0]['clop_loss']


def test_no_pseudo_label_is_no_accuracy():
  def label_none(embeddings, labels, prototypes, step):
    del embeddings, prototypes, step
    return labels

  _, history = run_on(1, pseudo_labels=label_none)
  assert history[0]['pseudo_label_share'] == 0
  assert np.isnan(history[0]['pseudo_label_accuracy'])
  assert history[0]['loss'] == run_on(1)[1][0]['loss']


@pytest.mark.parametrize('devices', [2, 8])
def test_views_and_labels_are_the_same_on_any_number_of_devices(
  devices,
):
  small.need_devices(devices)

  def outputs(count):
    mesh = parallel.make_mesh(jax.devices()[:count])
    data = loader.ResidentLoader(*_data(), batch_size=BATCH, seed=0, mesh=mesh)

    def shard_views(resident, batch):
      batch = loader.unpack(resident, batch)
      keys = augment.example_keys(jax.random.key(7), 2, batch['index'])
      views = augment.two_views(keys, batch['image'], RECIPE)
      return views.swapaxes(0, 1), batch['label'], batch['index']

    (batch,) = data.batches([range(2, 3)])
    batch = parallel.shard(mesh, {'index': np.asarray(batch['index'])[0]})
    spec = jax.sharding.PartitionSpec
    mapped = jax.jit(
      jax.shard_map(
        shard_views,
        mesh=mesh,
        in_specs=(spec(), spec(parallel.DATA_AXIS)),
        out_specs=spec(parallel.DATA_AXIS),
      )
    )
    return jax.device_get(mapped(data.resident, batch))

  (views, *ours), (expected_views, *expected) = outputs(devices), outputs(1)
  # The draws are equal; XLA may round a batch of another size differently.
  np.testing.assert_allclose(views, expected_views, atol=2e-6)
  for a, b in zip(ours, expected, strict=True):
    np.testing.assert_array_equal(a, b)


def test_pmap_with_averaged_gradients_equals_shard_map():
  small.need_devices(8)
  create, step = _parts(pmean_gradients=True)
  images, labels = _data()
  mesh = parallel.make_mesh()
  data = loader.ResidentLoader(
    images, labels, batch_size=BATCH, seed=0, mesh=mesh
  )
  mapped = jax.pmap(
    step, axis_name=parallel.DATA_AXIS, in_axes=(None, 0, None), out_axes=None
  )
  state = _initial_state(create)
  for i in range(STEPS):
    index = data.indices(i).reshape(8, -1)
    batch = {'image': images[index], 'label': labels[index], 'index': index}
    state, metrics = mapped(state, batch, jax.random.key(7))
  expected, history = run_on(8)
  assert_trees_close(jax.device_get(state.params), expected.params, atol=1e-5)
  assert metrics['loss'] == pytest.approx(float(history[-1]['loss']), rel=1e-5)


def test_one_device_without_an_axis_equals_the_mapped_step():
  create, step = _parts(axis_name=None)
  images, labels = _data()
  data = loader.ResidentLoader(
    images,
    labels,
    batch_size=BATCH,
    seed=0,
    mesh=parallel.make_mesh(jax.devices()[:1]),
  )
  state, jitted = _initial_state(create), jax.jit(step)
  for i in range(STEPS):
    index = data.indices(i)
    batch = {'image': images[index], 'label': labels[index], 'index': index}
    state, _ = jitted(state, batch, jax.random.key(7))
  assert_trees_close(
    jax.device_get(state.params), run_on(1)[0].params, atol=1e-5
  )


def test_bn_scope_device_normalizes_over_each_devices_own_examples():
  one, _ = run_on(1, 'device')
  assert_trees_close(one.params, run_on(1)[0].params, atol=1e-6)
  several, _ = run_on(8, 'device')
  difference = jax.tree.map(
    lambda a, b: np.abs(a - b).max(), several.params, one.params
  )
  assert max(jax.tree.leaves(difference)) > 1e-3
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(several))


def test_metrics_are_what_they_say():
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


def test_clop_weight_zero_leaves_the_contrastive_gradient_alone():
  def after_one_step(weight, labels):
    create, step = _parts(axis_name=None, clop_weight=weight)
    images, _ = _data()
    batch = {
      'image': jnp.asarray(images[:8]),
      'label': labels,
      'index': jnp.arange(8),
    }
    return jax.jit(step)(_initial_state(create), batch, jax.random.key(0))

  none = after_one_step(1.0, jnp.full(8, -1))
  off = after_one_step(0.0, jnp.arange(8) % 5)
  on = after_one_step(1.0, jnp.arange(8) % 5)
  assert_trees_close(off[0].params, none[0].params, atol=1e-7)
  assert off[1]['clop_loss'] > 0
  moved = jax.tree.map(
    lambda a, b: float(jnp.abs(a - b).max()), on[0].params, off[0].params
  )
  assert max(jax.tree.leaves(moved)) > 1e-4


def test_diagnostics_are_made_on_logged_steps_only():
  create, step = _parts(axis_name=None, log_every=2)
  images, labels = _data()
  batch = {
    'image': jnp.asarray(images[:8]),
    'label': jnp.asarray(labels[:8]),
    'index': jnp.arange(8),
  }
  jitted = jax.jit(step)
  state, first = jitted(_initial_state(create), batch, jax.random.key(0))
  _, second = jitted(state, batch, jax.random.key(0))
  assert first['effective_rank'] == 0 and first['loss'] > 0
  assert second['effective_rank'] > 1


def test_a_batch_that_devices_cannot_share_is_refused():
  small.need_devices(8)
  mesh = parallel.make_mesh()
  with pytest.raises(ValueError, match='multiple of the 8 devices, got 12'):
    parallel.check_batch_size(12, mesh)
