r"""Losses between predictions and targets, as in SimSiam, BYOL and MoCo v3.

A predictor (a small network) maps the embedding of one view to the target of
the other:

.. math::
  L = \frac{1}{2} \big[ l(p(z_1), t_2) + l(p(z_2), t_1) \big]

for any contrastive loss :math:`l` of two views. In SimSiam the target
:math:`t_v` is the embedding :math:`z_v` itself, without a gradient. In BYOL it
is the embedding by the target networks, whose parameters are an exponential
moving average of the trained ones.

Reference:
  Chen and He, "Exploring Simple Siamese Representation Learning", arXiv
  2011.10566, equation 2. Grill et al., "Bootstrap Your Own Latent", arXiv
  2006.07733, equations 1 and 2.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def asymmetric_loss(
  contrastive: Callable[..., jax.Array],
  predictions: jax.Array,
  targets: jax.Array,
  labels: jax.Array,
  *,
  axis_name: str | None = None,
) -> jax.Array:
  """Returns the mean loss between each prediction and the other view's target.

  Args:
    contrastive: Loss `(embeddings [2, batch, dim], labels, axis_name=...)`.
    predictions: `[2, batch, dim]`, floating.
    targets: `[2, batch, dim]`, floating.
    labels: `[batch]` integers.
    axis_name: Mapped axis over which the batch is split, or None.

  Returns:
    A float32 scalar.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import loss
    >>> from clop_jax.training import siamese
    >>> p, t = jnp.ones((2, 1, 2)), jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    >>> invariance = lambda z, labels, axis_name: loss.invariance_loss(z)
    >>> value = siamese.asymmetric_loss(invariance, p, t, jnp.array([-1]))
    >>> print(f'{value:.4f}')  # 1 - cos(45 degrees)
    0.2929
  """
  losses = [
    contrastive(
      jnp.stack([predictions[view], targets[1 - view]]),
      labels,
      axis_name=axis_name,
    )
    for view in (0, 1)
  ]
  return (losses[0] + losses[1]) / 2
