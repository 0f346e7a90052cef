"""The gradient of a loss of all embeddings, a few examples at a time.

A contrastive loss ties every embedding of the batch to every other, so the
gradients of parts of the batch do not add up to the gradient of the batch. But
it reaches the parameters through the embeddings alone, and those are small.
This module owns the two passes that follow from that, and knows neither losses
nor networks.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp


def value_and_grad(
  embed: Callable[[Any, Any], tuple[jax.Array, Any]],
  loss_of: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
  params: Any,
  batch: Any,
  *,
  num_micro_batches: int,
  axis_name: str | None = None,
):
  r"""The loss, its gradient, and what the forward pass left.

  .. math::
    \nabla L = \sum_m \Big(\frac{\partial Z_m}{\partial\theta}\Big)^{\!\top}
      \frac{\partial L(Z_1, \dots, Z_M)}{\partial Z_m}

  The first pass makes the embeddings `Z_m` of each micro-batch and keeps
  nothing else. Then the loss is differentiated by all of them. The second pass
  makes each micro-batch again, now with its part of that gradient. So memory is
  one micro-batch's, for one more forward pass. The gradient is exact where an
  embedding depends on no more of the batch than its micro-batch, and `embed`
  draws the same in both passes, as it does with keys that come with the
  examples.

  Micro-batch `m` has the examples `m`, `m + M`, `m + 2 M` and so on of each
  device. Over all devices these are the same examples however many devices
  there are, and so is what depends on a micro-batch as a whole.

  Args:
    embed: `(params, examples) -> (embeddings [views, examples, dim],
      batch_stats)`, where `examples` is `batch` or a part of it.
    loss_of: `(embeddings [views, batch, dim], batch) -> (loss, aux)`, a float32
      scalar and a tree.
    params: a tree of floating arrays.
    batch: a tree of `[batch, ...]` arrays.
    num_micro_batches: `M`; it divides the batch. 1 is one pass forward and one
      backward over the whole batch.
    axis_name: the mapped axis of a `jax.shard_map` with `check_vma=True` over
      which the parameters are replicated. The gradient is summed over it, once,
      as differentiating the whole batch would do. None: the gradient stays this
      shard's (under `jax.pmap`, average it, see `clop_jax.loss`).

  Returns:
    `((loss, aux), embeddings [views, batch, dim], batch_stats, gradients)`. The
    embeddings are in the order of the batch; `batch_stats` is the mean over the
    micro-batches; the gradients are accumulated in float32.

  Raises:
    ValueError: if `num_micro_batches` is below 1 or does not divide the batch.

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
    # Of replicated parameters JAX sums the gradient over the devices by itself:
    # once for each micro-batch, and in the precision of the layer that uses
    # them, bfloat16 on accelerators.
    params = _varying(params, axis_name)
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
  num_parts, views, part_size, dim = embeddings.shape
  embeddings = jnp.moveaxis(embeddings, 0, 2).reshape(views, -1, dim)

  total, pull_back, aux = jax.vjp(
    lambda z: loss_of(z, _after(embeddings, batch)), embeddings, has_aux=True
  )
  (cotangents,) = pull_back(_after(total, jnp.ones_like(total)))
  cotangents = cotangents.reshape(views, part_size, num_parts, dim)
  cotangents = jnp.moveaxis(cotangents, 2, 0)

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
  if axis_name is not None:
    zeros = _varying(zeros, axis_name)

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
  """`[batch, ...]` to `[micro-batches, examples, ...]`, strided."""
  batch_size = jax.tree.leaves(batch)[0].shape[0]
  if num_micro_batches < 1 or batch_size % num_micro_batches:
    raise ValueError(
      'train.num_micro_batches must be at least 1 and divide the examples of '
      f'one device (train.batch_size over the devices), {batch_size} here, got '
      f'{num_micro_batches}'
    )
  return jax.tree.map(
    lambda x: x.reshape(-1, num_micro_batches, *x.shape[1:]).swapaxes(0, 1),
    batch,
  )


def _after(first, tree):
  """The tree as it is, but not before `first` is there.

  The two passes are loops, and with batch normalization over all devices they
  hold collectives. XLA on CPUs starts a collective that depends on no loop
  while one still runs, and the devices then mix up the two. (An optimization
  barrier is gone by the time the program runs.)
  """
  never = first.ravel()[0] > jnp.inf
  return jax.tree.map(lambda x: jnp.where(never, jnp.zeros_like(x), x), tree)


def _varying(tree, axis_name):
  if hasattr(lax, 'pcast'):
    return lax.pcast(tree, axis_name, to='varying')
  return lax.pvary(tree, axis_name)  # before JAX 0.8.2
