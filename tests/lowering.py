"""Lowers jitted functions for every platform, without its hardware."""

import functools

import jax

from clop_jax.runtime import parallel

PLATFORMS = ('cpu', 'cuda', 'tpu')


def check(function, *arguments, **static):
  """Asserts that a function of `jax.jit` lowers for all platforms.

  Arguments are arrays or `jax.ShapeDtypeStruct`.
  """
  check_traced(function.trace(*arguments, **static))


def check_traced(traced):
  """Asserts that the result of `jax.jit(function).trace` lowers."""
  try:
    # One pass for all platforms takes a third of the time.
    traced.lower(lowering_platforms=PLATFORMS)
    return
  except Exception:
    failures = [_failure(traced, platform) for platform in PLATFORMS]
  # There may be none: for several platforms at once JAX also lowers branches of
  # `lax.platform_dependent` for the platforms that do not take them.
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
