import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clop_jax.training import gpu_updates

WIDTH = gpu_updates._ROW_WIDTH


def tree_of(sizes, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.normal(size=size).astype(np.float32) for size in sizes]


@pytest.mark.parametrize(
  'sizes',
  [
    [()],
    [(), (3,), (2, 5), (3, 3, 2, 4)],
    [(WIDTH,), (WIDTH - 1,), (WIDTH + 1,), (3, WIDTH), (7,)],
    [(3, 3, i + 1, 4) for i in range(2 * gpu_updates._LEAVES_PER_KERNEL + 1)],
  ],
)
def test_leaf_norms_are_those_of_the_single_leaves(sizes):
  leaves = tree_of(sizes)
  expected = [np.sqrt((x.astype(np.float64) ** 2).sum()) for x in leaves]
  got = jax.jit(gpu_updates.leaf_norms)(leaves)
  np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_leaf_norm_that_is_not_finite_stays_with_its_leaf():
  leaves = [np.ones(3), np.array([1, np.nan]), np.array([np.inf]), np.zeros(2)]
  got = gpu_updates.leaf_norms([x.astype(np.float32) for x in leaves])
  np.testing.assert_allclose(got, [3**0.5, np.nan, np.inf, 0], rtol=1e-6)


def test_flat_leaves_keep_the_shapes_of_updates_and_state():
  params = tree_of([(3, 4), (5,), ()])
  tx = gpu_updates.on_flat_leaves(optax.adam(0.1))
  state = tx.init(params)
  updates, new_state = jax.jit(tx.update)(params, state)
  shapes = jax.tree.map(jnp.shape, (params, state))
  assert jax.tree.map(jnp.shape, (updates, new_state)) == shapes


def test_trust_ratio_of_a_tree_without_leaves_is_nothing():
  tx = gpu_updates.scale_by_trust_ratio(0.001)
  updates, _ = tx.update({}, tx.init({}), {})
  assert updates == {}


def test_global_norms_are_those_of_optax():
  trees = [tree_of([3, 5000]), tree_of([1], seed=1), tree_of([7] * 90, seed=2)]
  expected = [optax.tree.norm(tree) for tree in trees]
  np.testing.assert_allclose(
    gpu_updates.global_norms(trees), expected, rtol=1e-6
  )
