import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clop_jax import collapse
from clop_jax import loss
from clop_jax import theory

MODELS = ['repulsion', 'symmetric', 'tangent', 'row_softmax', 'infonce']
WITH_COLLAPSE = {'repulsion': 1.0, 'symmetric': 2.0, 'row_softmax': 2.0}
TAU = 0.5  # 1/TAU is row_softmax's strength above


def unit(rows):
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def np_energy(model, rows, moving, k):
  """What the vector `moving` descends: a loop over pairs, for a gradient."""
  n = len(rows)

  def log_sum_exp(i):
    return math.log(
      sum(math.exp(rows[i] @ rows[j] / TAU) for j in range(n) if j != i)
    )

  def similarities(i):
    return sum(rows[i] @ rows[j] for j in range(n) if j != i) / (n - 1)

  if model in ('repulsion', 'tangent'):
    return similarities(moving)
  if model == 'symmetric':
    return sum(similarities(i) for i in range(n))
  if model == 'row_softmax':
    return log_sum_exp(moving)
  total = 0.0
  for i in range(n):
    positives = [j for j in range(n) if j != i and j % k == i % k]
    pull = sum(rows[i] @ rows[j] / TAU for j in positives) / len(positives)
    total += log_sum_exp(i) - pull
  return total


def np_step(model, z, prototypes, rate, weight, correlation, distance):
  """One step from central differences of the energies, without any formula."""
  n, dim, k = z.shape[0] * z.shape[1], z.shape[2], z.shape[1]
  rows = z.reshape(n, dim)
  gradient = np.zeros((n, dim))
  for i in range(n):
    for axis in range(dim):
      values = []
      for sign in (1, -1):
        moved = rows.copy()
        moved[i, axis] += sign * 1e-5
        energy = np_energy(model, moved, i, k)
        values.append(energy + weight * distance(moved[i], i % k, prototypes))
      gradient[i, axis] = (values[0] - values[1]) / 2e-5
    if model == 'tangent':
      gradient[i] -= (gradient[i] @ rows[i]) * rows[i]
  kernel = (1 - correlation) * np.eye(n) + correlation * np.ones((n, n))
  return unit(rows - rate * kernel @ gradient).reshape(z.shape)


def np_cosine(z, label, prototypes, r=0.0):
  others = [z @ c for j, c in enumerate(prototypes) if j != label]
  return 1 - z @ prototypes[label] + r * sum(others) / len(others)


def np_softmax(z, label, prototypes, temperature=0.1):
  shares = [math.exp(z @ c / temperature) for c in prototypes]
  return -math.log(shares[label] / sum(shares))


REPELLING = functools.partial(theory.cosine_distance, repulsion=0.7)
DISTANCES = [
  (theory.cosine_distance, np_cosine),
  (REPELLING, functools.partial(np_cosine, r=0.7)),
  (theory.softmax_distance, np_softmax),
]


@pytest.mark.parametrize(
  ('model', 'pull'),
  [(model, n % 3) for n, model in enumerate(MODELS)] + [('repulsion', 2)],
)
def test_two_steps_equal_central_differences_of_the_energies(model, pull):
  rng = np.random.default_rng(3)
  ours, numpys = DISTANCES[pull]
  start = unit(rng.normal(size=(2, 3, 4)))
  prototypes = np.linalg.qr(rng.normal(size=(4, 4)))[0][:3]
  z = start
  for _ in range(2):
    z = np_step(model, z, prototypes, 0.3, 0.8, 0.2, numpys)
  outcome = theory.simulate(
    model,
    jnp.array([0.3]),
    jnp.asarray(start[None], jnp.float32),
    steps=2,
    prototypes=prototypes,
    clop_weight=0.8,
    distance=ours,
    temperature=TAU,
    correlation=0.2,
  )
  between = [
    z[v, i] @ z[w, j]
    for v in range(2)
    for w in range(2)
    for i in range(3)
    for j in range(3)
    if i != j
  ]
  np.testing.assert_allclose(outcome.mean_cosine, np.mean(between), atol=2e-5)
  clop = np.mean(
    [1 - z[v, i] @ prototypes[i] for v in range(2) for i in range(3)]
  )
  np.testing.assert_allclose(outcome.clop_loss, clop, atol=2e-5)
  np.testing.assert_allclose(
    outcome.effective_rank, collapse.effective_rank(z), rtol=1e-4
  )


