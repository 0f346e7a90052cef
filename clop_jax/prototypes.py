"""Creating, orthonormalizing and aligning class prototypes: pure functions.

Prototypes are `[num_classes, dim]`, one row per class. Every function works
under `jax.jit`, `jax.vmap`, `jax.pmap` and `jax.shard_map`. An invalid shape,
dtype or number raises a `ValueError` while tracing.

Functions that create prototypes compute in float32 at least, and round the
result to the floating `dtype`.
"""

import math

import jax
from jax import lax
import jax.numpy as jnp

from clop_jax import arguments
from clop_jax import linalg

_PRECISION = lax.Precision.HIGHEST


def orthonormal_prototypes(
  key: jax.Array, num_classes: int, dim: int, *, dtype=jnp.float32
) -> jax.Array:
  r"""Random prototypes, uniform over all orthonormal sets.

  .. math:: G_{ij} \sim N(0, 1), \quad G = Q R, \quad
    C = (Q\, \mathrm{sign}(\mathrm{diag} R))^\top, \quad C C^\top = I

  The signs of a QR factor depend on the algorithm. With a positive diagonal of
  `R` the factor is unique, and `C` has the Haar distribution.

  Args:
    key: PRNG key, `jax.random.key(seed)`.
    num_classes: Number of prototypes, at most `dim`.
    dim: Dimension of the embeddings.
    dtype: Floating dtype of the result.

  Returns:
    `[num_classes, dim]` orthonormal rows.

  Raises:
    ValueError: If `num_classes > dim`.

  Example:
    >>> import jax
    >>> from clop_jax import prototypes
    >>> c = prototypes.orthonormal_prototypes(jax.random.key(0), 10, 128)
    >>> print(c.shape, abs(c @ c.T - jax.numpy.eye(10)).max() < 1e-6)
    (10, 128) True

  Reference:
    Mezzadri, "How to generate random matrices from the classical compact
    groups", arXiv math-ph/0609050, section 5; CLOP, arXiv 2403.18699.
  """
  _check_sizes(num_classes, dim)
  compute_dtype = _compute_dtype(dtype)
  gaussian = jax.random.normal(key, (dim, num_classes), compute_dtype)
  q, r = jnp.linalg.qr(gaussian)
  signs = jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0).astype(compute_dtype)
  return _refine((q * signs[None]).T).astype(dtype)


def simplex_etf_prototypes(
  key: jax.Array, num_classes: int, dim: int, *, dtype=jnp.float32
) -> jax.Array:
  r"""Random simplex equiangular tight frame of `num_classes` unit vectors.

  .. math:: c_a \cdot c_b = -\frac{1}{k - 1} \; (a \ne b), \qquad
    C = \sqrt{\tfrac{k}{k-1}}\; H U

  with `H` (`[k, k-1]`) an orthonormal basis of the complement of the all-ones
  vector (Helmert's) and `U` random orthonormal rows. The rows sum to zero and
  are as far apart as `k` directions can be.

  Args:
    key: PRNG key.
    num_classes: Number of prototypes `k`, at least 2.
    dim: Dimension of the embeddings, at least `k - 1`.
    dtype: Floating dtype of the result.

  Returns:
    `[num_classes, dim]` unit rows.

  Raises:
    ValueError: If `dim < num_classes - 1`.

  Example:
    >>> import jax
    >>> from clop_jax import prototypes
    >>> c = prototypes.simplex_etf_prototypes(jax.random.key(0), 3, 2)
    >>> print((c @ c.T).round(3)[0])
    [ 1.  -0.5 -0.5]

  Reference:
    Papyan et al., "Prevalence of neural collapse during the terminal phase of
    deep learning training", arXiv 2008.08186, definition 1.
  """
  num_classes = arguments.count('num_classes', num_classes, at_least=2)
  dim = arguments.count('dim', dim)
  if dim < num_classes - 1:
    raise ValueError(
      f'dim must be at least num_classes - 1 = {num_classes - 1} for a simplex '
      f'of {num_classes} classes, got {dim}; use a wider embedding'
    )
  compute_dtype = _compute_dtype(dtype)
  # Column j of Helmert's basis is j equal entries, then -j times that entry.
  row = jnp.arange(num_classes, dtype=compute_dtype)[:, None]
  j = jnp.arange(1, num_classes, dtype=compute_dtype)[None, :]
  helmert = jnp.where(row < j, 1.0, jnp.where(row == j, -j, 0.0))
  helmert /= jnp.sqrt(j * (j + 1))
  basis = orthonormal_prototypes(key, num_classes - 1, dim, dtype=compute_dtype)
  simplex = jnp.matmul(helmert, basis, precision=_PRECISION)
  simplex *= math.sqrt(num_classes / (num_classes - 1))
  return simplex.astype(dtype)


