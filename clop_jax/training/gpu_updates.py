"""Optax transformations that update a network with few GPU kernels.

Launching a kernel takes as long as updating a small layer, and Optax's
transformations become several kernels for each of the hundreds of arrays of a
deep network. These give the same updates and have the same states. They are
only for XLA's GPU compiler: TPUs keep arrays in tiles, so `on_flat_leaves`
would rearrange every parameter there.
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

  One kernel can then update all leaves of one size. Also, the gradient of a
  convolution kernel has another memory layout than the kernel. XLA would
  compute the update in that layout and transpose parameters and momentum twice.
  Here it transposes only the gradient.
  """

  def flat(tree):
    return jax.tree.map(lambda x: jnp.ravel(x) if jnp.ndim(x) > 1 else x, tree)

  def shaped_like(tree, like):
    return jax.tree.map(lambda x, y: jnp.reshape(x, jnp.shape(y)), tree, like)

  def update(updates, state, params=None):
    # Without barriers XLA would cancel the reshapes before and after.
    gradients = jax.tree.map(lax.optimization_barrier, flat(updates))
    new_updates, new_state = tx.update(gradients, flat(state), flat(params))
    return shaped_like(new_updates, updates), shaped_like(new_state, state)

  return optax.GradientTransformation(tx.init, update)


def scale_by_learning_rate(
  schedule: optax.Schedule,
) -> optax.GradientTransformation:
  """Like `optax.scale_by_learning_rate`, with the rate read from an array.

  XLA updates leaves of one size in one kernel if they read a common array. A
  scalar is not enough. Without the barrier XLA would notice that the array
  holds only a scalar.
  """

  def step_size(step):
    rate = -jnp.asarray(schedule(step))
    return lax.optimization_barrier(jnp.stack([rate, rate]))[0]

  return optax.scale_by_schedule(step_size)


def scale_by_trust_ratio(
  trust_coefficient: float,
) -> optax.GradientTransformation:
  """Like `optax.scale_by_trust_ratio`, with `leaf_norms`."""

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
  """Like `optax.clip_by_global_norm`, with `leaf_norms`."""

  def update(updates, state, params=None):
    del params
    (norm,) = global_norms([updates])
    clipped = jax.tree.map(
      lambda x: jnp.where(norm < max_norm, x, x / norm * max_norm), updates
    )
    return clipped, state

  return optax.GradientTransformation(optax.init_empty_state, update)


def global_norms(trees) -> list[jax.Array]:
  """Returns `optax.tree.norm` of each tree, with `leaf_norms`."""
  leaves = [jax.tree.leaves(tree) for tree in trees]
  squares = leaf_norms(leaves, leaves_per_kernel=90) ** 2
  ends = np.cumsum([len(x) for x in leaves])
  return [jnp.sqrt(jnp.sum(x)) for x in jnp.split(squares, ends[:-1])]


def leaf_norms(
  tree, *, leaves_per_kernel: int = _LEAVES_PER_KERNEL
) -> jax.Array:
  """Returns the Euclidean norm of every leaf, in the order of the leaves.

  The leaves are cut into rows of equal length, so that one kernel reduces the
  rows of many leaves. It reads the leaves in place.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax.training import gpu_updates
    >>> tree = {'bias': jnp.array([3.0, 4.0]), 'kernel': jnp.ones((2, 2))}
    >>> print(gpu_updates.leaf_norms(tree))
    [5. 2.]
  """
  leaves = [jnp.ravel(x) for x in jax.tree.leaves(tree)]
  width = min(_ROW_WIDTH, max(x.size for x in leaves))

  def rows(x):
    return jnp.pad(x, (0, -x.size % width)).reshape(-1, width)

  parts = []
  for start in range(0, len(leaves), leaves_per_kernel):
    part = leaves[start : start + leaves_per_kernel]
    entries = jnp.concatenate([rows(x) for x in part])
    parts.append(jnp.sum(entries * entries, axis=1))
  row_sums = jnp.concatenate(parts)
  # Sums of the rows of each leaf. A scatter-add would not be deterministic.
  numbers = np.arange(len(leaves))
  owners = np.repeat(numbers, [-(-x.size // width) for x in leaves])
  sums = jnp.where(owners == numbers[:, None], row_sums, 0)
  return jnp.sqrt(jnp.sum(sums, axis=1))