@pytest.mark.parametrize('k', [5, 10, 100, 1000])
@pytest.mark.parametrize('model', WITH_COLLAPSE)
def test_bisection_finds_the_closed_form(model, k):
  expected = 2 * (k - 1) / (k - 2) / WITH_COLLAPSE[model]
  closed = theory.critical_learning_rate(model, k, 8, temperature=TAU)
  assert closed == pytest.approx(expected, rel=1e-12)
  # Near collapse all differences grow by one factor, whatever the dimension.
  found = theory.bisect_critical_learning_rate(
    model, k, 8, temperature=TAU, steps=20
  )
  assert found == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(
  ('model', 'k', 'weight', 'correlation'),
  [
    ('repulsion', 5, 0.1, 0.0),
    ('repulsion', 10, 0.3, 0.05),
    ('repulsion', 100, 0.3, 0.0),
    ('symmetric', 10, 1.0, 0.0),
    ('row_softmax', 10, 0.6, 0.1),
    ('repulsion', 10, 0.0, 0.3),
  ],
)
def test_bisection_finds_the_closed_form_with_pull_and_correlation(
  model, k, weight, correlation
):
  problem = {
    'clop_weight': weight,
    'correlation': correlation,
    'temperature': TAU,
  }
  closed = theory.critical_learning_rate(model, k, k + 3, **problem)
  found = theory.bisect_critical_learning_rate(
    model, k, k + 3, steps=500, **problem
  )
  assert found == pytest.approx(closed, rel=5e-4)


@pytest.mark.parametrize('model', ['tangent', 'infonce'])
def test_models_whose_radial_gradient_vanishes_have_no_critical_rate(model):
  assert theory.critical_learning_rate(model, 10, 16) == math.inf
  assert theory.bisect_critical_learning_rate(model, 10, 16) == math.inf


def test_a_pull_of_weight_1_forbids_collapse_of_free_vectors_at_every_rate():
  assert (
    theory.critical_learning_rate('repulsion', 10, 16, clop_weight=1.0)
    == math.inf
  )
  starts = jax.random.normal(jax.random.key(0), (2, 1, 10, 16))
  rates = jnp.array([3.0, 20.0, 100.0])
  free = theory.simulate('repulsion', rates, starts)
  assert jnp.all(free.collapsed) and jnp.all(free.effective_rank < 1.01)
  pulled = theory.simulate(
    'repulsion', rates, starts, prototypes=jnp.eye(10, 16), clop_weight=1.0
  )
  assert not jnp.any(pulled.collapsed)
  assert jnp.all(pulled.effective_rank > 8)


def test_the_collapsed_branch_has_the_mean_cosine_of_the_formula():
  k, rate, weight, correlation = 10, 3.0, 0.4, 0.1
  common, own = 1 + correlation * (k - 1), 1 - correlation
  b = rate * own * weight / (rate * common - 2 - rate * own / (k - 1))
  outcome = theory.simulate(
    'repulsion',
    jnp.array([rate]),
    jax.random.normal(jax.random.key(2), (1, 1, k, k + 3)),
    steps=500,
    prototypes=jnp.eye(k, k + 3),
    clop_weight=weight,
    correlation=correlation,
  )
  np.testing.assert_allclose(outcome.mean_cosine, 1 - b**2, atol=1e-3)


