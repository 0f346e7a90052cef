"""The machine of the suite: its facts, its measured ceilings, PyTorch on it."""

from collections.abc import Iterator
import functools
import importlib.metadata
import os
import platform

import jax
from jax import lax
import jax.numpy as jnp

from docs.benchmarks import contest

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'dm-pix', 'scikit-learn', 'torch')
# Sides of the square matrices that a ceiling is measured with.
_SIDE = {'cpu': 4096, 'gpu': 16384, 'small': 256}
_COPIED = {'cpu': 2**28, 'gpu': 2**32, 'small': 2**20}  # bytes


def facts() -> dict[str, str]:
  """Returns device, cores, memory and versions."""
  devices = jax.devices()
  versions = {}
  for package in PACKAGES:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = 'not installed'
  return {
    'device': f'{len(devices)} x {devices[0].device_kind}',
    'processor': _proc('cpuinfo', 'model name') or platform.machine(),
    'cores': str(len(os.sched_getaffinity(0))),
    'memory': f'{_memory("MemTotal") / 2**30:.0f} GiB',
    'python': platform.python_version(),
  } | versions


def _proc(name, field):
  with open(f'/proc/{name}') as file:
    for line in file:
      key, _, value = line.partition(':')
      if key.strip() == field:
        return value.strip()
  return None


def _memory(field):
  return 1024 * int(_proc('meminfo', field).split()[0])


def contests(suite: str, small: bool) -> Iterator[contest.Contest]:
  """Yields the ceilings: matrix products, and a copy in the device's memory."""
  size = 'small' if small else suite
  side = _SIDE[size]
  products = [(dtype, dtype, jnp.matmul) for dtype in ('bfloat16', 'float32')]
  if suite == 'gpu':
    # The losses need full float32, which the tensor cores do not have (TF32).
    highest = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    products.append(('float32', 'float32, highest precision', highest))
  for dtype, name, product in products:
    yield contest.Contest(
      'ceilings',
      f'matrix product of {side:,} x {side:,}, {name}',
      {'XLA': functools.partial(_product, product, side, dtype)},
      flop=2 * side**3,
      dtype=name,
    )
  yield contest.Contest(
    'ceilings',
    f'copy of {_COPIED[size] / 2**20:,.0f} MiB (read and written)',
    {'XLA': functools.partial(_copy, _COPIED[size])},
  )


def _product(product, side, dtype):
  a = jax.random.normal(jax.random.key(0), (side, side), dtype)
  return contest.compiled(product, a, a)


def _copy(size):
  x = jnp.arange(size // 4, dtype=jnp.float32)
  return contest.compiled(lambda x: x + 1, x)


def copied_bytes(suite: str, small: bool) -> int:
  """Returns the bytes that the copy of `contests` reads and writes."""
  return 2 * _COPIED['small' if small else suite]


def check_fits(needed: int) -> None:
  """Raises `LeftOut` if this many more bytes would not fit."""
  if jax.default_backend() == 'cpu':
    free = _memory('MemAvailable')
  else:
    stats = jax.devices()[0].memory_stats()
    free = stats['bytes_limit'] - stats['bytes_in_use']
  if needed > 0.8 * free:
    raise contest.LeftOut(
      f'does not fit: needs {needed / 1e9:.0f} GB of temporaries, '
      f'{free / 1e9:.0f} GB are free'
    )


def import_torch():
  """Returns PyTorch, on all cores; raises `LeftOut` if it is not installed."""
  try:
    import torch
  except ModuleNotFoundError as error:
    raise contest.LeftOut(
      "PyTorch is not installed: pip install -e '.[bench]'"
    ) from error
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  if jax.default_backend() == 'gpu' and not torch.cuda.is_available():
    raise contest.LeftOut('this PyTorch has no GPU support')
  return torch


def torch_device() -> str:
  """Returns PyTorch's name of the device that JAX uses."""
  return 'cuda' if jax.default_backend() == 'gpu' else 'cpu'


def synchronize(torch) -> None:
  """Waits until the GPU has finished its work."""
  if torch_device() == 'cuda':
    torch.cuda.synchronize()
