"""The CLOP loss and other contrastive losses, as pure functions.

Conventions of all losses:

* `embeddings` are `[views, batch, dim]` floats of any precision. All arithmetic
  is float32, and the result is a float32 scalar.
* `labels` are `[batch]` integers, one for all views of an example. A negative
  label means unlabelled.
* `axis_name` is the mapped axis over which the batch is split, or None. With it
  the arrays are this device's part of the batch. The result is always the mean
  over the *global* batch, the same on every device.
* Under `jax.shard_map(..., check_vma=True)` the gradient for replicated
  parameters is already global: do not average it again. Under `jax.pmap`,
  average the gradients with `jax.lax.pmean`.
* A NaN in the embeddings gives a NaN loss. A zero embedding has cosine 0 with
  everything, and gradient 0.
* An invalid shape, dtype, label or hyper-parameter raises a `ValueError` while
  tracing.
"""

import functools
import itertools

import jax
from jax import lax
import jax.numpy as jnp

from clop_jax import arguments
from clop_jax import linalg

DISTANCES = ('cosine', 'euclidean', 'manhattan', 'softmax')

# Half of the lowest float32: exp(_MASKED - max) is exactly 0. Unlike -inf it
# gives no `inf - inf` in the gradient of a fully masked row.
_MASKED = float(jnp.finfo(jnp.float32).min) / 2

# The products feed exponentials, so TF32 or bfloat16 would lose three digits.
_PRECISION = lax.Precision.HIGHEST

# See `choose_block_size`.
_BLOCK_ROWS = 512
_ROWS_OF_WHOLE_ON_CPU = 2048
_LARGEST_WHOLE = 1 << 26

# The id of an embedding is `view * _BATCH_STRIDE + example`, on every device.
_BATCH_STRIDE = 1 << 24


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
  embeddings = _checked_embeddings(embeddings, min_views=1)
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
  return _mean(jnp.sum(distances * weights), jnp.sum(weights), axis_name)


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
    logits = _dot(unit, linalg.normalize(prototypes)) / temperature
    return jax.nn.logsumexp(logits, axis=-1) - cosines / temperature
  if not _may_repel(repulsion):
    return 1.0 - cosines
  total = jnp.sum(linalg.normalize(prototypes), axis=0)
  others = jnp.expand_dims(total, tuple(range(own.ndim - 1))) - own
  weight = repulsion / max(len(prototypes) - 1, 1)
  return 1.0 - cosines + weight * jnp.sum(unit * others, axis=-1)