@pytest.mark.parametrize(
  ('k', 'weight', 'correlation', 'repulsion'),
  [(10, 1, 0, 0), (10, 5, 0.5, 0), (10, 5, 0.9, 1), (10, 5, 0.9, 2)],
)
def test_the_simulation_rests_at_the_equilibrium_of_pull_and_repulsion(
  k, weight, correlation, repulsion
):
  outcome = theory.simulate(
    'repulsion',
    jnp.array([0.2 / (1 + correlation * (k - 1))]),
    jax.random.normal(jax.random.key(1), (1, 1, k, k + 1)),
    steps=1500,
    prototypes=jnp.eye(k, k + 1),
    clop_weight=float(weight),
    correlation=correlation,
    distance=functools.partial(theory.cosine_distance, repulsion=repulsion),
  )
  expected = theory.pull_equilibrium(
    k, weight, correlation=correlation, repulsion=repulsion
  )
  np.testing.assert_allclose(
    outcome.mean_cosine, expected.mean_cosine, atol=1e-4
  )
  np.testing.assert_allclose(outcome.clop_loss, expected.clop_loss, atol=1e-4)


def test_outputs_that_move_together_rest_at_the_prototypes_mean_from_sqrt_k():
  collapsed = 1 - 1 / math.sqrt(10)
  heavy = theory.pull_equilibrium(10, 5.0, correlation=0.9999)
  assert heavy.clop_loss == pytest.approx(collapsed, abs=1e-3)
  light = theory.pull_equilibrium(10, 1.0, correlation=0.9999)
  assert light.mean_cosine == pytest.approx(0.0, abs=1e-3)


def lines(kind, views, examples, dim):
  """Equal or collinear embeddings, half of the examples at each end."""
  line = unit(np.random.default_rng(5).normal(size=dim))
  signs = np.ones(examples)
  if kind == 'collinear':
    signs[1::2] = -1
  z = signs[None, :, None] * np.broadcast_to(line, (views, examples, dim))
  return jnp.asarray(z, jnp.float32)


LABELS = jnp.array([0, 0, 1, 2])
REAL_LOSSES = {
  'nt_xent': loss.nt_xent_loss,
  'supcon out': lambda z: loss.supcon_loss(z, LABELS),
  'supcon in': lambda z: loss.supcon_loss(z, LABELS, variant='in'),
  'dcl': loss.dcl_loss,
}


@pytest.mark.parametrize('kind', ['equal', 'collinear'])
@pytest.mark.parametrize('name', REAL_LOSSES)
def test_embeddings_on_one_line_are_stationary_for_the_real_losses(name, kind):
  z = lines(kind, 2, 4, 5)
  gradient = jax.jit(jax.grad(REAL_LOSSES[name]))
  assert jnp.max(jnp.abs(gradient(z))) < 1e-6
  # The same losses are not flat: off the line they have a gradient.
  off = z + 0.3 * jax.random.normal(jax.random.key(0), z.shape)
  assert jnp.max(jnp.abs(gradient(off))) > 1e-2


@pytest.mark.parametrize('kind', ['equal', 'collinear'])
@pytest.mark.parametrize(('views', 'temperature'), [(2, 0.5), (3, 1.0)])
def test_the_hessian_of_the_real_nt_xent_has_the_closed_form(
  views, temperature, kind
):
  examples, dim = 4, 4
  expected = []
  for value, multiplicity in theory.nt_xent_hessian_eigenvalues(
    examples,
    temperature=temperature,
    views=views,
    collinear=kind == 'collinear',
  ).values():
    expected += [value] * multiplicity * (dim - 1)
  spectrum = theory.hessian_spectrum(
    functools.partial(loss.nt_xent_loss, temperature=temperature),
    lines(kind, views, examples, dim),
  )
  np.testing.assert_allclose(spectrum, sorted(expected), atol=2e-6)
  assert spectrum[0] < -0.1  # classes moving apart: the point is a saddle


