"""Checks of arguments, shared by the pure functions.

They look at shapes and dtypes while tracing, and at values where these are
known: a traced array has none yet. What passes can be used under
`jax_numpy_rank_promotion='raise'` and `jax_numpy_dtype_promotion='strict'`, and
is float32 also under `jax_enable_x64`.
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
  """Runs a function in JAX's default promotion modes, whatever the caller has.

  For long functions, where explicit ranks and types in every line would hide
  what the line computes.

  Args:
    function: Function of arrays.
    x64: False makes it compute in 32 bits under `jax_enable_x64`, too; None
      leaves that mode to the caller.

  Returns:
    The function.
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
  """Returns the value as an array of numbers.

  Raises:
    ValueError: If it is not one, as a list of texts.
  """
  try:
    return jnp.asarray(value)
  except (TypeError, ValueError, OverflowError) as error:
    kind = getattr(value, 'dtype', type(value).__name__)
    raise ValueError(
      f'{name} must be an array of numbers, got {kind} ({error})'
    ) from error


def floating(name: str, value) -> jax.Array:
  """Returns the value as a float32 array.

  Raises:
    ValueError: If its dtype is not floating.
  """
  x = array(name, value)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f'{name} must be floating, got {x.dtype}')
  return x.astype(jnp.float32)


def real(name: str, value) -> jax.Array:
  """Returns a value of floating or integer numbers as a float32 array.

  Raises:
    ValueError: If its dtype is neither.
  """
  x = array(name, value)
  if not (
    jnp.issubdtype(x.dtype, jnp.floating)
    or jnp.issubdtype(x.dtype, jnp.integer)
  ):
    raise ValueError(f'{name} must be floating or integer, got {x.dtype}')
  return x.astype(jnp.float32)


def number(
  name: str,
  value,
  *,
  above: float | None = None,
  at_least: float | None = None,
  at_most: float | None = None,
  dtype=jnp.float32,
) -> Any:
  """Returns a finite number: a Python float, or a traced scalar of a dtype.

  Args:
    name: Name of the argument, for the error.
    value: Number of Python, NumPy or JAX.
    above: Bound that the number must exceed, unless it is traced.
    at_least: Lowest number allowed, unless it is traced.
    at_most: Highest number allowed, unless it is traced.
    dtype: Type of a traced number.

  Raises:
    ValueError: If the value is none, or out of range.
  """
  if isinstance(value, jax.core.Tracer):
    if value.shape or not jnp.issubdtype(value.dtype, jnp.number):
      raise ValueError(
        f'{name} must be a number, got {value.dtype}{list(value.shape)}'
      )
    return value.astype(dtype)
  expected = ' and '.join(
    f'{word} {bound:g}'
    for word, bound in (
      ('above', above),
      ('at least', at_least),
      ('at most', at_most),
    )
    if bound is not None
  )
  try:
    # A text would pass `float`, and an array of one number an older NumPy.
    if isinstance(value, str | bytes) or np.ndim(value):
      raise TypeError
    result = float(value)
  except (TypeError, ValueError):
    result = math.nan
  if (
    not math.isfinite(result)
    or (above is not None and not result > above)
    or (at_least is not None and not result >= at_least)
    or (at_most is not None and not result <= at_most)
  ):
    raise ValueError(
      f'{name} must be {expected or "a finite number"}, got {value}'
    )
  return result


def count(name: str, value, *, at_least: int = 1) -> int:
  """Returns a whole number.

  Raises:
    ValueError: If the value is none, or too small.
  """
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
  """Returns labels, of which negative ones mean unlabelled.

  Args:
    name: Name of the argument, for the error.
    value: Integers of any kind. Without `num_classes` only their equality
      matters: 64-bit ids that int32 cannot hold are renumbered where their
      values are known.
    shape: Shape that the labels must have.
    num_classes: Number of classes.

  Returns:
    An integer array; int32 with `num_classes`. A traced label that is too large
    for int32 is the largest int32.

  Raises:
    ValueError: If the shape is another, the dtype is not an integer, or a known
      label is not below `num_classes`.
  """
  known = _known(name, value)
  found = np.shape(value) if known is None else known.shape
  if found != shape:
    raise ValueError(f'{name} must have shape {list(shape)}, got {list(found)}')
  dtype = value.dtype if known is None else known.dtype
  if not jnp.issubdtype(dtype, jnp.integer):
    raise ValueError(f'{name} must be integers (-1 is unlabelled), got {dtype}')
  if num_classes is None:
    if known is not None and not isinstance(value, jax.Array):
      return jnp.asarray(_renumbered(known))
    return jnp.asarray(value)
  if known is not None:
    wrong = np.argwhere(known >= num_classes)
    if wrong.size:
      position = tuple(map(int, wrong[0]))
      where = position[0] if len(position) == 1 else position
      raise ValueError(
        f'{name} must be below the number of classes, {num_classes}, got '
        f'{known[position]} at index {where}'
      )
    return jnp.asarray(np.maximum(known.astype(np.int64), -1).astype(np.int32))
  # Saturated: a plain conversion would make another class of a large label.
  info = jnp.iinfo(dtype)
  x = value
  if info.max > _INT32.max:
    x = jnp.minimum(x, jnp.asarray(_INT32.max, dtype))
  if info.min < _INT32.min:
    x = jnp.maximum(x, jnp.asarray(_INT32.min, dtype))
  return x.astype(jnp.int32)


def _known(name, value):
  """The values of an array where they are known, else None."""
  if isinstance(value, jax.core.Tracer):
    return None
  if isinstance(value, jax.Array) and not value.is_fully_addressable:
    return None
  try:
    return np.asarray(value)
  except (TypeError, ValueError, OverflowError) as error:
    raise ValueError(f'{name} must be an array of integers ({error})') from None


def _renumbered(values):
  """Labels that int32 can hold, equal where the given ones are."""
  if values.size == 0 or (
    values.max() <= _INT32.max and values.min() >= _INT32.min
  ):
    return values.astype(np.int32)
  _, numbers = np.unique(values, return_inverse=True)
  return np.where(values < 0, -1, numbers.reshape(values.shape)).astype(
    np.int32
  )
