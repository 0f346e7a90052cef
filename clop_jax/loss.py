"""The training losses of CLOP and its neighbours, as pure functions.

Conventions, the same for every function:

* `embeddings` are `[views, batch, dim]`, floating, any precision; all
  arithmetic is float32 and the result is a float32 scalar.
* `labels` are `[batch]` integers of any kind, one for all views of an example;
  a negative label (-1) means unlabelled.
* The result is a mean over the *global* batch. With `axis_name=None` the arrays
  given are the global batch (one device, or global arrays under `jax.jit`).
  With a name they are this device's share of it, and every device returns the
  same global value.
* Gradients. Under `jax.shard_map(..., check_vma=True)` differentiate these
  functions as they are: the gradient for replicated parameters is already the
  global gradient, and averaging it again would be wrong or useless. Under
  `jax.pmap`, average the gradients with `jax.lax.pmean`.
* A NaN in the embeddings gives a NaN loss. A zero embedding has cosine 0 with
  everything, and gets the gradient 0.
"""

import functools
import itertools

import jax
from jax import lax
import jax.numpy as jnp

from clop_jax import arguments

# Half of the lowest float32: exp(_MASKED - max) is exactly 0, and unlike -inf
# it leaves no `inf - inf` in the gradient of a row whose every entry is masked.
_MASKED = float(jnp.finfo(jnp.float32).min) / 2

