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
  """The energy that the vector `moving` descends, by a loop over pairs."""
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
  """One step from central differences of the energies."""
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
  [(model, n % 3) for n, model in enumerate(MODELS)],
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
  ('model', 'weight', 'correlation', 'steps'),
  [
    ('repulsion', 0.0, 0.0, 20),
    ('symmetric', 0.0, 0.0, 20),
    ('row_softmax', 0.0, 0.0, 20),
    ('repulsion', 0.0, 0.3, 100),
    ('symmetric', 1.0, 0.0, 500),
    ('row_softmax', 0.6, 0.1, 500),
  ],
)
def test_bisection_agrees_with_the_closed_form(
  model, weight, correlation, steps
):
  k = 10
  keywords = {
    'clop_weight': weight,
    'correlation': correlation,
    'temperature': TAU,
  }
  closed = theory.critical_learning_rate(model, k, k + 3, **keywords)
  if not weight and not correlation:
    expected = 2 * (k - 1) / (k - 2) / WITH_COLLAPSE[model]
    assert closed == pytest.approx(expected, rel=1e-12)
  bisected = theory.bisect_critical_learning_rate(
    model, k, k + 3, steps=steps, **keywords
  )
  assert bisected == pytest.approx(closed, rel=5e-4)


@pytest.mark.parametrize('model', ['tangent', 'infonce'])
def test_models_that_repel_equal_embeddings_have_no_critical_rate(model):
  assert theory.critical_learning_rate(model, 10, 16) == math.inf
  assert theory.bisect_critical_learning_rate(model, 10, 16) == math.inf


def test_a_clop_weight_of_1_prevents_collapse_at_every_rate():
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


@pytest.mark.parametrize(
  ('weight', 'correlation', 'repulsion'),
  [(1, 0, 0), (5, 0.9, 2)],
)
def test_the_simulation_ends_at_the_equilibrium(weight, correlation, repulsion):
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


def test_outputs_that_move_together_end_at_the_mean_of_prototypes():
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


def test_embeddings_on_one_line_are_stationary_for_the_real_losses():
  gradients = jax.jit(
    lambda z: {name: jax.grad(f)(z) for name, f in REAL_LOSSES.items()}
  )
  for kind in ('equal', 'collinear'):
    z = lines(kind, 2, 4, 5)
    # Off the line they have a gradient.
    off = z + 0.3 * jax.random.normal(jax.random.key(0), z.shape)
    for name in REAL_LOSSES:
      assert jnp.max(jnp.abs(gradients(z)[name])) < 1e-6, name
      assert jnp.max(jnp.abs(gradients(off)[name])) > 1e-2, name


@pytest.mark.parametrize(
  ('kind', 'views', 'temperature'), [('equal', 2, 0.5), ('collinear', 3, 1.0)]
)
def test_the_hessian_of_nt_xent_has_the_closed_form(kind, views, temperature):
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
  assert spectrum[0] < -0.1  # classes move apart: the point is a saddle


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


