import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from clop_jax import collapse

K = 4
DIM = 6


def run(function, *arrays, **hyper_parameters):
  """Compiled whole: quicker than operation by operation."""
  return jax.jit(lambda *a: function(*a, **hyper_parameters))(*arrays)


def unit(rows):
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def problem(shape=(2, 15), dim=DIM, seed=0):
  """Embeddings `[2, 15, dim]` off the origin, labels with some -1."""
  rng = np.random.default_rng(seed)
  z = rng.normal(size=(*shape, dim)) + rng.normal(size=dim)
  labels = np.arange(shape[-1]) % (K + 1) - 1
  labels = np.broadcast_to(labels, shape).astype(np.int32)
  return z.astype(np.float32), labels


PROTOTYPES = np.random.default_rng(9).normal(size=(K, DIM)).astype(np.float32)


def members(z, y, label):
  return z.reshape(-1, z.shape[-1])[y.ravel() == label]


def np_effective_rank(rows, center=False):
  rows = rows.reshape(-1, rows.shape[-1])
  rows = rows - rows.mean(0) if center else rows
  s = scipy.linalg.svdvals(rows)
  if not s.any():
    return 0.0
  p = s / s.sum()
  return np.exp(-sum(q * np.log(q) for q in p if q > 0))


def np_class_means(z, y):
  classes = [members(z, y, label) for label in range(K)]
  return np.stack([x.mean(0) if len(x) else 0 * z[0, 0] for x in classes])


def np_present(y):
  return np.isin(np.arange(K), y)


def np_cosines(z, y, center=False):
  means = np_class_means(z, y)
  present = np_present(y)
  if center:
    means = means - means[present].mean(0)
    # The rest of equal means is rounding.
    means[np.linalg.norm(means, axis=1) < 1e-12 * np.abs(z).max()] = 0
  lengths = np.linalg.norm(means, axis=1, keepdims=True)
  means = means / np.where(lengths == 0, 1, lengths)
  both = present[:, None] & present
  return np.where(both, means @ means.T, np.nan)


def np_nc1(z, y):
  dim = z.shape[-1]
  z = z / np.abs(z).max()  # the squares of long vectors overflow
  classes = np.flatnonzero(np_present(y))
  if len(classes) < 2:
    return np.nan
  within, between = np.zeros((dim, dim)), np.zeros((dim, dim))
  means = {c: members(z, y, c).mean(0) for c in classes}
  grand = sum(means.values()) / len(means)
  count = 0
  for c, mean in means.items():
    for row in members(z, y, c):
      within += np.outer(row - mean, row - mean)
      count += 1
    between += np.outer(mean - grand, mean - grand) / len(means)
  if np.abs(between).max() < 1e-24:  # rounding of equal means
    return 0.0
  inverse = np.linalg.pinv(between, rcond=1e-10, hermitian=True)
  return np.trace(within / count @ inverse) / len(means)


def np_uniformity(z, t=2.0):
  rows = unit(z.reshape(-1, z.shape[-1]))
  values = [
    np.exp(-t * np.sum((rows[i] - rows[j]) ** 2))
    for i in range(len(rows))
    for j in range(i)
  ]
  return np.log(np.mean(values))


def np_alignment(z, alpha=2.0):
  z = unit(z)
  return np.mean(
    [
      np.linalg.norm(z[a, i] - z[b, i]) ** alpha
      for a in range(len(z))
      for b in range(a)
      for i in range(z.shape[1])
    ]
  )


def np_prototype_cosine(z, y):
  rows = unit(z.reshape(-1, DIM))
  c = unit(PROTOTYPES.astype(np.float64))
  return np.mean(
    [
      row @ c[label]
      for row, label in zip(rows, y.ravel(), strict=True)
      if label >= 0
    ]
  )


def np_energy_share(z, y):
  c = unit(PROTOTYPES.astype(np.float64))
  total, own = 0.0, 0.0
  for row, label in zip(z.reshape(-1, DIM), y.ravel(), strict=True):
    if label >= 0:
      total += row @ row
      own += (row @ c[label]) ** 2
  return own / total


def np_angles(z, y, subspace_dim):
  bases = []
  for c in range(K):
    _, sigma, vt = np.linalg.svd(members(z, y, c))
    rank = np.sum(sigma[:subspace_dim] > 1e-5 * max(sigma, default=0))
    bases.append(vt[:rank].T)
  angles = np.full((K, K, subspace_dim), np.nan)
  for a in range(K):
    for b in range(K):
      if bases[a].size and bases[b].size:
        those = scipy.linalg.subspace_angles(bases[a], bases[b])[::-1]
        angles[a, b, : len(those)] = those
  return angles


def measure(name, **keywords):
  return lambda z, y: getattr(collapse, name)(z, **keywords)


