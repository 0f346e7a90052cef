"""Measures of collapse and of class geometry, as pure functions.

Conventions of all measures:

* `embeddings` are `[..., dim]` numbers. The leading axes are examples (and
  views). Measures of directions normalize them and say so.
* `labels` are integers of the leading shape, `num_classes` is their number, and
  `prototypes` are `[num_classes, dim]`. Rows with label -1 are left out.
* `axis_name` is the mapped axis over which the examples are split, or None.
  With it every device gets the measure of all examples. Nothing larger than
  `[dim, dim]` is reduced, and no embedding leaves its device.
* Results are float32 and accurate to at least three digits for collapsed
  embeddings: differences of close vectors are taken before anything is rounded.
* An invalid shape, dtype or label raises a `ValueError` while tracing.
"""

import itertools
import math

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from clop_jax import arguments
from clop_jax import linalg

_PRECISION = lax.Precision.HIGHEST

# Singular values below this share of the largest are rounding in float32.
_RANK_TOLERANCE = 1e-5


def normalize(embeddings: jax.Array) -> jax.Array:
  """Unit vectors along the last axis; the zero vector stays 0.

  Returns:
    `[..., dim]` float32.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import collapse
    >>> z = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    >>> print(collapse.normalize(z).round(3))
    [[0.6 0.8]
     [0.  0. ]]
  """
  return linalg.normalize(arguments.real('embeddings', embeddings))


def singular_values(
  embeddings: jax.Array, *, center: bool = False, axis_name: str | None = None
) -> jax.Array:
  r"""Singular values of the embedding matrix, largest first.

  .. math:: Z = U\, \mathrm{diag}(\sigma)\, V^\top, \quad Z \in R^{n \times d}

  Args:
    embeddings: `[..., dim]`, flattened to `n` rows.
    center: True to subtract the mean embedding first.
    axis_name: Mapped axis of the examples.

  Returns:
    `[min(n, dim)]`, with `axis_name` `[dim]`. `linalg.singular_values` has the
    method and its error.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import collapse
    >>> z = jnp.diag(jnp.array([1.0, 3.0]))
    >>> print(*(f'{x:.3f}' for x in collapse.singular_values(z)))
    3.000 1.000

  Reference:
    Jing et al., "Understanding dimensional collapse in contrastive
    self-supervised learning", arXiv 2110.09348, section 3.
  """
  rows = _rows(embeddings)
  if center:
    rows = _centred(rows, axis_name)
  scale = linalg.magnitude(rows, axis_name)
  return scale * linalg.singular_values(rows / scale, axis_name=axis_name)


def effective_rank(
  embeddings: jax.Array, *, center: bool = False, axis_name: str | None = None
) -> jax.Array:
  r"""Effective rank: the number of directions that the embeddings use.

  .. math:: \exp\Big(-\sum_i p_i \log p_i\Big), \qquad
    p_i = \sigma_i / \sum_j \sigma_j

  It is 1 if all embeddings lie on one line, `dim` if they fill all directions
  equally, and 0 if all are 0.

  Args:
    embeddings: `[..., dim]`.
    center: True to subtract the mean embedding first.
    axis_name: Mapped axis of the examples.

  Returns:
    A scalar in [0, min(n, dim)].

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import collapse
    >>> print(collapse.effective_rank(jnp.eye(5)).round(3))
    5.0

  Reference:
    Roy and Vetterli, "The effective rank: a measure of effective
    dimensionality", EUSIPCO 2007, section 2.
  """
  return effective_rank_of_spectrum(
    singular_values(embeddings, center=center, axis_name=axis_name)
  )