def test_the_class_directions_are_those_that_lower_the_real_nt_xent():
  z = lines('equal', 2, 4, 5)
  values = theory.nt_xent_hessian_eigenvalues(4, temperature=0.5)
  rng = np.random.default_rng(0)
  apart = rng.normal(size=(4, 5))
  apart -= apart.mean(0)
  views = np.stack([apart, -apart])
  for name, motion in ('class', np.stack([apart, apart])), ('view', views):
    motion = motion - (motion @ z[0, 0])[..., None] * np.asarray(z[0, 0])
    motion *= 0.05 / np.linalg.norm(motion)
    change = float(loss.nt_xent_loss(z + motion) - loss.nt_xent_loss(z))
    assert change == pytest.approx(values[name][0] * 0.05**2 / 2, rel=0.02)


def np_riemannian_spectrum(function, z, h=1e-3):
  """Second differences along great circles, in float64."""
  basis = np.linalg.svd(z[None])[2][1:]

  def at(t):
    tangent = basis.T @ t
    length = np.linalg.norm(tangent)
    if length == 0:
      return function(z)
    return function(np.cos(length) * z + np.sin(length) * tangent / length)

  n = len(basis)
  steps = np.eye(n) * h
  hessian = [
    [
      at(steps[i] + steps[j])
      - at(steps[i] - steps[j])
      - at(steps[j] - steps[i])
      + at(-steps[i] - steps[j])
      for j in range(n)
    ]
    for i in range(n)
  ]
  return np.linalg.eigvalsh(np.array(hessian) / (4 * h * h))


def test_the_spectrum_is_that_of_great_circles_off_a_stationary_point_too():
  rng = np.random.default_rng(1)
  z, a, b = (
    unit(rng.normal(size=5)),
    rng.normal(size=(5, 5)),
    rng.normal(size=5),
  )
  a = a + a.T
  expected = np_riemannian_spectrum(lambda z: z @ a @ z + (z @ b) ** 3, z)
  spectrum = theory.hessian_spectrum(
    lambda z: z @ jnp.asarray(a) @ z + (z @ jnp.asarray(b)) ** 3, z
  )
  np.testing.assert_allclose(spectrum, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
  ('ours', 'numpys', 'arguments'),
  [
    (theory.cosine_distance, np_cosine, {}),
    (
      functools.partial(theory.cosine_distance, repulsion=1.0),
      functools.partial(np_cosine, r=1.0),
      {'repulsion': 1.0},
    ),
    (
      functools.partial(theory.cosine_distance, repulsion=1.5),
      functools.partial(np_cosine, r=1.5),
      {'repulsion': 1.5},
    ),
    (
      functools.partial(theory.softmax_distance, temperature=0.5),
      functools.partial(np_softmax, temperature=0.5),
      {'distance': 'softmax', 'temperature': 0.5},
    ),
  ],
)
def test_the_common_potential_at_the_mean_has_the_closed_curvature(
  ours, numpys, arguments
):
  k, dim = 4, 6
  prototypes = np.linalg.qr(np.random.default_rng(0).normal(size=(dim, k)))[0].T
  mean = unit(prototypes.sum(0))
  values = theory.common_hessian_eigenvalues(k, **arguments)
  expected = sorted(
    [values['class']] * (k - 1) + [values['outside']] * (dim - k)
  )
  c = jnp.asarray(prototypes, jnp.float32)
  spectrum = theory.hessian_spectrum(
    lambda z: theory.common_potential(z, c, distance=ours),
    jnp.asarray(mean, jnp.float32),
  )
  np.testing.assert_allclose(spectrum, expected, atol=2e-5)

  def potential(z):
    return np.mean([numpys(z, y, prototypes) for y in range(k)])

  np.testing.assert_allclose(
    np_riemannian_spectrum(potential, mean), expected, atol=1e-4
  )


def test_a_simplex_etf_exerts_no_common_force_anywhere():
  k = 5
  etf = unit(np.eye(k) - 1 / k)
  z = unit(np.random.default_rng(0).normal(size=(3, k)))
  force = jax.vmap(jax.grad(theory.common_potential), in_axes=(0, None))
  np.testing.assert_allclose(
    force(jnp.asarray(z), jnp.asarray(etf)), 0, atol=1e-6
  )


