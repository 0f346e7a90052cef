"""Checks, sums over devices and products that the losses share."""

from collections.abc import Iterator
import itertools

import jax
from jax import lax
import jax.numpy as jnp

from clop_jax import arguments

# Half of the lowest float32: exp(MASKED - max) is exactly 0. Unlike -inf it
# gives no `inf - inf` in the gradient of a fully masked row.
MASKED = float(jnp.finfo(jnp.float32).min) / 2

# The products feed exponentials, so TF32 or bfloat16 would lose three digits.
PRECISION = lax.Precision.HIGHEST


def dot(rows, columns):
  """Returns the dot products `[rows, columns]`."""
  return jnp.matmul(rows, columns.T, precision=PRECISION)


def centred(embeddings, global_batch, axis_name):
  """Subtracts each view's mean over the global batch."""
  total = psum(jnp.sum(embeddings, axis=1, keepdims=True), axis_name)
  return embeddings - total / global_batch


def cross_products(a, b, axis_name):
  """Returns sums of `a_i b_j` over the global batch, `[views, dim, dim]`."""
  local = jnp.einsum('vni,vnj->vij', a, b, precision=PRECISION)
  return psum(local, axis_name)


def mean(total, count, axis_name):
  """Returns sum / count over all devices; 0 if the count is 0."""
  # Not a mean of local means: devices hold different numbers of labels. One
  # collective, as the count alone may be constant and `grad_cache` needs the
  # same order of collectives on all devices.
  total, count = psum(jnp.stack([total, count]), axis_name)
  return total / jnp.where(count == 0.0, 1.0, count)


def psum(x, axis_name):
  """Returns the sum over devices."""
  return x if axis_name is None else lax.psum(x, axis_name)


def all_gather(x, axis_name, axis):
  """Returns the parts of all devices, joined along an axis."""
  if axis_name is None:
    return x
  return lax.all_gather(x, axis_name, axis=axis, tiled=True)


def pairs(embeddings: jax.Array) -> Iterator[tuple[int, int]]:
  """Returns the unordered pairs of views."""
  return itertools.combinations(range(len(embeddings)), 2)


def pair_cosines(unit: jax.Array) -> jax.Array:
  """Returns cosines between the views of each example, `[pairs, batch]`."""
  return jnp.stack(
    [jnp.sum(unit[a] * unit[b], axis=-1) for a, b in pairs(unit)]
  )


def mean_cosine(unit: jax.Array, axis_name: str | None) -> jax.Array:
  """Returns the mean cosine over the pairs of views and the global batch."""
  cosines = pair_cosines(unit)
  return mean(jnp.sum(cosines), jnp.float32(cosines.size), axis_name)


def checked_embeddings(embeddings, min_views):
  """Returns float32 `[views, batch, dim]`, or raises a ValueError."""
  embeddings = arguments.floating('embeddings', embeddings)
  return arguments.views('embeddings', embeddings, min_views)


def checked_global_batch(embeddings, axis_name):
  """Returns the size of the global batch, at least two."""
  devices = 1 if axis_name is None else lax.axis_size(axis_name)
  batch = embeddings.shape[1] * devices
  if batch < 2:
    raise ValueError(
      f'embeddings must hold at least 2 examples for this loss, got {batch} '
      f'(shape {embeddings.shape} on {devices} devices)'
    )
  return batch