def effective_rank_of_spectrum(spectrum: jax.Array) -> jax.Array:
  """Effective rank from singular values.

  Args:
    spectrum: `[n]` singular values of any scale, floating.

  Returns:
    A scalar in [0, n].

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import collapse
    >>> spectrum = jnp.array([2.0, 2.0, 0.0])
    >>> print(f'{collapse.effective_rank_of_spectrum(spectrum):.3f}')
    2.000
  """
  total = jnp.sum(spectrum)
  logs = jnp.log(jnp.where(spectrum == 0.0, 1.0, spectrum))
  divisor = jnp.where(total == 0.0, 1.0, total)
  entropy = jnp.log(divisor) - jnp.sum(spectrum * logs) / divisor
  return jnp.where(total == 0.0, 0.0, jnp.exp(entropy))


def embedding_variance(embeddings: jax.Array) -> jax.Array:
  r"""Variance of the embeddings over the examples, summed over dimensions.

  .. math:: \frac{1}{n} \sum_i \|z_i - \bar z\|^2

  For unit embeddings it is `1 - ||mean||^2`: 0 if all are equal, 1 if their
  mean is 0.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import collapse
    >>> print(collapse.embedding_variance(jnp.array([[1.0, 0.0], [-1.0, 0.0]])))
    1.0

  Reference:
    CLOP, arXiv 2403.18699, measures collapse by it in its learning-rate sweep.
  """
  return jnp.sum(jnp.mean(_centred(_rows(embeddings)) ** 2, axis=0))


def embedding_std(
  embeddings: jax.Array, *, axis_name: str | None = None
) -> jax.Array:
  r"""Standard deviation of the normalized embeddings, mean over dimensions.

  .. math:: \frac{1}{d} \sum_j \mathrm{std}_i(z_{ij} / \|z_i\|)

  It is about `1 / sqrt(dim)` for embeddings spread over the sphere, and 0 for
  equal ones.

  Args:
    embeddings: `[..., dim]`, normalized inside.
    axis_name: Mapped axis of the examples.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import collapse
    >>> print(collapse.embedding_std(jnp.array([[1.0, 0.0], [-1.0, 0.0]])))
    0.5

  Reference:
    Chen and He, "Exploring simple siamese representation learning", arXiv
    2011.10566, section 4.1.
  """
  rows = _rows(embeddings)
  difference = _difference_of_directions(rows, _origin(rows, axis_name)[None])
  difference = difference - _mean(difference, axis_name)[None]
  return jnp.mean(jnp.sqrt(_mean(difference**2, axis_name)))


def class_means(
  embeddings: jax.Array, labels: jax.Array, num_classes: int
) -> jax.Array:
  r"""Mean embedding of each class.

  .. math:: m_k = \frac{1}{n_k} \sum_{i:\, y_i = k} z_i

  Returns:
    `[num_classes, dim]`, zeros for a class without an example.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import collapse
    >>> z = jnp.array([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]])
    >>> print(collapse.class_means(z, jnp.array([0, 0, -1]), 2))
    [[2. 0.]
     [0. 0.]]
  """
  rows, labels = _rows_and_labels(embeddings, labels, num_classes)
  return _class_means(rows, _one_hot(labels, num_classes))


def class_mean_cosines(
  embeddings: jax.Array,
  labels: jax.Array,
  num_classes: int,
  *,
  center: bool = False,
) -> jax.Array:
  r"""Cosines between the class means.

  .. math:: \cos(m_a, m_b) \quad\text{or, centred,}\quad
    \cos(m_a - \bar m,\, m_b - \bar m)

  CLOP aims at 0 between classes (not centred). A simplex ETF has `-1/(k-1)`.

  Args:
    embeddings: `[..., dim]`.
    labels: Integers of the leading shape.
    num_classes: Number of classes.
    center: True to subtract the mean of the class means first, as in neural
      collapse (NC2).

  Returns:
    `[num_classes, num_classes]`, NaN for a class without an example.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import collapse
    >>> z = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> print(collapse.class_mean_cosines(z, jnp.arange(2), 2).round(3))
    [[1. 0.]
     [0. 1.]]

  Reference:
    Papyan et al., arXiv 2008.08186, (NC2).
  """
  rows, labels = _rows_and_labels(embeddings, labels, num_classes)
  one_hot = _one_hot(labels, num_classes)
  present = jnp.max(one_hot, axis=0)
  if center:
    _, means = _within_and_between(rows, labels, one_hot)
  else:
    means = _class_means(rows, one_hot)
  unit = linalg.normalize(means)
  cosines = jnp.matmul(unit, unit.T, precision=_PRECISION)
  both = (present[:, None] * present[None, :]) > 0
  return jnp.where(both, cosines, jnp.nan)


