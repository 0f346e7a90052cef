"""What the suite runs on: its facts, its measured ceilings, PyTorch on it."""

from collections.abc import Iterator
import functools
import importlib.metadata
import os
import platform

import jax
from jax import lax
import jax.numpy as jnp

from tests.benchmarks import contest

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'dm-pix', 'scikit-learn', 'torch')
# Sides of the square matrices that a ceiling is measured with.
_SIDE = {'cpu': 4096, 'gpu': 16384, 'small': 256}
_COPIED = {'cpu': 2**28, 'gpu': 2**32, 'small': 2**20}  # bytes


def facts() -> dict[str, str]:
  """Device, cores, memory and versions."""
  devices = jax.devices()
  found = {
    'device': f'{len(devices)} x {devices[0].device_kind}',
    'processor': _processor(),
    'cores': str(len(os.sched_getaffinity(0))),
    'memory': f'{_memory("MemTotal") / 2**30:.0f} GiB',
    'python': platform.python_version(),
  }
  for package in PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = 'not installed'
  return found


def _processor():
  with open('/proc/cpuinfo') as file:
    for line in file:
      if line.startswith('model name'):
        return line.split(':')[1].strip()
  return platform.machine()


def _memory(field):
  with open('/proc/meminfo') as file:
    for line in file:
      if line.startswith(f'{field}:'):
        return 1024 * int(line.split()[1])
  raise ValueError(f'/proc/meminfo has no {field}')


def contests(suite: str, small: bool) -> Iterator[contest.Contest]:
  """The two ceilings: matrix products, and copies in the device's memory."""
  size = 'small' if small else suite
  side = _SIDE[size]
  for dtype in ('bfloat16', 'float32'):
    a = jax.random.normal(jax.random.key(0), (side, side), dtype)
    yield contest.Contest(
      'ceilings',
      f'matrix product of {side:,} x {side:,}, {dtype}',
      {'XLA': lambda a=a: contest.compiled(jnp.matmul, a, a)},
      flop=2 * side**3,
      dtype=dtype,
    )
  if suite == 'gpu':
    # By default a GPU makes it of numbers cut to 10 bits (TF32); the losses ask
    # for float32, which its tensor cores do not have.
    highest = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    yield contest.Contest(
      'ceilings',
      f'matrix product of {side:,} x {side:,}, float32, highest precision',
      {'XLA': lambda: contest.compiled(highest, a, a)},
      flop=2 * side**3,
      dtype='float32, highest',
    )
  x = jnp.arange(_COPIED[size] // 4, dtype=jnp.float32)
  yield contest.Contest(
    'ceilings',
    f'copy of {x.nbytes / 2**20:,.0f} MiB (read and written)',
    {'XLA': lambda: contest.compiled(lambda x: x + 1, x)},
  )


def copied_bytes(suite: str, small: bool) -> int:
  """What the copy of `contests` reads and writes."""
  return 2 * _COPIED['small' if small else suite]


def check_fits(needed: int) -> None:
  """Raises `LeftOut` where so many bytes more would be too many."""
  if jax.default_backend() == 'cpu':
    there = _memory('MemAvailable')
  else:
    stats = jax.devices()[0].memory_stats()
    there = stats['bytes_limit'] - stats['bytes_in_use']
  if needed > 0.8 * there:
    raise contest.LeftOut(
      f'does not fit: needs {needed / 1e9:.0f} GB of temporaries, '
      f'{there / 1e9:.0f} GB are free'
    )


def import_torch():
  """PyTorch, on all cores; raises `LeftOut` where it is not installed."""
  try:
    import torch
  except ModuleNotFoundError as error:
    raise contest.LeftOut(
      "PyTorch is not installed: pip install -e '.[bench]'"
    ) from error
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  if jax.default_backend() == 'gpu' and not torch.cuda.is_available():
    raise contest.LeftOut('this PyTorch knows no GPU')
  return torch


def torch_device() -> str:
  """That of JAX."""
  return 'cuda' if jax.default_backend() == 'gpu' else 'cpu'


def synchronize(torch) -> None:
  """Waits for what the GPU has been given."""
  if torch_device() == 'cuda':
    torch.cuda.synchronize()