def random_prototypes(
  key: jax.Array, num_classes: int, dim: int, *, dtype=jnp.float32
) -> jax.Array:
  r"""Independent random directions, for ablations of orthogonality.

  .. math:: c_k = g_k / \|g_k\|, \qquad g_k \sim N(0, I_{dim})

  Their cosines have mean 0 and standard deviation `1 / sqrt(dim)`.

  Args:
    key: PRNG key.
    num_classes: Number of prototypes, may exceed `dim`.
    dim: Dimension of the embeddings.
    dtype: Floating dtype of the result.

  Returns:
    `[num_classes, dim]` unit rows.

  Example:
    >>> import jax
    >>> from clop_jax import prototypes
    >>> c = prototypes.random_prototypes(jax.random.key(0), 3, 2)
    >>> print(prototypes.orthonormality_error(c) > 0.1)
    True
  """
  num_classes = arguments.count('num_classes', num_classes)
  dim = arguments.count('dim', dim)
  rows = jax.random.normal(key, (num_classes, dim), _compute_dtype(dtype))
  return linalg.normalize(rows).astype(dtype)


def orthonormality_error(prototypes: jax.Array) -> jax.Array:
  """Returns the largest entry of `|C C^T - I|`, 0 for orthonormal rows.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import prototypes
    >>> print(prototypes.orthonormality_error(jnp.eye(3, 4)))
    0.0
  """
  rows = arguments.real('prototypes', prototypes)
  identity = jnp.eye(len(rows), dtype=jnp.float32)
  return jnp.max(jnp.abs(_gram(rows) - identity))


def orthonormalize(prototypes: jax.Array) -> jax.Array:
  r"""Returns the nearest orthonormal rows (polar factor).

  .. math:: \arg\min_{C C^\top = I} \|C - P\|_F = U V^\top
    \quad\text{for}\quad P = U \Sigma V^\top

  Unlike Gram-Schmidt it treats all classes equally. If the rows are linearly
  dependent, it returns one of several nearest sets.

  Args:
    prototypes: `[num_classes, dim]`, floating, `num_classes <= dim`.

  Returns:
    `[num_classes, dim]` orthonormal rows of the same dtype.

  Raises:
    ValueError: If `num_classes > dim`.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import prototypes
    >>> p = jnp.array([[1.0, 1.0, 0.0], [1.0, -1.0, 0.0]])
    >>> print(prototypes.orthonormalize(p).round(3))
    [[ 0.707  0.707  0.   ]
     [ 0.707 -0.707  0.   ]]

  Reference:
    Higham, "Computing the polar decomposition, with applications", SIAM J. Sci.
    Stat. Comput. 7 (1986), theorem 3.1 (Fan and Hoffman).
  """
  prototypes = arguments.array('prototypes', prototypes)
  if prototypes.ndim != 2:
    raise ValueError(
      f'prototypes must have shape [num_classes, dim], got {prototypes.shape}'
    )
  if not jnp.issubdtype(prototypes.dtype, jnp.floating):
    raise ValueError(f'prototypes must be floating, got {prototypes.dtype}')
  _check_sizes(*prototypes.shape)
  compute_dtype = jnp.promote_types(prototypes.dtype, jnp.float32)
  u, _, vt = linalg.svd(prototypes.astype(compute_dtype))
  polar = jnp.matmul(u, vt, precision=_PRECISION)
  return _refine(polar).astype(prototypes.dtype)


