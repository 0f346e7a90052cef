"""What makes training fast changes no number, or as little as it says."""

import functools

from flax import linen as nn
import jax
from jax import lax
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
from tests import small

RECIPE = augment.Recipe(
  size=8,
  mean=(0.5,),
  std=(0.3,),
  crop_area=(0.6, 1.0),
  flip_probability=0.0,
)
EXAMPLES, BATCH = 64, 32


class Dense(nn.Module):
  """A backbone without convolutions."""

  @nn.compact
  def __call__(self, images, train):
    del train
    x = images.reshape(images.shape[0], -1)
    return nn.relu(nn.Dense(32)(x))


def program(backbone, dtype=jnp.float32):
  """What trains: `run(steps of each dispatch) -> last state, losses, states`.

  `states` are those before each dispatch; given, they are where it starts.
  """
  head = heads.ProjectionHead(
    dim=8, hidden_dim=16, dtype=dtype, axis_name=parallel.DATA_AXIS
  )
  mesh = parallel.make_mesh(jax.devices()[:1])
  rng = np.random.default_rng(0)
  labels = np.arange(EXAMPLES) % 10
  # Coarse patterns, which a crop leaves alike.
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
  made = np.asarray(prototypes.orthonormal_prototypes(jax.random.key(1), 8, 8))

  def steps(state, kept, batches, key):
    def one(state, batch):
      examples = loader.unpack(kept, batch)
      labels = examples['label']
      examples['label'] = jnp.where(labels < 8, labels, -1)
      return step(state, examples, key)

    if batches['index'].shape[0] > 1:
      return lax.scan(one, state, batches)
    state, metrics = one(state, jax.tree.map(lambda x: x[0], batches))
    return state, jax.tree.map(lambda x: x[None], metrics)

  mapped = parallel.map_step(steps, mesh, batch_axes=(None, None, 1, None))
  key = parallel.replicate(mesh, jax.random.key(2))

  def run(*lengths, states=None):
    current = parallel.replicate(mesh, create(prototypes=made))
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


def test_a_scan_of_steps_is_these_steps_bit_for_bit():
  run = program(Dense())
  scanned, single = run(4), run(1, 1, 1, 1)
  assert_equal(scanned, single)
  assert np.ptp(scanned[1]) > 0.01  # the steps do something


def test_where_a_scan_is_cut_changes_nothing_bit_for_bit():
  # XLA computes convolutions in a loop with other instructions than outside on
  # a CPU, so the loops are compared with one another here.
  run = program(resnet.ResNet8(width_multiplier=0.25, axis_name='data'))
  whole, cut = run(6), run(3, 3)
  assert_equal(whole, cut)
  single = run(*[1] * 6)
  np.testing.assert_allclose(whole[1], single[1], rtol=1e-4)


def test_bfloat16_stays_within_two_percent_of_float32_over_fifty_steps():
  runs = {}
  for dtype in (jnp.float32, jnp.bfloat16):
    backbone = resnet.ResNet8(axis_name='data', dtype=dtype)
    runs[dtype] = program(backbone, dtype)
  single = [1] * 50
  _, expected, states = runs[jnp.float32](*single)
  assert expected[-10:].mean() < 0.9 * expected[:10].mean()
  # Of the same parameters, at every step.
  _, ours, _ = runs[jnp.bfloat16](*single, states=states)
  assert not np.array_equal(ours, expected)
  np.testing.assert_allclose(ours, expected, rtol=0.02)
  # And of the parameters that it comes to itself, in the mean: single steps of
  # two runs that round differently part, how well they train does not.
  _, ours, _ = runs[jnp.bfloat16](*single)
  np.testing.assert_allclose(ours.mean(), expected.mean(), rtol=0.02)


@pytest.mark.parametrize('block_size', [64, 100])
def test_blocks_equal_the_whole_matrix_at_a_real_size(block_size):
  z = jax.random.normal(jax.random.key(0), (2, 256, 128))

  def value_and_grad(block_size):
    return jax.value_and_grad(
      functools.partial(loss.nt_xent_loss, block_size=block_size)
    )(z)

  (value, gradient), (dense, expected) = map(value_and_grad, (block_size, None))
  np.testing.assert_allclose(value, dense, rtol=1e-5)
  error = np.linalg.norm(gradient - expected) / np.linalg.norm(expected)
  assert error < 1e-5