def within_between_ratio(
  embeddings: jax.Array, labels: jax.Array, num_classes: int
) -> jax.Array:
  r"""Within-class over between-class variability (NC1).

  .. math:: \frac{1}{k} \mathrm{Tr}(\Sigma_W \Sigma_B^{\dagger}), \quad
    \Sigma_W = \tfrac{1}{n} \sum_i (z_i - m_{y_i})(z_i - m_{y_i})^\top, \quad
    \Sigma_B = \tfrac{1}{k} \sum_k (m_k - \bar m)(m_k - \bar m)^\top

  It is 0 if every class has collapsed to its mean, large if classes overlap.
  The pseudo-inverse drops directions in which the class means differ by less
  than 1e-5 of their largest difference, so equal class means give 0.

  Returns:
    A scalar, NaN with fewer than two classes.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import collapse
    >>> z = jnp.array([[1.0], [3.0], [-1.0], [-3.0]])  # 1 within, 4 between
    >>> labels = jnp.array([0, 0, 1, 1])
    >>> print(f'{collapse.within_between_ratio(z, labels, 2):.3f}')
    0.125

  Reference:
    Papyan et al., arXiv 2008.08186, (NC1) and figure 6.
  """
  rows, labels = _rows_and_labels(embeddings, labels, num_classes)
  one_hot = _one_hot(labels, num_classes)
  within, between = _within_and_between(rows, labels, one_hot)
  k = jnp.sum(jnp.max(one_hot, axis=0))
  # The measure has no scale, but the squares below could overflow.
  scale = jnp.maximum(jnp.max(jnp.abs(within)), jnp.max(jnp.abs(between)))
  scale = linalg.magnitude(scale)
  # The singular vectors of the k centred means give the pseudo-inverse of
  # Sigma_B, which has rank k - 1 at most, without a dim x dim matrix.
  _, sigma, vt = linalg.svd(between / scale)
  in_range = (sigma > _RANK_TOLERANCE * sigma[0]) & (
    jnp.arange(len(sigma), dtype=jnp.float32) < k - 1
  )
  inverse = jnp.where(in_range, k / jnp.where(in_range, sigma, 1.0) ** 2, 0.0)
  projected = jnp.matmul(within / scale, vt.T, precision=_PRECISION)
  count = jnp.maximum(jnp.sum(one_hot), 1.0)
  variances = jnp.sum(projected**2, axis=0) / count
  return jnp.where(k >= 2, jnp.sum(variances * inverse) / k, jnp.nan)


def alignment(views: jax.Array, *, alpha: float = 2.0) -> jax.Array:
  r"""Mean distance between the views of an example, on the unit sphere.

  .. math:: E_{i,\, a < b}\; \|z^a_i - z^b_i\|_2^\alpha

  Args:
    views: `[views, batch, dim]`, at least two views; normalized inside.
    alpha: Power of the distance, must be positive.

  Returns:
    A scalar in [0, 2^alpha]. 0 is perfect alignment (and full collapse).

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import collapse
    >>> views = jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    >>> print(collapse.alignment(views))
    2.0

  Reference:
    Wang and Isola, "Understanding contrastive representation learning through
    alignment and uniformity on the hypersphere", arXiv 2005.10242, section 4.1.
  """
  alpha = arguments.number('alpha', alpha, above=0)
  views = arguments.views('views', arguments.real('views', views), 2)
  pairs = jnp.array([*itertools.combinations(range(len(views)), 2)]).T
  difference = _difference_of_directions(views[pairs[0]], views[pairs[1]])
  squared = jnp.sum(difference**2, axis=-1)
  return jnp.mean(squared ** (alpha / 2))