def of_classes(name, **keywords):
  return lambda z, y: getattr(collapse, name)(z, y, K, **keywords)


def of_prototypes(name):
  return lambda z, y: getattr(collapse, name)(z, y, PROTOTYPES)


def flat(z):
  return z.reshape(-1, DIM)


# Name: (ours, float64 oracle, tolerance), both of (embeddings, labels).
CASES = {
  'singular_values': (
    measure('singular_values'),
    lambda z, y: scipy.linalg.svdvals(flat(z)),
    1e-4,
  ),
  'singular_values centred': (
    measure('singular_values', center=True),
    lambda z, y: scipy.linalg.svdvals(flat(z) - flat(z).mean(0)),
    1e-4,
  ),
  'effective_rank': (
    measure('effective_rank'),
    lambda z, y: np_effective_rank(z),
    1e-4,
  ),
  'embedding_variance': (
    measure('embedding_variance'),
    lambda z, y: np.cov(flat(z).T, bias=True).trace(),
    1e-4,
  ),
  'embedding_std': (
    measure('embedding_std'),
    lambda z, y: unit(flat(z)).std(axis=0).mean(),
    1e-5,
  ),
  'class_means': (of_classes('class_means'), np_class_means, 1e-5),
  'class_mean_cosines': (of_classes('class_mean_cosines'), np_cosines, 1e-5),
  'class_mean_cosines centred': (
    of_classes('class_mean_cosines', center=True),
    lambda z, y: np_cosines(z, y, center=True),
    1e-5,
  ),
  'within_between_ratio': (of_classes('within_between_ratio'), np_nc1, 2e-3),
  'alignment': (
    measure('alignment', alpha=1.0),
    lambda z, y: np_alignment(z, alpha=1.0),
    1e-5,
  ),
  'uniformity': (
    measure('uniformity', t=3.0),
    lambda z, y: np_uniformity(z, t=3.0),
    1e-5,
  ),
  'prototype_cosine': (
    of_prototypes('prototype_cosine'),
    np_prototype_cosine,
    1e-5,
  ),
  'prototype_energy_share': (
    of_prototypes('prototype_energy_share'),
    np_energy_share,
    1e-5,
  ),
  'principal_angles': (
    of_classes('principal_angles', subspace_dim=2),
    lambda z, y: np_angles(z, y, 2),
    2e-3,  # arccos turns an eps at cosine 1 into its root
  ),
}


# One program for all measures: compiling takes longer than running.
@jax.jit
def all_measures(z, y):
  return {name: ours(z, y) for name, (ours, _, _) in CASES.items()}


@pytest.mark.parametrize('name', CASES)
def test_measures_equal_their_float64_formulas(name):
  _, oracle, tolerance = CASES[name]
  z, y = problem()
  expected = oracle(z.astype(np.float64), y)
  value = all_measures(z, y)[name]
  assert value.dtype == jnp.float32
  assert value.shape == np.shape(expected)
  np.testing.assert_allclose(value, expected, rtol=tolerance, atol=tolerance)


def collapsed_sets():
  """Name: embeddings `[2, 15, 6]` and labels."""
  rng = np.random.default_rng(3)
  noise = rng.normal(size=(2, 15, DIM))
  _, y = problem()
  center = rng.normal(size=DIM)
  classes = rng.normal(size=(K, DIM))[np.maximum(y, 0)]
  along = 2.0 ** np.arange(DIM) * rng.normal(size=(2, 15, 1)).round(2)
  sets = {
    'all equal': np.broadcast_to(center, noise.shape),
    'on a line': along,
    'on a line off the origin': 100 + along,
    'tiny spread around a large mean': 100 * center + 1e-4 * noise,
    'far from the origin': 1e4 + noise,
    'classes collapsed to their means': classes + 1e-5 * noise,
    'class means nearly equal': center + 1e-3 * classes + noise,
    'class means on a line': classes[..., :1] * center + 0.1 * noise,
    'long': 1e25 * (center + 0.1 * noise),
    'short': 1e-25 * (center + 0.1 * noise),
  }
  sets = {name: (z.astype(np.float32), y) for name, z in sets.items()}
  z = (center + 0.01 * noise).astype(np.float32)
  sets['float16'] = z.astype(np.float16), y
  sets['one class'] = z, np.where(y == 2, 2, -1)
  sets['two examples'] = z[:, :2], np.array([[0, 1]] * 2, np.int32)
  return sets


SETS = collapsed_sets()


