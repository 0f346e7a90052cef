"""The losses on several devices, with a different number of labels on each."""

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


def supcon(**keywords):
  return functools.partial(loss.supcon_loss, **keywords)


LOSSES = {
  'clop': of_prototypes(),
  'clop weighted': of_prototypes(
    distance='euclidean', class_weights=jnp.arange(1.0, 6.0)
  ),
  'clop softmax': of_prototypes(distance='softmax'),
  'nt_xent': unlabelled(loss.nt_xent_loss),
  # 48 embeddings: no size divides the rows of a device, and 3 is less than one
  # row for each of 8 devices.
  'nt_xent blocks of 3': unlabelled(loss.nt_xent_loss, block_size=3),
  'nt_xent blocks of 47': unlabelled(loss.nt_xent_loss, block_size=47),
  'supcon out': supcon(),
  'supcon out blocked': supcon(block_size=31),
  'supcon in': supcon(variant='in'),
  'supcon in blocked': supcon(variant='in', block_size=31),
  'dcl': unlabelled(loss.dcl_loss),
  'vicreg': unlabelled(loss.vicreg_loss),
  'barlow_twins': unlabelled(loss.barlow_twins_loss),
  'w_mse': unlabelled(loss.w_mse_loss),
  'invariance': unlabelled(loss.invariance_loss),
  'alignment and uniformity': unlabelled(loss.alignment_uniformity_loss),
  'spectral': unlabelled(loss.spectral_contrastive_loss),
  'cross_entropy': loss.cross_entropy_loss,
  'sigmoid': unlabelled(loss.sigmoid_loss),
}


def problem(labels):
  """Parameters, inputs `[2, 24, 4]` and labels `[24]`."""
  rng = np.random.default_rng(0)
  w = rng.normal(size=(4, DIM)).astype(np.float32)
  x = rng.normal(size=(2, DEVICES * LOCAL_BATCH, 4)).astype(np.float32)
  y = rng.integers(0, 5, size=(DEVICES, LOCAL_BATCH)).astype(np.int32)
  for device, count in enumerate([3, 2, 1, 0, 0, 1, 0, 2]):
    y[device, 0 if labels == 'none' else count :] = -1
  return w, x, y.ravel()


def loss_of(name, axis_name):
  return lambda w, x, y: LOSSES[name](jnp.tanh(x @ w), y, axis_name=axis_name)


def all_losses(axis_name):
  """A function to every loss and its gradient: one program to compile."""
  functions = {name: loss_of(name, axis_name) for name in LOSSES}

  def run(w, x, y):
    return {
      name: jax.value_and_grad(function)(w, x, y)
      for name, function in functions.items()
    }

  return run


@functools.cache
def on_one_device():
  return jax.jit(all_losses(None))


def assert_same(results, labels):
  for name, expected in on_one_device()(*problem(labels)).items():
    value, gradient = results[name]
    np.testing.assert_allclose(
      value, expected[0], rtol=1e-5, atol=1e-6, err_msg=name
    )
    scale = max(1e-3, float(np.abs(expected[1]).max()))
    np.testing.assert_allclose(
      gradient, expected[1], atol=1e-5 * scale, err_msg=name
    )


@functools.cache
def shard_map(devices):
  mapped = jax.shard_map(
    all_losses(AXIS),
    mesh=parallel.make_mesh(jax.devices()[:devices]),
    in_specs=(P(), P(None, AXIS), P(AXIS)),
    out_specs=P(),
    check_vma=True,
  )
  return jax.jit(mapped)


@functools.cache
def pmap():
  def step(w, x, y):
    return {
      name: (value, jax.lax.pmean(gradient, AXIS))
      for name, (value, gradient) in all_losses(AXIS)(w, x, y).items()
    }

  return jax.pmap(step, axis_name=AXIS, in_axes=(None, 0, 0))


@pytest.mark.parametrize('labels', ['unequal', 'none'])
@pytest.mark.parametrize('devices', [2, 8])
def test_shard_map_gives_the_single_device_losses_and_gradients(
  devices, labels
):
  assert_same(shard_map(devices)(*problem(labels)), labels)


@pytest.mark.parametrize('labels', ['unequal', 'none'])
def test_pmap_with_averaged_gradients_gives_the_same(labels):
  w, x, y = problem(labels)
  x = x.reshape(2, DEVICES, LOCAL_BATCH, 4).swapaxes(0, 1)
  results = jax.device_get(pmap()(w, x, y.reshape(DEVICES, LOCAL_BATCH)))
  for device in range(DEVICES):
    one = jax.tree.map(lambda leaf, device=device: leaf[device], results)
    assert_same(one, labels)


def test_a_global_array_under_plain_jit_gives_the_same():
  w, x, y = problem('unequal')
  sharding = jax.sharding.NamedSharding(parallel.make_mesh(), P(None, AXIS))
  x = jax.device_put(x, sharding)
  assert_same(jax.jit(all_losses(None))(w, x, y), 'unequal')


def compile_supcon(devices, batch, block_size, *, dim):
  """Compiles SupCon and its gradient without arrays."""
  function = functools.partial(
    loss.supcon_loss, block_size=block_size, axis_name=AXIS
  )
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


def test_with_more_devices_only_the_gathered_arrays_grow():
  local_batch, dim, block_size = 40, 4, 110
  local_rows = 2 * local_batch
  temporaries, gathered = {}, {}
  for devices in (2, 4, 8):
    compiled = compile_supcon(
      devices, local_batch * devices, block_size, dim=dim
    )
    text = compiled.as_text()
    # The gathered arrays of this problem are smaller than a block.
    largest = max(elements for elements, _ in hlo.array_sizes(text))
    assert largest <= local_rows * block_size
    assert largest > local_rows * block_size * 0.9  # the block itself
    # All communication is outside the loop over blocks.
    collectives = hlo.collectives(text)
    assert all(c.times == 1 for c in collectives)
    assert hlo.payload(collectives, 'all-gather') == 4 * devices * (
      local_rows * dim + local_batch
    )
    temporaries[devices] = compiled.memory_analysis().temp_size_in_bytes
    # Embeddings, their gradient, and a block's part of it; ids and labels.
    gathered[devices] = 4 * devices * local_rows * (3 * dim + 4)
  for devices in (2, 4):
    growth = temporaries[2 * devices] - temporaries[devices]
    assert growth <= gathered[2 * devices] - gathered[devices]
  # Guards the sums above: a block more or less would show.
  assert gathered[8] - gathered[4] < 4 * local_rows * block_size


def test_a_mean_of_local_means_would_be_seen():
  # With these labels the wrong reduction differs.
  w, x, y = problem('unequal')
  local = []
  for start in range(0, y.size, LOCAL_BATCH):
    part = slice(start, start + LOCAL_BATCH)
    local.append(loss_of('clop', None)(w, x[:, part], y[part]))
  right = loss_of('clop', None)(w, x, y)
  assert abs(np.mean(local) - right) > 0.1