def uniformity(embeddings: jax.Array, *, t: float = 2.0) -> jax.Array:
  r"""Uniformity of the embeddings on the unit sphere; lower is more uniform.

  .. math:: \log \frac{2}{n (n-1)} \sum_{i < j} \exp(-t \|z_i - z_j\|^2)

  Args:
    embeddings: `[..., dim]`, at least two rows; normalized inside. Memory grows
      with `n^2`.
    t: Inverse width of the Gaussian kernel, must be positive.

  Returns:
    A scalar, 0 if all are equal and about -2 t if they are spread out.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import collapse
    >>> z = jnp.array([[1.0, 0.0], [-1.0, 0.0]])
    >>> print(f'{collapse.uniformity(z):.3f}')
    -8.000

  Reference:
    Wang and Isola, arXiv 2005.10242, section 4.1.
  """
  t = arguments.number('t', t, above=0)
  rows = _rows(embeddings)
  n = rows.shape[0]
  if n < 2:
    raise ValueError(f'embeddings must have at least two rows, got {n}')
  difference = _centred(_difference_of_directions(rows, rows[:1]))
  length = jnp.sum(difference**2, axis=-1)
  product = jnp.matmul(difference, difference.T, precision=_PRECISION)
  squared = length[:, None] + length[None, :] - 2 * product
  itself = jnp.eye(n, dtype=bool)
  exponents = -t * jnp.where(itself, 0.0, jnp.maximum(squared, 0.0))
  # At collapse the mean is near 1, and its logarithm needs the difference.
  below_one = jnp.sum(jnp.expm1(exponents)) / (n * (n - 1.0))
  is_close = below_one > -0.5
  near = jnp.log1p(jnp.where(is_close, below_one, 0.0))
  far = jax.nn.logsumexp(jnp.where(itself, -jnp.inf, exponents))
  return jnp.where(is_close, near, far - math.log(n * (n - 1.0)))


def prototype_cosine(
  embeddings: jax.Array,
  labels: jax.Array,
  prototypes: jax.Array,
  *,
  axis_name: str | None = None,
) -> jax.Array:
  r"""Mean cosine of the embeddings to the prototype of their own class.

  .. math:: \frac{1}{n} \sum_{i:\, y_i \ge 0} \cos(z_i, c_{y_i})

  Args:
    embeddings: `[..., dim]`, normalized inside.
    labels: Integers of the leading shape.
    prototypes: `[num_classes, dim]`.
    axis_name: Mapped axis of the examples.

  Returns:
    A scalar in [-1, 1], 0 without a labelled example.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import collapse
    >>> z = jnp.array([[2.0, 0.0], [1.0, 0.0]])
    >>> print(collapse.prototype_cosine(z, jnp.array([0, 1]), jnp.eye(2)))
    0.5

  Reference:
    One minus the CLOP loss, arXiv 2403.18699.
  """
  rows, labels, prototypes = _against_prototypes(embeddings, labels, prototypes)
  unit = linalg.normalize(rows)
  own = linalg.normalize(prototypes)[jnp.maximum(labels, 0)]
  known = (labels >= 0) & (labels < len(prototypes))
  cosines = jnp.where(known, jnp.sum(unit * own, axis=-1), 0.0)
  total = jnp.stack([jnp.sum(cosines), jnp.sum(known.astype(jnp.float32))])
  if axis_name is not None:
    total = lax.psum(total, axis_name)
  return total[0] / jnp.maximum(total[1], 1.0)


