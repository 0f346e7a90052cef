"""Learning-rate schedule, masks, and the Optax chain that a config names."""

from collections.abc import Callable
import functools

import jax
from jax import lax
import jax.numpy as jnp
import optax

from clop_jax.training import gpu_updates


def scaled_learning_rate(base: float, batch_size: int, scaling: str) -> float:
  """The peak learning rate for a batch size.

  Args:
    base: base learning rate.
    batch_size: global batch size.
    scaling: 'linear' (`base * batch_size / 256`), 'sqrt' (`base *
      sqrt(batch_size)`) or 'none'.

  Returns:
    The peak learning rate.

  Raises:
    ValueError: for an unknown scaling.

  Example:
    >>> from clop_jax.training import optimizer
    >>> optimizer.scaled_learning_rate(0.3, 512, 'linear')
    0.6

  Reference:
    Chen et al., arXiv 2002.05709, appendix B.1 (linear and square root).
  """
  if scaling not in _SCALINGS:
    raise ValueError(
      f'scaling must be one of {sorted(_SCALINGS)}, got {scaling!r}'
    )
  return base * _SCALINGS[scaling](batch_size)


_SCALINGS = {
  'linear': lambda batch_size: batch_size / 256,
  'sqrt': lambda batch_size: batch_size**0.5,
  'none': lambda batch_size: 1.0,
}


def warmup_cosine(
  peak: jax.typing.ArrayLike, *, total_steps: int, warmup_steps: int
) -> optax.Schedule:
  """Linear warm-up from 0 to `peak`, then a cosine to 0, in steps.

  Args:
    peak: learning rate after the warm-up; it may be traced.
    total_steps: steps of the whole run; the cosine ends there.
    warmup_steps: steps of the warm-up, fewer than `total_steps`.

  Returns:
    A function of the step.

  Raises:
    ValueError: if the warm-up does not end within the run.
  """
  if not 0 <= warmup_steps < total_steps:
    raise ValueError(
      f'warmup_steps must be in [0, total_steps={total_steps}), got '
      f'{warmup_steps}; shorten the warm-up or train for longer'
    )
  # Of height one: Optax looks at the peak, which may be traced.
  shape = optax.warmup_cosine_decay_schedule(
    init_value=0.0 if warmup_steps else 1.0,
    peak_value=1.0,
    warmup_steps=warmup_steps,
    decay_steps=total_steps,
  )
  return lambda step: peak * shape(step)


def kernel_mask(params) -> dict:
  """True for kernels; False for biases and batch-normalization parameters.

  Weight decay and the trust ratio are for kernels: decaying a scale or scaling
  a bias by its own norm would only disturb it.
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
  """The optimizer of that name, as an Optax chain.

  On GPUs its updates take fewer kernels, see `gpu_updates`; its state is the
  same everywhere.

  Args:
    name: 'lars', 'sgd' or 'adamw'.
    schedule: learning rate as a function of the step.
    momentum: of 'lars' and 'sgd' (for 'adamw' it is b1).
    weight_decay: on kernels only; decoupled for 'adamw', added to the gradient
      for the others.
    trust_coefficient: of 'lars', on kernels only.
    clip_norm: clip the gradient to this global norm first; None does not.
    rate_in_momentum: For 'lars': True multiplies a step by the learning rate
      before it enters the momentum, as SimCLR's code and the paper do. False
      multiplies the momentum by the learning rate, as the LARS of VICReg,
      solo-learn and lightly do. While the learning rate changes, the two move
      the parameters differently.

  Returns:
    An Optax gradient transformation.

  Raises:
    ValueError: for an unknown name or a clip norm that is not above 0.

  Reference:
    You et al., "Large batch training of convolutional networks", arXiv
    1708.03888 (LARS); Loshchilov and Hutter, arXiv 1711.05101 (AdamW).
  """
  if name not in _OPTIMIZERS:
    raise ValueError(
      f'optimizer name must be one of {sorted(_OPTIMIZERS)}, got {name!r}'
    )
  if clip_norm is not None and not clip_norm > 0:
    raise ValueError(f'clip_norm must be None or above 0, got {clip_norm}')

  def chain(transforms):
    make = _OPTIMIZERS[name]
    if name == 'lars':
      make = functools.partial(make, rate_in_momentum=rate_in_momentum)
    tx = make(transforms, schedule, momentum, weight_decay, trust_coefficient)
    if clip_norm is None:
      return tx
    return optax.chain(transforms.clip_by_global_norm(clip_norm), tx)

  plain = chain(optax)
  on_gpu = gpu_updates.on_flat_leaves(chain(gpu_updates))

  def update(updates, state, params=None):
    return lax.platform_dependent(
      updates,
      state,
      params,
      cuda=on_gpu.update,
      rocm=on_gpu.update,
      default=plain.update,
    )

  return optax.GradientTransformation(plain.init, update)


def in_row_order(gradients):
  """Returns the same gradients, on GPUs in the parameters' memory layout.

  The gradient of a convolution's kernel comes in another layout. What reads it
  several times, as the optimizer and the norms do, would transpose it each
  time.

  Args:
    gradients: Tree of arrays.

  Returns:
    The tree.
  """

  def reorder(tree):
    return jax.tree.map(
      lambda x: lax.optimization_barrier(jnp.ravel(x)).reshape(x.shape), tree
    )

  return lax.platform_dependent(
    gradients, cuda=reorder, rocm=reorder, default=lambda tree: tree
  )


def global_norms(*trees) -> list[jax.Array]:
  """Returns the Euclidean norm of each tree, in few kernels on GPUs.

  Args:
    *trees: Trees of floating arrays.

  Returns:
    The norm of each tree.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax.training import optimizer
    >>> tree = {'bias': jnp.array([3.0, 4.0]), 'kernel': jnp.ones((2, 2))}
    >>> print(*optimizer.global_norms(tree, tree['kernel']))
    5.3851647 2.0
  """

  def plain(trees):
    return [optax.tree.norm(tree) for tree in trees]

  return lax.platform_dependent(
    trees,
    cuda=gpu_updates.global_norms,
    rocm=gpu_updates.global_norms,
    default=plain,
  )


# The chains of optax.lars, optax.sgd and optax.adamw. `transforms` is optax or
# gpu_updates.


def _lars(
  transforms,
  schedule,
  momentum,
  weight_decay,
  trust_coefficient,
  rate_in_momentum,
):
  scale = transforms.scale_by_trust_ratio(trust_coefficient=trust_coefficient)
  last = [
    transforms.scale_by_learning_rate(schedule),
    optax.trace(decay=momentum),
  ]
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask=kernel_mask),
    optax.masked(scale, kernel_mask),
    *(last if rate_in_momentum else reversed(last)),
  )


def _sgd(transforms, schedule, momentum, weight_decay, trust_coefficient):
  del trust_coefficient
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask=kernel_mask),
    optax.chain(
      optax.trace(decay=momentum), transforms.scale_by_learning_rate(schedule)
    ),
  )


def _adamw(transforms, schedule, momentum, weight_decay, trust_coefficient):
  del trust_coefficient
  return optax.chain(
    optax.scale_by_adam(b1=momentum),
    optax.add_decayed_weights(weight_decay, mask=kernel_mask),
    transforms.scale_by_learning_rate(schedule),
  )


_OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  'lars': _lars,
  'sgd': _sgd,
  'adamw': _adamw,
}
