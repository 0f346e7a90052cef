import jax
import numpy as np
import pytest

from clop_jax.experiment import build
from clop_jax.experiment import components
from clop_jax.runtime import parallel
from clop_jax.training import train_state
from tests import small

BATCH = {
  'image': jax.ShapeDtypeStruct((8, 8, 8, 1), np.uint8),
  'label': jax.ShapeDtypeStruct((8,), np.int32),
  'index': jax.ShapeDtypeStruct((8,), np.int32),
}


def built(**changes):
  config = small.digits_config('unused', **changes)
  return config, build.build(config, total_steps=10, steps_per_epoch=5)


def program(**changes):
  """Returns the lowered text of a step on one device."""
  config, run = built(**changes)
  numbers = jax.tree.map(np.float32, build.numbers_of(config))
  state = jax.eval_shape(run.create_state)
  mesh = jax.make_mesh((1,), ('data',), (jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec
  step = jax.shard_map(
    run.step, mesh=mesh, in_specs=spec(), out_specs=spec(), check_vma=False
  )
  lowered = jax.jit(step).lower(state, BATCH, jax.random.key(0), numbers)
  return lowered.as_text()


def test_numbers_and_seed_do_not_change_the_program():
  one = program()
  other = {'optimizer__learning_rate': 7.0, 'loss__clop_weight': 0.0, 'seed': 5}
  assert program(**other) == one
  assert program(loss__temperature=0.1) != one


def test_clop_begins_after_clop_after_epochs():
  _, run = built(loss__clop_after_epochs=1, loss__clop_weight=3.0)
  rng = np.random.default_rng(0)
  batch = {
    'image': rng.integers(0, 256, (8, 8, 8, 1), np.uint8),
    'label': np.arange(8) % 10,
    'index': np.arange(8),
  }
  mesh = jax.make_mesh((1,), ('data',), (jax.sharding.AxisType.Auto,))
  step = parallel.map_step(run.step, mesh, batch_axes=(None, 0, None))
  for number, weight in (4, 0.0), (5, 3.0):
    state = jax.jit(run.create_state)().replace(step=jax.numpy.array(number))
    _, metrics = step(state, batch, jax.random.key(0))
    of_clop = metrics['loss'] - metrics['contrastive_loss']
    assert metrics['clop_loss'] > 0.1
    np.testing.assert_allclose(of_clop, weight * metrics['clop_loss'], 1e-5)


def test_key_argument_replaces_the_seed():
  _, run = built()
  _, other = built(seed=5)
  own = jax.jit(run.create_state)()
  given = jax.jit(run.create_state)(jax.random.key(5))
  expected = jax.jit(other.create_state)()
  assert isinstance(given, train_state.TrainState)
  jax.tree.map(np.testing.assert_array_equal, given, expected)
  assert np.abs(own.prototypes - given.prototypes).max() > 0.1


@pytest.mark.parametrize(
  ('given', 'in_blocks'), [(None, True), (4096, False), (64, True)]
)
def test_large_similarity_matrix_is_computed_in_blocks(given, in_blocks):
  config, _ = built(loss__block_size=given)
  contrastive = components.contrastive_loss(config, platform='cpu')
  z = jax.ShapeDtypeStruct((2, 1024, 16), np.float32)
  program = str(
    jax.make_jaxpr(lambda z: contrastive(z, None, axis_name=None))(z)
  )
  assert ('scan[' in program) == in_blocks
  assert ('f32[2048,2048]' in program) != in_blocks
