"""Lowers jitted functions for every platform, without its hardware."""

import functools

import jax

from clop_jax.runtime import parallel

PLATFORMS = ('cpu', 'cuda', 'tpu')


def check(function, *arguments, **static):
  """Lowers a jitted function for all platforms.

  Args:
    function: Function that `jax.jit` has returned.
    *arguments: Arrays or `jax.ShapeDtypeStruct`.
    **static: Static keyword arguments.

  Raises:
    AssertionError: If a platform's rules cannot lower the function; names it.
  """
  check_traced(function.trace(*arguments, **static))


def check_traced(traced):
  """Lowers what `jax.jit(function).trace` returns; see `check`."""
  try:
    # One pass applies the rules of all platforms in a third of the time.
    traced.lower(lowering_platforms=PLATFORMS)
    return
  except Exception:
    failures = [_failure(traced, platform) for platform in PLATFORMS]
  # There may be none: for several platforms at once JAX also lowers a branch of
  # `lax.platform_dependent` for the platforms that would not take it.
  failures = [failure for failure in failures if failure]
  assert not failures, '\n'.join(failures)


def _failure(traced, platform):
  try:
    traced.lower(lowering_platforms=(platform,))
  except Exception as error:
    return f'{platform}: {type(error).__name__}: {error}'
  return None


@functools.cache
def mesh():
  """Mesh of eight virtual devices."""
  return parallel.make_mesh(jax.devices()[:8])