def batch_measures(
  embeddings: jax.Array,
  labels: jax.Array,
  prototypes: jax.Array,
  *,
  axis_name: str | None = None,
) -> dict[str, jax.Array]:
  """Returns the measures that a training step logs.

  Each equals the function of the same name for the normalized embeddings.

  Returns:
    A dict of the scalars `effective_rank`, `embedding_std` and
    `prototype_cosine`.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import collapse
    >>> z = jnp.array([[2.0, 0.0], [0.0, 1.0]])
    >>> measures = collapse.batch_measures(z, jnp.array([0, 1]), jnp.eye(2))
    >>> print(*(f'{name} {x:.1f}' for name, x in measures.items()))
    effective_rank 2.0 embedding_std 0.5 prototype_cosine 1.0
  """
  unit = linalg.normalize(_rows(embeddings))
  spectrum = linalg.singular_values(unit, axis_name=axis_name)
  return {
    'effective_rank': effective_rank_of_spectrum(spectrum),
    'embedding_std': embedding_std(embeddings, axis_name=axis_name),
    'prototype_cosine': prototype_cosine(
      embeddings, labels, prototypes, axis_name=axis_name
    ),
  }


def prototype_energy_share(
  embeddings: jax.Array, labels: jax.Array, prototypes: jax.Array
) -> jax.Array:
  r"""Share of the embeddings' energy that lies on their own prototype.

  .. math:: \frac{\sum_i (z_i \cdot \hat c_{y_i})^2}{\sum_i \|z_i\|^2},
    \qquad \hat c = c / \|c\|

  Unlike the mean cosine, it ignores the sign.

  Returns:
    A scalar in [0, 1], 0 without a labelled example.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import collapse
    >>> z = jnp.array([[-2.0, 0.0], [1.0, 0.0]])
    >>> labels = jnp.array([0, 1])
    >>> share = collapse.prototype_energy_share(z, labels, jnp.eye(2))
    >>> print(f'{share:.3f}')  # 4 of 5
    0.800

  Reference:
    CLOP, arXiv 2403.18699, claims that classes lie in orthogonal subspaces.
  """
  rows, labels, prototypes = _against_prototypes(embeddings, labels, prototypes)
  rows = jnp.where((labels >= 0)[:, None], rows, 0.0)
  # The measure has no scale, but the squares below could overflow.
  rows = rows / linalg.magnitude(rows)
  directions = linalg.normalize(prototypes)
  projections = jnp.matmul(rows, directions.T, precision=_PRECISION)
  energy = jnp.sum(rows**2)
  on_own = jnp.sum((projections * _one_hot(labels, len(prototypes))) ** 2)
  return on_own / jnp.where(energy == 0.0, 1.0, energy)