def align_prototypes(class_means: jax.Array) -> jax.Array:
  r"""Returns the orthonormal set nearest to the class means (Procrustes).

  .. math:: \arg\max_{C C^\top = I} \sum_k c_k \cdot m_k
    = \arg\min_{C C^\top = I} \sum_k \|c_k - m_k\|^2

  A class without a mean (a row of zeros) gets one of the remaining directions.

  Args:
    class_means: `[num_classes, dim]`, floating, `num_classes <= dim`, see
      `clop_jax.collapse.class_means`. The length of a row is its weight.

  Returns:
    `[num_classes, dim]` orthonormal rows of the same dtype.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import prototypes
    >>> means = jnp.array([[0.0, 3.0, 0.0], [0.5, 0.0, 0.0]])
    >>> print(prototypes.align_prototypes(means))
    [[0. 1. 0.]
     [1. 0. 0.]]

  Reference:
    Schoenemann, "A generalized solution of the orthogonal Procrustes problem",
    Psychometrika 31 (1966).
  """
  return orthonormalize(class_means)


def assign_prototypes(
  class_means: jax.Array, prototypes: jax.Array
) -> jax.Array:
  r"""Assigns the given prototypes to the classes that they fit best.

  .. math:: c'_k = c_{\pi(k)}, \qquad
    \pi = \arg\max_{\pi} \sum_k c_{\pi(k)} \cdot m_k

  over all permutations. Unlike `align_prototypes` it keeps the set of
  prototypes, for example a simplex.

  Args:
    class_means: `[num_classes, dim]`, see `clop_jax.collapse.class_means`.
    prototypes: `[num_classes, dim]`.

  Returns:
    `[num_classes, dim]`, the rows of `prototypes` reordered, or NaN if an
    argument is not finite.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import prototypes
    >>> means = jnp.array([[0.1, 0.9], [0.8, 0.7]])
    >>> print(prototypes.assign_prototypes(means, jnp.eye(2)))
    [[0. 1.]
     [1. 0.]]

  Reference:
    Crouse, "On implementing 2D rectangular assignment algorithms", IEEE Trans.
    Aerosp. Electron. Syst. 52 (2016), section III.
  """
  class_means = arguments.real('class_means', class_means)
  prototypes = arguments.array('prototypes', prototypes)
  if class_means.shape != prototypes.shape or prototypes.ndim != 2:
    raise ValueError(
      'class_means and prototypes must both have shape [num_classes, dim], got '
      f'{class_means.shape} and {prototypes.shape}'
    )
  # Products of large means would overflow float32.
  means = lax.stop_gradient(class_means)
  directions = lax.stop_gradient(arguments.real('prototypes', prototypes))
  means = means / linalg.magnitude(means)
  directions = directions / linalg.magnitude(directions)
  gain = jnp.matmul(means, directions.T, precision=_PRECISION)
  is_finite = jnp.all(jnp.isfinite(gain))
  # The search would not terminate with NaN.
  assigned = prototypes[_cheapest_columns(jnp.where(is_finite, -gain, 0.0))]
  return jnp.where(is_finite, assigned, jnp.full_like(assigned, jnp.nan))


def pseudo_labels(
  embeddings: jax.Array,
  labels: jax.Array,
  prototypes: jax.Array,
  *,
  threshold: float,
  temperature: float = 0.1,
) -> jax.Array:
  r"""Labels unlabelled examples with the nearest prototype, where confident.

  .. math:: p_{ik} = \mathrm{softmax}_k\Big(\frac{1}{V \tau} \sum_v
    \cos(z_{v,i}, c_k)\Big), \qquad
    \hat y_i = \arg\max_k p_{ik} \;\text{if}\; \max_k p_{ik} \ge t
    \;\text{else}\; -1

  Labelled examples keep their label. No gradient flows through.

  Args:
    embeddings: `[views, batch, dim]`, floating.
    labels: `[batch]` integers; -1 is unlabelled.
    prototypes: `[num_classes, dim]`.
    threshold: Smallest confidence `t` that gives a label, in (0, 1].
    temperature: Softmax temperature, must be positive.

  Returns:
    `[batch]` int32 labels.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import prototypes
    >>> z = jnp.array([[[1.0, 0.1], [1.0, 1.0], [0.0, 1.0]]])
    >>> labels = jnp.array([-1, -1, 0])
    >>> print(prototypes.pseudo_labels(z, labels, jnp.eye(2), threshold=0.9))
    [ 0 -1  0]

  Reference:
    Lee, "Pseudo-Label", ICML workshop on challenges in representation learning
    (2013); the threshold as in Sohn et al., "FixMatch", arXiv 2001.07685.
  """
  threshold = arguments.number('threshold', threshold, above=0, at_most=1)
  temperature = arguments.number('temperature', temperature, above=0)
  embeddings = arguments.floating('embeddings', embeddings)
  _, batch, dim = arguments.views('embeddings', embeddings).shape
  prototypes = arguments.prototypes(prototypes, dim)
  labels = arguments.labels('labels', labels, (batch,), len(prototypes))
  cosines = jnp.matmul(
    jnp.mean(linalg.normalize(embeddings), axis=0),
    linalg.normalize(prototypes).T,
    precision=_PRECISION,
  )
  confidence = jax.nn.softmax(cosines / temperature, axis=-1)
  nearest = jnp.argmax(confidence, axis=-1).astype(jnp.int32)
  is_confident = jnp.max(confidence, axis=-1) >= threshold
  pseudo = jnp.where(is_confident, nearest, -1)
  return lax.stop_gradient(jnp.where(labels >= 0, labels, pseudo))


