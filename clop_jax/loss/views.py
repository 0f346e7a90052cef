"""Losses between views by cosines; `clop_jax.loss` has the conventions."""

import jax
from jax import lax
import jax.numpy as jnp

from clop_jax import arguments
from clop_jax import linalg
from clop_jax.loss import shared


def invariance_loss(
  embeddings: jax.Array, *, axis_name: str | None = None
) -> jax.Array:
  r"""Mean cosine distance between the views of an example, and nothing else.

  .. math::
    L = \frac{1}{B} \sum_i \big( 1 - \cos(z_{1,i}, z_{2,i}) \big)

  With more than two views it is the mean over the pairs of views. Equal
  embeddings for all images minimize it: alone, it collapses. It shows what a
  term that prevents collapse, such as `clop_loss`, does by itself.

  Args:
    embeddings: `[views, batch, dim]` with at least two views, floating.
    axis_name: Mapped axis of the batch.

  Returns:
    A float32 scalar in [0, 2].

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import loss
    >>> z = jnp.stack([jnp.eye(2), jnp.ones((2, 2))])
    >>> print(f'{loss.invariance_loss(z):.4f}')  # 1 - cos(45 degrees)
    0.2929

  Reference:
    The first term of BYOL and SimSiam without their predictor and
    stop-gradient: Chen and He, "Exploring Simple Siamese Representation
    Learning", arXiv 2011.10566, equation 1.
  """
  embeddings = shared.checked_embeddings(embeddings, min_views=2)
  return 1.0 - shared.mean_cosine(linalg.normalize(embeddings), axis_name)


def alignment_uniformity_loss(
  embeddings: jax.Array,
  *,
  alignment_weight: float = 1.0,
  uniformity_weight: float = 1.0,
  alpha: float = 2.0,
  t: float = 2.0,
  axis_name: str | None = None,
) -> jax.Array:
  r"""Alignment of views plus uniformity of examples on the unit sphere.

  .. math::
    L = \lambda_a\, \frac{1}{B} \sum_i \| z_{1,i} - z_{2,i} \|^\alpha +
      \frac{\lambda_u}{2} \sum_v \log \frac{1}{B (B - 1)} \sum_{i \ne j}
      \exp(-t \| z_{v,i} - z_{v,j} \|^2)

  with unit embeddings `z`. With more than two views, both terms are means: over
  the pairs of views and over the views.

  Args:
    embeddings: `[views, batch, dim]`, floating, with at least two views and
      (over all devices) two examples.
    alignment_weight: Weight of the alignment.
    uniformity_weight: Weight of the uniformity.
    alpha: Power of the distance in the alignment, must be positive.
    t: Scale of the squared distance in the uniformity, must be positive.
    axis_name: Mapped axis of the batch.

  Returns:
    A float32 scalar.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import loss
    >>> z = jnp.stack([jnp.eye(2), jnp.eye(2)])
    >>> print(loss.alignment_uniformity_loss(z))  # log(exp(-2 * 2))
    -4.0

  Reference:
    Wang and Isola, "Understanding Contrastive Representation Learning through
    Alignment and Uniformity on the Hypersphere", arXiv 2005.10242, section 4.1.
  """
  alignment_weight = arguments.number('alignment_weight', alignment_weight)
  uniformity_weight = arguments.number('uniformity_weight', uniformity_weight)
  alpha = arguments.number('alpha', alpha, above=0)
  t = arguments.number('t', t, above=0)
  embeddings = shared.checked_embeddings(embeddings, min_views=2)
  batch = shared.checked_global_batch(embeddings, axis_name)
  unit = linalg.normalize(embeddings)
  squared = jnp.stack(
    [
      jnp.sum(jnp.square(unit[a] - unit[b]), axis=-1)
      for a, b in shared.pairs(unit)
    ]
  )
  # For alpha below 2 the power has no gradient at 0: 0 is a subgradient.
  is_zero = squared == 0.0
  powers = jnp.where(is_zero, 1.0, squared) ** (alpha / 2)
  powers = jnp.where(is_zero, 0.0, powers)
  alignment = shared.psum(jnp.sum(powers), axis_name) / (len(squared) * batch)

  others = ~_same_example(unit.shape[1], batch, axis_name)
  exponents = -t * (2.0 - 2.0 * _cosines(unit, unit, axis_name))
  exponents = jnp.where(others[None], exponents, shared.MASKED)
  largest = lax.stop_gradient(jnp.max(exponents, axis=(1, 2), keepdims=True))
  if axis_name is not None:
    largest = lax.pmax(largest, axis_name)
  total = jnp.sum(jnp.exp(exponents - largest), axis=(1, 2))
  total = shared.psum(total, axis_name) / (batch * (batch - 1))
  uniformity = jnp.mean(jnp.log(total) + largest[:, 0, 0])
  return alignment_weight * alignment + uniformity_weight * uniformity


