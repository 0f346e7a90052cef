"""Public functions in other people's JAX programs: modes, and kinds of numbers.

A user may have set any of JAX's modes, and pass Python, NumPy or JAX scalars.
"""

import contextlib
import functools

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

MODES = {
  'rank promotion': lambda: jax.numpy_rank_promotion('raise'),
  'dtype promotion': lambda: jax.numpy_dtype_promotion('strict'),
  'x64': lambda: jax.enable_x64(True),
}


def value_of(argument, seed):
  rng = np.random.default_rng(seed)
  if argument is functions.KEY:
    return jax.random.key(0)
  if jnp.issubdtype(argument.dtype, jnp.integer):
    return rng.integers(-1, functions.CLASSES, argument.shape).astype(np.int32)
  x = rng.normal(size=argument.shape).astype(np.float32)
  # A symmetric matrix, for `eigh`.
  return x @ x.T if argument.shape in ((12, 12), (300, 300)) else x


@functools.cache
def case(name):
  """A function, its arguments, and what it gives in no mode."""
  function, arguments = functions.ROWS[name]
  values = [value_of(argument, i) for i, argument in enumerate(arguments)]
  return function, values, jax.jit(function)(*values)


@pytest.mark.parametrize('name', [x for x in functions.ROWS if '300' not in x])
def test_modes_change_no_value_and_no_type(name):
  function, values, expected = case(name)
  with contextlib.ExitStack() as stack:
    for mode in MODES.values():
      stack.enter_context(mode())
    got = jax.jit(function)(*values)
    plain = function(*values)
  assert got.dtype == plain.dtype == expected.dtype
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(plain, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', functions.ROWS)
def test_every_transformation_traces_in_every_mode(name, mode):
  function, arguments = functions.ROWS[name]
  with MODES[mode]():
    result = jax.eval_shape(function, *arguments)
    assert result.dtype in (jnp.float32, jnp.int32)
    jax.eval_shape(jax.vmap(function), *map(functions.batched, arguments))
    jax.eval_shape(functions.value_and_gradient(name), *arguments)
    mapped, shapes = functions.on_eight_devices(function, arguments)
    jax.eval_shape(mapped, *shapes)


Z, Y, C = (
  value_of(argument, seed)
  for seed, argument in enumerate((functions.Z, functions.Y, functions.C))
)
# Name: a function of one number, and the number.
OF_A_NUMBER = {
  'clop temperature': (
    lambda x: loss.clop_loss(Z, Y, C, distance='softmax', temperature=x),
    0.5,
  ),
  'clop repulsion': (lambda x: loss.clop_loss(Z, Y, C, repulsion=x), 0.5),
  'nt_xent': (lambda x: loss.nt_xent_loss(Z, temperature=x), 0.5),
  'nt_xent blocked': (
    lambda x: loss.nt_xent_loss(Z, temperature=x, block_size=5),
    0.5,
  ),
  'supcon': (lambda x: loss.supcon_loss(Z, Y, temperature=x), 0.5),
  'dcl': (lambda x: loss.dcl_loss(Z, temperature=x), 0.5),
  'vicreg invariance': (lambda x: loss.vicreg_loss(Z, invariance_weight=x), 3),
  'vicreg variance': (lambda x: loss.vicreg_loss(Z, variance_weight=x), 3),
  'vicreg covariance': (lambda x: loss.vicreg_loss(Z, covariance_weight=x), 3),
  'barlow': (lambda x: loss.barlow_twins_loss(Z, redundancy_weight=x), 0.25),
  'pseudo threshold': (
    lambda x: prototypes.pseudo_labels(Z, Y, C, threshold=x),
    0.5,
  ),
  'pseudo temperature': (
    lambda x: prototypes.pseudo_labels(Z, Y, C, threshold=0.9, temperature=x),
    0.5,
  ),
  'alignment': (lambda x: collapse.alignment(Z, alpha=x), 1.5),
  'uniformity': (lambda x: collapse.uniformity(Z, t=x), 1.5),
  'theory repulsion': (
    lambda x: theory.cosine_distance(C[0], 0, C, repulsion=x),
    0.5,
  ),
  'theory temperature': (
    lambda x: theory.softmax_distance(C[0], 0, C, temperature=x),
    0.5,
  ),
}


@pytest.mark.parametrize('name', OF_A_NUMBER)
def test_numbers_of_every_kind_are_one_number(name):
  function, number = OF_A_NUMBER[name]
  expected = function(number)
  with jax.numpy_rank_promotion('raise'), jax.enable_x64(True):
    for kind in (np.float32, np.float64, np.array, jnp.float32, jnp.array):
      got = function(kind(number))
      assert got.dtype == expected.dtype
      np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    traced = jax.jit(function)(number)
    assert traced.dtype == expected.dtype
    np.testing.assert_allclose(traced, expected, rtol=1e-5, atol=1e-6)
    with jax.numpy_dtype_promotion('strict'):
      function(np.float64(number))


PICTURE = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
RECIPE = {
  'mean': (0.5,) * 3,
  'std': (0.2,) * 3,
  'blur_probability': 0.5,
  'solarize_probability': 0.5,
  'randaugment_layers': 2,
  'randaugment_magnitude': 9.0,
}
STARTS = value_of(jax.ShapeDtypeStruct((1, 2, 6, 8), jnp.float32), 3)
RATES = np.array([1.0, 2.0], np.float32)


def simulated(model, **keywords):
  return lambda: theory.simulate(model, RATES, STARTS, steps=5, **keywords)


def view(**keywords):
  return lambda: augment.view(
    jax.random.key(0),
    jnp.asarray(PICTURE),
    augment.Recipe(**RECIPE, **keywords),
  )


# Calls of the theory and of the augmentation, which has no gradient.
CALLS = {
  'repulsion': simulated(
    'repulsion', prototypes=np.eye(6, 8, dtype=np.float32), clop_weight=0.5
  ),
  'infonce': simulated('infonce'),
  'row_softmax': simulated('row_softmax', correlation=0.5),
  'tangent': simulated('tangent'),
  'mean cosine': lambda: theory.mean_pairwise_cosine(jnp.asarray(STARTS[0])),
  'critical': lambda: theory.critical_learning_rate('repulsion', 6, 8),
  'bisected': lambda: theory.bisect_critical_learning_rate('repulsion', 4, 6),
  'smaller view': view(size=8),
  'larger view': view(size=16),
  'bicubic view': view(size=8, interpolation='bicubic'),
  'whole image': lambda: augment.whole(
    jnp.asarray(PICTURE)[None], size=8, mean=(0.5,) * 3, std=(0.2,) * 3
  ),
}


@pytest.mark.parametrize('name', CALLS)
def test_modes_do_not_matter_to_theory_and_augmentation(name):
  expected = jax.tree.leaves(CALLS[name]())
  for mode in MODES.values():
    with mode():
      got = jax.tree.leaves(CALLS[name]())
    for one, other in zip(got, expected, strict=True):
      assert getattr(one, 'dtype', None) == getattr(other, 'dtype', None)
      np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


# A wrong number, label or array: the function, and what the error must name.
WRONG = [
  (lambda: loss.nt_xent_loss(Z, temperature=0), 'temperature.* 0'),
  (lambda: loss.nt_xent_loss(Z, temperature=np.nan), 'temperature.*nan'),
  (lambda: loss.nt_xent_loss(Z, temperature='1'), 'temperature.* 1'),
  (lambda: loss.nt_xent_loss(Z, temperature=np.ones(2)), 'temperature'),
  (lambda: loss.nt_xent_loss(Z, block_size=0), 'block_size.* 0'),
  (lambda: loss.nt_xent_loss(Z, block_size=2.5), r'block_size.*2\.5'),
  (lambda: loss.nt_xent_loss([['xyz']]), 'embeddings'),
  (lambda: loss.vicreg_loss(Z, variance_weight=np.inf), 'variance_weight.*inf'),
  (lambda: loss.clop_loss(Z, Y, C, repulsion=-1), 'repulsion.*-1'),
  (lambda: loss.clop_loss(Z, Y, 'c'), 'prototypes'),
  (lambda: loss.clop_loss(Z, Y, C[:, :3]), 'prototypes'),
  (lambda: loss.clop_loss(Z, list('abcdefghijklmnop'), C), 'labels.*U1'),
  (lambda: loss.clop_loss(Z, Y * 1.0, C), 'labels.*float'),
  (lambda: loss.clop_loss(Z, Y[:3], C), r'labels.*\[16\].*\[3\]'),
  (lambda: loss.clop_loss(Z, Y.astype(int) + 2**33, C), 'labels.*5, got 85899'),
  (lambda: loss.supcon_loss(Z, Y > 0), 'labels.*bool'),
  (lambda: collapse.class_means(Z[0], Y + 90, 5), 'labels.*5, got'),
  (lambda: collapse.uniformity(Z, t=-1), 't must.*-1'),
  (lambda: prototypes.pseudo_labels(Z, Y, C, threshold=2), 'threshold.* 2'),
  (lambda: prototypes.random_prototypes(jax.random.key(0), 0, 2), 'classes.*0'),
]


@pytest.mark.parametrize(('call', 'message'), WRONG)
def test_a_wrong_argument_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()


IDS = [0, 1, 2, 3, -1, 5]


@pytest.mark.parametrize(
  'kind',
  [list, np.int8, np.int16, np.int32, np.int64, np.uint8, jnp.int8, jnp.int32],
)
def test_labels_of_every_integer_kind_are_the_same(kind):
  z = Z[:, :6]
  many = np.concatenate([C, np.ones((195, functions.DIM))])
  ids = IDS if kind is not np.uint8 else [abs(x) for x in IDS]
  labels = kind(ids) if kind is list else kind(np.array(ids))
  if kind in (jnp.int8, jnp.int32):
    labels = jnp.array(ids, kind)
  for function in (
    lambda y: loss.supcon_loss(z, y),
    lambda y: loss.supcon_loss(z, y, block_size=3),
    lambda y: loss.clop_loss(z, y, many),
    lambda y: collapse.prototype_cosine(z[0], y, many),
    lambda y: prototypes.pseudo_labels(z, y, many, threshold=0.2),
  ):
    expected = function(np.array(ids, np.int32))
    np.testing.assert_array_equal(function(labels), expected)
    if kind is not list:
      np.testing.assert_allclose(jax.jit(function)(labels), expected, rtol=1e-5)


def test_ids_of_64_bits_do_not_wrap_around():
  ids = np.array([0, 2**32, 2**33, 2**34, 2**32, -(2**40)])
  expected = loss.supcon_loss(Z[:, :6], np.array([0, 1, 2, 3, 1, -1]))
  np.testing.assert_array_equal(loss.supcon_loss(Z[:, :6], ids), expected)
  with jax.enable_x64(True):
    traced = jax.jit(lambda y: loss.supcon_loss(Z[:, :6], y))(ids)
    beyond = jax.jit(lambda y: loss.clop_loss(Z[:, :6], y, C))(ids)
  np.testing.assert_allclose(traced, expected, rtol=1e-6)
  assert np.isnan(beyond)
