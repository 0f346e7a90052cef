"""VICReg, Barlow Twins and W-MSE; `clop_jax.loss` has the conventions."""

import itertools

import jax
from jax import lax
import jax.numpy as jnp

from clop_jax import arguments
from clop_jax import linalg
from clop_jax.loss import shared


def vicreg_loss(
  embeddings: jax.Array,
  *,
  invariance_weight: float = 25.0,
  variance_weight: float = 25.0,
  covariance_weight: float = 1.0,
  axis_name: str | None = None,
) -> jax.Array:
  r"""VICReg: variance, invariance and covariance regularization.

  .. math::
    L = \lambda\, s(Z, Z') + \mu\, [v(Z) + v(Z')] + \nu\, [c(Z) + c(Z')]

  .. math::
    s = \tfrac{1}{nd} \sum_{ij} (Z_{ij} - Z'_{ij})^2, \quad
    v = \tfrac{1}{d} \sum_j \max(0, 1 - \sqrt{Var(Z_{:j}) + 10^{-4}}), \quad
    c = \tfrac{1}{d} \sum_{i \ne j} Cov(Z)_{ij}^2

  with the unbiased (n - 1) variance and covariance, averaged over the pairs of
  views. As in algorithm 1 of the paper, `s` is a mean over the dimensions
  (equation 5 sums them). The authors' code and lightly halve the variance term:
  their weights 25, 25, 1 are 25, 12.5, 1 here.

  Args:
    embeddings: `[views, batch, dim]`, floating, with at least two views and
      (over all devices) two examples. They are not normalized.
    invariance_weight: Weight lambda of the invariance term.
    variance_weight: Weight mu of the variance term.
    covariance_weight: Weight nu of the covariance term.
    axis_name: Mapped axis of the batch.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import loss
    >>> z = jnp.array([[[3.0], [-3.0]], [[3.0], [-3.0]]])
    >>> print(loss.vicreg_loss(z))  # equal views, deviation above 1, one dim
    0.0

  Reference:
    Bardes et al., "VICReg", arXiv 2105.04906, section 4.1 and algorithm 1.
  """
  weights = [
    arguments.number('invariance_weight', invariance_weight),
    arguments.number('variance_weight', variance_weight),
    arguments.number('covariance_weight', covariance_weight),
  ]
  embeddings = shared.checked_embeddings(embeddings, min_views=2)
  views, _, dim = embeddings.shape
  batch = shared.checked_global_batch(embeddings, axis_name)
  pairs = list(itertools.combinations(range(views), 2))
  squared = sum(
    jnp.sum(jnp.square(embeddings[a] - embeddings[b])) for a, b in pairs
  )
  invariance = shared.psum(squared, axis_name) / (len(pairs) * batch * dim)

  centred = shared.centred(embeddings, batch, axis_name)
  covariance = shared.cross_products(centred, centred, axis_name) / (batch - 1)
  variances = jnp.diagonal(covariance, axis1=1, axis2=2)
  # The mean over pairs of v(Z) + v(Z') is twice the mean over views.
  variance = 2 * jnp.mean(jax.nn.relu(1.0 - jnp.sqrt(variances + 1e-4)))
  off_diagonal = covariance * (1.0 - jnp.eye(dim, dtype=jnp.float32))[None]
  off_diagonal = 2 * jnp.sum(jnp.square(off_diagonal)) / (views * dim)
  terms = (invariance, variance, off_diagonal)
  return sum(w * term for w, term in zip(weights, terms, strict=True))