def principal_angles(
  embeddings: jax.Array,
  labels: jax.Array,
  num_classes: int,
  *,
  subspace_dim: int = 1,
) -> jax.Array:
  r"""Principal angles between the subspaces of the classes.

  .. math:: \cos \theta_r(a, b) = \sigma_r(V_a^\top V_b)

  where the columns of `V_a` are the first `subspace_dim` right singular vectors
  of the (not centred) embeddings of class `a`. All angles are pi/2 if classes
  lie in orthogonal subspaces. The error is about 1e-6 rad times the ratio of
  the largest singular value of a class to that of the direction. The subspace
  of a class is not unique if its last singular value equals the next one.

  Args:
    embeddings: `[..., dim]`.
    labels: Integers of the leading shape.
    num_classes: Number of classes.
    subspace_dim: Dimension of the subspace of each class, at most `dim`.

  Returns:
    `[num_classes, num_classes, subspace_dim]` radians in [0, pi/2], smallest
    angle first. Angles are NaN beyond the number of directions that a class
    spans (singular values above 1e-5 of the largest).

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import collapse
    >>> angles = collapse.principal_angles(jnp.eye(2), jnp.arange(2), 2)
    >>> print(f'{jnp.degrees(angles[0, 1, 0]):.2f}')
    90.00

  Reference:
    Bjorck and Golub, "Numerical methods for computing angles between linear
    subspaces", Math. Comp. 27 (1973), theorem 1 and section 3.
  """
  rows, labels = _rows_and_labels(embeddings, labels, num_classes)
  dim = rows.shape[1]
  subspace_dim = arguments.count('subspace_dim', subspace_dim)
  if subspace_dim > dim:
    raise ValueError(
      f'subspace_dim must be at most dim={dim}, got {subspace_dim}'
    )
  labelled = (labels >= 0)[:, None]
  rows = rows / linalg.magnitude(jnp.where(labelled, rows, 0.0))

  def basis(members):
    """Returns `V` `[dim, subspace_dim]`, zero beyond the rank, and the rank."""
    # QR, as second moments would square the singular values.
    factor = jnp.linalg.qr(members, mode='r')
    _, sigma, vt = linalg.svd(factor)
    missing = max(0, subspace_dim - len(sigma))
    sigma = jnp.pad(sigma[:subspace_dim], (0, missing))
    vt = jnp.pad(vt[:subspace_dim], ((0, missing), (0, 0)))
    exists = sigma > _RANK_TOLERANCE * sigma[0]
    return jnp.where(exists[None], vt.T, 0.0), jnp.sum(exists, dtype=jnp.int32)

  bases, ranks = _map_classes(basis, rows, labels, num_classes)
  order = jnp.arange(subspace_dim, dtype=jnp.int32)

  def angles(basis_a, basis_b, rank_b):
    overlap = jnp.matmul(basis_a.T, basis_b, precision=_PRECISION)
    _, cosines, _ = linalg.svd(overlap)
    outside = basis_b - jnp.matmul(basis_a, overlap, precision=_PRECISION)
    # A direction that does not exist counts as orthogonal, not as equal.
    absent = jnp.diag((order >= rank_b).astype(jnp.float32))
    _, sines, _ = linalg.svd(jnp.concatenate([outside, absent]))
    sines = jnp.clip(sines[::-1], 0.0, 1.0)
    cosines = jnp.clip(cosines, 0.0, 1.0)
    # The cosine of an angle below 3e-4 is 1 in float32.
    is_small = sines < math.sqrt(0.5)
    return jnp.where(is_small, jnp.arcsin(sines), jnp.arccos(cosines))

  # One class at a time: there may be thousands.
  to_all = jax.vmap(angles, in_axes=(None, 0, 0))
  result = lax.map(lambda a: to_all(a, bases, ranks), bases)
  smaller = jnp.minimum(ranks[:, None], ranks[None, :])
  exists = order[None, None] < smaller[..., None]
  return jnp.where(exists, result, jnp.nan)


def _map_classes(function, rows, labels, num_classes):
  """Maps a function over the rows of each class, padded with zeros.

  With traced labels each class is padded to all rows. With known labels it is
  padded to the largest class, which takes a fraction of the time.
  """
  is_traced = isinstance(labels, jax.core.Tracer)
  if is_traced or not labels.is_fully_addressable:
    numbers = jnp.arange(num_classes, dtype=jnp.int32)

    def of_class(number):
      return function(jnp.where((labels == number)[:, None], rows, 0.0))

    return lax.map(of_class, numbers)
  known = np.asarray(labels)
  members = [np.flatnonzero(known == i) for i in range(num_classes)]
  index = np.full((num_classes, max(1, *map(len, members))), len(known))
  for row, own in zip(index, members, strict=True):
    row[: len(own)] = own
  padded = jnp.pad(rows, ((0, 1), (0, 0)))
  return lax.map(
    lambda row: function(padded[row]), jnp.asarray(index, jnp.int32)
  )


