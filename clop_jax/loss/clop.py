"""The CLOP loss; `clop_jax.loss` has the conventions."""

import jax
import jax.numpy as jnp

from clop_jax import arguments
from clop_jax import linalg
from clop_jax.loss import shared

DISTANCES = ('cosine', 'euclidean', 'manhattan', 'softmax')


def clop_loss(
  embeddings: jax.Array,
  labels: jax.Array,
  prototypes: jax.Array,
  *,
  distance: str = 'cosine',
  temperature: float = 0.1,
  repulsion: float = 0.0,
  class_weights: jax.Array | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  r"""CLOP: mean distance of labelled embeddings to their class prototype.

  .. math::
    L = \frac{\sum_{v,i:\, y_i \ge 0} w_{y_i}\, d(z_{v,i}, c_{y_i})}
             {\sum_{v,i:\, y_i \ge 0} w_{y_i}}

  with `d(z, c) = 1 - cos(z, c)` ('cosine', the paper's), `||z - c||_2`
  ('euclidean') or `||z - c||_1` ('manhattan'). Embeddings are normalized for
  every distance, as in the authors' code. Prototypes are only normalized for
  cosines. Without a labelled example, the loss and its gradient are exactly 0.

  Two options are not in the paper. Its cosine distance pulls embeddings that
  are all equal to the mean of the prototypes. These two do not:

  .. math::
    d_{softmax}(z, c_y) = -\log \frac{\exp(\cos(z, c_y) / \tau)}
      {\sum_j \exp(\cos(z, c_j) / \tau)}, \qquad
    d_{repulsion}(z, c_y) = 1 - \cos(z, c_y) +
      \frac{r}{k - 1} \sum_{j \ne y} \cos(z, c_j)

  Args:
    embeddings: `[views, batch, dim]` or `[batch, dim]`, floating.
    labels: `[batch]` integers below `num_classes`. A traced label that is too
      large gives NaN.
    prototypes: `[num_classes, dim]`, see `clop_jax.prototypes`.
    distance: 'cosine', 'euclidean', 'manhattan' or 'softmax'.
    temperature: Temperature of 'softmax', must be positive.
    repulsion: Weight `r` of the repulsion from the other prototypes, at least
      0. Only for 'cosine'.
    class_weights: `[num_classes]` non-negative weights `w`. None is all ones.
    axis_name: Mapped axis of the batch.

  Returns:
    A float32 scalar, in [0, 2] for the cosine distance without repulsion.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import loss
    >>> z = jnp.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    >>> print(loss.clop_loss(z, jnp.array([0, 0, -1]), jnp.eye(2)))
    0.5

  Reference:
    "CLOP", arXiv 2403.18699, the loss added to the contrastive one.
  """
  if distance not in DISTANCES:
    raise ValueError(
      f'distance must be one of {sorted(DISTANCES)}, got {distance!r}'
    )
  temperature = arguments.number('temperature', temperature, above=0)
  repulsion = arguments.number('repulsion', repulsion, at_least=0)
  if _may_repel(repulsion) and distance != 'cosine':
    raise ValueError(
      f"repulsion={repulsion} needs distance='cosine', got {distance!r}; set "
      'repulsion to 0'
    )
  embeddings = arguments.array('embeddings', embeddings)
  if embeddings.ndim == 2:
    embeddings = embeddings[None]
  embeddings = shared.checked_embeddings(embeddings, min_views=1)
  views, batch, dim = embeddings.shape
  prototypes = arguments.prototypes(prototypes, dim)
  num_classes = len(prototypes)
  labels = arguments.labels('labels', labels, (batch,), num_classes)
  weights = (labels >= 0).astype(jnp.float32)
  if class_weights is not None:
    class_weights = arguments.real('class_weights', class_weights)
    if class_weights.shape != (num_classes,):
      raise ValueError(
        f'class_weights must have shape [num_classes]=[{num_classes}], got '
        f'{class_weights.shape}'
      )
    weights *= class_weights[labels]
  distances = prototype_distances(
    linalg.normalize(embeddings),
    labels,
    prototypes,
    distance=distance,
    temperature=temperature,
    repulsion=repulsion,
  )
  weights = jnp.broadcast_to(weights[None], (views, batch))
  # A product, not a selection, so that a NaN shows even where its weight is 0.
  return shared.mean(jnp.sum(distances * weights), jnp.sum(weights), axis_name)


def prototype_distances(
  unit: jax.Array,
  labels: jax.Array,
  prototypes: jax.Array,
  *,
  distance: str = 'cosine',
  temperature: float = 0.1,
  repulsion: float = 0.0,
) -> jax.Array:
  """Distances of unit embeddings to their prototypes, as in `clop_loss`.

  Arguments are not checked, and the dtype is kept.

  Args:
    unit: `[..., dim]` unit embeddings, floating.
    labels: Integers of the leading shape, or of its last axes. Unlabelled
      embeddings get the distance to some prototype.
    prototypes: `[num_classes, dim]`, floating.
    distance: As for `clop_loss`.
    temperature: As for `clop_loss`.
    repulsion: As for `clop_loss`.

  Returns:
    `[...]` distances, NaN for labels beyond the prototypes.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import loss
    >>> labels = jnp.array([0, 0])
    >>> print(loss.prototype_distances(jnp.eye(2), labels, jnp.eye(2)))
    [0. 1.]
  """
  unit, labels, prototypes = map(jnp.asarray, (unit, labels, prototypes))
  # A gather would clamp a label that is too large to another class.
  exists = (labels < len(prototypes))[..., None]
  own = jnp.where(exists, prototypes[jnp.maximum(labels, 0)], jnp.nan)
  own = jnp.expand_dims(own, tuple(range(unit.ndim - own.ndim)))
  if distance == 'manhattan':
    return jnp.sum(jnp.abs(unit - own), axis=-1)
  if distance == 'euclidean':
    squared = jnp.sum(jnp.square(unit - own), axis=-1)
    # The square root has no gradient at 0; use the subgradient 0.
    is_zero = squared == 0.0
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, squared)))
  own = linalg.normalize(own)
  cosines = jnp.sum(unit * own, axis=-1)
  if distance == 'softmax':
    logits = shared.dot(unit, linalg.normalize(prototypes)) / temperature
    return jax.nn.logsumexp(logits, axis=-1) - cosines / temperature
  if not _may_repel(repulsion):
    return 1.0 - cosines
  total = jnp.sum(linalg.normalize(prototypes), axis=0)
  others = jnp.expand_dims(total, tuple(range(own.ndim - 1))) - own
  weight = repulsion / max(len(prototypes) - 1, 1)
  return 1.0 - cosines + weight * jnp.sum(unit * others, axis=-1)


def _may_repel(repulsion):
  # A traced number has no value: it may be 0 or not.
  return isinstance(repulsion, jax.core.Tracer) or repulsion != 0