def _cheapest_columns(cost):
  """Column of each row in the assignment of lowest total cost, `[n]` int32.

  The Hungarian algorithm. `optax.assignment.hungarian_algorithm` fails for
  costs that vary over an axis of `shard_map`, and is slow on accelerators.
  """
  # Loops need values that vary over the same mapped axes as the costs.
  zeros = 0.0 * cost[0]
  none = zeros.astype(jnp.int32) - 1

  def find_path(row, u, v, row_of):
    """Finds the shortest alternating path from a row to a free column."""

    def extend(carry):
      here, least, _, distance, path, done = carry
      reached = least + cost[here] - u[here] - v
      closer = ~done & (reached < distance)
      distance = jnp.where(closer, reached, distance)
      path = jnp.where(closer, here, path)
      column = jnp.argmin(jnp.where(done, jnp.inf, distance)).astype(jnp.int32)
      owner = row_of[column]
      end = jnp.where(owner < 0, column, -1)
      here = jnp.where(owner < 0, here, owner)
      done = done.at[column].set(True)
      return here, distance[column], end, distance, path, done

    start = (row, zeros[0], none[0], zeros + jnp.inf, none, zeros > 0)
    _, least, end, distance, path, done = lax.while_loop(
      lambda carry: carry[2] < 0, extend, start
    )
    return least, end, path, jnp.where(done, least - distance, 0.0)

  def add_row(row, carry):
    u, v, row_of, column_of = carry
    row = row.astype(jnp.int32) + none[0] + 1
    least, end, path, slack = find_path(row, u, v, row_of)
    # Where `row_of` is -1, the column is free and its slack is 0.
    u = u.at[row].add(least).at[row_of].add(slack)

    def flip(carry):
      column, row_of, column_of = carry
      row = path[column]
      row_of = row_of.at[column].set(row)
      return column_of[row], row_of, column_of.at[row].set(column)

    _, row_of, column_of = lax.while_loop(
      lambda carry: carry[0] >= 0, flip, (end, row_of, column_of)
    )
    return u, v - slack, row_of, column_of

  start = (zeros, zeros, none, none)
  return lax.fori_loop(0, len(cost), add_row, start)[-1]


def _compute_dtype(dtype):
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f'dtype must be floating, got {jnp.dtype(dtype)}')
  return jnp.promote_types(dtype, jnp.float32)


def _refine(rows):
  """Reduces the error to about one eps by a Newton-Schulz step."""
  excess = _gram(rows) - jnp.eye(len(rows), dtype=rows.dtype)
  return rows - 0.5 * jnp.matmul(excess, rows, precision=_PRECISION)


def _gram(rows):
  """Inner products of the rows, accurate to about one eps for unit rows."""
  # A GPU adds the terms of a product one by one. Over 1,024 terms that rounds
  # by 1e-6, more than the error that `_refine` removes.
  parts = [rows[:, i : i + 64] for i in range(0, rows.shape[1], 64)]
  return sum(jnp.matmul(x, x.T, precision=_PRECISION) for x in parts)


def _check_sizes(num_classes, dim):
  num_classes = arguments.count('num_classes', num_classes)
  dim = arguments.count('dim', dim)
  if num_classes > dim:
    raise ValueError(
      f'num_classes must be at most dim={dim} for orthonormal prototypes, got '
      f'{num_classes}; use a wider embedding (or simplex_etf_prototypes at '
      'dim = num_classes - 1)'
    )
