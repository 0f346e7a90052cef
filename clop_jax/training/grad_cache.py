"""The gradient of a loss of all embeddings, a few examples at a time.

A contrastive loss couples all embeddings of a batch, so its gradient is not the
sum of the gradients of parts of the batch. But it depends on the parameters
only through the embeddings, which are small.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp


def value_and_grad(
  embed: Callable[[Any, Any], tuple[Any, Any]],
  loss_of: Callable[[Any, Any], tuple[jax.Array, Any]],
  params: Any,
  batch: Any,
  *,
  num_micro_batches: int,
  axis_name: str | None = None,
):
  r"""Returns the loss and its gradient, computed in micro-batches.

  .. math::
    \nabla L = \sum_m \Big(\frac{\partial Z_m}{\partial\theta}\Big)^{\!\top}
      \frac{\partial L(Z_1, \dots, Z_M)}{\partial Z_m}

  The first pass computes the embeddings `Z_m` of each micro-batch. Then the
  loss is differentiated with respect to all of them. The second pass repeats
  each micro-batch with its part of that gradient. This takes the memory of one
  micro-batch, for one more forward pass. The gradient is exact if an embedding
  depends only on its micro-batch, and `embed` draws the same random numbers in
  both passes.

  Micro-batch `m` has the examples `m`, `m + M`, `m + 2 M`, ... of each device,
  so over all devices it has the same examples for any number of devices.

  Args:
    embed: Function `(params, examples) -> (embeddings, batch_stats)`, where
      `examples` is `batch` or a part of it and `embeddings` a tree of arrays
      `[views, examples, dim]`.
    loss_of: Function `(embeddings, batch) -> (loss, aux)`.
    params: Tree of floating arrays.
    batch: Tree of `[batch, ...]` arrays.
    num_micro_batches: Number of micro-batches `M`, which divides the batch. 1
      is one pass forward and one backward over the whole batch.
    axis_name: Mapped axis of a `jax.shard_map` with `check_vma=True` over which
      the parameters are replicated. The gradient is summed over it, once. If
      None, the gradient is that of this shard (under `jax.pmap`, average it,
      see `clop_jax.loss`).

  Returns:
    `((loss, aux), embeddings, batch_stats, gradients)`, with the embeddings in
    the order of the batch, the mean `batch_stats` of the micro-batches, and
    gradients accumulated in float32.

  Raises:
    ValueError: If `num_micro_batches` does not divide the batch.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax.training import grad_cache
    >>> batch = jnp.array([[1.0], [2.0]])
    >>> _, _, _, gradient = grad_cache.value_and_grad(
    ...   lambda w, x: ((w * x)[None], {}),
    ...   lambda z, x: (jnp.prod(z), None),  # 2 w^2, no sum over examples
    ...   jnp.array(3.0),
    ...   batch,
    ...   num_micro_batches=2,
    ... )
    >>> print(gradient)
    12.0

  Reference:
    Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory
    Limited Setup", arXiv 2101.06983, section 3.2.
  """
  if axis_name is not None:
    # For replicated parameters JAX itself would sum the gradient over the
    # devices: once per micro-batch, and in the precision of the layer that uses
    # them, bfloat16 on accelerators.
    params = lax.pcast(params, axis_name, to='varying')
  if num_micro_batches == 1:

    def loss_of_params(params):
      embeddings, batch_stats = embed(params, batch)
      total, aux = loss_of(embeddings, batch)
      return total, (aux, embeddings, batch_stats)

    (total, aux), gradients = jax.value_and_grad(loss_of_params, has_aux=True)(
      params
    )
    aux, embeddings, batch_stats = aux
    gradients = _summed(gradients, axis_name)
    return (total, aux), embeddings, batch_stats, gradients

  parts = _split(batch, num_micro_batches)
  embeddings, batch_stats = lax.map(lambda part: embed(params, part), parts)
  batch_stats = jax.tree.map(lambda x: jnp.mean(x, axis=0), batch_stats)
  embeddings = jax.tree.map(_joined, embeddings)
  total, pull_back, aux = jax.vjp(
    lambda z: loss_of(z, _after(embeddings, batch)), embeddings, has_aux=True
  )
  (cotangents,) = pull_back(_after(total, jnp.ones_like(total)))
  cotangents = jax.tree.map(lambda x: _parted(x, num_micro_batches), cotangents)

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
  if axis_name is not None:
    zeros = lax.pcast(zeros, axis_name, to='varying')

  def add_part(gradients, part_and_cotangent):
    part, cotangent = part_and_cotangent
    _, pull_back = jax.vjp(lambda params: embed(params, part)[0], params)
    (of_part,) = pull_back(cotangent)
    return jax.tree.map(jnp.add, gradients, of_part), None

  with jax.named_scope('gradients'):
    gradients, _ = lax.scan(add_part, zeros, (parts, cotangents))
  gradients = _summed(gradients, axis_name)
  return (total, aux), embeddings, batch_stats, gradients


@jax.named_scope('gradients')
def _summed(gradients, axis_name):
  return gradients if axis_name is None else lax.psum(gradients, axis_name)


def _split(batch, num_micro_batches):
  """Reshapes `[batch, ...]` to `[micro-batches, examples, ...]`, strided."""
  batch_size = jax.tree.leaves(batch)[0].shape[0]
  if batch_size % num_micro_batches:
    raise ValueError(
      'train.num_micro_batches must divide the examples of one device '
      f'(train.batch_size over the devices), {batch_size} here, got '
      f'{num_micro_batches}'
    )
  return jax.tree.map(
    lambda x: x.reshape(-1, num_micro_batches, *x.shape[1:]).swapaxes(0, 1),
    batch,
  )


def _joined(x):
  """Returns `[views, batch, dim]` of `[micro-batches, views, examples, dim]`.

  The inverse of `_split`, for arrays with views first.
  """
  x = jnp.moveaxis(x, 0, 2)
  return x.reshape(x.shape[0], -1, x.shape[-1])


def _parted(x, num_micro_batches):
  """Returns the inverse of `_joined`."""
  x = x.reshape(x.shape[0], -1, num_micro_batches, x.shape[-1])
  return jnp.moveaxis(x, 2, 0)


def _after(first, tree):
  """Returns the tree, but only after `first` has been computed.

  The two passes are loops. With batch normalization over all devices they
  contain collectives. XLA for CPUs starts a collective that does not depend on
  a running loop, and the devices then confuse it with those of the loop. (An
  optimization barrier does not exist anymore when the program runs.)
  """
  never = jax.tree.leaves(first)[0].ravel()[0] > jnp.inf
  return jax.tree.map(lambda x: jnp.where(never, jnp.zeros_like(x), x), tree)
