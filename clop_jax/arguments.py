"""Argument checks of the pure functions.

Shapes and dtypes are checked while tracing, values only if they are known. The
results work with `jax_numpy_rank_promotion='raise'`,
`jax_numpy_dtype_promotion='strict'` and `jax_enable_x64`.
"""

import contextlib
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_INT32 = np.iinfo(np.int32)


def in_default_modes(function, *, x64: bool | None = None):
  """Returns the function wrapped to run in JAX's default promotion modes.

  For long functions that explicit ranks and dtypes would make hard to read. If
  `x64` is not None, it overrides `jax_enable_x64`.
  """

  @functools.wraps(function)
  def wrapped(*arguments, **keywords):
    with contextlib.ExitStack() as stack:
      stack.enter_context(jax.numpy_rank_promotion('allow'))
      stack.enter_context(jax.numpy_dtype_promotion('standard'))
      if x64 is not None and jax.config.jax_enable_x64 != x64:
        stack.enter_context(jax.enable_x64(x64))
      return function(*arguments, **keywords)

  return wrapped


def array(name: str, value) -> jax.Array:
  """Returns the value as an array, or raises ValueError."""
  try:
    return jnp.asarray(value)
  except (TypeError, ValueError, OverflowError) as error:
    kind = getattr(value, 'dtype', type(value).__name__)
    raise ValueError(
      f'{name} must be an array of numbers, got {kind} ({error})'
    ) from error


def floating(name: str, value) -> jax.Array:
  """Returns a floating array as float32, or raises ValueError."""
  x = array(name, value)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f'{name} must be floating, got {x.dtype}')
  return x.astype(jnp.float32)


def real(name: str, value) -> jax.Array:
  """Returns a floating or integer array as float32, or raises ValueError."""
  x = array(name, value)
  if not any(jnp.issubdtype(x.dtype, t) for t in (jnp.floating, jnp.integer)):
    raise ValueError(f'{name} must be floating or integer, got {x.dtype}')
  return x.astype(jnp.float32)


def views(name: str, x: jax.Array, at_least: int = 1) -> jax.Array:
  """Returns an array `[views, batch, dim]`, or raises ValueError."""
  if x.ndim != 3 or 0 in x.shape or len(x) < at_least:
    raise ValueError(
      f'{name} must have shape [views, batch, dim] with at least {at_least} '
      'views and no empty axis (two views: jnp.stack([z1, z2])), got shape '
      f'{x.shape}'
    )
  return x


def prototypes(value, dim: int) -> jax.Array:
  """Returns float32 prototypes `[num_classes, dim]`, or raises ValueError."""
  x = real('prototypes', value)
  if x.ndim != 2 or x.shape[1] != dim or not len(x):
    raise ValueError(
      f'prototypes must have shape [num_classes, dim]=[*, {dim}] as the '
      f'embeddings, got {x.shape}'
    )
  return x


def number(
  name: str,
  value,
  *,
  above: float = -math.inf,
  at_least: float = -math.inf,
  at_most: float = math.inf,
  dtype=jnp.float32,
) -> Any:
  """Returns a finite Python float, or a traced scalar of `dtype`.

  The bounds are not checked for traced scalars.
  """
  if isinstance(value, jax.core.Tracer):
    if value.shape or not jnp.issubdtype(value.dtype, jnp.number):
      raise ValueError(
        f'{name} must be a number, got {value.dtype}{list(value.shape)}'
      )
    return value.astype(dtype)
  try:
    # `float` also accepts strings and arrays with one element.
    if isinstance(value, str | bytes) or np.ndim(value):
      raise TypeError
    result = float(value)
  except (TypeError, ValueError):
    result = math.nan
  in_range = result > above and at_least <= result <= at_most
  if not (math.isfinite(result) and in_range):
    bounds = {'above': above, 'at least': at_least, 'at most': at_most}
    limits = [f'{k} {x:g}' for k, x in bounds.items() if math.isfinite(x)]
    expected = ' and '.join(limits) or 'a finite number'
    raise ValueError(f'{name} must be {expected}, got {value}')
  return result


def count(name: str, value, *, at_least: int = 1) -> int:
  """Returns an integer that is not too small, or raises ValueError."""
  try:
    result = operator.index(value)
  except TypeError:
    result = at_least - 1
  if result < at_least:
    raise ValueError(
      f'{name} must be a whole number of at least {at_least}, got {value}'
    )
  return result


def labels(
  name: str, value, shape: tuple[int, ...], num_classes: int | None = None
) -> jax.Array:
  """Returns integer labels; negative labels mean unlabelled.

  Args:
    name: Name of the argument, for the error.
    value: Integers. Without `num_classes` only their equality matters, and
      known 64-bit ids that do not fit int32 are renumbered.
    shape: Expected shape.
    num_classes: Number of classes. Known labels are checked, and the result is
      int32, where a traced label that is too large becomes the largest int32.

  Raises:
    ValueError: If shape, dtype or a known label is wrong.
  """
  known = _known(name, value)
  values = value if known is None else known
  if values.shape != shape:
    raise ValueError(
      f'{name} must have shape {list(shape)}, got {list(values.shape)}'
    )
  dtype = values.dtype
  if not jnp.issubdtype(dtype, jnp.integer):
    raise ValueError(f'{name} must be integers (-1 is unlabelled), got {dtype}')
  if num_classes is None:
    if known is None or isinstance(value, jax.Array):
      return value
    if known.size and (known.max() > _INT32.max or known.min() < _INT32.min):
      numbers = np.unique(known, return_inverse=True)[1].reshape(shape)
      known = np.where(known < 0, -1, numbers)
    return jnp.asarray(known.astype(np.int32))
  if known is not None:
    wrong = np.argwhere(known >= num_classes)
    if wrong.size:
      index = tuple(map(int, wrong[0]))
      raise ValueError(
        f'{name} must be below the number of classes, {num_classes}, got '
        f'{known[index]} at index {", ".join(map(str, index))}'
      )
    return jnp.asarray(np.maximum(known.astype(np.int64), -1).astype(np.int32))
  # A plain conversion would wrap large labels around to other classes.
  if jnp.iinfo(dtype).max > _INT32.max:
    value = jnp.minimum(value, jnp.asarray(_INT32.max, dtype))
  if jnp.iinfo(dtype).min < _INT32.min:
    value = jnp.maximum(value, jnp.asarray(_INT32.min, dtype))
  return value.astype(jnp.int32)


def _known(name, value):
  """Returns the values as NumPy, or None if they are traced or remote."""
  if isinstance(value, jax.core.Tracer):
    return None
  if isinstance(value, jax.Array) and not value.is_fully_addressable:
    return None
  try:
    return np.asarray(value)
  except (TypeError, ValueError, OverflowError) as error:
    raise ValueError(f'{name} must be an array of integers ({error})') from None
