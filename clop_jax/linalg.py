"""Unit vectors, and decompositions that lower everywhere, also in `shard_map`.

On a TPU, JAX writes its SVD and, for more than 256 rows, its `eigh` as loops.
These loops cannot be lowered for values that vary over an axis of
`jax.shard_map`. There the functions of this module use QR and Jacobi rotations,
which are single operations of the TPU's compiler.
"""

import jax
from jax import lax
import jax.numpy as jnp

_PRECISION = lax.Precision.HIGHEST
_JACOBI = lax.linalg.EighImplementation.JACOBI


def normalize(x: jax.Array) -> jax.Array:
  """Unit vectors along the last axis; the zero vector stays 0.

  Args:
    x: `[..., dim]`, floating.

  Returns:
    `[..., dim]` of the same dtype. The gradient at a zero vector is 0.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import linalg
    >>> print(linalg.normalize(jnp.array([[0.0, 2.0], [0.0, 0.0]])))
    [[0. 1.]
     [0. 0.]]
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
  """The largest absolute entry, over all devices, or 1 if all entries are 0.

  Dividing by it keeps the squares of very large or small numbers in float32.

  Args:
    x: Array of any shape, floating.
    axis_name: Mapped axis over which the entries are spread, or None.

  Returns:
    A scalar.
  """
  largest = jnp.max(jnp.abs(x))
  if axis_name is not None:
    largest = lax.pmax(largest, axis_name)
  return jnp.where(largest == 0.0, 1.0, largest)


def eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Eigenvalues, ascending, and eigenvectors of a symmetric matrix.

  Args:
    matrix: `[..., n, n]`, symmetric.

  Returns:
    Eigenvalues `[..., n]` and eigenvectors `[..., n, n]`, one in each column.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import linalg
    >>> values, _ = linalg.eigh(jnp.diag(jnp.array([2.0, 1.0])))
    >>> print(values)
    [1. 2.]
  """
  return lax.platform_dependent(matrix, tpu=_eigh_jacobi, default=_eigh)


def svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  r"""Thin singular value decomposition.

  .. math:: A = U\, \mathrm{diag}(\sigma)\, V^\top

  Args:
    matrix: `[..., m, n]`, floating.

  Returns:
    `U` `[..., m, r]`, the singular values `[..., r]`, largest first, and `V^T`
    `[..., r, n]` with `r = min(m, n)`. `U` and `V` are orthonormal also where
    the matrix is singular.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import linalg
    >>> _, sigma, _ = linalg.svd(jnp.diag(jnp.array([1.0, 3.0])))
    >>> print(sigma)
    [3. 1.]
  """
  return lax.platform_dependent(matrix, tpu=_svd_by_eigh, default=_svd)


def singular_values(
  rows: jax.Array, *, axis_name: str | None = None
) -> jax.Array:
  r"""Singular values of a matrix, whose rows may be spread over devices.

  With `axis_name` nothing larger than `[dim, dim]` is reduced. The eigenvalues
  of :math:`Z^\top Z` alone would lose all singular values below `sqrt(eps) =
  3e-4` of the largest. So the rows are rotated to its eigenvectors, :math:`Y =
  Z V`. The norms of the columns of :math:`Y` are the singular values: sums of
  squares, which do not cancel.

  The error of a singular value is at most about 2e-4 of the largest. The
  effective rank differs from that of a float64 SVD by less than 0.1 % for
  healthy spectra, rank 1, and rank 3 with noise of 1e-3. The worst case found
  is 1.3 %, for a direction 3e-4 as strong as the only other one.

  Args:
    rows: `[n, dim]`, floating. With `axis_name`, this device's rows.
    axis_name: Mapped axis over which the rows are spread, or None.

  Returns:
    `[min(n, dim)]` without `axis_name`, else `[dim]`; largest first.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import linalg
    >>> print(linalg.singular_values(jnp.diag(jnp.array([1.0, 3.0]))))
    [3. 1.]

  Reference:
    The rotation is that of one-sided Jacobi methods: Demmel and Veselic,
    "Jacobi's method is more accurate than QR", SIAM J. Matrix Anal. Appl. 13
    (1992), section 4.
  """
  if axis_name is None:
    return lax.platform_dependent(
      rows,
      tpu=lambda x: _svd_by_eigh(x)[1],
      default=lambda x: jnp.linalg.svd(x, compute_uv=False),
    )
  # The Gram matrix is replicated, so JAX's own `eigh` lowers everywhere. It is
  # symmetric already: each entry and its mirror are the same sum.
  gram = lax.psum(_matmul(rows.T, rows), axis_name)
  vectors, _ = lax.linalg.eigh(gram, symmetrize_input=False)
  rotated = _matmul(rows, vectors)
  energy = lax.psum(jnp.sum(rotated**2, axis=0), axis_name)
  # `eigh` sorts its values, but these are more accurate.
  return jnp.sqrt(-jnp.sort(-energy))


def _matmul(a, b):
  return jnp.matmul(a, b, precision=_PRECISION)


def _eigh(matrix):
  return tuple(jnp.linalg.eigh(matrix))


def _eigh_jacobi(matrix):
  vectors, values = lax.linalg.eigh(matrix, implementation=_JACOBI)
  return values, vectors


def _svd(matrix):
  return tuple(jnp.linalg.svd(matrix, full_matrices=False))


def _svd_by_eigh(matrix):
  """SVD by QR and Jacobi rotations, for a TPU's varying values."""
  if matrix.shape[-2] < matrix.shape[-1]:
    u, sigma, vt = _svd_by_eigh(matrix.mT)
    return vt.mT, sigma, u.mT
  q, r = jnp.linalg.qr(matrix)
  _, v = _eigh_jacobi(_matmul(r.mT, r))
  v = jnp.flip(v, axis=-1)
  # The columns of R V are orthogonal up to rounding: QR normalizes them, gives
  # zero columns a direction, and leaves sigma on its diagonal, up to the sign.
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
