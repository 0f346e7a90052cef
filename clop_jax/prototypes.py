"""Class prototypes: made, orthonormalized and aligned by pure functions.

Prototypes are `[num_classes, dim]` with one row a class. Every function works
under `jax.jit`, `jax.vmap` and `jax.pmap`; shapes are checked while tracing.
"""

import math

import jax
from jax import lax
import jax.numpy as jnp

_PRECISION = lax.Precision.HIGHEST


def orthonormal_prototypes(
  key: jax.Array, num_classes: int, dim: int, *, dtype=jnp.float32
) -> jax.Array:
  r"""Random prototypes, uniform over all orthonormal sets.

  .. math:: G_{ij} \sim N(0, 1), \quad G = Q R, \quad
    C = (Q\, \mathrm{sign}(\mathrm{diag} R))^\top, \quad C C^\top = I

  A QR factor alone is not uniform: its signs are the algorithm's choice. With
  the diagonal of `R` made positive the factor is unique, and `C` has the Haar
  distribution.

  Args:
    key: a PRNG key, `jax.random.key(seed)`.
    num_classes: number of prototypes, at most `dim`.
    dim: dimension of the embeddings.
    dtype: floating; computed in float32 at least.

  Returns:
    `[num_classes, dim]` orthonormal rows.

  Raises:
    ValueError: if `num_classes > dim`, one of them is below 1, or `dtype` is
      not floating.

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
  return _refine((q * signs).T).astype(dtype)


def simplex_etf_prototypes(
  key: jax.Array, num_classes: int, dim: int, *, dtype=jnp.float32
) -> jax.Array:
  r"""Random simplex equiangular tight frame of `num_classes` unit vectors.

  .. math:: c_a \cdot c_b = -\frac{1}{k - 1} \; (a \ne b), \qquad
    C = \sqrt{\tfrac{k}{k-1}}\; H U

  with `H` (`[k, k-1]`) an orthonormal basis of the complement of the all-ones
  vector (Helmert's) and `U` random orthonormal rows. The rows sum to zero; they
  are as far apart as `k` directions can be, and need one dimension less.

  Args:
    key: a PRNG key.
    num_classes: `k`, at least 2.
    dim: dimension of the embeddings, at least `k - 1`.
    dtype: floating; computed in float32 at least.

  Returns:
    `[num_classes, dim]` unit rows.

  Raises:
    ValueError: if `num_classes < 2`, `dim < num_classes - 1`, or `dtype` is not
      floating.

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
  if num_classes < 2:
    raise ValueError(
      f'num_classes must be at least 2 for a simplex, got {num_classes}'
    )
  if dim < num_classes - 1:
    raise ValueError(
      f'dim must be at least num_classes - 1 = {num_classes - 1} for a simplex '
      f'of {num_classes} classes, got {dim}; use a wider embedding'
    )
  compute_dtype = _compute_dtype(dtype)
  # Column j of Helmert's basis: j equal entries, then -j times as much.
  row = jnp.arange(num_classes, dtype=compute_dtype)[:, None]
  j = jnp.arange(1, num_classes, dtype=compute_dtype)[None, :]
  helmert = jnp.where(row < j, 1.0, jnp.where(row == j, -j, 0.0))
  helmert /= jnp.sqrt(j * (j + 1))
  basis = orthonormal_prototypes(key, num_classes - 1, dim, dtype=compute_dtype)
  simplex = jnp.matmul(helmert, basis, precision=_PRECISION)
  simplex *= math.sqrt(num_classes / (num_classes - 1))
  return simplex.astype(dtype)


def orthonormalize(prototypes: jax.Array) -> jax.Array:
  r"""The nearest orthonormal rows: the polar factor.

  .. math:: \arg\min_{C C^\top = I} \|C - P\|_F = U V^\top
    \quad\text{for}\quad P = U \Sigma V^\top

  Unlike Gram-Schmidt it treats all classes alike. If the rows are linearly
  dependent the nearest set is not unique; one of them is returned.

  Args:
    prototypes: `[num_classes, dim]`, floating, `num_classes <= dim`.

  Returns:
    `[num_classes, dim]` orthonormal rows of the same dtype.

  Raises:
    ValueError: if the shape or the dtype is not as above.

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
  prototypes = jnp.asarray(prototypes)
  if prototypes.ndim != 2:
    raise ValueError(
      f'prototypes must have shape [num_classes, dim], got {prototypes.shape}'
    )
  if not jnp.issubdtype(prototypes.dtype, jnp.floating):
    raise ValueError(f'prototypes must be floating, got {prototypes.dtype}')
  _check_sizes(*prototypes.shape)
  compute_dtype = jnp.promote_types(prototypes.dtype, jnp.float32)
  u, _, vt = jnp.linalg.svd(
    prototypes.astype(compute_dtype), full_matrices=False
  )
  polar = jnp.matmul(u, vt, precision=_PRECISION)
  return _refine(polar).astype(prototypes.dtype)


def align_prototypes(class_means: jax.Array) -> jax.Array:
  r"""The orthonormal set nearest to given class means (Procrustes).

  .. math:: \arg\max_{C C^\top = I} \sum_k c_k \cdot m_k
    = \arg\min_{C C^\top = I} \sum_k \|c_k - m_k\|^2

  A random set of prototypes is also a random assignment of classes to
  directions; this one asks of the embeddings the least change. A class without
  a mean is a row of zeros: it gets a direction that is left over.

  Args:
    class_means: `[num_classes, dim]`, floating, see
      `clop_jax.collapse.class_means`. Scale a row to give its class weight.

  Returns:
    `[num_classes, dim]` orthonormal rows of the same dtype.

  Raises:
    ValueError: if the shape or the dtype is not as above.

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


def _compute_dtype(dtype):
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f'dtype must be floating, got {jnp.dtype(dtype)}')
  return jnp.promote_types(dtype, jnp.float32)


def _refine(rows):
  """One Newton-Schulz step: from orthonormal to some eps to about one eps."""
  gram = jnp.matmul(rows, rows.T, precision=_PRECISION)
  return 1.5 * rows - 0.5 * jnp.matmul(gram, rows, precision=_PRECISION)


def _check_sizes(num_classes, dim):
  if num_classes < 1:
    raise ValueError(f'num_classes must be at least 1, got {num_classes}')
  if num_classes > dim:
    raise ValueError(
      f'num_classes must be at most dim={dim} for orthonormal prototypes, got '
      f'{num_classes}; use a wider embedding (or simplex_etf_prototypes at '
      'dim = num_classes - 1)'
    )