def _difference_of_directions(a, b):
  r"""Returns `a / |a| - b / |b|` with relative precision even for `a` near `b`.

  .. math:: \frac{d}{|a|} - \frac{b}{|b|}
    \frac{d \cdot (a + b)}{|a| (|a| + |b|)}, \qquad d = a - b
  """
  unit_a, unit_b = linalg.normalize(a), linalg.normalize(b)
  difference = a - b
  largest = jnp.max(jnp.maximum(abs(a), abs(b)), axis=-1, keepdims=True)
  scale = jnp.where(largest == 0.0, 1.0, largest)
  a, b, difference = a / scale, b / scale, difference / scale
  near = jnp.max(jnp.abs(difference), axis=-1, keepdims=True) <= 0.5

  def dot(a, b):
    return jnp.sum(a * b, axis=-1, keepdims=True)

  def length(x):
    squared = dot(x, x)
    return jnp.sqrt(jnp.where(squared == 0.0, 1.0, squared))

  longer = dot(difference, a + b) / (length(a) * (length(a) + length(b)))
  exact = difference / length(a) - unit_b * longer
  return jnp.where(near, exact, unit_a - unit_b)


def _class_means(rows, one_hot):
  """Means of the rows of each class, zeros for a class without a row."""
  rows = jnp.where(jnp.max(one_hot, axis=1, keepdims=True) > 0, rows, 0.0)
  sums = jnp.matmul(one_hot.T, rows, precision=_PRECISION)
  return sums / jnp.maximum(jnp.sum(one_hot, axis=0), 1.0)[:, None]


def _within_and_between(rows, labels, one_hot):
  """Deviations of rows from their class means, and of these from their mean.

  `[n, dim]`, 0 for unlabelled rows, and `[num_classes, dim]`, 0 for classes
  without a row.
  """
  # Subtract a row before the mean: the difference of two close numbers is
  # exact, the difference of rounded means is not.
  present = jnp.max(one_hot, axis=0)
  first = rows[jnp.argmax(one_hot, axis=0)]
  own = jnp.maximum(labels, 0)
  labelled = jnp.max(one_hot, axis=1, keepdims=True) > 0
  shifted = jnp.where(labelled, rows - first[own], 0.0)
  means = _class_means(shifted, one_hot)
  within = jnp.where(labelled, shifted - means[own], 0.0)
  offsets = first - first[jnp.argmax(present)][None] + means
  between = jnp.where(present[:, None] > 0, offsets, 0.0)
  grand = jnp.sum(between, axis=0) / jnp.maximum(jnp.sum(present), 1.0)
  between = jnp.where(present[:, None] > 0, between - grand[None], 0.0)
  return within, between


def _centred(rows, axis_name=None):
  """Rows minus their mean, exactly 0 if all are equal."""
  # The rounded mean of equal numbers may differ from them.
  rows = rows - _origin(rows, axis_name)[None]
  return rows - _mean(rows, axis_name)[None]


def _origin(rows, axis_name):
  """A vector that is close to all rows if they are close to each other."""
  first = lax.stop_gradient(rows[0])
  return first if axis_name is None else lax.pmax(first, axis_name)


def _mean(rows, axis_name):
  """Mean over the rows of all devices."""
  mean = jnp.mean(rows, axis=0)
  return mean if axis_name is None else lax.pmean(mean, axis_name)


def _rows(embeddings):
  embeddings = arguments.real('embeddings', embeddings)
  if embeddings.ndim < 2 or 0 in embeddings.shape:
    raise ValueError(
      'embeddings must have shape [..., dim] without an empty axis, got '
      f'{embeddings.shape}'
    )
  return embeddings.reshape(-1, embeddings.shape[-1])


def _rows_and_labels(embeddings, labels, num_classes):
  """Rows `[n, dim]` and their labels `[n]`."""
  rows = _rows(embeddings)
  shape = jnp.shape(embeddings)[:-1]
  labels = arguments.labels('labels', labels, shape, num_classes)
  return rows, labels.reshape(-1)


def _against_prototypes(embeddings, labels, prototypes):
  """Rows `[n, dim]`, their labels `[n]` and the prototypes."""
  prototypes = arguments.prototypes(prototypes, jnp.shape(embeddings)[-1])
  return *_rows_and_labels(embeddings, labels, len(prototypes)), prototypes


def _one_hot(labels, num_classes):
  return jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
