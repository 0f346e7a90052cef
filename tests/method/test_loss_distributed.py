"""Every loss on eight devices against one, with unequal labels per device."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from clop_jax import loss
from clop_jax.runtime import hlo
from clop_jax.runtime import parallel

AXIS = parallel.DATA_AXIS
DEVICES = 8
LOCAL_BATCH = 3
DIM = 6
PROTOTYPES = np.linalg.qr(np.random.default_rng(3).normal(size=(DIM, 5)))[0].T


def of_prototypes(**keywords):
  prototypes = jnp.asarray(PROTOTYPES, jnp.float32)
  return functools.partial(loss.clop_loss, prototypes=prototypes, **keywords)


def unlabelled(function, **keywords):
  return lambda z, y, axis_name: function(z, axis_name=axis_name, **keywords)


LOSSES = {
  'clop': of_prototypes(),
  'clop weighted': of_prototypes(
    distance='euclidean', class_weights=jnp.arange(1.0, 6.0)
  ),
  'clop softmax': of_prototypes(distance='softmax'),
  'nt_xent': unlabelled(loss.nt_xent_loss),
  'nt_xent blocked': unlabelled(loss.nt_xent_loss, block_size=4),
  'supcon out': loss.supcon_loss,
  'supcon in': functools.partial(loss.supcon_loss, variant='in'),
  'supcon blocked': functools.partial(loss.supcon_loss, block_size=4),
  'dcl': unlabelled(loss.dcl_loss),
  'vicreg': unlabelled(loss.vicreg_loss),
  'barlow_twins': unlabelled(loss.barlow_twins_loss),
}


def problem(labels):
  """Parameters, inputs `[2, 24, 4]` and labels `[24]`."""
  rng = np.random.default_rng(0)
  w = rng.normal(size=(4, DIM)).astype(np.float32)
  x = rng.normal(size=(2, DEVICES * LOCAL_BATCH, 4)).astype(np.float32)
  if labels == 'none':
    y = np.full(DEVICES * LOCAL_BATCH, -1, np.int32)
  else:
    # 3, 2, 1, 0, 0, 1, 0 and 2 labelled examples.
    kept = [3, 2, 1, 0, 0, 1, 0, 2]
    y = rng.integers(0, 5, size=(DEVICES, LOCAL_BATCH)).astype(np.int32)
    for device, count in enumerate(kept):
      y[device, count:] = -1
    y = y.ravel()
  return w, x, y


def loss_of(name, axis_name):
  def function(w, x, y):
    return LOSSES[name](jnp.tanh(x @ w), y, axis_name=axis_name)

  return function


# Without labels the losses that do not take them are the same.
CASES = [(name, 'unequal') for name in LOSSES] + [
  (name, 'none') for name in LOSSES if name.startswith(('clop', 'supcon'))
]


@functools.cache
def expected_of(name, labels):
  return jax.value_and_grad(loss_of(name, None))(*problem(labels))


def assert_same(value, gradient, expected):
  np.testing.assert_allclose(value, expected[0], rtol=1e-5, atol=1e-6)
  scale = max(1e-3, float(np.abs(expected[1]).max()))
  np.testing.assert_allclose(gradient, expected[1], atol=1e-5 * scale)


def mapped_gradient(function, devices=None):
  """Value and gradient of a function of weights, inputs and labels."""
  mapped = jax.shard_map(
    jax.value_and_grad(function),
    mesh=parallel.make_mesh(devices),
    in_specs=(P(), P(None, AXIS), P(AXIS)),
    out_specs=(P(), P()),
    check_vma=True,
  )
  return jax.jit(mapped)


@pytest.mark.parametrize(('name', 'labels'), CASES)
def test_shard_map_gives_the_single_device_loss_and_gradient(name, labels):
  mapped = mapped_gradient(loss_of(name, AXIS))
  assert_same(*mapped(*problem(labels)), expected_of(name, labels))


@pytest.mark.parametrize(('name', 'labels'), CASES)
def test_pmap_with_averaged_gradients_gives_the_same(name, labels):
  w, x, y = problem(labels)

  def step(w, x, y):
    value, gradient = jax.value_and_grad(loss_of(name, AXIS))(w, x, y)
    return value, jax.lax.pmean(gradient, AXIS)

  x = x.reshape(2, DEVICES, LOCAL_BATCH, 4).swapaxes(0, 1)
  values, gradients = jax.pmap(step, axis_name=AXIS, in_axes=(None, 0, 0))(
    w, x, y.reshape(DEVICES, LOCAL_BATCH)
  )
  for value, gradient in zip(values, gradients, strict=True):
    assert_same(value, gradient, expected_of(name, labels))


def test_a_global_array_under_plain_jit_gives_the_same():
  w, x, y = problem('unequal')
  sharding = jax.sharding.NamedSharding(parallel.make_mesh(), P(None, AXIS))
  function = jax.jit(jax.value_and_grad(loss_of('supcon out', None)))
  value, gradient = function(w, jax.device_put(x, sharding), y)
  assert_same(value, gradient, expected_of('supcon out', 'unequal'))


@pytest.mark.parametrize(
  ('name', 'devices', 'block_size'),
  [
    # 80 embeddings: none of the blocks fits a whole number of times.
    *((name, n, 27) for name in ('out', 'in', None) for n in (1, 2, 4, 8)),
    (None, 8, 3),  # less than a row for each device
    (None, 8, 79),
  ],
)
def test_blocks_of_odd_sizes_give_the_dense_loss_and_gradient(
  name, devices, block_size
):
  rng = np.random.default_rng(1)
  w = rng.normal(size=(4, DIM)).astype(np.float32)
  x = rng.normal(size=(2, 40, 4)).astype(np.float32)
  y = rng.integers(-1, 5, size=40).astype(np.int32)

  def function(w, x, y, **keywords):
    if name is None:
      return loss.nt_xent_loss(jnp.tanh(x @ w), **keywords)
    return loss.supcon_loss(jnp.tanh(x @ w), y, variant=name, **keywords)

  expected = jax.value_and_grad(function)(w, x, y)
  blocked = functools.partial(function, block_size=block_size, axis_name=AXIS)
  mapped = mapped_gradient(blocked, jax.devices()[:devices])
  assert_same(*mapped(w, x, y), expected)


def compile_loss(devices, batch, block_size, *, labelled, dim):
  """Value and gradient of NT-Xent or SupCon, for arrays that do not exist."""

  def function(z, y):
    keywords = {'block_size': block_size, 'axis_name': AXIS}
    if labelled:
      return loss.supcon_loss(z, y, **keywords)
    return loss.nt_xent_loss(z, **keywords)

  mapped = jax.shard_map(
    jax.value_and_grad(function),
    mesh=parallel.make_mesh(jax.devices()[:devices]),
    in_specs=(P(None, AXIS), P(AXIS)),
    out_specs=(P(), P(None, AXIS)),
    check_vma=True,
  )
  z = jax.ShapeDtypeStruct((2, batch, dim), jnp.float32)
  y = jax.ShapeDtypeStruct((batch,), jnp.int32)
  return jax.jit(mapped).lower(z, y).compile()


@pytest.mark.parametrize('labelled', [False, True])
def test_with_more_devices_only_the_gathered_arrays_grow(labelled):
  local_batch, dim, block_size = 40, 4, 110
  local_rows = 2 * local_batch
  temporaries, gathered = {}, {}
  for devices in (2, 4, 8):
    compiled = compile_loss(
      devices,
      local_batch * devices,
      block_size,
      labelled=labelled,
      dim=dim,
    )
    text = compiled.as_text()
    # The gathered arrays of this problem are smaller than a block.
    largest = max(elements for elements, _ in hlo.array_sizes(text))
    assert largest <= local_rows * block_size
    assert largest > local_rows * block_size * 0.9  # the block itself
    # All that is communicated stands outside the loop over blocks.
    found = hlo.collectives(text)
    assert all(c.times == 1 for c in found)
    assert hlo.payload(found, 'all-gather') == 4 * devices * (
      local_rows * dim + (local_batch if labelled else 0)
    )
    temporaries[devices] = compiled.memory_analysis().temp_size_in_bytes
    # Embeddings, their gradient, and a block's part of it; ids and labels.
    gathered[devices] = 4 * devices * local_rows * (3 * dim + 4)
  for devices in (2, 4):
    growth = temporaries[2 * devices] - temporaries[devices]
    assert growth <= gathered[2 * devices] - gathered[devices]
  # Guards the sums above: a block more or less would be seen.
  assert gathered[8] - gathered[4] < 4 * local_rows * block_size


def test_a_mean_of_local_means_would_be_seen():
  # Guards the tests above: with these labels the wrong reduction differs.
  w, x, y = problem('unequal')
  local = []
  for start in range(0, y.size, LOCAL_BATCH):
    part = slice(start, start + LOCAL_BATCH)
    local.append(loss_of('clop', None)(w, x[:, part], y[part]))
  right = loss_of('clop', None)(w, x, y)
  assert abs(np.mean(local) - right) > 0.1
