"""Argument checks shared by the pure functions.

Shapes and dtypes are checked while tracing, values only where they are known.
The results work under `jax_numpy_rank_promotion='raise'`,
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
  """Returns a function that runs in JAX's default promotion modes.

  For long functions, which explicit ranks and dtypes would make hard to read.

  Args:
    function: Function of arrays.
    x64: False to compute in 32 bits even under `jax_enable_x64`. None keeps the
      caller's mode.
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
  """Returns the value as an array of numbers, or raises a ValueError."""
  try:
    return jnp.asarray(value)
  except (TypeError, ValueError, OverflowError) as error:
    kind = getattr(value, 'dtype', type(value).__name__)
    raise ValueError(
      f'{name} must be an array of numbers, got {kind} ({error})'
    ) from error


def floating(name: str, value) -> jax.Array:
  """Returns a floating array as float32, or raises a ValueError."""
  x = array(name, value)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f'{name} must be floating, got {x.dtype}')
  return x.astype(jnp.float32)


def real(name: str, value) -> jax.Array:
  """Returns a floating or integer array as float32, or raises a ValueError."""
  x = array(name, value)
  if not any(jnp.issubdtype(x.dtype, t) for t in (jnp.floating, jnp.integer)):
    raise ValueError(f'{name} must be floating or integer, got {x.dtype}')
  return x.astype(jnp.float32)


def views(name: str, x: jax.Array, at_least: int = 1) -> jax.Array:
  """Returns an array `[views, batch, dim]`, or raises a ValueError."""
  if x.ndim != 3 or 0 in x.shape:
    raise ValueError(
      f'{name} must have shape [views, batch, dim] without an empty axis (two '
      f'views: jnp.stack([z1, z2])), got {x.shape}'
    )
  if x.shape[0] < at_least:
    raise ValueError(
      f'{name} must have at least {at_least} views on the first axis '
      f'(jnp.stack([z1, z2])), got shape {x.shape}'
    )
  return x


def prototypes(value, dim: int) -> jax.Array:
  """Returns float32 prototypes `[num_classes, dim]`, or raises a ValueError."""
  x = real('prototypes', value)
  if x.ndim != 2 or x.shape[1] != dim or not len(x):
    raise ValueError(
      f'prototypes must have shape [num_classes, dim]=[*, {dim}] to fit the '
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
  """Returns a finite number: a Python float, or a traced scalar.

  Args:
    name: Name of the argument, for the error.
    value: Number of Python, NumPy or JAX.
    above: Bound that the number must exceed. Traced numbers are not compared.
    at_least: Smallest number allowed.
    at_most: Largest number allowed.
    dtype: Dtype of a traced number.

  Raises:
    ValueError: If the value is not a number, or out of range.
  """
  if isinstance(value, jax.core.Tracer):
    if value.shape or not jnp.issubdtype(value.dtype, jnp.number):
      raise ValueError(
        f'{name} must be a number, got {value.dtype}{list(value.shape)}'
      )
    return value.astype(dtype)
  try:
    # `float` accepts strings, and some versions of NumPy arrays of one number.
    if isinstance(value, str | bytes) or np.ndim(value):
      raise TypeError
    result = float(value)
  except (TypeError, ValueError):
    result = math.nan
  in_range = result > above and at_least <= result <= at_most
  if not (math.isfinite(result) and in_range):
    bounds = {'above': above, 'at least': at_least, 'at most': at_most}
    expected = ' and '.join(
      f'{word} {bound:g}'
      for word, bound in bounds.items()
      if math.isfinite(bound)
    )
    raise ValueError(
      f'{name} must be {expected or "a finite number"}, got {value}'
    )
  return result


def count(name: str, value, *, at_least: int = 1) -> int:
  """Returns a whole number, or raises a ValueError if it is too small."""
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
  """Returns integer labels, of which negative ones mean unlabelled.

  Args:
    name: Name of the argument, for the error.
    value: Integers of any kind. Without `num_classes` only their equality
      matters. Known 64-bit ids that do not fit int32 are then renumbered.
    shape: Shape that the labels must have.
    num_classes: Number of classes, or None.

  Returns:
    An integer array, int32 with `num_classes`. A traced label that is too large
    for int32 becomes the largest int32.

  Raises:
    ValueError: If the shape differs, the dtype is not an integer, or a known
      label is not below `num_classes`.
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
    renumber = known is not None and not isinstance(value, jax.Array)
    return jnp.asarray(_renumbered(known) if renumber else value)
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
  # A plain conversion would wrap a large label around to another class.
  info = jnp.iinfo(dtype)
  x = value
  if info.max > _INT32.max:
    x = jnp.minimum(x, jnp.asarray(_INT32.max, dtype))
  if info.min < _INT32.min:
    x = jnp.maximum(x, jnp.asarray(_INT32.min, dtype))
  return x.astype(jnp.int32)


def _known(name, value):
  """The values of an array as NumPy, or None if they are not available."""
  if isinstance(value, jax.core.Tracer):
    return None
  if isinstance(value, jax.Array) and not value.is_fully_addressable:
    return None
  try:
    return np.asarray(value)
  except (TypeError, ValueError, OverflowError) as error:
    raise ValueError(f'{name} must be an array of integers ({error})') from None


def _renumbered(values):
  """Labels that fit int32 and are equal where the given ones are."""
  if values.size and (values.max() > _INT32.max or values.min() < _INT32.min):
    numbers = np.unique(values, return_inverse=True)[1].reshape(values.shape)
    values = np.where(values < 0, -1, numbers)
  return values.astype(np.int32)
