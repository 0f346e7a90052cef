import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clop_jax import collapse
from clop_jax import loss
from clop_jax import theory
from docs.theory import stationary
from docs.theory import tables
from tests import small

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
  for i, axis in np.ndindex(n, dim):
    values = []
    for sign in (1, -1):
      moved = rows.copy()
      moved[i, axis] += sign * 1e-5
      energy = np_energy(model, moved, i, k)
      values.append(energy + weight * distance(moved[i], i % k, prototypes))
    gradient[i, axis] = (values[0] - values[1]) / 2e-5
  if model == 'tangent':
    gradient -= np.sum(gradient * rows, axis=1, keepdims=True) * rows
  kernel = (1 - correlation) * np.eye(n) + correlation * np.ones((n, n))
  return unit(rows - rate * kernel @ gradient).reshape(z.shape)


def np_cosine(z, label, prototypes, r=0.0):
  others = [z @ c for j, c in enumerate(prototypes) if j != label]
  return 1 - z @ prototypes[label] + r * sum(others) / len(others)


def np_softmax(z, label, prototypes, temperature=0.1):
  shares = [math.exp(z @ c / temperature) for c in prototypes]
  return -math.log(shares[label] / sum(shares))


def distances(**keywords):
  """A distance and its oracle."""
  if 'temperature' in keywords:
    return (
      functools.partial(theory.softmax_distance, **keywords),
      functools.partial(np_softmax, **keywords),
    )
  return (
    functools.partial(theory.cosine_distance, **keywords),
    functools.partial(np_cosine, r=keywords.get('repulsion', 0.0)),
  )


DISTANCES = [distances(), distances(repulsion=0.7), distances(temperature=0.1)]


@pytest.mark.parametrize(
  ('model', 'pull'),
  [(model, n % 3) for n, model in enumerate(MODELS)] + [('repulsion', 2)],
)
def test_two_steps_equal_central_differences_of_the_energies(model, pull):
  rng = np.random.default_rng(3)
  ours, numpys = DISTANCES[pull]
  z = start = unit(rng.normal(size=(2, 3, 4)))
  prototypes = np.linalg.qr(rng.normal(size=(4, 4)))[0][:3]
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
  cosines = np.einsum('vid,wjd->ijvw', z, z)[~np.eye(3, dtype=bool)]
  np.testing.assert_allclose(outcome.mean_cosine, cosines.mean(), atol=2e-5)
  clop = 1 - np.mean(np.sum(z * prototypes, axis=-1))
  np.testing.assert_allclose(outcome.clop_loss, clop, atol=2e-5)
  np.testing.assert_allclose(
    outcome.effective_rank, collapse.effective_rank(z), rtol=1e-4
  )