@pytest.mark.parametrize('name', SETS)
def test_measures_of_collapsed_embeddings_equal_float64(name):
  z, y = SETS[name]
  results = all_measures(z, y)
  for measure, (_, oracle, _) in CASES.items():
    expected = np.asarray(oracle(z.astype(np.float64), y))
    # As float32: the variance of long vectors is infinite there.
    with np.errstate(over='ignore'):
      expected = expected.astype(np.float32)
    size = np.max(np.abs(expected), initial=0, where=np.isfinite(expected))
    # Angles are that accurate; others differ from 0 by float64's rounding.
    least = 1e-6 if 'angles' in measure else 1e-15
    np.testing.assert_allclose(
      results[measure],
      expected,
      rtol=1e-3,
      atol=max(least, 1e-3 * float(size)),
      err_msg=measure,
    )


def test_unlabelled_rows_do_not_change_measures_of_classes():
  z, y = problem()
  results = all_measures(z, y)
  others = all_measures(np.where(y[..., None] < 0, 100 + 50 * z, z), y)
  for name, (_, _, tolerance) in CASES.items():
    if name.startswith(('class', 'within', 'prototype', 'principal')):
      np.testing.assert_allclose(
        others[name], results[name], atol=tolerance / 10, err_msg=name
      )


def test_bfloat16_embeddings_are_measured_in_float32():
  z, y = problem()
  z = jnp.asarray(z, jnp.bfloat16)
  expected = all_measures(z.astype(jnp.float32), y)
  for name, value in all_measures(z, y).items():
    np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-5)


def test_effective_rank_of_a_spectrum_does_not_depend_on_its_scale():
  spectrum = jnp.array([3.0, 2.0, 1.0, 0.0])
  p = np.array([3, 2, 1]) / 6
  expected = np.exp(-np.sum(p * np.log(p)))
  for scale in (1e-3, 1.0, 1e3):
    value = run(collapse.effective_rank_of_spectrum, scale * spectrum)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize('scale', [1e-15, 1.0, 1e15])
def test_normalize_gives_unit_vectors_and_keeps_zero(scale):
  z = jnp.array([[3.0, 4.0], [0.0, 0.0]]) * scale
  expected = [[0.6, 0.8], [0, 0]]
  np.testing.assert_allclose(run(collapse.normalize, z), expected, rtol=1e-5)


EQUAL = np.tile(np.float32([0.6, 0.8]), (5, 1))
SPREAD = np.concatenate([np.eye(4), -np.eye(4)]).astype(np.float32)
VIEWS = np.random.default_rng(7).normal(size=(15, DIM)).astype(np.float32)