def barlow_twins_loss(
  embeddings: jax.Array,
  *,
  redundancy_weight: float = 5e-3,
  axis_name: str | None = None,
) -> jax.Array:
  r"""Barlow Twins: pulls the cross-correlation of two views to the identity.

  .. math::
    L = \sum_i (1 - C_{ii})^2 + \lambda \sum_{i \ne j} C_{ij}^2, \qquad
    C = \tfrac{1}{n} \hat{Z}^\top \hat{Z}'

  where each column of `Z` is standardized over the batch: mean 0 and divided by
  `sqrt(variance + 1e-5)`, as in batch normalization. With more than two views
  it is the mean over the pairs of views. (solo-learn multiplies the loss by
  0.025.)

  Args:
    embeddings: `[views, batch, dim]`, floating, with at least two views and
      (over all devices) two examples.
    redundancy_weight: Weight lambda of the off-diagonal entries.
    axis_name: Mapped axis of the batch.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import loss
    >>> z = jnp.array([[[1.0], [-1.0]], [[-1.0], [1.0]]])
    >>> print(f'{loss.barlow_twins_loss(z):.3f}')  # correlation -1: (1 + 1)^2
    4.000

  Reference:
    Zbontar et al., "Barlow Twins", arXiv 2103.03230, equations 1 and 2.
  """
  redundancy_weight = arguments.number('redundancy_weight', redundancy_weight)
  embeddings = shared.checked_embeddings(embeddings, min_views=2)
  views, _, dim = embeddings.shape
  batch = shared.checked_global_batch(embeddings, axis_name)
  centred = shared.centred(embeddings, batch, axis_name)
  variances = (
    shared.psum(jnp.sum(jnp.square(centred), axis=1), axis_name) / batch
  )
  standardized = centred * lax.rsqrt(variances + 1e-5)[:, None]
  pairs = jnp.array([*itertools.combinations(range(views), 2)]).T
  first, second = standardized[pairs[0]], standardized[pairs[1]]
  correlation = shared.cross_products(first, second, axis_name) / batch
  identity = jnp.eye(dim, dtype=jnp.float32)[None]
  weights = identity + redundancy_weight * (1.0 - identity)
  squared = weights * jnp.square(correlation - identity)
  return jnp.sum(squared) / len(first)


def w_mse_loss(
  embeddings: jax.Array,
  *,
  epsilon: float = 1e-3,
  axis_name: str | None = None,
) -> jax.Array:
  r"""W-MSE: the distance between views after whitening each view.

  .. math::
    L = \frac{1}{B} \sum_i \big( 2 - 2 \cos(w_{1,i}, w_{2,i}) \big), \qquad
    w_{v,i} = L_v^{-1} (z_{v,i} - \bar z_v), \qquad
    L_v L_v^\top = (1 - \epsilon)\, Cov(Z_v) + \epsilon I

  where `L` is the Cholesky factor and the covariance is unbiased (B - 1).
  Whitened embeddings have no direction in common, so they cannot collapse. With
  more than two views it is the mean over the pairs of views. (The authors
  whiten random parts of the batch; here it is the whole batch.)

  Args:
    embeddings: `[views, batch, dim]`, floating, with at least two views and
      (over all devices) more examples than dimensions. They are not normalized.
    epsilon: Shrinkage of the covariance to the identity, in [0, 1]. With 0, as
      in the authors' code, collapsed embeddings give NaN.
    axis_name: Mapped axis of the batch.

  Returns:
    A float32 scalar in [0, 4].

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import loss
    >>> z = jnp.array([[[1.0], [-1.0]], [[-5.0], [5.0]]])
    >>> print(f'{loss.w_mse_loss(z):.3f}')  # whitened, the views are opposite
    4.000

  Reference:
    Ermolov et al., "Whitening for Self-Supervised Representation Learning",
    arXiv 2007.06346, section 3, equations 3 to 5.
  """
  epsilon = arguments.number('epsilon', epsilon, at_least=0, at_most=1)
  embeddings = shared.checked_embeddings(embeddings, min_views=2)
  batch = shared.checked_global_batch(embeddings, axis_name)
  dim = embeddings.shape[-1]
  if batch <= dim:
    raise ValueError(
      f'embeddings must hold more examples than their dim={dim} to be '
      f'whitened, got a global batch of {batch}; raise the batch size or lower '
      'the dim'
    )
  centred = shared.centred(embeddings, batch, axis_name)
  covariance = shared.cross_products(centred, centred, axis_name) / (batch - 1)
  identity = jnp.eye(dim, dtype=jnp.float32)[None]
  factors = lax.linalg.cholesky(
    (1.0 - epsilon) * covariance + epsilon * identity
  )
  whitened = lax.linalg.triangular_solve(
    factors, centred, left_side=False, lower=True, transpose_a=True
  )
  return 2.0 - 2.0 * shared.mean_cosine(linalg.normalize(whitened), axis_name)
