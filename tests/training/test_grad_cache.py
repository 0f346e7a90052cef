"""The step in micro-batches against the whole step, and what it costs."""

import functools
import re

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clop_jax import loss
from clop_jax import prototypes
from clop_jax.data import augment
from clop_jax.models import heads
from clop_jax.models import resnet
from clop_jax.runtime import parallel
from tests import small

BATCH = 32
STEPS = 2
LEARNING_RATE = 0.05
RECIPE = augment.Recipe(
  size=8,
  mean=(0.3,),
  std=(0.4,),
  crop_area=(0.4, 1.0),
  jitter_probability=0.0,
)
CONTRASTIVE = {
  'nt_xent': lambda z, y, **axis: loss.nt_xent_loss(z, **axis),
  'supcon': lambda z, y, **axis: loss.supcon_loss(z, y, **axis),
  'vicreg': lambda z, y, **axis: loss.vicreg_loss(z, **axis),
}


class Network(nn.Module):
  """Small; without `batch_norm` the features of an image are its own."""

  filters: int = 8
  layers: int = 1
  batch_norm: bool = False
  axis_name: str | None = None

  @nn.compact
  def __call__(self, images, train):
    x = images
    for _ in range(self.layers):
      x = nn.Conv(self.filters, (3, 3))(x)
      if self.batch_norm:
        x = nn.BatchNorm(not train, momentum=0.9, axis_name=self.axis_name)(x)
      x = nn.tanh(x)
    return jnp.mean(x, axis=1).reshape(x.shape[0], -1)


def _networks(batch_norm, axis_name, bn_scope='global'):
  head = heads.ProjectionHead(
    dim=6,
    hidden_dim=8,
    use_bn=batch_norm,
    bn_scope=bn_scope,
    axis_name=axis_name,
  )
  axis_name = resnet.bn_axis(bn_scope, axis_name)
  return Network(batch_norm=batch_norm, axis_name=axis_name), head


def _parts(
  contrastive='nt_xent',
  *,
  batch_norm=False,
  axis_name=None,
  bn_scope='global',
  momentum=0.9,
  backbone=None,
  **changes,
):
  own, projection_head = _networks(batch_norm, axis_name, bn_scope)
  create, step = small.training(
    backbone or own,
    projection_head,
    learning_rate=LEARNING_RATE,
    momentum=momentum,
    recipe=RECIPE,
    contrastive=CONTRASTIVE[contrastive],
    bn_scope=bn_scope,
    axis_name=axis_name,
    **changes,
  )
  made = prototypes.orthonormal_prototypes(jax.random.key(1), 5, 6)
  # Not made once: some mappings give the state's memory away.
  return lambda: create(prototypes=jnp.copy(made)), step


def _batches():
  """Different examples each step, of which few have a label."""
  rng = np.random.default_rng(0)
  for _ in range(STEPS):
    labels = rng.integers(0, 5, size=BATCH).astype(np.int32)
    labels[rng.random(BATCH) < 0.5] = -1
    labels[16:20] = -1
    yield {
      'image': rng.integers(0, 256, size=(BATCH, 8, 8, 1), dtype=np.uint8),
      'label': labels,
      'index': rng.permutation(1000)[:BATCH],
    }


def _run(step, state, mapping):
  """Returns state and metrics after each step."""
  if mapping != 'jit':
    small.need_devices(8)
  if mapping == 'jit':
    mapped = jax.jit(step)
  elif mapping == 'shard_map8':
    mesh = parallel.make_mesh(jax.devices()[:8])
    mapped = parallel.map_step(step, mesh, batch_axes=(None, 0, None))
    state = parallel.replicate(mesh, state)
  else:
    mapped = jax.pmap(
      functools.partial(step, pmean_gradients=True),
      axis_name=parallel.DATA_AXIS,
      in_axes=(None, 0, None),
      out_axes=None,
    )
  history = []
  for batch in _batches():
    if mapping == 'pmap8':
      batch = {k: x.reshape(8, -1, *x.shape[1:]) for k, x in batch.items()}
    state, metrics = mapped(state, batch, jax.random.key(7))
    history.append(jax.device_get((state, metrics)))
  return history


