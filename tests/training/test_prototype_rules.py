import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from clop_jax import loss
from clop_jax import prototypes
from clop_jax.training import prototype_rules

K, DIM = 6, 16


def made(k=K, dim=DIM):
  return prototypes.orthonormal_prototypes(jax.random.key(0), k, dim)


def test_learned_prototypes_stay_orthonormal_over_many_steps():
  rule = prototype_rules.Learned(0.5)

  def step(c, key):
    # Each step other embeddings, none of which suit the prototypes.
    z = jax.random.normal(key, (32, DIM)) + 2.0
    labels = jax.random.randint(key, (32,), -1, K)
    gradient = functools.partial(
      jax.grad(loss.clop_loss, argnums=2), z, labels, c
    )
    moved, _ = rule.update(c, None, gradient=gradient)
    error = prototypes.orthonormality_error(moved)
    return moved, (jnp.linalg.norm(moved - c), error)

  keys = jax.random.split(jax.random.key(1), 2_000)
  last, (moves, errors) = jax.jit(lambda c: lax.scan(step, c, keys))(made())
  assert errors.shape == (2_000,) and errors.max() < 1e-5
  gram = np.asarray(last, np.float64) @ np.asarray(last, np.float64).T
  assert np.abs(gram - np.eye(K)).max() < 1e-5
  # A rule that does nothing would stay orthonormal too.
  assert np.median(moves) > 1e-3


def play(rule, batches):
  """Prototypes after each step of a rule; batches are (z, labels)."""
  c = made()
  statistics = rule.statistics(c)

  @jax.jit
  def update(c, statistics, step, z, labels):
    return rule.update(
      c,
      statistics,
      step=step,
      embeddings=z,
      labels=labels,
      gradient=lambda: jnp.full_like(c, jnp.nan),
      axis_name=None,
    )

  history = [np.asarray(c)]
  for step, (z, labels) in enumerate(batches, start=1):
    c, statistics = update(c, statistics, step, z, labels)
    history.append(np.asarray(c))
  return history


def random_batches(count):
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(K, DIM))
  for _ in range(count):
    labels = rng.integers(-1, K, size=20)
    labels[:K] = np.arange(K)
    z = centres[labels] + rng.normal(size=(2, 20, DIM))
    yield z.astype(np.float32), labels.astype(np.int32)


def means_of(batches):
  """Class means of normalized embeddings, by loops in float64."""
  sums, counts = np.zeros((K, DIM)), np.zeros(K)
  for z, labels in batches:
    for view in z.astype(np.float64):
      for embedding, label in zip(view, labels, strict=True):
        if label >= 0:
          sums[label] += embedding / np.linalg.norm(embedding)
          counts[label] += 1
  return sums / counts[:, None]


def procrustes(means):
  """The orthonormal rows nearest to the means, by scipy."""
  # orthogonal_procrustes(A, B) gives the square R that brings A R near to B.
  a = np.eye(K, DIM)
  rotation, _ = scipy.linalg.orthogonal_procrustes(a, means)
  return a @ rotation


def align(means, before):
  del before
  return prototypes.align_prototypes(means)


def test_aligned_prototypes_are_scipys_solution_for_the_last_epochs_means():
  batches = list(random_batches(7))
  # Epochs of two steps: set after the second one, on steps 3 and 4.
  rule = prototype_rules.Aligned(align, 4, None, 2)
  history = play(rule, batches)
  for c in history[:4]:
    np.testing.assert_array_equal(c, history[0])
  np.testing.assert_allclose(
    history[4], procrustes(means_of(batches[2:4])), atol=1e-5
  )
  for c in history[5:]:
    np.testing.assert_array_equal(c, history[4])


def test_aligned_prototypes_can_be_set_again_every_so_often():
  batches = list(random_batches(8))
  rule = prototype_rules.Aligned(align, 2, 4, 2)
  history = play(rule, batches)
  changes = [
    step
    for step in range(1, 9)
    if np.abs(history[step] - history[step - 1]).max() > 0
  ]
  assert changes == [2, 6]
  np.testing.assert_allclose(
    history[6], procrustes(means_of(batches[4:6])), atol=1e-5
  )


def test_assigned_prototypes_are_the_same_ones_in_another_order():
  batches = list(random_batches(2))
  rule = prototype_rules.Aligned(prototypes.assign_prototypes, 2, None, 2)
  first, _, last = play(rule, batches)
  order = (last @ first.T).argmax(axis=1)
  np.testing.assert_array_equal(last, first[order])
  assert sorted(order) == list(range(K)) != list(order)
  means = means_of(batches)
  assert (last * means).sum() > (first * means).sum()


def test_the_clop_term_waits_for_the_first_alignment():
  rule = prototype_rules.Aligned(align, 4, None, 2)
  assert [float(rule.clop_factor(step)) for step in (0, 3, 4, 9)] == [
    0.0,
    0.0,
    1.0,
    1.0,
  ]
  assert prototype_rules.Fixed().clop_factor(0) == 1.0