# The matrix products of the losses feed exponentials; TPU and GPU defaults
# (bfloat16, TF32) would cost up to three digits there.
_PRECISION = lax.Precision.HIGHEST


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
  r"""CLOP: the mean distance of labelled embeddings to their class prototype.

  .. math::
    L = \frac{\sum_{v,i:\, y_i \ge 0} w_{y_i}\, d(z_{v,i}, c_{y_i})}
             {\sum_{v,i:\, y_i \ge 0} w_{y_i}}

  with `d(z, c) = 1 - cos(z, c)` ('cosine', the paper's), `||z - c||_2`
  ('euclidean') or `||z - c||_1` ('manhattan'). All of them first divide the
  embeddings by their lengths, as the authors' code does; `c` stays as it is
  given. Without a labelled example anywhere the loss and its gradient are
  exactly 0.

  Two forms are not the paper's. Embeddings that are all alike feel its cosine
  distance as a pull towards the mean of orthonormal prototypes, where the loss
  rests at `1 - 1 / sqrt(num_classes)`; these do not have that pull:

  .. math::
    d_{softmax}(z, c_y) = -\log \frac{\exp(\cos(z, c_y) / \tau)}
      {\sum_j \exp(\cos(z, c_j) / \tau)}, \qquad
    d_{repulsion}(z, c_y) = 1 - \cos(z, c_y) +
      \frac{r}{k - 1} \sum_{j \ne y} \cos(z, c_j)

  Repulsion with `r = 1` is, up to a constant and a factor, the cosine distance
  to the simplex ETF that the centred prototypes are.

  Args:
    embeddings: `[views, batch, dim]` or `[batch, dim]`, floating.
    labels: `[batch]` integers in `[-1, num_classes)`; -1 is unlabelled. A
      traced label beyond the prototypes gives NaN.
    prototypes: `[num_classes, dim]`, see `clop_jax.prototypes`.
    distance: 'cosine', 'euclidean', 'manhattan' or 'softmax'.
    temperature: tau of 'softmax', above 0.
    repulsion: r, the weight of the repulsion from the other prototypes, at
      least 0; of 'cosine' only.
    class_weights: `[num_classes]` non-negative weights `w`; None is all ones.
    axis_name: the mapped axis over which the batch is split, or None.

  Returns:
    A float32 scalar, in [0, 2] for the cosine distance without repulsion.

  Raises:
    ValueError: if a shape, a dtype, `distance`, a number or a label whose value
      is known is not as above.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import loss
    >>> z = jnp.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    >>> print(loss.clop_loss(z, jnp.array([0, 0, -1]), jnp.eye(2)))
    0.5

  Reference:
    "CLOP", arXiv 2403.18699, the loss added to the contrastive one.
  """
  if distance not in _DISTANCES:
    raise ValueError(
      f'distance must be one of {sorted(_DISTANCES)}, got {distance!r}'
    )
  temperature = arguments.number('temperature', temperature, above=0)
  repulsion = arguments.number('repulsion', repulsion, at_least=0)
  # A traced number has no value: it may be 0 or not.
  repels = isinstance(repulsion, jax.core.Tracer) or repulsion > 0
  if repels and distance != 'cosine':
    raise ValueError(
      f"repulsion={repulsion} goes with distance='cosine' only, got "
      f'{distance!r}; set repulsion to 0'
    )
  embeddings = arguments.array('embeddings', embeddings)
  if embeddings.ndim == 2:
    embeddings = embeddings[None]
  embeddings = _checked_embeddings(embeddings, min_views=1)
  views, batch, dim = embeddings.shape
  prototypes = arguments.real('prototypes', prototypes)
  if prototypes.ndim != 2 or prototypes.shape[1] != dim or not len(prototypes):
    raise ValueError(
      f'prototypes must have shape [num_classes, dim]=[*, {dim}] to fit the '
      f'embeddings, got {prototypes.shape}'
    )
  num_classes = prototypes.shape[0]
  labels = arguments.labels('labels', labels, (batch,), num_classes)
  labelled = labels >= 0
  weights = labelled.astype(jnp.float32)
  if class_weights is not None:
    class_weights = arguments.real('class_weights', class_weights)
    if class_weights.shape != (num_classes,):
      raise ValueError(
        f'class_weights must have shape [num_classes]=[{num_classes}], got '
        f'{class_weights.shape}'
      )
    weights *= class_weights[labels]
  # A gather clamps an index that is too large, which would pull the example to
  # the wrong prototype without a word.
  own = jnp.where(
    (labels < num_classes)[:, None],
    prototypes[jnp.where(labelled, labels, 0)],
    jnp.nan,
  )[None]
  unit = _normalize(embeddings)
  distances = _DISTANCES[distance](unit, own)
  if distance == 'softmax':
    cosines = _dot(unit, _normalize(prototypes))
    partition = jax.nn.logsumexp(cosines / temperature, axis=-1)
    distances = partition - (1.0 - distances) / temperature
  if repels:
    everything = jnp.sum(_normalize(prototypes), axis=0)
    others = everything[None, None] - _normalize(own)
    cosines = jnp.sum(unit * others, axis=-1)
    distances += repulsion / max(num_classes - 1, 1) * cosines
  weights = jnp.broadcast_to(weights[None], (views, batch))
  return _masked_mean(distances, weights, axis_name)


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

  over all `V B` embeddings `a`; `P(a)` are the other views of the same example.
  With two views it is the published loss. With more, the positives' logarithms
  are averaged, as in SupCon's `L_out`.

  Args:
    embeddings: `[views, batch, dim]` with at least two views, floating.
    temperature: tau, above 0.
    block_size: rows of the similarity matrix that exist at one time. None makes
      it whole: memory grows with the square of the batch. A number makes it
      block by block, and each block's part of the gradient with it: memory
      grows with the batch, the value is the same. With `axis_name` the rows are
      as many fewer as the devices are more (and at least one), so that a device
      never holds more than its own rows times `block_size` numbers of the
      matrix, if `block_size` is not below the devices. docs/scaling.md says how
      to choose it for many devices. (Reverse mode only.)
    axis_name: the mapped axis over which the batch is split, or None.

  Returns:
    A float32 scalar.

  Raises:
    ValueError: if a shape, a dtype or a hyper-parameter is not as above.

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
  return _supervised_contrastive(
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

  with `s = cos / temperature`. (The code SupContrast multiplies the loss by
  `temperature / 0.07`.) `P(a)` are the other views of the same example and, if
  it is labelled, all views of the examples with its label. `A` are the
  embeddings with a positive: one without adds nothing. With all labels unique,
  or all -1, both forms equal `nt_xent_loss` at two views.

  Args:
    embeddings: `[views, batch, dim]`, floating. One view is enough where
      classes repeat.
    labels: `[batch]` integers; negative is unlabelled.
    temperature: above 0.
    variant: 'out', the mean of logarithms, or 'in', the logarithm of the mean.
    block_size: as in `nt_xent_loss`.
    axis_name: the mapped axis over which the batch is split, or None.

  Returns:
    A float32 scalar; 0 if no embedding has a positive.

  Raises:
    ValueError: if a shape, a dtype or a hyper-parameter is not as above.

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
  return _supervised_contrastive(
    embeddings, labels, temperature, variant, block_size, axis_name
  )


def choose_block_size(
  num_embeddings: int, num_devices: int = 1, *, platform: str | None = None
) -> int | None:
  """The `block_size` that training takes unless the config gives one.

  Blocks of 512 rows on each device, where the whole matrix would be slower or
  too large: on a CPU from 2,048 embeddings on (from there they are faster, as
  they stay nearer to the caches), elsewhere from 2^26 numbers on a device on,
  268 MB, as a loss needs two or three such matrices.

  Args:
    num_embeddings: of all views, over all devices.
    num_devices: that share the rows.
    platform: 'cpu', 'gpu' or 'tpu'; None: JAX's default.

  Returns:
    The block size, or None for the whole matrix.

  Example:
    >>> from clop_jax import loss
    >>> print(loss.choose_block_size(1024, platform='gpu'))
    None
    >>> loss.choose_block_size(131072, 8, platform='gpu')
    4096

  Reference:
    docs/performance.md, measured.
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
  r"""Decoupled contrastive loss (DCL): NT-Xent without the positives below.

  .. math::
    L = \frac{1}{VB} \sum_a \Big( -\frac{1}{V-1} \sum_{p \in P(a)} s_{ap} +
        \log \sum_{b \in N(a)} \exp(s_{ab}) \Big)

  with `s = cos / temperature`; `P(a)` are the other views of the same example
  and `N(a)` all views of all other examples. It can be negative.

  Args:
    embeddings: `[views, batch, dim]`, floating, at least two views and (over
      all devices) two examples.
    temperature: above 0.
    axis_name: the mapped axis over which the batch is split, or None.

  Returns:
    A float32 scalar.

  Raises:
    ValueError: if a shape, a dtype or a hyper-parameter is not as above.

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
  temperature = arguments.number('temperature', temperature, above=0)
  views = embeddings.shape[0]
  _checked_global_batch(embeddings, axis_name, at_least=2)
  rows, row_ids, columns, column_ids = _rows_and_columns(embeddings, axis_name)
  logits = _dot(rows / temperature, columns)
  same_example = _same_example(row_ids, column_ids)
  positive = same_example & (row_ids[:, None] != column_ids[None, :])
  attraction = jnp.sum(jnp.where(positive, logits, 0.0), axis=1) / (views - 1)
  repulsion = jax.nn.logsumexp(jnp.where(same_example, _MASKED, logits), axis=1)
  per_anchor = repulsion - attraction
  return _masked_mean(per_anchor, jnp.ones_like(per_anchor), axis_name)


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

  with the unbiased (n - 1) variance and covariance. As in the paper's
  algorithm 1, `s` is also a mean over the dimensions (equation 5 sums them).
  The authors' code and lightly take half of the variance term: their weights
  25, 25, 1 are 25, 12.5, 1 here.
  With more than two views it is the mean over the pairs of views.

  Args:
    embeddings: `[views, batch, dim]`, floating, at least two views and (over
      all devices) two examples; used at the length they have.
    invariance_weight: lambda.
    variance_weight: mu.
    covariance_weight: nu.
    axis_name: the mapped axis over which the batch is split, or None.

  Returns:
    A float32 scalar.

  Raises:
    ValueError: if a shape or a dtype is not as above.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import loss
    >>> z = jnp.array([[[3.0], [-3.0]], [[3.0], [-3.0]]])
    >>> print(loss.vicreg_loss(z))  # equal views, deviation above 1, one dim
    0.0

  Reference:
    Bardes et al., "VICReg", arXiv 2105.04906, section 4.1 and algorithm 1.
  """
  invariance_weight, variance_weight, covariance_weight = (
    arguments.number(name, value)
    for name, value in (
      ('invariance_weight', invariance_weight),
      ('variance_weight', variance_weight),
      ('covariance_weight', covariance_weight),
    )
  )
  embeddings = _checked_embeddings(embeddings, min_views=2)
  views, _, dim = embeddings.shape
  batch = _checked_global_batch(embeddings, axis_name, at_least=2)
  pairs = list(itertools.combinations(range(views), 2))
  squared = sum(
    jnp.sum(jnp.square(embeddings[a] - embeddings[b])) for a, b in pairs
  )
  invariance = _psum(squared, axis_name) / (len(pairs) * batch * dim)

  centred = _centred(embeddings, batch, axis_name)
  covariance = _cross_products(centred, centred, axis_name) / (batch - 1)
  variances = jnp.diagonal(covariance, axis1=1, axis2=2)
  deviation = jnp.sqrt(variances + 1e-4)
  # Each view is in as many pairs as any other, so a mean over pairs of
  # v(Z) + v(Z') is twice the mean over views.
  variance = 2 * jnp.mean(jax.nn.relu(1.0 - deviation))
  off_diagonal = covariance * (1.0 - jnp.eye(dim, dtype=jnp.float32))[None]
  covariance_term = 2 * jnp.sum(jnp.square(off_diagonal)) / (views * dim)
  return (
    invariance_weight * invariance
    + variance_weight * variance
    + covariance_weight * covariance_term
  )


def barlow_twins_loss(
  embeddings: jax.Array,
  *,
  redundancy_weight: float = 5e-3,
  axis_name: str | None = None,
) -> jax.Array:
  r"""Barlow Twins: the views' cross-correlation should be the identity.

  .. math::
    L = \sum_i (1 - C_{ii})^2 + \lambda \sum_{i \ne j} C_{ij}^2, \qquad
    C = \tfrac{1}{n} \hat{Z}^\top \hat{Z}'

  where each column of `Z` is standardized over the batch: mean 0 and divided by
  `sqrt(variance + 1e-5)`, as batch normalization does, so that a dead dimension
  has correlation 0 and a finite gradient. With more than two views it is the
  mean over the pairs of views. (solo-learn multiplies the loss by 0.025.)

  Args:
    embeddings: `[views, batch, dim]`, floating, at least two views and (over
      all devices) two examples.
    redundancy_weight: lambda.
    axis_name: the mapped axis over which the batch is split, or None.

  Returns:
    A float32 scalar.

  Raises:
    ValueError: if a shape or a dtype is not as above.

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
  batch = _checked_global_batch(embeddings, axis_name, at_least=2)
  centred = _centred(embeddings, batch, axis_name)
  variances = _psum(jnp.sum(jnp.square(centred), axis=1), axis_name) / batch
  standardized = centred * lax.rsqrt(variances + 1e-5)[:, None]
  first, second = zip(*itertools.combinations(range(views), 2), strict=True)
  correlation = (
    _cross_products(
      standardized[jnp.array(first)], standardized[jnp.array(second)], axis_name
    )
    / batch
  )
  identity = jnp.eye(dim, dtype=jnp.float32)[None]
  weights = identity + redundancy_weight * (1.0 - identity)
  squared = weights * jnp.square(correlation - identity)
  return jnp.sum(squared) / len(first)


# Distances of unit embeddings to the prototypes of their classes.


def _cosine_distance(unit, targets):
  return 1.0 - jnp.sum(unit * _normalize(targets), axis=-1)


def _euclidean_distance(unit, targets):
  squared = jnp.sum(jnp.square(unit - targets), axis=-1)
  # The square root has no gradient at 0; where an embedding sits on its target
  # the distance is at its minimum and 0 is a subgradient.
  at_target = squared == 0.0
  return jnp.where(at_target, 0.0, jnp.sqrt(jnp.where(at_target, 1.0, squared)))


def _manhattan_distance(unit, targets):
  return jnp.sum(jnp.abs(unit - targets), axis=-1)


_DISTANCES = {
  'cosine': _cosine_distance,
  'euclidean': _euclidean_distance,
  'manhattan': _manhattan_distance,
  'softmax': _cosine_distance,  # its logits are the cosines
}

# See `choose_block_size`.
_BLOCK_ROWS = 512
_ROWS_OF_WHOLE_ON_CPU = 2048
_LARGEST_WHOLE = 1 << 26

# An embedding's number is `view * _BATCH_STRIDE + example`: the same on every
# device, and one remainder away from the example's number.
_BATCH_STRIDE = 1 << 24


def _supervised_contrastive(
  embeddings, labels, temperature, variant, block_size, axis_name
):
  """SupCon and, with labels None, NT-Xent, dense or in blocks of rows."""
  temperature = arguments.number('temperature', temperature, above=0)
  if block_size is not None:
    block_size = arguments.count('block_size', block_size)
  views = embeddings.shape[0]
  rows, row_ids, columns, column_ids = _rows_and_columns(embeddings, axis_name)
  row_labels = column_labels = None
  if labels is not None:
    row_labels = jnp.tile(labels, views)
    column_labels = jnp.tile(_all_gather(labels, axis_name, axis=0), views)
  numbered = (row_ids, row_labels), (column_ids, column_labels)
  rows = rows / temperature
  num_rows, num_columns = rows.shape[0], columns.shape[0]
  if block_size is None or block_size >= num_columns:
    total, count = _anchor_sum(rows, columns, *numbered, variant)
  else:
    # The columns are of all devices: with a fixed number of rows a block would
    # grow with the number of devices. Rounded down, to hold no more than said.
    rows_at_once = max(1, block_size * num_rows // num_columns)
    total, count = _blocked_anchor_sum(
      rows, columns, *numbered, variant, rows_at_once
    )
  return _mean(total, count, axis_name)


def _anchor_sum(rows, columns, row_numbers, column_numbers, variant):
  """Sum of the anchors' losses and number of the anchors with a positive.

  `*_numbers` are `(ids, labels or None)`. A negative row id is padding.
  """
  (row_ids, row_labels), (column_ids, column_labels) = (
    row_numbers,
    column_numbers,
  )
  itself = row_ids[:, None] == column_ids[None, :]
  logits = jnp.where(itself, _MASKED, _dot(rows, columns))
  positive = _same_example(row_ids, column_ids)
  if row_labels is not None:
    same_class = row_labels[:, None] == column_labels[None, :]
    positive |= same_class & (row_labels[:, None] >= 0)
  positive &= ~itself & (row_ids[:, None] >= 0)
  num_positives = jnp.sum(positive, axis=1).astype(jnp.float32)
  divisor = jnp.maximum(num_positives, 1.0)
  if variant == 'out':
    attraction = jnp.sum(jnp.where(positive, logits, 0.0), axis=1) / divisor
  else:
    attraction = jax.nn.logsumexp(
      jnp.where(positive, logits, _MASKED), axis=1
    ) - jnp.log(divisor)
  losses = jax.nn.logsumexp(logits, axis=1) - attraction
  has_positive = (num_positives > 0).astype(jnp.float32)
  # A product, so that a NaN shows also where no anchor has a positive.
  return jnp.sum(losses * has_positive), jnp.sum(has_positive)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _blocked_anchor_sum(
  rows, columns, row_numbers, column_numbers, variant, block_size
):
  """`_anchor_sum` with no more than `block_size` rows of logits at one time."""

  def add_block(sums, block):
    block_rows, block_numbers = block
    block_sums = _anchor_sum(
      block_rows, columns, block_numbers, column_numbers, variant
    )
    return jax.tree.map(jnp.add, sums, block_sums), None

  start = _zeros((jnp.float32(0), jnp.float32(0)), like=rows)
  blocks = _blocks(rows, row_numbers, block_size)
  return lax.scan(add_block, start, blocks)[0]


def _blocked_anchor_sum_fwd(
  rows, columns, row_numbers, column_numbers, variant, block_size
):
  # The sum is differentiated where its block is at hand: the gradient needs the
  # block's logits once, so nothing is kept and nothing made again, and all that
  # the cotangent (a scalar) can do later is to scale it.
  differentiate = jax.value_and_grad(_anchor_sum, argnums=(0, 1), has_aux=True)

  def add_block(sums, block):
    block_rows, block_numbers = block
    (total, count), (d_rows, d_columns) = differentiate(
      block_rows, columns, block_numbers, column_numbers, variant
    )
    return jax.tree.map(jnp.add, sums, (total, count, d_columns)), d_rows

  start = _zeros((jnp.float32(0), jnp.float32(0), columns), like=rows)
  blocks = _blocks(rows, row_numbers, block_size)
  (total, count, d_columns), d_rows = lax.scan(add_block, start, blocks)
  d_rows = d_rows.reshape(-1, rows.shape[1])[: rows.shape[0]]
  return (total, count), (d_rows, d_columns)


def _blocked_anchor_sum_bwd(variant, block_size, gradients, cotangents):
  del variant, block_size
  d_rows, d_columns = gradients
  d_total, _ = cotangents
  return d_total * d_rows, d_total * d_columns, None, None


_blocked_anchor_sum.defvjp(_blocked_anchor_sum_fwd, _blocked_anchor_sum_bwd)


def _blocks(rows, row_numbers, block_size):
  """Rows and ids as `[blocks, block_size, ...]`, padded with id -1."""
  num_blocks = -(-rows.shape[0] // block_size)
  padding = num_blocks * block_size - rows.shape[0]

  def split(x, fill):
    widths = [(0, padding)] + [(0, 0)] * (x.ndim - 1)
    x = jnp.pad(x, widths, constant_values=fill)
    return x.reshape(num_blocks, block_size, *x.shape[1:])

  row_ids, row_labels = row_numbers
  if row_labels is not None:
    row_labels = split(row_labels, 0)
  return split(rows, 0.0), (split(row_ids, -1), row_labels)


def _zeros(tree, like):
  """Zeros that vary over the same mapped axes as `like`, as a scan demands."""
  never = like.ravel()[0] != like.ravel()[0]
  return jax.tree.map(lambda x: jnp.where(never, 0.0, jnp.zeros_like(x)), tree)


def _rows_and_columns(embeddings, axis_name):
  """This device's unit embeddings as rows, everybody's as columns, numbered."""
  views, batch, dim = embeddings.shape
  unit = _normalize(embeddings)
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


def _same_example(row_ids, column_ids):
  columns = column_ids[None, :] % _BATCH_STRIDE
  return row_ids[:, None] % _BATCH_STRIDE == columns


def _dot(rows, columns):
  return jnp.matmul(rows, columns.T, precision=_PRECISION)


def _normalize(x):
  """Unit vectors along the last axis; the zero vector stays 0, gradient 0."""
  # Scaled by the largest entry first: the square of a float32 beyond 1e19
  # overflows, and a diverged embedding would come out as 0 and not as wrong.
  largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
  is_zero = largest == 0.0
  x = x / jnp.where(is_zero, 1.0, largest)
  squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * jnp.where(
    is_zero, 0.0, lax.rsqrt(jnp.where(is_zero, 1.0, squared))
  )


def _centred(embeddings, global_batch, axis_name):
  total = _psum(jnp.sum(embeddings, axis=1, keepdims=True), axis_name)
  return embeddings - total / global_batch


def _cross_products(a, b, axis_name):
  """`[views, dim, dim]` sums over the global batch of `a_i b_j`."""
  local = jnp.einsum('vni,vnj->vij', a, b, precision=_PRECISION)
  return _psum(local, axis_name)


def _masked_mean(values, weights, axis_name):
  """Weighted mean over all devices; 0 if all weights are 0, NaN stays NaN."""
  # A product, not a selection: NaN times 0 is NaN, so a broken embedding shows
  # even where its weight is 0.
  return _mean(jnp.sum(values * weights), jnp.sum(weights), axis_name)


def _mean(total, count, axis_name):
  """Sum over devices by count over devices; 0 if there is nothing."""
  # Not a mean of local means: devices hold different numbers of labels. In one
  # collective, which waits for the embeddings; the count alone may be constant,
  # and `grad_cache` needs the collectives in one order on all devices.
  total, count = _psum(jnp.stack([total, count]), axis_name)
  return total / jnp.where(count == 0.0, 1.0, count)


def _psum(x, axis_name):
  return x if axis_name is None else lax.psum(x, axis_name)


def _all_gather(x, axis_name, axis):
  if axis_name is None:
    return x
  return lax.all_gather(x, axis_name, axis=axis, tiled=True)


def _checked_embeddings(embeddings, min_views):
  """The embeddings in float32, or a ValueError."""
  embeddings = arguments.floating('embeddings', embeddings)
  if embeddings.ndim != 3 or 0 in embeddings.shape:
    raise ValueError(
      'embeddings must have shape [views, batch, dim] without an empty axis '
      f'(two views: jnp.stack([z1, z2])), got {embeddings.shape}'
    )
  if embeddings.shape[0] < min_views:
    raise ValueError(
      f'embeddings must have at least {min_views} views on their first axis '
      f'(jnp.stack([z1, z2])), got shape {embeddings.shape}'
    )
  return embeddings


def _checked_global_batch(embeddings, axis_name, *, at_least):
  devices = 1 if axis_name is None else lax.axis_size(axis_name)
  batch = embeddings.shape[1] * devices
  if batch < at_least:
    raise ValueError(
      f'embeddings must hold at least {at_least} examples for this loss, got '
      f'{batch} (shape {embeddings.shape} on {devices} devices)'
    )
  return batch