def _axis_of(mapping):
  return None if mapping == 'jit' else parallel.DATA_AXIS


@functools.cache
def _undivided(contrastive):
  create, step = _parts(contrastive)
  return _run(step, create(), 'jit')


def _gradient(before, after):
  return jax.tree.map(
    lambda a, b: (np.asarray(a) - np.asarray(b)) / LEARNING_RATE, before, after
  )


def _assert_close(ours, expected, relative):
  """Every array to a share of the tree's largest entry."""
  largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=relative * largest),
    ours,
    expected,
  )


@pytest.mark.parametrize(
  ('contrastive', 'mapping', 'num_micro_batches'),
  [
    *[(contrastive, 'shard_map8', 4) for contrastive in CONTRASTIVE],
    ('nt_xent', 'jit', 2),
    ('nt_xent', 'pmap8', 4),
  ],
)
def test_without_batch_norm_the_step_is_the_undivided_one(
  contrastive, mapping, num_micro_batches
):
  create, step = _parts(
    contrastive,
    axis_name=_axis_of(mapping),
    num_micro_batches=num_micro_batches,
  )
  initial = jax.device_get(create().params)
  history = _run(step, create(), mapping)
  for (state, metrics), (expected, expected_metrics) in zip(
    history, _undivided(contrastive), strict=True
  ):
    # The undivided step rounds as well, differently on each kind of CPU.
    _assert_close(state.params, expected.params, 5e-6)
    _assert_close(
      _gradient(initial, state.params),
      _gradient(initial, expected.params),
      5e-5,
    )
    for name, value in expected_metrics.items():
      assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_two_crops_of_each_example_stay_together():
  def after_one_step(num_micro_batches):
    create, step = _parts(num_micro_batches=num_micro_batches)
    batch = next(_batches())
    crops = np.stack([batch['image'], batch['image'][::-1]], axis=1)
    state, _ = jax.jit(step)(
      create(), batch | {'image': crops}, jax.random.key(7)
    )
    return _gradient(create().params, state.params)

  _assert_close(after_one_step(4), after_one_step(1), 1e-5)


def _by_hand(groups):
  """Gradient and batch statistics where each group is normalized by itself."""
  backbone, head = _networks(batch_norm=True, axis_name=None)
  create, _ = _parts(batch_norm=True)
  state, batch = create(), next(_batches())

  def through(module, name, params, x):
    variables = {
      'params': params[name],
      'batch_stats': state.batch_stats[name],
    }
    y, new = module.apply(variables, x, train=True, mutable=['batch_stats'])
    return y, new['batch_stats']

  def total(params):
    first, second, all_stats = {}, {}, []
    for group in groups:
      keys = augment.example_keys(jax.random.key(7), 0, batch['index'][group])
      a, b = augment.two_views(keys, batch['image'][group], RECIPE)
      features, of_backbone = through(
        backbone, 'backbone', params, jnp.concatenate([a, b])
      )
      z, of_head = through(head, 'projection_head', params, features)
      all_stats.append({'backbone': of_backbone, 'projection_head': of_head})
      for place, example in enumerate(group):
        first[example] = z[place]
        second[example] = z[len(group) + place]
    z = jnp.stack(
      [
        jnp.stack([first[i] for i in range(BATCH)]),
        jnp.stack([second[i] for i in range(BATCH)]),
      ]
    )
    value = loss.nt_xent_loss(z) + loss.clop_loss(
      z, batch['label'], state.prototypes
    )
    return value, all_stats

  differentiate = jax.jit(jax.value_and_grad(total, has_aux=True))
  (value, stats), gradient = differentiate(state.params)
  mean = jax.tree.map(lambda *x: sum(x) / len(x), *stats)
  return jax.device_get((value, gradient, mean))