def nt_xent_loss(
  embeddings: jax.Array,
  *,
  temperature: float = 0.5,
  block_size: int | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  r"""NT-Xent (InfoNCE), the loss of SimCLR.

  .. math::
    L = -\frac{1}{VB} \sum_a \frac{1}{V-1} \sum_{p \in P(a)} \log
        \frac{\exp(\cos(z_a, z_p) / \tau)}
             {\sum_{b \ne a} \exp(\cos(z_a, z_b) / \tau)}

  over all `V B` embeddings `a`, where `P(a)` are the other views of the same
  example. With more than two views, the logarithms of the positives are
  averaged, as in SupCon's `L_out`.

  Args:
    embeddings: `[views, batch, dim]` with at least two views, floating.
    temperature: Softmax temperature, must be positive.
    block_size: Number of rows of the similarity matrix in memory at a time,
      over all devices together (at least one on each). None computes the whole
      matrix. Blocks give the same value, memory that grows linearly with the
      batch, and no forward-mode derivative. See docs/scaling.md.
    axis_name: Mapped axis of the batch.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import loss
    >>> z = jnp.stack([jnp.eye(2), jnp.eye(2)])
    >>> value = loss.nt_xent_loss(z, temperature=1.0)
    >>> print(f'{value:.4f}')  # log(1 + 2 / e)
    0.5514

  Reference:
    Chen et al., "A Simple Framework for Contrastive Learning of Visual
    Representations", arXiv 2002.05709, section 2.1, equation 1.
  """
  embeddings = _checked_embeddings(embeddings, min_views=2)
  return _contrastive(
    embeddings, None, temperature, 'out', block_size, axis_name
  )


def supcon_loss(
  embeddings: jax.Array,
  labels: jax.Array,
  *,
  temperature: float = 0.1,
  variant: str = 'out',
  block_size: int | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  r"""Supervised contrastive loss (SupCon).

  .. math::
    L_{out} = \frac{1}{|A|} \sum_{a \in A} \frac{-1}{|P(a)|} \sum_{p \in P(a)}
      \log \frac{\exp(s_{ap})}{\sum_{b \ne a} \exp(s_{ab})}
    \qquad
    L_{in} = \frac{1}{|A|} \sum_{a \in A} -\log \frac{1}{|P(a)|}
      \sum_{p \in P(a)} \frac{\exp(s_{ap})}{\sum_{b \ne a} \exp(s_{ab})}

  with `s = cos / temperature`. `P(a)` are the other views of the same example
  and, if it is labelled, all views of the examples with its label. `A` are the
  embeddings with a positive. If all labels are unique, or all are -1, both
  forms equal `nt_xent_loss` at two views. (The authors' code multiplies the
  loss by `temperature / 0.07`.)

  Args:
    embeddings: `[views, batch, dim]`, floating. One view is enough where
      classes repeat.
    labels: `[batch]` integers.
    temperature: Softmax temperature, must be positive.
    variant: 'out' (mean of logarithms) or 'in' (logarithm of the mean).
    block_size: As for `nt_xent_loss`.
    axis_name: Mapped axis of the batch.

  Returns:
    A float32 scalar, 0 if no embedding has a positive.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import loss
    >>> z = jnp.array([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    >>> labels = jnp.array([4, 4, -1])
    >>> value = loss.supcon_loss(z, labels, temperature=1.0)
    >>> print(f'{value:.4f}')  # log(1 + 1 / e)
    0.3133

  Reference:
    Khosla et al., "Supervised Contrastive Learning", arXiv 2004.11362,
    section 3.2.2, equations 2 and 3.
  """
  if variant not in ('out', 'in'):
    raise ValueError(f"variant must be 'out' or 'in', got {variant!r}")
  embeddings = _checked_embeddings(embeddings, min_views=1)
  labels = arguments.labels('labels', labels, (embeddings.shape[1],))
  return _contrastive(
    embeddings, labels, temperature, variant, block_size, axis_name
  )


def choose_block_size(
  num_embeddings: int, num_devices: int = 1, *, platform: str | None = None
) -> int | None:
  """Returns the default `block_size` of training.

  Blocks have 512 rows on each device. They are used on a CPU from 2,048
  embeddings, where they are faster, and elsewhere above 2^26 matrix entries
  (268 MB) per device. docs/performance.md has the measurements.

  Args:
    num_embeddings: Number of embeddings: all views, all devices.
    num_devices: Number of devices that share the rows.
    platform: 'cpu', 'gpu', 'tpu', or None for JAX's default.

  Returns:
    The block size, or None for the whole matrix.

  Example:
    >>> from clop_jax import loss
    >>> print(loss.choose_block_size(1024, platform='gpu'))
    None
    >>> loss.choose_block_size(131072, 8, platform='gpu')
    4096
  """
  platform = platform or jax.default_backend()
  if platform == 'cpu':
    whole = num_embeddings < _ROWS_OF_WHOLE_ON_CPU
  else:
    whole = num_embeddings**2 // num_devices <= _LARGEST_WHOLE
  return None if whole else _BLOCK_ROWS * num_devices


def dcl_loss(
  embeddings: jax.Array,
  *,
  temperature: float = 0.1,
  axis_name: str | None = None,
) -> jax.Array:
  r"""Decoupled contrastive loss (DCL): NT-Xent without positives below.

  .. math::
    L = \frac{1}{VB} \sum_a \Big( -\frac{1}{V-1} \sum_{p \in P(a)} s_{ap} +
        \log \sum_{b \in N(a)} \exp(s_{ab}) \Big)

  with `s = cos / temperature`. `P(a)` are the other views of the same example
  and `N(a)` all views of all other examples. The loss can be negative.

  Args:
    embeddings: `[views, batch, dim]`, floating, with at least two views and
      (over all devices) two examples.
    temperature: Softmax temperature, must be positive.
    axis_name: Mapped axis of the batch.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import loss
    >>> z = jnp.stack([jnp.eye(2), jnp.eye(2)])
    >>> value = loss.dcl_loss(z, temperature=1.0)
    >>> print(f'{value:.4f}')  # log(2) - 1
    -0.3069

  Reference:
    Yeh et al., "Decoupled Contrastive Learning", arXiv 2110.06848, section 3,
    the loss L_DC.
  """
  embeddings = _checked_embeddings(embeddings, min_views=2)
  _checked_global_batch(embeddings, axis_name)
  return _contrastive(embeddings, None, temperature, 'dcl', None, axis_name)


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
  embeddings = _checked_embeddings(embeddings, min_views=2)
  views, _, dim = embeddings.shape
  batch = _checked_global_batch(embeddings, axis_name)
  pairs = list(itertools.combinations(range(views), 2))
  squared = sum(
    jnp.sum(jnp.square(embeddings[a] - embeddings[b])) for a, b in pairs
  )
  invariance = _psum(squared, axis_name) / (len(pairs) * batch * dim)

  centred = _centred(embeddings, batch, axis_name)
  covariance = _cross_products(centred, centred, axis_name) / (batch - 1)
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
  embeddings = _checked_embeddings(embeddings, min_views=2)
  views, _, dim = embeddings.shape
  batch = _checked_global_batch(embeddings, axis_name)
  centred = _centred(embeddings, batch, axis_name)
  variances = _psum(jnp.sum(jnp.square(centred), axis=1), axis_name) / batch
  standardized = centred * lax.rsqrt(variances + 1e-5)[:, None]
  pairs = jnp.array([*itertools.combinations(range(views), 2)]).T
  first, second = standardized[pairs[0]], standardized[pairs[1]]
  correlation = _cross_products(first, second, axis_name) / batch
  identity = jnp.eye(dim, dtype=jnp.float32)[None]
  weights = identity + redundancy_weight * (1.0 - identity)
  squared = weights * jnp.square(correlation - identity)
  return jnp.sum(squared) / len(first)


def _contrastive(
  embeddings, labels, temperature, variant, block_size, axis_name
):
  """SupCon or, with labels None, NT-Xent or DCL; dense or in blocks."""
  temperature = arguments.number('temperature', temperature, above=0)
  if block_size is not None:
    block_size = arguments.count('block_size', block_size)
  views = embeddings.shape[0]
  rows, row_ids, columns, column_ids = _rows_and_columns(embeddings, axis_name)
  row_labels = column_labels = None
  if labels is not None:
    row_labels = jnp.tile(labels, views)
    column_labels = jnp.tile(_all_gather(labels, axis_name, axis=0), views)
  numbers = (row_ids, row_labels), (column_ids, column_labels)
  rows = rows / temperature
  num_rows, num_columns = rows.shape[0], columns.shape[0]
  if block_size is None or block_size >= num_columns:
    total, count = _anchor_sum(rows, columns, *numbers, variant)
  else:
    # This device's share of `block_size`, so that a block does not grow with
    # the number of devices.
    block_rows = max(1, block_size * num_rows // num_columns)
    total, count = _blocked_anchor_sum(
      rows, columns, *numbers, variant, block_rows
    )
  return _mean(total, count, axis_name)


def _anchor_sum(rows, columns, row_numbers, column_numbers, variant):
  """Sum of the anchors' losses, and number of the anchors with a positive.

  `*_numbers` are `(ids, labels or None)`. A negative row id is padding.
  """
  row_ids, row_labels = row_numbers
  column_ids, column_labels = column_numbers
  itself = row_ids[:, None] == column_ids[None, :]
  columns_example = column_ids[None, :] % _BATCH_STRIDE
  same_example = row_ids[:, None] % _BATCH_STRIDE == columns_example
  excluded = same_example if variant == 'dcl' else itself
  positive = same_example
  if row_labels is not None:
    same_class = row_labels[:, None] == column_labels[None, :]
    positive |= same_class & (row_labels[:, None] >= 0)
  positive &= ~itself & (row_ids[:, None] >= 0)
  num_positives = jnp.sum(positive, axis=1).astype(jnp.float32)
  divisor = jnp.maximum(num_positives, 1.0)
  logits = _dot(rows, columns)
  partition = jax.nn.logsumexp(jnp.where(excluded, _MASKED, logits), axis=1)
  if variant == 'in':
    attraction = jax.nn.logsumexp(
      jnp.where(positive, logits, _MASKED), axis=1
    ) - jnp.log(divisor)
  else:
    attraction = jnp.sum(jnp.where(positive, logits, 0.0), axis=1) / divisor
  has_positive = (num_positives > 0).astype(jnp.float32)
  # A product, so that a NaN shows even where no anchor has a positive.
  losses = (partition - attraction) * has_positive
  return jnp.sum(losses), jnp.sum(has_positive)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _blocked_anchor_sum(*operands):
  """`_anchor_sum` with at most `block_rows` rows of logits at a time."""
  return _blocked_anchor_sum_fwd(*operands)[0]


def _blocked_anchor_sum_fwd(
  rows, columns, row_numbers, column_numbers, variant, block_rows
):
  # Each block is differentiated while its logits exist, so they are neither
  # kept nor computed again. The cotangent, a scalar, only scales the result.
  differentiate = jax.value_and_grad(_anchor_sum, argnums=(0, 1), has_aux=True)

  def add_block(sums, block):
    block, numbers = block
    (total, count), (d_rows, d_columns) = differentiate(
      block, columns, numbers, column_numbers, variant
    )
    return jax.tree.map(jnp.add, sums, (total, count, d_columns)), d_rows

  num_rows, dim = rows.shape
  num_blocks = -(-num_rows // block_rows)
  padding = num_blocks * block_rows - num_rows

  def split(x, fill):
    widths = [(0, padding)] + [(0, 0)] * (x.ndim - 1)
    x = jnp.pad(x, widths, constant_values=fill)
    return x.reshape(num_blocks, block_rows, *x.shape[1:])

  ids, labels = row_numbers
  labels = None if labels is None else split(labels, -1)
  blocks = split(rows, 0.0), (split(ids, -1), labels)
  # `lax.scan` needs zeros that vary over the same mapped axes as the rows.
  zero = 0.0 * rows[0, 0]
  start = zero, zero, zero + jnp.zeros_like(columns)
  (total, count, d_columns), d_rows = lax.scan(add_block, start, blocks)
  return (total, count), (d_rows.reshape(-1, dim)[:num_rows], d_columns)


def _blocked_anchor_sum_bwd(variant, block_rows, gradients, cotangents):
  del variant, block_rows
  d_rows, d_columns = gradients
  d_total, _ = cotangents
  return d_total * d_rows, d_total * d_columns, None, None


_blocked_anchor_sum.defvjp(_blocked_anchor_sum_fwd, _blocked_anchor_sum_bwd)


def _rows_and_columns(embeddings, axis_name):
  """Unit embeddings: this device's as rows, all as columns, with their ids."""
  views, batch, dim = embeddings.shape
  unit = linalg.normalize(embeddings)
  gathered = _all_gather(unit, axis_name, axis=1)
  global_batch = gathered.shape[1]
  if global_batch > _BATCH_STRIDE:
    raise ValueError(
      f'the global batch must be at most {_BATCH_STRIDE}, got {global_batch}'
    )
  offset = 0 if axis_name is None else lax.axis_index(axis_name) * batch
  view_ids = jnp.arange(views, dtype=jnp.int32)[:, None] * _BATCH_STRIDE
  row_ids = view_ids + jnp.arange(batch, dtype=jnp.int32)[None] + offset
  column_ids = view_ids + jnp.arange(global_batch, dtype=jnp.int32)[None]
  return (
    unit.reshape(-1, dim),
    row_ids.reshape(-1),
    gathered.reshape(-1, dim),
    column_ids.reshape(-1),
  )


def _dot(rows, columns):
  return jnp.matmul(rows, columns.T, precision=_PRECISION)


def _may_repel(repulsion):
  # A traced number has no value: it may be 0 or not.
  return isinstance(repulsion, jax.core.Tracer) or repulsion != 0


def _centred(embeddings, global_batch, axis_name):
  total = _psum(jnp.sum(embeddings, axis=1, keepdims=True), axis_name)
  return embeddings - total / global_batch


def _cross_products(a, b, axis_name):
  """Sums of `a_i b_j` over the global batch, `[views, dim, dim]`."""
  local = jnp.einsum('vni,vnj->vij', a, b, precision=_PRECISION)
  return _psum(local, axis_name)


def _mean(total, count, axis_name):
  """Sum over devices divided by count over devices; 0 if the count is 0."""
  # Not a mean of local means: devices hold different numbers of labels. One
  # collective, as the count alone may be constant and `grad_cache` needs the
  # same order of collectives on all devices.
  total, count = _psum(jnp.stack([total, count]), axis_name)
  return total / jnp.where(count == 0.0, 1.0, count)


def _psum(x, axis_name):
  return x if axis_name is None else lax.psum(x, axis_name)


def _all_gather(x, axis_name, axis):
  if axis_name is None:
    return x
  return lax.all_gather(x, axis_name, axis=axis, tiled=True)


def _checked_embeddings(embeddings, min_views):
  embeddings = arguments.floating('embeddings', embeddings)
  return arguments.views('embeddings', embeddings, min_views)


def _checked_global_batch(embeddings, axis_name):
  """Returns the size of the global batch, at least two."""
  devices = 1 if axis_name is None else lax.axis_size(axis_name)
  batch = embeddings.shape[1] * devices
  if batch < 2:
    raise ValueError(
      f'embeddings must hold at least 2 examples for this loss, got {batch} '
      f'(shape {embeddings.shape} on {devices} devices)'
    )
  return batch