def spectral_contrastive_loss(
  embeddings: jax.Array, *, mu: float = 1.0, axis_name: str | None = None
) -> jax.Array:
  r"""Spectral contrastive loss: factorizes the graph of augmentations.

  .. math::
    L = -\frac{2}{B} \sum_i z_{1,i} \cdot z_{2,i} +
      \frac{1}{B (B - 1)} \sum_{i \ne j} (z_{1,i} \cdot z_{2,j})^2

  with embeddings of length `sqrt(mu)`, as in the authors' code. With more than
  two views it is the mean over the pairs of views. No matrix larger than
  `[dim, dim]` is needed or reduced over devices.

  Args:
    embeddings: `[views, batch, dim]`, floating, with at least two views and
      (over all devices) two examples.
    mu: Squared length of the embeddings, must be positive.
    axis_name: Mapped axis of the batch.

  Returns:
    A float32 scalar, at least `-2 mu`.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import loss
    >>> z = jnp.stack([jnp.eye(2), jnp.eye(2)])
    >>> print(loss.spectral_contrastive_loss(z))
    -2.0

  Reference:
    HaoChen et al., "Provable Guarantees for Self-Supervised Deep Learning with
    Spectral Contrastive Loss", arXiv 2106.04156, equation 6.
  """
  mu = arguments.number('mu', mu, above=0)
  embeddings = shared.checked_embeddings(embeddings, min_views=2)
  batch = shared.checked_global_batch(embeddings, axis_name)
  unit = linalg.normalize(embeddings)
  grams = shared.cross_products(unit, unit, axis_name)
  # The sum of all (z_i . z'_j)^2 is the inner product of the Gram matrices.
  everything = sum(jnp.sum(grams[a] * grams[b]) for a, b in shared.pairs(unit))
  own = shared.pair_cosines(unit)
  sums = jnp.stack([jnp.sum(own), jnp.sum(jnp.square(own))])
  attraction, own_squared = shared.psum(sums, axis_name)
  repulsion = (everything - own_squared) / (batch - 1)
  return mu * (mu * repulsion - 2.0 * attraction) / (len(own) * batch)


def sigmoid_loss(
  embeddings: jax.Array,
  *,
  temperature: float = 0.1,
  bias: float = -10.0,
  axis_name: str | None = None,
) -> jax.Array:
  r"""Sigmoid loss (SigLIP) between views: one binary decision for each pair.

  .. math::
    L = \frac{1}{B} \sum_{i,j} \log \big( 1 + \exp(-y_{ij}\, l_{ij}) \big),
    \qquad l_{ij} = \cos(z_{1,i}, z_{2,j}) / \tau + b

  with :math:`y_{ij} = 1` for `i = j`, else -1. With more than two views it is
  the mean over the pairs of views. The paper learns `1 / temperature` and
  `bias` from the initial values that are the defaults here.

  Args:
    embeddings: `[views, batch, dim]` with at least two views, floating.
    temperature: Temperature of the logits, must be positive.
    bias: Bias of the logits. A negative bias outweighs the many negatives.
    axis_name: Mapped axis of the batch.

  Returns:
    A float32 scalar.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import loss
    >>> z = jnp.stack([jnp.eye(2), jnp.eye(2)])
    >>> value = loss.sigmoid_loss(z, temperature=1.0, bias=0.0)
    >>> print(f'{value:.4f}')  # log(1 + 1 / e) + log(2)
    1.0064

  Reference:
    Zhai et al., "Sigmoid Loss for Language Image Pre-Training", arXiv
    2303.15343, section 3.2 and algorithm 1.
  """
  temperature = arguments.number('temperature', temperature, above=0)
  bias = arguments.number('bias', bias)
  embeddings = shared.checked_embeddings(embeddings, min_views=2)
  unit = linalg.normalize(embeddings)
  first, second = jnp.array([*shared.pairs(unit)]).T
  logits = _cosines(unit[first], unit[second], axis_name) / temperature + bias
  batch = logits.shape[-1]
  positive = _same_example(unit.shape[1], batch, axis_name)
  # log(1 + exp(-l)) = log(1 + exp(l)) - l
  total = jnp.sum(jax.nn.softplus(logits)) - jnp.sum(
    jnp.where(positive[None], logits, 0.0)
  )
  return shared.psum(total, axis_name) / (len(first) * batch)


def _cosines(rows, columns, axis_name):
  """Cosines `[views, batch, global batch]`; columns come from all devices."""
  columns = shared.all_gather(columns, axis_name, axis=1)
  return jnp.einsum('vid,vjd->vij', rows, columns, precision=shared.PRECISION)


def _same_example(batch, global_batch, axis_name):
  """Mask `[batch, global batch]` of the entries of one example."""
  offset = 0 if axis_name is None else lax.axis_index(axis_name) * batch
  rows = jnp.arange(batch, dtype=jnp.int32) + offset
  return rows[:, None] == jnp.arange(global_batch, dtype=jnp.int32)[None]