def _step_with_batch_norm(mapping, num_micro_batches, bn_scope='global'):
  create, step = _parts(
    batch_norm=True,
    axis_name=_axis_of(mapping),
    bn_scope=bn_scope,
    momentum=0.0,
    num_micro_batches=num_micro_batches,
  )
  state, metrics = _run(step, create(), mapping)[0]
  gradient = _gradient(create().params, state.params)
  return metrics['loss'], gradient, state.batch_stats


@functools.cache
def _micro_batches_by_hand():
  return _by_hand([np.arange(m, BATCH, 4) for m in range(4)])


@pytest.mark.parametrize('mapping', ['jit', 'shard_map8', 'pmap8'])
def test_batch_statistics_are_of_one_micro_batch_over_all_devices(mapping):
  for a, b in zip(
    _step_with_batch_norm(mapping, 4), _micro_batches_by_hand(), strict=True
  ):
    _assert_close(a, b, 1e-4)


def test_batch_statistics_of_a_device_are_of_its_micro_batch():
  groups = [
    np.arange(4 * device + m, 4 * device + 4, 2)
    for device in range(8)
    for m in range(2)
  ]
  ours = _step_with_batch_norm('shard_map8', 2, bn_scope='device')
  for a, b in zip(ours, _by_hand(groups), strict=True):
    _assert_close(a, b, 1e-4)


def _compiled(step, state, mesh=None):
  batch = next(_batches())
  mapped = jax.jit(step)
  if mesh is not None:
    mapped = parallel.map_step(step, mesh, batch_axes=(None, 0, None))
  return mapped.lower(state, batch, jax.random.key(7)).compile()


def test_memory_is_that_of_one_micro_batch():
  def temporary_bytes(num_micro_batches):
    create, step = _parts(
      backbone=Network(filters=32, layers=4),
      num_micro_batches=num_micro_batches,
    )
    state = jax.eval_shape(create)
    return _compiled(step, state).memory_analysis().temp_size_in_bytes

  whole, divided = temporary_bytes(1), temporary_bytes(8)
  # The activations that the backward pass needs: 2 views of 32 examples, 4
  # layers of 32 filters.
  assert whole > 2 * 32 * 4 * 32 * 8 * 8 * 4
  assert divided < whole / 3


def _all_reduces(text):
  """Operands of the all-reduces in each computation of a compiled program."""
  found, computation = {}, None
  for line in text.splitlines():
    if line and not line[0].isspace() and line.endswith('{'):
      computation = line.split()[0 if line[0] == '%' else 1]
    called = re.search(r' all-reduce(?:-start)?\(([^)]*)\)', line)
    if called:
      count = called.group(1).count('%')
      found.setdefault(computation, []).append(count)
  return found


def test_gradients_are_summed_over_devices_once():
  small.need_devices(8)
  create, step = _parts(axis_name=parallel.DATA_AXIS, num_micro_batches=4)
  state = jax.eval_shape(create)
  text = _compiled(step, state, parallel.make_mesh()).as_text()
  loops = set(re.findall(r'body=(%[\w.\-]+)', text))
  found = _all_reduces(text)
  assert loops and not loops & set(found)
  # Convolution and two dense layers, each with a bias, and nothing else as big.
  operands = [count for counts in found.values() for count in counts]
  assert len(jax.tree.leaves(state.params)) == 6
  assert [count for count in operands if count > 3] == [6]


@pytest.mark.parametrize('number', [3, 64])
def test_micro_batches_must_divide_the_batch(number):
  create, step = _parts(num_micro_batches=number)
  with pytest.raises(ValueError, match=rf'num_micro_batches .*got {number}'):
    jax.eval_shape(step, create(), next(_batches()), jax.random.key(7))
