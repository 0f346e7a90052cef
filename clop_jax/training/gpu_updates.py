"""Optax transformations that update a network with few GPU kernels.

Launching a kernel takes as long as updating a small layer, and Optax's
transformations become several kernels for each of the hundreds of arrays of a
deep network. Those here give the same updates and have the same states. They
are for XLA's GPU compiler alone: TPUs keep arrays in tiles, so there
`on_flat_leaves` would rearrange every parameter.
"""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

_ROW_WIDTH = 4096

# XLA gives a fused kernel at most 96 arguments, and a leaf of the gradient with
# weight decay has two.
_LEAVES_PER_KERNEL = 40


def on_flat_leaves(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Applies an element-wise transformation to 1-D views of all arrays.

  Leaves of one size can then be updated by one kernel, whatever their shapes.
  The gradient of a convolution's kernel also comes in another memory layout
  than the kernel has. XLA would compute the update in the gradient's layout and
  transpose parameters and momentum there and back. Instead the gradient alone
  is transposed.

  Args:
    tx: Transformation that updates each element of a leaf by one rule.

  Returns:
    The transformation. Its updates and its state have the shapes of `tx`.
  """

  def update(updates, state, params=None):
    # Without barriers XLA would cancel the reshapes before and after.
    gradients = jax.tree.map(lax.optimization_barrier, _flat(updates))
    new_updates, new_state = tx.update(gradients, _flat(state), _flat(params))
    return _shaped_like(new_updates, updates), _shaped_like(new_state, state)

  return optax.GradientTransformation(tx.init, update)


def _flat(tree):
  return jax.tree.map(lambda x: jnp.ravel(x) if jnp.ndim(x) > 1 else x, tree)


def _shaped_like(tree, like):
  return jax.tree.map(lambda x, y: jnp.reshape(x, jnp.shape(y)), tree, like)


def scale_by_learning_rate(
  schedule: optax.Schedule,
) -> optax.GradientTransformation:
  """As `optax.scale_by_learning_rate`, with the rate read from an array.

  XLA joins the updates of leaves of one size in one kernel if they read an
  array in common. A scalar is not enough, and without the barrier XLA would
  notice that the array holds nothing but a scalar.

  Args:
    schedule: Learning rate as a function of the step.

  Returns:
    The transformation.
  """

  def step_size(step):
    rate = -jnp.asarray(schedule(step))
    return lax.optimization_barrier(jnp.stack([rate, rate]))[0]

  return optax.scale_by_schedule(step_size)


def scale_by_trust_ratio(
  trust_coefficient: float,
) -> optax.GradientTransformation:
  """As `optax.scale_by_trust_ratio`, with `leaf_norms`.

  Args:
    trust_coefficient: Norm of an update over the norm of its parameter.

  Returns:
    The transformation.
  """

  def update(updates, state, params):
    leaves, treedef = jax.tree.flatten(updates)
    if not leaves:
      return updates, state
    param_norms, update_norms = leaf_norms(params), leaf_norms(leaves)
    ratios = trust_coefficient * param_norms / update_norms
    is_zero = (param_norms == 0) | (update_norms == 0)
    ratios = jnp.where(is_zero, 1, ratios)
    scaled = [x * ratio for x, ratio in zip(leaves, ratios, strict=True)]
    return treedef.unflatten(scaled), state

  return optax.GradientTransformation(optax.init_empty_state, update)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
  """As `optax.clip_by_global_norm`, with `leaf_norms`.

  Args:
    max_norm: Largest norm of all updates together.

  Returns:
    The transformation.
  """

  def update(updates, state, params=None):
    del params
    norm = jnp.sqrt(jnp.sum(leaf_norms(updates) ** 2))
    clipped = jax.tree.map(
      lambda x: jnp.where(norm < max_norm, x, x / norm * max_norm), updates
    )
    return clipped, state

  return optax.GradientTransformation(optax.init_empty_state, update)


def global_norms(trees) -> list[jax.Array]:
  """As `optax.tree.norm` of each tree, with `leaf_norms`.

  Args:
    trees: Sequence of trees of floating arrays.

  Returns:
    The norm of each tree.
  """
  leaves = [jax.tree.leaves(tree) for tree in trees]
  squares = leaf_norms(leaves, leaves_per_kernel=90) ** 2
  ends = np.cumsum([len(x) for x in leaves])
  return [jnp.sqrt(jnp.sum(x)) for x in jnp.split(squares, ends[:-1])]


def leaf_norms(
  tree, *, leaves_per_kernel: int = _LEAVES_PER_KERNEL
) -> jax.Array:
  """Returns the Euclidean norm of every leaf.

  The leaves are cut into rows of equal length, so that one kernel reduces the
  rows of many leaves. It reads the leaves where they are.

  Args:
    tree: Tree with at least one floating array.
    leaves_per_kernel: Number of leaves that one kernel can read.

  Returns:
    Norms `[leaves]`, in the order of `jax.tree.leaves`.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax.training import gpu_updates
    >>> tree = {'bias': jnp.array([3.0, 4.0]), 'kernel': jnp.ones((2, 2))}
    >>> print(gpu_updates.leaf_norms(tree))
    [5. 2.]
  """
  leaves = [jnp.ravel(x) for x in jax.tree.leaves(tree)]
  width = min(_ROW_WIDTH, max(x.size for x in leaves))
  parts = []
  for start in range(0, len(leaves), leaves_per_kernel):
    part = leaves[start : start + leaves_per_kernel]
    rows = jnp.concatenate([_rows(x, width) for x in part])
    parts.append(jnp.sum(rows * rows, axis=1))
  row_sums = jnp.concatenate(parts)
  # By leaf. A scatter-add would not be deterministic.
  numbers = np.arange(len(leaves))
  owners = np.repeat(numbers, [-(-x.size // width) for x in leaves])
  sums = jnp.where(owners == numbers[:, None], row_sums, 0)
  return jnp.sqrt(jnp.sum(sums, axis=1))


def _rows(x, width):
  """`[size]` to `[rows, width]`, padded with zeros."""
  return jnp.pad(x, (0, -x.size % width)).reshape(-1, width)