def test_the_hessian_spectrum_is_that_along_great_circles():
  rng = np.random.default_rng(1)
  z, b = unit(rng.normal(size=5)), rng.normal(size=5)
  a = rng.normal(size=(5, 5))
  a = a + a.T
  expected = np_riemannian_spectrum(lambda z: z @ a @ z + (z @ b) ** 3, z)
  spectrum = stationary.hessian_spectrum(
    lambda z: z @ jnp.asarray(a) @ z + (z @ jnp.asarray(b)) ** 3, z
  )
  np.testing.assert_allclose(spectrum, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('keywords', [{'repulsion': 1.5}, {'temperature': 0.5}])
def test_the_common_potential_at_the_mean_has_the_closed_curvature(keywords):
  k, dim = 4, 6
  ours, _ = distances(**keywords)
  prototypes = np.linalg.qr(np.random.default_rng(0).normal(size=(dim, k)))[0].T
  values = stationary.common_hessian_eigenvalues(
    k, 'softmax' if 'temperature' in keywords else 'cosine', **keywords
  )
  expected = sorted(
    [values['class']] * (k - 1) + [values['outside']] * (dim - k)
  )
  c = jnp.asarray(prototypes, jnp.float32)
  spectrum = stationary.hessian_spectrum(
    lambda z: stationary.common_potential(z, c, distance=ours),
    jnp.asarray(unit(prototypes.sum(0)), jnp.float32),
  )
  np.testing.assert_allclose(spectrum, expected, atol=2e-5)


def test_a_simplex_etf_exerts_no_common_force_anywhere():
  k = 5
  etf = unit(np.eye(k) - 1 / k)
  z = unit(np.random.default_rng(0).normal(size=(3, k)))
  force = jax.vmap(jax.grad(stationary.common_potential), in_axes=(0, None))
  np.testing.assert_allclose(
    force(jnp.asarray(z), jnp.asarray(etf)), 0, atol=1e-6
  )


def test_at_the_mean_of_prototypes_the_clop_loss_has_a_minimum_of_equal_ones():
  k = 5
  c = jnp.eye(k, k + 2)
  mean = jnp.sum(c, axis=0) / math.sqrt(k)

  def shared(z):
    every = jnp.broadcast_to(z, (k, k + 2))
    return loss.clop_loss(every, jnp.arange(k), c)

  assert float(shared(mean)) == pytest.approx(1 - 1 / math.sqrt(k), abs=1e-6)
  np.testing.assert_allclose(jax.jit(jax.grad(shared))(mean), 0, atol=1e-6)
  spectrum = stationary.hessian_spectrum(shared, mean)
  np.testing.assert_allclose(spectrum, 1 / math.sqrt(k), atol=1e-5)


def test_infonce_collapses_onto_a_line_with_opposite_views():
  k, temperature = 5, 0.5
  critical = stationary.opposite_views_critical_rate(k, temperature=temperature)
  start = 1e-3 * np.random.default_rng(0).normal(size=(1, 2, k, k + 1))
  start[:, 0, :, 0] += 1
  start[:, 1, :, 0] -= 1
  outcome = theory.simulate(
    'infonce',
    critical * jnp.array([0.95, 1.05]),
    jnp.asarray(start, jnp.float32),
    steps=600,
    temperature=temperature,
  )
  assert list(outcome.effective_rank[:, 0] < 1.01) == [False, True]
  np.testing.assert_allclose(outcome.mean_cosine[1:], 0, atol=1e-3)


def test_infonce_has_no_collapse_onto_a_line_at_high_temperatures():
  rate = stationary.opposite_views_critical_rate(10, temperature=50)
  assert rate == math.inf


STARTS = np.ones((1, 2, 4, 5), np.float32)


def simulate(model='repulsion', rates=(1.0,), starts=STARTS, **keywords):
  return theory.simulate(model, rates, starts, **keywords)


def critical(model, k, dim, **keywords):
  return theory.critical_learning_rate(model, k, dim, **keywords)


PULL = {'clop_weight': 5.0, 'correlation': 0.5}


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: simulate('adam'), "model .*'adam'"),
    (lambda: simulate(rates=1.0), r'learning_rates .*\(\)'),
    (
      lambda: simulate('infonce', starts=STARTS[:, :1]),
      r'starts .*\(1, 1, 4, 5\)',
    ),
    (lambda: simulate(clop_weight=1.0), 'prototypes .*None'),
    (lambda: simulate(prototypes=np.eye(3, 5)), r'prototypes .*\(3, 5\)'),
    (lambda: critical('repulsion', 2, 8), 'num_classes .*2'),
    (lambda: critical('repulsion', 10, 1), 'dim .*1'),
    (lambda: critical('repulsion', 10, 8, clop_weight=0.1), 'dim .*=10 .*8'),
    (lambda: critical('repulsion', 9, 9, clop_weight=0.1), 'dim=9.*bisect'),
    (
      lambda: critical('repulsion', 10, 16, **PULL),
      r'clop_weight=5\.0.*bisect',
    ),
    (lambda: critical('tangent', 10, 16, **PULL), "'tangent'.*bisect"),
    (lambda: critical('repulsion', 9, 9, correlation=1.0), 'correlation .*1'),
    (lambda: critical('repulsion', 9, 9, correlation=-1), 'correlation .*-1'),
    (lambda: critical('repulsion', 9, 9, clop_weight=-1), 'clop_weight .*-1'),
    (lambda: critical('row_softmax', 9, 9, temperature=0), 'temperature .*0'),
  ],
)
def test_invalid_arguments(call, message):
  with pytest.raises(ValueError, match=message):
    call()


@pytest.mark.parametrize('make', [tables.hessians, tables.opposite_views])
def test_docs_theory_has_the_tables_of_its_script(make, monkeypatch):
  rows = []
  # Only the column that is not compared needs the spectrum.
  monkeypatch.setattr(stationary, 'hessian_spectrum', lambda *_: 0.0)
  monkeypatch.setattr(tables, 'table', lambda *table: rows.extend(table[2]))
  make()
  docs = small.ROOT / 'docs'
  paths = [docs / 'theory.md', *docs.glob('theory/*.md')]
  page = ''.join(path.read_text() for path in paths)
  for row in rows:
    # The last column of `hessians` is rounding.
    cells = row[:-1] if make is tables.hessians else row
    assert ' | '.join(map(tables.text, cells)) in page
