import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize

from clop_jax import prototypes
from tests import small

DEVICES = 8
STATIC = {'static_argnums': (1, 2), 'static_argnames': 'dtype'}
ORTHONORMAL = jax.jit(prototypes.orthonormal_prototypes, **STATIC)
ORTHONORMALIZE = jax.jit(prototypes.orthonormalize)
SIMPLEX = jax.jit(prototypes.simplex_etf_prototypes, **STATIC)


def gram(rows):
  rows = np.asarray(rows, np.float64)
  return rows @ rows.T


def random_rows(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def polar(rows):
  """The polar factor of a wide matrix, float64."""
  return scipy.linalg.polar(np.asarray(rows, np.float64).T)[0].T


@pytest.mark.parametrize(('k', 'dim'), [(1000, 1024), (16, 16), (1, 5)])
def test_rows_are_orthonormal_to_1e_6(k, dim):
  c = ORTHONORMAL(jax.random.key(0), k, dim)
  assert c.shape == (k, dim)
  np.testing.assert_allclose(gram(c), np.eye(k), atol=1e-6)


def test_orthonormal_prototypes_are_uniformly_distributed():
  # The bare QR factor, whose signs the algorithm chooses, is not.
  k, dim, n = 4, 4, 20_000
  keys = jax.random.split(jax.random.key(1), n)
  make = functools.partial(prototypes.orthonormal_prototypes, num_classes=k)
  make = jax.jit(jax.vmap(functools.partial(make, dim=dim)))
  c = np.asarray(make(keys), np.float64)
  # Every entry has the moments of one coordinate on the unit sphere; five
  # standard errors of a mean over n draws.
  second, fourth = 1 / dim, 3 / (dim * (dim + 2))
  eighth = 105 / (dim * (dim + 2) * (dim + 4) * (dim + 6))

  def error(variance):
    return 5 * np.sqrt(variance / n)

  np.testing.assert_allclose(c.mean(axis=0), 0, atol=error(second))
  np.testing.assert_allclose(
    (c**2).mean(axis=0), second, atol=error(fourth - second**2)
  )
  np.testing.assert_allclose(
    (c**4).mean(axis=0), fourth, atol=error(eighth - fourth**2)
  )
  # A direction off the axes has the same moments.
  diagonal = c.sum(axis=-1) / np.sqrt(dim)
  np.testing.assert_allclose(
    (diagonal**4).mean(axis=0), fourth, atol=error(eighth - fourth**2)
  )
  # A sign rule would tie different rows and columns together.
  products = (c[:, 0, 0] * c[:, 1, 1]).mean()
  assert abs(products) < error(1 / dim)


KEYS = jax.random.split(jax.random.key(2), DEVICES)
SIZES = {'num_classes': 5, 'dim': 8}


@pytest.mark.parametrize(
  ('make', 'arguments'),
  [
    (functools.partial(prototypes.orthonormal_prototypes, **SIZES), KEYS),
    (functools.partial(prototypes.simplex_etf_prototypes, **SIZES), KEYS),
    (prototypes.orthonormalize, random_rows((DEVICES, 4, 6))),
  ],
  ids=['orthonormal', 'simplex', 'orthonormalize'],
)
def test_jit_vmap_and_pmap_give_the_same(make, arguments):
  small.need_devices(DEVICES)
  compiled = jax.jit(make)
  one_by_one = np.stack([compiled(x) for x in arguments])
  assert np.abs(one_by_one[0] - one_by_one[1]).max() > 0.1
  for mapped in (jax.jit(jax.vmap(make)), jax.pmap(make)):
    np.testing.assert_allclose(mapped(arguments), one_by_one, atol=1e-6)


@pytest.mark.parametrize(('k', 'dim'), [(2, 1), (10, 9), (257, 300)])
def test_simplex_has_equal_angles_and_no_mean(k, dim):
  c = SIMPLEX(jax.random.key(3), k, dim)
  assert c.shape == (k, dim)
  cosines = np.where(np.eye(k) > 0, 1, -1 / (k - 1))
  np.testing.assert_allclose(gram(c), cosines, atol=1e-6)
  np.testing.assert_allclose(np.asarray(c, np.float64).sum(0), 0, atol=1e-5)


@pytest.mark.parametrize('shape', [(3, 7), (10, 10), (1, 4)])
def test_orthonormalize_equals_the_polar_factor(shape):
  rows = random_rows(shape)
  ours = ORTHONORMALIZE(rows)
  np.testing.assert_allclose(ours, polar(rows), atol=1e-5)
  np.testing.assert_allclose(gram(ours), np.eye(shape[0]), atol=1e-6)


@pytest.mark.parametrize(
  'rows',
  [
    np.zeros((3, 5)),
    np.ones((3, 5)),
    np.array([[1.0, 2, 0, 0], [2, 4, 0, 0], [0, 0, 3, 1]]),
    np.diag([1.0, 1e-6, 1e6]),
  ],
  ids=['zeros', 'equal', 'collinear', 'badly scaled'],
)
def test_dependent_rows_give_orthonormal_ones(rows):
  ours = ORTHONORMALIZE(jnp.asarray(rows, jnp.float32))
  np.testing.assert_allclose(gram(ours), np.eye(len(rows)), atol=1e-6)


def test_align_solves_the_procrustes_problem():
  means = random_rows((4, 9), seed=1)
  # scipy's square solution of M^T = R [I; 0] has C^T as its first columns.
  padded = np.zeros((9, 9))
  padded[:, :4] = means.astype(np.float64).T
  rotation, _ = scipy.linalg.orthogonal_procrustes(np.eye(9), padded)
  np.testing.assert_allclose(
    prototypes.align_prototypes(means), rotation[:, :4].T, atol=1e-5
  )


def test_align_gives_a_class_without_mean_a_remaining_direction():
  means = np.zeros((3, 4), np.float32)
  means[0, 1], means[2, 0] = 2.0, 0.5
  ours = np.asarray(prototypes.align_prototypes(means))
  np.testing.assert_allclose(gram(ours), np.eye(3), atol=1e-6)
  np.testing.assert_allclose(ours[[0, 2]], np.eye(4)[[1, 0]], atol=1e-6)


def test_bfloat16_prototypes_are_orthonormal_up_to_rounding():
  rows = jnp.asarray(random_rows((4, 8)), jnp.bfloat16)
  key = jax.random.key(5)
  for c in (
    ORTHONORMAL(key, 4, 8, dtype=jnp.bfloat16),
    ORTHONORMALIZE(rows),
  ):
    assert c.dtype == jnp.bfloat16
    np.testing.assert_allclose(gram(c), np.eye(4), atol=1e-2)
  simplex = SIMPLEX(key, 4, 8, dtype=jnp.bfloat16)
  assert simplex.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.diagonal(gram(simplex)), 1, atol=1e-2)