@pytest.mark.parametrize(
  ('model', 'k'),
  [
    ('repulsion', 5),
    ('repulsion', 10),
    ('symmetric', 10),
    ('row_softmax', 10),
    ('row_softmax', 300),
  ],
)
def test_bisection_finds_the_closed_form(model, k):
  expected = 2 * (k - 1) / (k - 2) / WITH_COLLAPSE[model]
  closed = theory.critical_learning_rate(model, k, 8, temperature=TAU)
  assert closed == pytest.approx(expected, rel=1e-12)
  # Near collapse all differences grow by one factor, whatever the dimension.
  bisected = theory.bisect_critical_learning_rate(
    model, k, 8, temperature=TAU, steps=20
  )
  assert bisected == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(
  ('model', 'k', 'weight', 'correlation'),
  [
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
  bisected = theory.bisect_critical_learning_rate(
    model, k, k + 3, steps=500, **problem
  )
  assert bisected == pytest.approx(closed, rel=5e-4)


@pytest.mark.parametrize('model', ['tangent', 'infonce'])
def test_models_whose_radial_gradient_vanishes_have_no_critical_rate(model):
  assert theory.critical_learning_rate(model, 10, 16) == math.inf
  assert theory.bisect_critical_learning_rate(model, 10, 16) == math.inf


def test_a_pull_of_weight_1_forbids_collapse_of_free_vectors_at_every_rate():
  pull = {'clop_weight': 1.0}
  assert theory.critical_learning_rate('repulsion', 10, 16, **pull) == math.inf
  starts = jax.random.normal(jax.random.key(0), (2, 1, 10, 16))
  rates = jnp.array([3.0, 20.0, 100.0])
  free = theory.simulate('repulsion', rates, starts)
  assert jnp.all(free.collapsed) and jnp.all(free.effective_rank < 1.01)
  pulled = theory.simulate(
    'repulsion', rates, starts, prototypes=jnp.eye(10, 16), **pull
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
  ('weight', 'correlation', 'repulsion'),
  [(1, 0, 0), (5, 0.5, 0), (5, 0.9, 1), (5, 0.9, 2)],
)
def test_the_simulation_rests_at_the_equilibrium_of_pull_and_repulsion(
  weight, correlation, repulsion
):
  k = 10
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
  expected = stationary.pull_equilibrium(
    k, weight, correlation=correlation, repulsion=repulsion
  )
  got = float(outcome.mean_cosine[0, 0]), float(outcome.clop_loss[0, 0])
  np.testing.assert_allclose(got, expected, atol=1e-4)


def test_outputs_that_move_together_rest_at_the_prototypes_mean_from_sqrt_k():
  collapsed = 1 - 1 / math.sqrt(10)
  heavy = stationary.pull_equilibrium(10, 5.0, correlation=0.9999)
  assert heavy.clop_loss == pytest.approx(collapsed, abs=1e-3)
  light = stationary.pull_equilibrium(10, 1.0, correlation=0.9999)
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


@pytest.mark.parametrize('name', REAL_LOSSES)
def test_embeddings_on_one_line_are_stationary_for_the_real_losses(name):
  gradient = jax.jit(jax.grad(REAL_LOSSES[name]))
  for kind in ('equal', 'collinear'):
    z = lines(kind, 2, 4, 5)
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
  values = stationary.nt_xent_hessian_eigenvalues(
    examples,
    temperature=temperature,
    views=views,
    collinear=kind == 'collinear',
  ).values()
  expected = np.repeat(*map(np.array, zip(*values, strict=True)))
  spectrum = stationary.hessian_spectrum(
    functools.partial(loss.nt_xent_loss, temperature=temperature),
    lines(kind, views, examples, dim),
  )
  expected = np.sort(np.repeat(expected, dim - 1))
  np.testing.assert_allclose(spectrum, expected, atol=2e-6)
  assert spectrum[0] < -0.1  # classes moving apart: the point is a saddle


def test_the_class_directions_are_those_that_lower_the_real_nt_xent():
  z = lines('equal', 2, 4, 5)
  values = stationary.nt_xent_hessian_eigenvalues(4, temperature=0.5)
  apart = np.random.default_rng(0).normal(size=(4, 5))
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
  hessian = np.zeros((n, n))
  for i, j in np.ndindex(n, n):
    together, apart = steps[i] + steps[j], steps[i] - steps[j]
    hessian[i, j] = at(together) + at(-together) - at(apart) - at(-apart)
  return np.linalg.eigvalsh(hessian / (4 * h * h))


def test_the_spectrum_is_that_of_great_circles_off_a_stationary_point_too():
  rng = np.random.default_rng(1)
  z, b = unit(rng.normal(size=5)), rng.normal(size=5)
  a = rng.normal(size=(5, 5))
  a = a + a.T
  expected = np_riemannian_spectrum(lambda z: z @ a @ z + (z @ b) ** 3, z)
  spectrum = stationary.hessian_spectrum(
    lambda z: z @ jnp.asarray(a) @ z + (z @ jnp.asarray(b)) ** 3, z
  )
  np.testing.assert_allclose(spectrum, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
  'keywords', [{}, {'repulsion': 1.0}, {'repulsion': 1.5}, {'temperature': 0.5}]
)
def test_the_common_potential_at_the_mean_has_the_closed_curvature(keywords):
  k, dim = 4, 6
  ours, numpys = distances(**keywords)
  prototypes = np.linalg.qr(np.random.default_rng(0).normal(size=(dim, k)))[0].T
  mean = unit(prototypes.sum(0))
  values = stationary.common_hessian_eigenvalues(
    k, 'softmax' if 'temperature' in keywords else 'cosine', **keywords
  )
  expected = sorted(
    [values['class']] * (k - 1) + [values['outside']] * (dim - k)
  )
  c = jnp.asarray(prototypes, jnp.float32)
  spectrum = stationary.hessian_spectrum(
    lambda z: stationary.common_potential(z, c, distance=ours),
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
  force = jax.vmap(jax.grad(stationary.common_potential), in_axes=(0, None))
  np.testing.assert_allclose(
    force(jnp.asarray(z), jnp.asarray(etf)), 0, atol=1e-6
  )


def test_at_the_mean_the_real_clop_loss_holds_all_but_no_single_embedding():
  k = 10
  c = jnp.eye(k, k + 2)
  mean = jnp.sum(c, axis=0) / math.sqrt(k)

  def shared(z):
    every = jnp.broadcast_to(z, (k, k + 2))
    return loss.clop_loss(every, jnp.arange(k), c)

  assert float(shared(mean)) == pytest.approx(1 - 1 / math.sqrt(k), abs=1e-6)
  np.testing.assert_allclose(jax.grad(shared)(mean), 0, atol=1e-6)
  spectrum = stationary.hessian_spectrum(shared, mean)
  np.testing.assert_allclose(spectrum, 1 / math.sqrt(k), atol=1e-5)
  gradient = jax.grad(loss.clop_loss)(jnp.tile(mean, (k, 1)), jnp.arange(k), c)
  lengths = jnp.linalg.norm(gradient, axis=1) * k
  np.testing.assert_allclose(lengths, math.sqrt(1 - 1 / k), atol=1e-5)


@pytest.mark.parametrize(('k', 'temperature'), [(5, 0.5), (10, 1.0), (10, 0.1)])
def test_infonce_collapses_onto_a_line_with_opposite_views(k, temperature):
  critical = stationary.opposite_views_critical_rate(k, temperature=temperature)
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


def test_infonce_has_no_collapse_onto_a_line_at_high_temperatures():
  rate = stationary.opposite_views_critical_rate(10, temperature=50)
  assert rate == math.inf


STARTS = np.ones((1, 2, 4, 5), np.float32)
C = np.eye(3, 5)


@pytest.mark.parametrize(
  ('arguments', 'keywords', 'message'),
  [
    (('adam', [1.0], STARTS), {}, "model .*'repulsion'.*got 'adam'"),
    (('repulsion', 1.0, STARTS), {}, r'learning_rates .*got \(\)'),
    (('infonce', [1.0], STARTS[:, :1]), {}, r'starts .*\(1, 1, 4, 5\)'),
    (('repulsion', [1.0], STARTS), {'clop_weight': 1.0}, 'prototypes .*None'),
    (('repulsion', [1.0], STARTS), {'prototypes': C}, r'prototypes .*\(3, 5\)'),
  ],
)
def test_a_wrong_argument_of_a_simulation_is_named(
  arguments, keywords, message
):
  with pytest.raises(ValueError, match=message):
    theory.simulate(*arguments, **keywords)


@pytest.mark.parametrize(
  ('arguments', 'keywords', 'message'),
  [
    (('repulsion', 2, 8), {}, 'num_classes .*got 2'),
    (('repulsion', 10, 1), {}, 'dim .*got 1'),
    (('repulsion', 10, 8), {'clop_weight': 0.1}, 'dim .*=10 .*got 8'),
    (('repulsion', 10, 10), {'clop_weight': 0.1}, 'dim=10.*use bisect'),
    (
      ('repulsion', 10, 16),
      {'clop_weight': 5.0, 'correlation': 0.5},
      r'clop_weight=5\.0.*mean of the prototypes; use bisect',
    ),
    (
      ('tangent', 10, 16),
      {'clop_weight': 1.0, 'correlation': 0.5},
      "'tangent'.*no closed form: use bisect",
    ),
    (('repulsion', 10, 16), {'correlation': 1.0}, 'correlation .*below 1'),
    (('repulsion', 9, 9), {'correlation': -1}, 'correlation .*got -1'),
    (('repulsion', 9, 9), {'clop_weight': -1}, 'clop_weight .*got -1'),
    (('repulsion', 9, 9), {'level': 1.0}, r'level .*got 1\.0'),
    (('row_softmax', 9, 9), {'temperature': 0}, 'temperature .*got 0'),
  ],
)
def test_a_problem_without_a_closed_form_is_named(arguments, keywords, message):
  with pytest.raises(ValueError, match=message):
    theory.critical_learning_rate(*arguments, **keywords)


@pytest.mark.parametrize('make', [tables.hessians, tables.opposite_views])
def test_the_page_has_the_tables_that_its_script_prints(make, monkeypatch):
  rows = []
  monkeypatch.setattr(tables, 'table', lambda *table: rows.extend(table[2]))
  make()
  page = (small.ROOT / 'docs' / 'theory.md').read_text()
  for row in rows:
    # The last column of `hessians` is rounding.
    cells = row[:-1] if make is tables.hessians else row
    assert ' | '.join(map(tables.text, cells)) in page
