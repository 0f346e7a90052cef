"""Cross-entropy of a linear classifier, the usual use of a few labels."""

import jax
import jax.numpy as jnp

from clop_jax import arguments
from clop_jax.loss import shared


def cross_entropy_loss(
  logits: jax.Array, labels: jax.Array, *, axis_name: str | None = None
) -> jax.Array:
  r"""Mean cross-entropy of the labelled examples.

  .. math::
    L = -\frac{1}{|\{v,i: y_i \ge 0\}|} \sum_{v,i:\, y_i \ge 0}
      \log \frac{\exp(a_{v,i,y_i})}{\sum_j \exp(a_{v,i,j})}

  Without a labelled example, the loss and its gradient are exactly 0.

  Args:
    logits: `[views, batch, num_classes]` logits `a`, floating.
    labels: `[batch]` integers below `num_classes`. A traced label that is too
      large gives NaN.
    axis_name: Mapped axis of the batch.

  Returns:
    A float32 scalar.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import loss
    >>> logits = jnp.zeros((1, 3, 2))
    >>> value = loss.cross_entropy_loss(logits, jnp.array([0, 1, -1]))
    >>> print(f'{value:.4f}')  # log(2)
    0.6931
  """
  logits = arguments.views('logits', arguments.floating('logits', logits))
  views, batch, num_classes = logits.shape
  labels = arguments.labels('labels', labels, (batch,), num_classes)
  own = jnp.take_along_axis(
    logits, jnp.maximum(labels, 0)[None, :, None], axis=-1, mode='fill'
  )[..., 0]  # NaN beyond the classes
  entropies = jax.nn.logsumexp(logits, axis=-1) - own
  weights = jnp.broadcast_to(
    (labels >= 0).astype(jnp.float32)[None], (views, batch)
  )
  # A product, not a selection, so that a NaN shows even where its weight is 0.
  total = jnp.sum(entropies * weights)
  return shared.mean(total, jnp.sum(weights), axis_name)