KEY = jax.random.key(0)
Z, Y = np.ones((1, 1, 2), np.float32), np.array([-1])


def pseudo_labels(**keywords):
  return prototypes.pseudo_labels(Z, Y, np.eye(2), **keywords)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (
      lambda: prototypes.orthonormal_prototypes(KEY, 5, 4),
      'num_classes.*dim=4.* 5',
    ),
    (lambda: prototypes.orthonormal_prototypes(KEY, 0, 4), 'num_classes.* 0'),
    (lambda: prototypes.orthonormal_prototypes(KEY, 1, 0), 'dim.* 0'),
    (
      lambda: prototypes.orthonormal_prototypes(KEY, 3, 4, dtype=int),
      'dtype.*int',
    ),
    (lambda: prototypes.simplex_etf_prototypes(KEY, 1, 4), 'num_classes.* 1'),
    (lambda: prototypes.simplex_etf_prototypes(KEY, 5, 3), 'dim.*4.* 3'),
    (lambda: prototypes.random_prototypes(KEY, 0, 3), 'num_classes.* 0'),
    (lambda: prototypes.orthonormalize(np.ones(3)), r'prototypes.*\(3,\)'),
    (
      lambda: prototypes.orthonormalize(np.ones((2, 3), int)),
      'prototypes.*int',
    ),
    (
      lambda: prototypes.align_prototypes(np.ones((3, 2))),
      'num_classes.*dim=2.* 3',
    ),
    (
      lambda: prototypes.assign_prototypes(np.ones((2, 3)), np.eye(3)),
      r'class_means.*\(2, 3\).*\(3, 3\)',
    ),
    (
      lambda: prototypes.pseudo_labels(Z, Y, np.eye(3), threshold=0.9),
      'prototypes',
    ),
    (lambda: pseudo_labels(threshold=0.0), r'threshold.*0\.0'),
    (lambda: pseudo_labels(threshold=2), 'threshold.* 2'),
    (
      lambda: pseudo_labels(threshold=0.9, temperature=0.0),
      r'temperature.*0\.0',
    ),
  ],
)
def test_invalid_arguments(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_random_prototypes_are_unit_with_cosines_of_random_directions():
  c = prototypes.random_prototypes(jax.random.key(0), 200, 64)
  cosines = gram(c)
  np.testing.assert_allclose(np.diagonal(cosines), 1, atol=1e-6)
  off = cosines[~np.eye(200, dtype=bool)]
  # Mean 0 and variance 1 / dim; the pairs are 19,900.
  assert abs(off.mean()) < 5e-3
  assert off.std() == pytest.approx(1 / 8, rel=0.03)
  assert prototypes.orthonormality_error(c) == pytest.approx(
    np.abs(cosines - np.eye(200)).max(), rel=1e-5
  )


ASSIGN = jax.jit(prototypes.assign_prototypes)


@pytest.mark.parametrize(('k', 'dim'), [(1, 3), (40, 64)])
def test_assignment_is_the_best_of_all_orders(k, dim):
  means = random_rows((k, dim), seed=1)
  c = np.asarray(ORTHONORMAL(jax.random.key(0), k, dim))
  ours = np.asarray(ASSIGN(means, c))
  rows, columns = scipy.optimize.linear_sum_assignment(
    means @ c.T, maximize=True
  )
  np.testing.assert_array_equal(ours[rows], c[columns])


@pytest.mark.parametrize('size', [2, 40])
def test_assignment_is_the_best_for_tied_and_low_rank_costs(size):
  rng = np.random.default_rng(size)
  for gain in (
    np.zeros((size, size)),
    rng.integers(0, 3, (size, size)),
    rng.normal(size=(size, 1)) * rng.normal(size=(1, size)),
  ):
    gain = gain.astype(np.float32)
    ours = np.asarray(ASSIGN(gain, jnp.eye(size)))
    np.testing.assert_array_equal(np.sort(ours.argmax(axis=1)), range(size))
    rows, columns = scipy.optimize.linear_sum_assignment(gain, maximize=True)
    best = gain[rows, columns].sum()
    assert (gain * ours).sum() == pytest.approx(best, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize('value', [np.nan, np.inf, 3e38])
def test_assignment_terminates_for_huge_and_non_finite_means(value):
  means = np.where(random_rows((6, 6)) > 0, value, -1).astype(np.float32)
  ours = np.asarray(ASSIGN(means, jnp.eye(6)))
  if value == 3e38:
    np.testing.assert_array_equal(np.sort(ours.argmax(axis=1)), range(6))
  else:
    assert np.isnan(ours).all()


def test_pseudo_labels_are_the_nearest_prototypes_where_confident():
  rng = np.random.default_rng(0)
  z = rng.normal(size=(2, 50, 6)).astype(np.float32)
  labels = np.where(rng.random(50) < 0.3, rng.integers(0, 4, 50), -1)
  c = np.asarray(ORTHONORMAL(jax.random.key(0), 4, 6))
  ours = prototypes.pseudo_labels(z, labels, c, threshold=0.6, temperature=0.3)
  expected = labels.copy()
  for i in np.flatnonzero(labels < 0):
    unit = [view[i] / np.linalg.norm(view[i]) for view in z.astype(np.float64)]
    cosines = np.mean([u @ c.T for u in unit], axis=0)
    odds = np.exp(cosines / 0.3)
    if (odds / odds.sum()).max() >= 0.6:
      expected[i] = odds.argmax()
  np.testing.assert_array_equal(ours, expected)
  assert 5 < (expected[labels < 0] >= 0).sum() < (labels < 0).sum() - 5


def test_collapsed_embeddings_get_no_pseudo_label():
  z = jnp.ones((2, 7, 10))
  labels = jnp.full(7, -1)
  ours = prototypes.pseudo_labels(z, labels, jnp.eye(10), threshold=0.2)
  assert (ours == -1).all()