def test_repulsion_1_is_the_pull_of_a_simplex_etf():
  k = 5
  etf = unit(np.eye(k) - 1 / k)
  z = jnp.asarray(unit(np.random.default_rng(0).normal(size=k)), jnp.float32)
  gradient = jax.grad(theory.cosine_distance)
  repelled = jax.grad(functools.partial(theory.cosine_distance, repulsion=1.0))
  for label in range(k):
    np.testing.assert_allclose(
      repelled(z, label, jnp.eye(k)),
      math.sqrt(k / (k - 1)) * gradient(z, label, jnp.asarray(etf)),
      atol=1e-6,
    )


def test_a_shared_motion_of_the_real_clop_loss_rests_at_the_mean():
  k = 10
  prototypes = jnp.eye(k, k + 2)
  mean = jnp.sum(prototypes, axis=0) / math.sqrt(k)

  def shared(z):
    every = jnp.broadcast_to(z, (k, k + 2))
    return loss.clop_loss(every, jnp.arange(k), prototypes)

  assert float(shared(mean)) == pytest.approx(1 - 1 / math.sqrt(k), abs=1e-6)
  np.testing.assert_allclose(jax.grad(shared)(mean), 0, atol=1e-6)
  spectrum = theory.hessian_spectrum(shared, mean)
  np.testing.assert_allclose(spectrum, 1 / math.sqrt(k), atol=1e-5)


def test_a_batch_of_embeddings_at_the_mean_is_not_stationary_one_by_one():
  k = 10
  prototypes = jnp.eye(k)
  mean = jnp.full((k, k), 1 / math.sqrt(k))
  gradient = jax.grad(loss.clop_loss)(mean, jnp.arange(k), prototypes)
  lengths = jnp.linalg.norm(gradient, axis=1) * k
  np.testing.assert_allclose(lengths, math.sqrt(1 - 1 / k), atol=1e-5)


@pytest.mark.parametrize(('k', 'temperature'), [(5, 0.5), (10, 1.0), (10, 0.1)])
def test_infonce_collapses_onto_a_line_with_opposite_views(k, temperature):
  critical = theory.opposite_views_critical_rate(k, temperature=temperature)
  start = 1e-3 * np.random.default_rng(0).normal(size=(1, 2, k, k + 1))
  start[:, 0, :, 0] += 1
  start[:, 1, :, 0] -= 1
  outcome = theory.simulate(
    'infonce',
    critical * jnp.array([0.95, 1.05, 3.0]),
    jnp.asarray(start, jnp.float32),
    steps=600,
    temperature=temperature,
  )
  assert list(outcome.effective_rank[:, 0] < 1.01) == [False, True, True]
  np.testing.assert_allclose(outcome.mean_cosine[1:], 0, atol=1e-3)
  assert theory.opposite_views_critical_rate(10, temperature=50) == math.inf


