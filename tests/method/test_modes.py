"""Public functions under any of JAX's modes, with any kind of number."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clop_jax import collapse
from clop_jax import loss
from clop_jax import prototypes
from clop_jax import theory
from clop_jax.data import augment
from tests.method import test_lowering_functions as functions

ROWS = [name for name in functions.ROWS if '300' not in name]


@contextlib.contextmanager
def all_modes():
  with (
    jax.numpy_rank_promotion('raise'),
    jax.numpy_dtype_promotion('strict'),
    jax.enable_x64(True),
  ):
    yield


def value_of(argument, seed):
  rng = np.random.default_rng(seed)
  if argument is functions.KEY:
    return jax.random.key(0)
  if jnp.issubdtype(argument.dtype, jnp.integer):
    return rng.integers(-1, functions.CLASSES, argument.shape).astype(np.int32)
  return rng.normal(size=argument.shape).astype(np.float32)


def assert_same(results, expected, rtol=1e-4):
  leaves = jax.tree.leaves_with_path(expected)
  for (path, one), other in zip(leaves, jax.tree.leaves(results), strict=True):
    name = jax.tree_util.keystr(path)
    assert getattr(one, 'dtype', None) == getattr(other, 'dtype', None), name
    np.testing.assert_allclose(
      other, one, rtol=rtol, atol=rtol / 10, err_msg=name
    )


def test_modes_change_no_value_and_no_dtype():
  values = {
    name: [value_of(x, i) for i, x in enumerate(functions.ROWS[name][1])]
    for name in ROWS
  }

  def all_rows(values):
    return {name: functions.ROWS[name][0](*values[name]) for name in ROWS}

  expected = jax.jit(all_rows)(values)
  with all_modes():
    assert_same(jax.jit(all_rows)(values), expected)


def test_gradients_under_shard_map_trace_in_all_modes():
  with all_modes():
    for name in ROWS:
      function, arguments = functions.on_eight_devices(name)
      jax.eval_shape(function, *arguments)


Z, Y, C = (
  value_of(argument, seed)
  for seed, argument in enumerate((functions.Z, functions.Y, functions.C))
)


def of_a_number(x):
  """Every hyper-parameter that may be a traced number."""
  return {
    'clop temperature': loss.clop_loss(
      Z, Y, C, distance='softmax', temperature=x
    ),
    'clop repulsion': loss.clop_loss(Z, Y, C, repulsion=x),
    'nt_xent blocked': loss.nt_xent_loss(Z, temperature=x, block_size=5),
    'supcon': loss.supcon_loss(Z, Y, temperature=x),
    'dcl': loss.dcl_loss(Z, temperature=x),
    'vicreg': loss.vicreg_loss(
      Z, invariance_weight=x, variance_weight=x, covariance_weight=x
    ),
    'barlow_twins': loss.barlow_twins_loss(Z, redundancy_weight=x),
    'w_mse': loss.w_mse_loss(Z, epsilon=x),
    'alignment and uniformity': loss.alignment_uniformity_loss(
      Z, alignment_weight=x, uniformity_weight=x, alpha=x, t=x
    ),
    'spectral': loss.spectral_contrastive_loss(Z, mu=x),
    'sigmoid': loss.sigmoid_loss(Z, temperature=x, bias=x),
    'pseudo_labels': prototypes.pseudo_labels(
      Z, Y, C, threshold=x, temperature=x
    ),
    'alignment': collapse.alignment(Z, alpha=x),
    'uniformity': collapse.uniformity(Z, t=x),
    'cosine_distance': theory.cosine_distance(C[0], 0, C, repulsion=x),
    'softmax_distance': theory.softmax_distance(C[0], 0, C, temperature=x),
  }


def test_numbers_of_every_kind_give_the_same():
  expected = jax.jit(lambda: of_a_number(0.5))()
  with all_modes():
    for kind in (np.float32, np.float64, np.array, jnp.float32):
      results = jax.jit(lambda kind=kind: of_a_number(kind(0.5)))()
      assert_same(results, expected)
    assert_same(jax.jit(of_a_number)(0.5), expected)


PICTURE = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
STARTS = np.random.default_rng(3).normal(size=(1, 2, 6, 8)).astype(np.float32)


def simulated(model, **keywords):
  rates = np.array([1.0, 2.0], np.float32)
  return lambda: theory.simulate(model, rates, STARTS, steps=5, **keywords)


def view():
  recipe = augment.Recipe(
    size=8,
    mean=(0.5,) * 3,
    std=(0.2,) * 3,
    interpolation='bicubic',
    blur_probability=0.5,
    solarize_probability=0.5,
    randaugment_layers=1,
    randaugment_magnitude=9.0,
  )
  return augment.view(jax.random.key(0), jnp.asarray(PICTURE), recipe)


CALLS = {
  'simulated': simulated(
    'repulsion', prototypes=np.eye(6, 8, dtype=np.float32), clop_weight=0.5
  ),
  'simulated infonce': simulated('infonce', correlation=0.5),
  'mean cosine': lambda: theory.mean_pairwise_cosine(jnp.asarray(STARTS[0])),
  'critical': lambda: theory.critical_learning_rate('repulsion', 6, 8),
  'bisected': lambda: theory.bisect_critical_learning_rate(
    'repulsion', 4, 6, steps=5
  ),
  'view': view,
  'whole image': lambda: augment.whole(
    jnp.asarray(PICTURE)[None], size=8, mean=(0.5,) * 3, std=(0.2,) * 3
  ),
}


@pytest.mark.parametrize('name', CALLS)
def test_modes_do_not_change_theory_and_augmentation(name):
  expected = CALLS[name]()
  with all_modes():
    assert_same(CALLS[name](), expected, rtol=1e-3)


def of_labels(z, labels):
  many = np.concatenate([C, np.ones((195, functions.DIM))])
  return {
    'supcon': loss.supcon_loss(z, labels),
    'clop': loss.clop_loss(z, labels, many),
    'prototype_cosine': collapse.prototype_cosine(z[0], labels, many),
    'pseudo_labels': prototypes.pseudo_labels(z, labels, many, threshold=0.2),
  }


@pytest.mark.parametrize('kind', [list, np.int8, np.uint8, np.int64, jnp.int8])
def test_labels_of_every_integer_kind_give_the_same(kind):
  ids = np.array([0, 1, 2, 3, 5 if kind is np.uint8 else -1, 5])
  labels = list(ids) if kind is list else kind(ids)
  z = Z[:, :6]
  expected = jax.jit(of_labels)(z, ids.astype(np.int32))
  assert_same(jax.jit(lambda z: of_labels(z, labels))(z), expected)
  if kind is not list:
    assert_same(jax.jit(of_labels)(z, labels), expected)


def test_labels_of_64_bits_do_not_wrap_around():
  ids = np.array([0, 2**32, 2**33, 2**34, 2**32, -(2**40)])
  supcon = jax.jit(lambda y: loss.supcon_loss(Z[:, :6], y))
  expected = supcon(np.array([0, 1, 2, 3, 1, -1]))
  known = jax.jit(lambda: loss.supcon_loss(Z[:, :6], ids))()
  np.testing.assert_array_equal(known, expected)
  with jax.enable_x64(True):
    traced = supcon(ids)
    beyond = jax.jit(lambda y: loss.clop_loss(Z[:, :6], y, C))(ids)
  np.testing.assert_allclose(traced, expected, rtol=1e-6)
  assert np.isnan(beyond)
