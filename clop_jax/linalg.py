"""Unit vectors, and decompositions that lower on every platform.

On a TPU, JAX writes its SVD and, for more than 256 rows, its `eigh` as loops,
which cannot be lowered for values that vary over an axis of `jax.shard_map`.
There these functions use QR and Jacobi rotations instead.
"""

import jax
from jax import lax
import jax.numpy as jnp

_PRECISION = lax.Precision.HIGHEST
_JACOBI = lax.linalg.EighImplementation.JACOBI


def normalize(x: jax.Array) -> jax.Array:
  """Returns unit vectors along the last axis; zero vectors stay 0.

  The dtype is kept. The gradient at a zero vector is 0.
  """
  # Dividing by the largest entry first keeps the squares within float32.
  largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
  is_zero = largest == 0.0
  x = x / jnp.where(is_zero, 1.0, largest)
  squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * jnp.where(
    is_zero, 0.0, lax.rsqrt(jnp.where(is_zero, 1.0, squared))
  )


def magnitude(x: jax.Array, axis_name: str | None = None) -> jax.Array:
  """Returns the largest absolute entry over all devices, or 1 if all are 0.

  Dividing by it keeps the squares of very large or small numbers in float32.
  """
  largest = jnp.max(jnp.abs(x))
  if axis_name is not None:
    largest = lax.pmax(largest, axis_name)
  return jnp.where(largest == 0.0, 1.0, largest)


def svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  r"""Thin singular value decomposition, singular values largest first.

  .. math:: A = U\, \mathrm{diag}(\sigma)\, V^\top

  Args:
    matrix: `[..., m, n]`, floating.

  Returns:
    `U` `[..., m, r]`, singular values `[..., r]` and `V^T` `[..., r, n]` with
    `r = min(m, n)`. `U` and `V` are orthonormal even if the matrix is singular.
  """
  return lax.platform_dependent(matrix, tpu=_svd_by_eigh, default=_svd)


def singular_values(
  rows: jax.Array, *, axis_name: str | None = None
) -> jax.Array:
  r"""Singular values of a matrix whose rows may be split over devices.

  With `axis_name` nothing larger than `[dim, dim]` is reduced. The eigenvalues
  of :math:`Z^\top Z` would lose singular values below `sqrt(eps) = 3e-4` of the
  largest. So the rows are rotated to its eigenvectors, :math:`Y = Z V`, and the
  singular values are the norms of the columns of :math:`Y`.

  The error of a singular value is at most about 2e-4 of the largest. The
  effective rank differs from that of a float64 SVD by less than 0.1 %, except
  for very weak directions (1.3 % for one 3e-4 as strong as the only other one).

  Args:
    rows: `[n, dim]`, floating. With `axis_name`, this device's rows.
    axis_name: Mapped axis of the rows, or None.

  Returns:
    `[min(n, dim)]` without `axis_name`, else `[dim]`, largest first.

  Reference:
    Demmel and Veselic, "Jacobi's method is more accurate than QR", SIAM J.
    Matrix Anal. Appl. 13 (1992), section 4.
  """
  if axis_name is None:
    return lax.platform_dependent(
      rows,
      tpu=lambda x: _svd_by_eigh(x)[1],
      default=lambda x: jnp.linalg.svd(x, compute_uv=False),
    )
  # The Gram matrix is replicated, so JAX's own `eigh` lowers everywhere.
  gram = lax.psum(_matmul(rows.T, rows), axis_name)
  vectors, _ = lax.linalg.eigh(gram, symmetrize_input=False)
  rotated = _matmul(rows, vectors)
  energy = lax.psum(jnp.sum(rotated**2, axis=0), axis_name)
  return jnp.sqrt(-jnp.sort(-energy))


def _matmul(a, b):
  return jnp.matmul(a, b, precision=_PRECISION)


def _eigh_jacobi(matrix):
  vectors, values = lax.linalg.eigh(matrix, implementation=_JACOBI)
  return values, vectors


def _svd(matrix):
  return tuple(jnp.linalg.svd(matrix, full_matrices=False))


def _svd_by_eigh(matrix):
  """SVD by QR and Jacobi rotations."""
  if matrix.shape[-2] < matrix.shape[-1]:
    u, sigma, vt = _svd_by_eigh(matrix.mT)
    return vt.mT, sigma, u.mT
  q, r = jnp.linalg.qr(matrix)
  _, v = _eigh_jacobi(_matmul(r.mT, r))
  v = jnp.flip(v, axis=-1)
  # The columns of R V are orthogonal. QR normalizes them, gives zero columns a
  # direction, and leaves sigma on its diagonal, up to the sign.
  u, diagonal = jnp.linalg.qr(_matmul(r, v))
  diagonal = jnp.diagonal(diagonal, axis1=-2, axis2=-1)
  sign = jnp.where(diagonal < 0.0, -1.0, 1.0).astype(matrix.dtype)
  u = _matmul(q, u) * sign[..., None, :]
  order = jnp.argsort(-jnp.abs(diagonal), axis=-1)
  return (
    jnp.take_along_axis(u, order[..., None, :], axis=-1),
    jnp.take_along_axis(jnp.abs(diagonal), order, axis=-1),
    jnp.take_along_axis(v.mT, order[..., None], axis=-2),
  )
