"""NT-Xent, SupCon and DCL; `clop_jax.loss` has the conventions."""

import functools

import jax
from jax import lax
import jax.numpy as jnp

from clop_jax import arguments
from clop_jax import linalg
from clop_jax.loss import shared

# See `choose_block_size`.
_BLOCK_ROWS = 512

_ROWS_OF_WHOLE_ON_CPU = 2048

_LARGEST_WHOLE = 1 << 26

# The id of an embedding is `view * _BATCH_STRIDE + example`, on every device.
_BATCH_STRIDE = 1 << 24


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
  embeddings = shared.checked_embeddings(embeddings, min_views=2)
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
  embeddings = shared.checked_embeddings(embeddings, min_views=1)
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
  embeddings = shared.checked_embeddings(embeddings, min_views=2)
  shared.checked_global_batch(embeddings, axis_name)
  return _contrastive(embeddings, None, temperature, 'dcl', None, axis_name)


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
    column_labels = jnp.tile(
      shared.all_gather(labels, axis_name, axis=0), views
    )
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
  return shared.mean(total, count, axis_name)


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
  logits = shared.dot(rows, columns)
  partition = jax.nn.logsumexp(
    jnp.where(excluded, shared.MASKED, logits), axis=1
  )
  if variant == 'in':
    attraction = jax.nn.logsumexp(
      jnp.where(positive, logits, shared.MASKED), axis=1
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
  gathered = shared.all_gather(unit, axis_name, axis=1)
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
