"""Matrix decompositions that lower on every platform, also inside `shard_map`.

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

  With `axis_name` no device sees all rows, and nothing larger than `[dim, dim]`
  is reduced. The eigenvalues of :math:`Z^\top Z` alone would lose all singular
  values below `sqrt(eps) = 3e-4` of the largest. So the rows are rotated to its
  eigenvectors, :math:`Y = Z V`, and the norms of the columns of :math:`Y` are
  the singular values: they are sums of squares, which do not cancel.

  The error of a singular value is at most about 2e-4 of the largest: directions
  below 3e-4 of it share their energy. The effective rank differs from a float64
  SVD's by less than 0.1 % for healthy spectra, rank 1, and rank 3 with noise of
  1e-3, and by 1.3 % in the worst case found, a single direction 3e-4 as strong
  as the only other one.

  Args:
    rows: `[n, dim]` float32, this device's part of the rows with `axis_name`.
    axis_name: The mapped axis over which the rows are spread, or None.

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
      rows, tpu=lambda x: _svd_by_eigh(x)[1], default=_singular_values
    )
  # `_gram` is the same on all devices, so JAX's own `eigh` lowers everywhere.
  # It is symmetric already: each entry and its mirror are the same sum.
  gram = lax.psum(_matmul(rows.T, rows), axis_name)
  vectors, _ = lax.linalg.eigh(gram, symmetrize_input=False)
  rotated = _matmul(rows, vectors)
  energy = lax.psum(jnp.sum(rotated**2, axis=0), axis_name)
  # `eigh` sorts its values, but these are more accurate.
  return jnp.sqrt(-jnp.sort(-energy))


def _matmul(a, b):
  return jnp.matmul(a, b, precision=_PRECISION)


def _eigh(matrix):
  values, vectors = jnp.linalg.eigh(matrix)
  return values, vectors


def _eigh_jacobi(matrix):
  vectors, values = lax.linalg.eigh(matrix, implementation=_JACOBI)
  return values, vectors


def _singular_values(matrix):
  return jnp.linalg.svd(matrix, compute_uv=False)


def _svd(matrix):
  u, sigma, vt = jnp.linalg.svd(matrix, full_matrices=False)
  return u, sigma, vt


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