STARTS = np.ones((1, 2, 4, 5), np.float32)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (
      lambda: theory.simulate('adam', [1.0], STARTS),
      r"model must be one of \['repulsion', 'symmetric', 'tangent', "
      r"'row_softmax', 'infonce'\], got 'adam'",
    ),
    (
      lambda: theory.simulate('repulsion', 1.0, STARTS),
      r'learning_rates must have shape \[rates\], got \(\)',
    ),
    (
      lambda: theory.simulate('infonce', [1.0], STARTS[:, :1]),
      r"at least 2 views and two classes for 'infonce', got \(1, 1, 4, 5\)",
    ),
    (
      lambda: theory.simulate('repulsion', [1.0], STARTS, clop_weight=1.0),
      'prototypes must be given where clop_weight is not 0, got None',
    ),
    (
      lambda: theory.simulate(
        'repulsion', [1.0], STARTS, prototypes=np.eye(3, 5)
      ),
      r'prototypes must have shape \[k, dim\]=\[4, 5\] .* got \(3, 5\)',
    ),
    (
      lambda: theory.critical_learning_rate('repulsion', 2, 8),
      'num_classes must be at least 3 .* got 2',
    ),
    (
      lambda: theory.bisect_critical_learning_rate(
        'repulsion', 10, 8, clop_weight=0.1
      ),
      'dim must be at least num_classes=10 for orthonormal prototypes, got 8',
    ),
    (
      lambda: theory.critical_learning_rate(
        'repulsion', 10, 10, clop_weight=0.1
      ),
      'dim must be above num_classes=10 with a pull, got 10',
    ),
    (
      lambda: theory.critical_learning_rate('repulsion', 10, 1),
      'dim must be at least 2, got 1',
    ),
    (
      lambda: theory.critical_learning_rate(
        'repulsion', 10, 16, clop_weight=5.0, correlation=0.5
      ),
      "collapse towards the prototypes' mean; use bisect",
    ),
    (
      lambda: theory.critical_learning_rate(
        'tangent', 10, 16, clop_weight=1.0, correlation=0.5
      ),
      "must not both be set for 'tangent'",
    ),
    (
      lambda: theory.critical_learning_rate(
        'repulsion', 10, 16, correlation=1.0
      ),
      'correlation must be below 1',
    ),
    (
      lambda: theory.critical_learning_rate('repulsion', 9, 9, correlation=-1),
      r'correlation must be in \[0, 1\], got -1',
    ),
    (
      lambda: theory.critical_learning_rate('repulsion', 9, 9, clop_weight=-1),
      'clop_weight must be at least 0, got -1',
    ),
    (
      lambda: theory.critical_learning_rate('repulsion', 9, 9, level=1.0),
      r'level must be in \(0, 1\), got 1.0',
    ),
    (
      lambda: theory.critical_learning_rate('row_softmax', 9, 9, temperature=0),
      'temperature must be above 0, got 0',
    ),
    (
      lambda: theory.opposite_views_critical_rate(2),
      'num_classes must be at least 3, got 2',
    ),
    (
      lambda: theory.pull_equilibrium(1, 1.0),
      'num_classes must be at least 2, got 1',
    ),
    (
      lambda: theory.pull_equilibrium(10, 1.0, correlation=1.0),
      'correlation must be below 1',
    ),
    (
      lambda: theory.common_hessian_eigenvalues(1),
      'num_classes must be at least 2, got 1',
    ),
    (
      lambda: theory.common_hessian_eigenvalues(4, 'l2'),
      r"distance must be one of \['cosine', 'softmax'\], got 'l2'",
    ),
    (
      lambda: theory.hessian_spectrum(jnp.sum, jnp.ones((3, 1))),
      r'dim at least 2, got \(3, 1\)',
    ),
    (
      lambda: theory.nt_xent_hessian_eigenvalues(3, views=1),
      'views must be at least 2, got 1',
    ),
    (
      lambda: theory.nt_xent_hessian_eigenvalues(1),
      'num_examples must be at least 2, got 1',
    ),
    (
      lambda: theory.nt_xent_hessian_eigenvalues(5, collinear=True),
      'num_examples must be even and at least 4 if collinear, got 5',
    ),
  ],
)
def test_bad_input_gets_one_clear_line(call, message):
  with pytest.raises(ValueError, match=message) as error:
    call()
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('how', 'distance'),
  [
    ({'repulsion': 0.7}, {'repulsion': 0.7}),
    ({'distance': 'softmax', 'temperature': 0.3}, {'temperature': 0.3}),
  ],
)
def test_the_distances_are_those_of_the_loss(how, distance):
  name = 'softmax_distance' if 'distance' in how else 'cosine_distance'
  c = jnp.eye(4, 6)
  z = jax.random.normal(jax.random.key(0), (9, 6))
  unit = z / jnp.linalg.norm(z, axis=1, keepdims=True)
  labels = jnp.arange(9) % 4
  ours = [
    getattr(theory, name)(embedding, label, c, **distance)
    for embedding, label in zip(unit, labels, strict=True)
  ]
  expected = loss.clop_loss(z, labels, c, **how)
  assert np.mean(ours) == pytest.approx(float(expected), rel=1e-5)
