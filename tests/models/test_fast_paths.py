"""Scans of steps, blocks and bfloat16 train like the plain program."""

import functools

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from clop_jax import loss
from clop_jax import prototypes
from clop_jax.data import augment
from clop_jax.data import loader
from clop_jax.models import heads
from clop_jax.models import resnet
from clop_jax.runtime import parallel
from tests import small

RECIPE = augment.Recipe(
  size=8,
  mean=(0.5,),
  std=(0.3,),
  crop_area=(0.6, 1.0),
  flip_probability=0.0,
)
EXAMPLES, BATCH = 32, 16
ResNet = functools.partial(
  resnet.ResNet8, width=4, stage_sizes=(1, 1), axis_name=parallel.DATA_AXIS
)


class Dense(nn.Module):
  @nn.compact
  def __call__(self, images, train):
    del train
    x = images.reshape(images.shape[0], -1)
    return nn.relu(nn.Dense(32)(x))


def program(backbone, dtype=jnp.float32):
  """Returns `run(*steps of each dispatch, states=None)`.

  It returns the last state, the losses and the states before each dispatch.
  With `states`, each dispatch starts from its state.
  """
  head = heads.ProjectionHead(
    dim=8, hidden_dim=16, dtype=dtype, axis_name=parallel.DATA_AXIS
  )
  mesh = parallel.make_mesh(jax.devices()[:1])
  rng = np.random.default_rng(0)
  labels = np.arange(EXAMPLES) % 8
  # Coarse patterns, which survive a crop.
  images = rng.integers(0, 256, (EXAMPLES, 2, 2, 1), np.uint8)
  images = images.repeat(4, axis=1).repeat(4, axis=2)
  data = loader.ResidentLoader(
    images, labels, batch_size=BATCH, seed=0, mesh=mesh
  )
  create, step = small.training(
    backbone,
    head,
    learning_rate=0.05,
    recipe=RECIPE,
    contrastive=lambda z, y, axis_name: loss.nt_xent_loss(
      z, axis_name=axis_name
    ),
  )
  initial = prototypes.orthonormal_prototypes(jax.random.key(1), 8, 8)

  def steps(state, resident, batches, key):
    def one(state, batch):
      return step(state, loader.unpack(resident, batch), key)

    if batches['index'].shape[0] > 1:
      return lax.scan(one, state, batches)
    state, metrics = one(state, jax.tree.map(lambda x: x[0], batches))
    return state, jax.tree.map(lambda x: x[None], metrics)

  mapped = parallel.map_step(steps, mesh, batch_axes=(None, None, 1, None))
  key = parallel.replicate(mesh, jax.random.key(2))

  def run(*lengths, states=None):
    current = parallel.replicate(mesh, create(prototypes=np.asarray(initial)))
    ends = np.cumsum(lengths)
    chunks = [range(end - n, end) for end, n in zip(ends, lengths, strict=True)]
    visited, losses = [], []
    for number, batch in enumerate(data.batches(chunks)):
      if states is not None:
        current = parallel.replicate(mesh, states[number])
      visited.append(jax.device_get(current))
      current, metrics = mapped(current, data.resident, batch, key)
      losses.append(metrics['loss'])
    return jax.device_get(current), np.concatenate(losses), visited

  return run


def assert_equal(ours, expected):
  jax.tree.map(np.testing.assert_array_equal, ours[:2], expected[:2])


def test_a_scan_of_steps_equals_single_steps_bit_for_bit():
  run = program(Dense())
  scanned, single = run(4), run(1, 1, 1, 1)
  assert_equal(scanned, single)
  assert np.ptp(scanned[1]) > 0.01  # the steps do something


def test_two_scans_equal_one_bit_for_bit():
  # On a CPU, XLA computes convolutions in a loop with other instructions than
  # outside, so loops are compared with loops.
  run = program(ResNet())
  whole, halves = run(4), run(2, 2)
  assert_equal(whole, halves)
  np.testing.assert_allclose(whole[1], run(1, 1, 1, 1)[1], rtol=1e-4)


def test_bfloat16_losses_stay_within_two_percent_of_float32():
  runs = {
    dtype: program(ResNet(dtype=dtype), dtype)
    for dtype in (jnp.float32, jnp.bfloat16)
  }
  steps = [1] * 8
  _, expected, states = runs[jnp.float32](*steps)
  # From the same parameters at every step.
  _, ours, _ = runs[jnp.bfloat16](*steps, states=states)
  assert not np.array_equal(ours, expected)
  np.testing.assert_allclose(ours, expected, rtol=0.02)


def test_blocks_equal_the_whole_matrix_at_a_real_size():
  z = jax.random.normal(jax.random.key(0), (2, 256, 128))

  def value_and_grad(block_size):
    return jax.jit(
      jax.value_and_grad(
        functools.partial(loss.nt_xent_loss, block_size=block_size)
      )
    )(z)

  (value, gradient), (dense, expected) = map(value_and_grad, (100, None))
  np.testing.assert_allclose(value, dense, rtol=1e-5)
  error = np.linalg.norm(gradient - expected) / np.linalg.norm(expected)
  assert error < 1e-5
