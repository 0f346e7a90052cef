"""Learning-rate schedule, masks and the Optax chain of a config."""

import jax
from jax import lax
import jax.numpy as jnp
import optax

from clop_jax.training import gpu_updates

_SCALINGS = {
  'linear': lambda batch_size: batch_size / 256,
  'sqrt': lambda batch_size: batch_size**0.5,
  'none': lambda batch_size: 1.0,
}


def scaled_learning_rate(base: float, batch_size: int, scaling: str) -> float:
  """Returns the peak learning rate for a global batch size.

  Args:
    base: Base learning rate.
    batch_size: Global batch size.
    scaling: 'linear' (`base * batch_size / 256`), 'sqrt' (`base *
      sqrt(batch_size)`) or 'none'.

  Example:
    >>> from clop_jax.training import optimizer
    >>> optimizer.scaled_learning_rate(0.3, 512, 'linear')
    0.6

  Reference:
    Chen et al., arXiv 2002.05709, appendix B.1 (linear and square root).
  """
  return base * _SCALINGS[scaling](batch_size)


def warmup_cosine(
  peak: jax.typing.ArrayLike, *, total_steps: int, warmup_steps: int
) -> optax.Schedule:
  """Returns a schedule: linear from 0 to `peak`, then a cosine to 0.

  Args:
    peak: Learning rate after the warm-up; it may be traced.
    total_steps: Number of steps of the whole run.
    warmup_steps: Number of steps of the warm-up.

  Raises:
    ValueError: If the warm-up does not end within the run.
  """
  if not 0 <= warmup_steps < total_steps:
    raise ValueError(
      f'warmup_steps must be in [0, total_steps={total_steps}), got '
      f'{warmup_steps}; shorten the warm-up or train for longer'
    )
  # The schedule has height one, because Optax compares the peak, which may be
  # traced.
  shape = optax.warmup_cosine_decay_schedule(
    init_value=0.0 if warmup_steps else 1.0,
    peak_value=1.0,
    warmup_steps=warmup_steps,
    decay_steps=total_steps,
  )
  return lambda step: peak * shape(step)


def kernel_mask(params) -> dict:
  """Returns True for kernels, False for biases and batch normalization.

  Weight decay and the trust ratio apply only to kernels.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key == 'kernel', params
  )


def create(
  name: str,
  schedule: optax.Schedule,
  *,
  momentum: float = 0.9,
  weight_decay: float = 0.0,
  trust_coefficient: float = 0.001,
  clip_norm: float | None = None,
  rate_in_momentum: bool = True,
) -> optax.GradientTransformation:
  """Returns an optimizer as an Optax chain.

  On GPUs its updates take fewer kernels, see `gpu_updates`. Its state is the
  same on all platforms.

  Args:
    name: 'lars', 'sgd' or 'adamw'.
    schedule: Learning rate as a function of the step.
    momentum: Momentum of 'lars' and 'sgd', b1 of 'adamw'.
    weight_decay: Weight decay of kernels: decoupled for 'adamw', added to the
      gradient for the others.
    trust_coefficient: Trust coefficient of 'lars', for kernels.
    clip_norm: Largest global norm of the gradient; None does not clip.
    rate_in_momentum: For 'lars', True multiplies a step by the learning rate
      before it enters the momentum, as SimCLR's code and the paper do. False
      multiplies the momentum by the learning rate, as the LARS of VICReg,
      solo-learn and lightly do. The two differ while the learning rate changes.

  Reference:
    You et al., "Large batch training of convolutional networks", arXiv
    1708.03888 (LARS); Loshchilov and Hutter, arXiv 1711.05101 (AdamW).
  """

  def chain(transforms):
    """Returns the chain of optax.lars, optax.sgd or optax.adamw."""
    decay = optax.add_decayed_weights(weight_decay, mask=kernel_mask)
    rate = transforms.scale_by_learning_rate(schedule)
    trace = optax.trace(decay=momentum)
    trust = transforms.scale_by_trust_ratio(trust_coefficient=trust_coefficient)
    trust = optax.masked(trust, kernel_mask)
    last = (rate, trace) if rate_in_momentum else (trace, rate)
    tx = {
      'lars': optax.chain(decay, trust, *last),
      'sgd': optax.chain(decay, optax.chain(trace, rate)),
      'adamw': optax.chain(optax.scale_by_adam(b1=momentum), decay, rate),
    }[name]
    if clip_norm is None:
      return tx
    return optax.chain(transforms.clip_by_global_norm(clip_norm), tx)

  plain = chain(optax)
  on_gpu = gpu_updates.on_flat_leaves(chain(gpu_updates))

  def update(updates, state, params=None):
    return _on_platform(on_gpu.update, plain.update, updates, state, params)

  return optax.GradientTransformation(plain.init, update)


def _on_platform(on_gpu, default, *arguments):
  return lax.platform_dependent(
    *arguments, cuda=on_gpu, rocm=on_gpu, default=default
  )


def in_row_order(gradients):
  """Returns the gradients, on GPUs in the parameters' memory layout.

  The gradient of a convolution kernel has another layout. The optimizer and the
  norms would each transpose it.
  """

  def reorder(tree):
    return jax.tree.map(
      lambda x: lax.optimization_barrier(jnp.ravel(x)).reshape(x.shape), tree
    )

  return _on_platform(reorder, lambda tree: tree, gradients)


def global_norms(*trees) -> list[jax.Array]:
  """Returns the Euclidean norm of each tree, in few kernels on GPUs."""

  def plain(trees):
    return [optax.tree.norm(tree) for tree in trees]

  return _on_platform(gpu_updates.global_norms, plain, trees)