@pytest.mark.parametrize(
  ('function', 'embeddings', 'expected'),
  [
    (collapse.embedding_variance, EQUAL, 0),
    (collapse.embedding_variance, SPREAD, 1),
    # Only one of the two measures directions.
    (collapse.embedding_variance, 3 * SPREAD, 9),
    (collapse.embedding_std, EQUAL, 0),
    (collapse.embedding_std, SPREAD, 0.5),
    (collapse.embedding_std, 3 * SPREAD, 0.5),
    (collapse.uniformity, EQUAL, 0),
    (collapse.uniformity, 5 * np.eye(4), -4),
    (collapse.alignment, np.stack([VIEWS, 3 * VIEWS]), 0),
    (collapse.alignment, np.stack([VIEWS, -VIEWS]), 4),
    (collapse.effective_rank, np.ones((7, 5)), 1),
    (collapse.effective_rank, np.outer([1, -2, 3], [0.3, -0.4, 1.2]), 1),
    (collapse.effective_rank, np.eye(5), 5),
    (collapse.effective_rank, SPREAD, 4),
    (collapse.effective_rank, np.zeros((4, 3)), 0),
    (collapse.effective_rank, np.diag([1.0, 1.0, 0.0]), 2),
  ],
)
def test_known_sets_have_known_measures(function, embeddings, expected):
  value = run(function, jnp.asarray(embeddings, jnp.float32))
  np.testing.assert_allclose(value, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize('center', [False, True])
def test_class_mean_cosines_of_a_simplex(center):
  c = np.eye(K, DIM) - np.eye(K, DIM).mean(axis=0)
  labels = np.arange(12) % K
  # Centring must take a common shift out again.
  z = c[labels] + (7.0 if center else 0.0)
  cosines = run(
    collapse.class_mean_cosines, z, labels, num_classes=K, center=center
  )
  expected = np.where(np.eye(K) > 0, 1, -1 / (K - 1))
  np.testing.assert_allclose(cosines, expected, atol=1e-5)


def test_classes_without_examples_are_nan_and_left_out():
  z, y = problem()
  y = np.where(y == 1, -1, y)
  results = all_measures(z, y)
  for name in ('class_mean_cosines', 'principal_angles'):
    assert np.isnan(results[name][1]).all()
    assert np.isnan(results[name][:, 1]).all()
  assert not results['class_means'][1].any()
  for name in (
    'class_mean_cosines centred',
    'principal_angles',
    'within_between_ratio',
  ):
    expected = CASES[name][1](z.astype(np.float64), y)
    np.testing.assert_allclose(
      results[name], expected, rtol=2e-3, atol=1e-4, err_msg=name
    )


@pytest.mark.parametrize('missing', [None, 1, 2])
def test_principal_angles_take_each_class_own_rows_if_labels_are_known(missing):
  # Those of the other tests are traced.
  z, y = problem()
  y = np.where(y == missing, -1, y)
  np.testing.assert_allclose(
    collapse.principal_angles(z, y, K, subspace_dim=2),
    np_angles(z.astype(np.float64), y, 2),
    atol=2e-3,
  )


@pytest.mark.parametrize('dim', [2, 3, 20])
def test_within_between_ratio_with_fewer_and_more_dimensions_than_classes(dim):
  z, y = problem(dim=dim, seed=2)
  expected = np_nc1(z.astype(np.float64), y)
  value = run(collapse.within_between_ratio, z, y, num_classes=K)
  np.testing.assert_allclose(value, expected, rtol=2e-3)


@pytest.mark.parametrize('label', [-1, 2])
def test_within_between_ratio_needs_two_classes(label):
  z, y = problem()
  one = np.full_like(y, label)
  assert np.isnan(run(collapse.within_between_ratio, z, one, num_classes=K))


def test_alignment_takes_every_pair_of_three_views():
  z, _ = problem((3, 5))
  expected = np_alignment(z.astype(np.float64))
  np.testing.assert_allclose(run(collapse.alignment, z), expected, rtol=1e-5)


@pytest.mark.parametrize('sign', [1, -1])
def test_the_energy_share_ignores_the_sign_and_the_cosine_does_not(sign):
  _, y = problem()
  z = sign * 2 * PROTOTYPES[y]
  share = run(collapse.prototype_energy_share, z, y, PROTOTYPES)
  cosine = run(collapse.prototype_cosine, z, y, PROTOTYPES)
  np.testing.assert_allclose(share, 1, rtol=1e-5)
  np.testing.assert_allclose(cosine, sign, rtol=1e-5)


def test_prototype_measures_are_zero_without_labels():
  z, y = problem()
  none = np.full_like(y, -1)
  assert run(collapse.prototype_cosine, z, none, PROTOTYPES) == 0
  assert run(collapse.prototype_energy_share, z, none, PROTOTYPES) == 0


def test_principal_angles_resolve_small_angles_and_weak_directions():
  # Two classes share a strong direction. Their second ones are a thousandth as
  # strong, and 0.01 rad apart.
  rng = np.random.default_rng(6)
  basis = np.linalg.qr(rng.normal(size=(8, 8)))[0]
  turned = np.cos(0.01) * basis[1] + np.sin(0.01) * basis[2]
  strong, weak = rng.normal(size=(2, 60, 1))
  labels = np.arange(60) % 2
  second = np.where(labels[:, None], turned, basis[1])
  z = strong * basis[0] + 1e-3 * weak * second
  angles = run(
    collapse.principal_angles,
    z.astype(np.float32),
    labels,
    num_classes=2,
    subspace_dim=2,
  )
  np.testing.assert_allclose(angles[0, 1], [0, 0.01], atol=1e-3)
  # A class of one example has no plane.
  planes = run(
    collapse.principal_angles,
    basis[:2].astype(np.float32),
    np.arange(2),
    num_classes=2,
    subspace_dim=2,
  )
  np.testing.assert_allclose(planes[0, 1, 0], np.pi / 2, atol=1e-5)
  assert np.isnan(planes[..., 1]).all()


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda z, y: collapse.singular_values(z[0, 0]), r'embeddings.*\(6,\)'),
    (lambda z, y: collapse.class_means(z, y[0], K), r'labels.*15\].*\[15\]'),
    (lambda z, y: collapse.class_means(z, y + 90, K), 'labels.*4, got'),
    (
      lambda z, y: collapse.prototype_cosine(z, y, PROTOTYPES[:, :3]),
      r'prototypes.*6.*\(4, 3\)',
    ),
    (lambda z, y: collapse.alignment(z[:1]), r'views.*2 .*\(1, 15, 6\)'),
    (lambda z, y: collapse.alignment(z[0]), r'views.*\(15, 6\)'),
    (lambda z, y: collapse.alignment(z, alpha=0), 'alpha.*0'),
    (lambda z, y: collapse.uniformity(z, t=-1), 't must.*-1'),
    (lambda z, y: collapse.uniformity(z[0, :1]), 'embeddings.*two.* 1'),
    (
      lambda z, y: collapse.principal_angles(z, y, K, subspace_dim=0),
      'subspace_dim.* 0',
    ),
    (
      lambda z, y: collapse.principal_angles(z, y, K, subspace_dim=7),
      'subspace_dim.* 7',
    ),
  ],
)
def test_invalid_arguments(call, message):
  with pytest.raises(ValueError, match=message):
    call(*problem())
