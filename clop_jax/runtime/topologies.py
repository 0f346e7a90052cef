"""Devices that are not attached, to compile for, and their peak figures.

The compiler of a platform runs without its hardware. It needs the extra `tpu`
or `cuda` of this package.
"""

from collections.abc import Sequence
import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published peak figures of one device.

  Attributes:
    name: Name of the product.
    platform: 'tpu' or 'cuda'.
    kinds: Values of `device_kind` in JAX.
    memory: Bytes of its memory.
    bandwidth: Bytes/s of its memory, read and written together.
    flops: FLOP/s of dense bfloat16 matrix products.
    links: For each level of the network, innermost first, the number of
      neighbours it joins and the bytes/s that a device can send.
    usable: Share of the memory that JAX takes by default.
  """

  name: str
  platform: str
  kinds: tuple[str, ...]
  memory: float
  bandwidth: float
  flops: float
  links: tuple[tuple[float, float], ...]
  usable: float = 1.0

  def seconds_to_send(self, sent: float, devices: int) -> float:
    """Seconds that the slowest link of a ring of devices takes."""
    reached = 1.0
    bandwidth = math.inf
    for neighbours, link in self.links:
      if reached < devices:
        bandwidth = min(bandwidth, link)
      reached *= neighbours
    return 0.0 if devices == 1 else sent / bandwidth


# TPU links are counted in one direction, half of the published figure, and all
# links of the torus are busy. A GPU reaches its neighbours by NVLink in a node
# of 8, then the others by one 400 Gbit/s adapter.
CHIPS = {
  'v5e': Chip(
    'TPU v5e',
    'tpu',
    ('TPU v5 lite', 'TPU v5e'),
    16 * 2**30,
    819e9,
    197e12,
    ((256, 200e9),),
  ),
  'v5p': Chip(
    'TPU v5p',
    'tpu',
    ('TPU v5', 'TPU v5p'),
    95 * 2**30,
    2765e9,
    459e12,
    ((8960, 600e9),),
  ),
  'v6e': Chip(
    'TPU v6e',
    'tpu',
    ('TPU v6 lite', 'TPU v6e'),
    32 * 2**30,
    1640e9,
    918e12,
    ((256, 400e9),),
  ),
  'h100': Chip(
    'H100 SXM',
    'cuda',
    ('NVIDIA H100 80GB HBM3',),
    84942979072,
    3352e9,
    989e12,
    ((8, 450e9), (math.inf, 50e9)),
    0.75,
  ),
  'h200': Chip(
    'H200 SXM',
    'cuda',
    ('NVIDIA H200',),
    150754820096,
    4800e9,
    989e12,
    ((8, 450e9), (math.inf, 50e9)),
    0.75,
  ),
}

_EXAMPLES = 'v5e:2x2, v5e:16x16, v5p:2x2x1, v6e:4x4, h100:1, h100:8, h200:8'
# Modules of which one must be there. The platform is also the extra's name.
_COMPILERS = {
  'tpu': ('libtpu',),
  'cuda': ('jax_plugins.xla_cuda12', 'jax_plugins.xla_cuda13'),
}

# The compiler for GPUs wants the device's limits. Those of both are Hopper's.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory:.0f}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 minor: 0 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{kind}"
"""


def devices(name: str) -> tuple[Chip, Sequence[jax.Device]]:
  """Returns devices of a slice or host that need not be attached.

  Args:
    name: `CHIP:SHAPE`. For a TPU the shape of the slice, as 'v5e:4x4'; for a
      GPU the number of devices, as 'h100:8'.

  Returns:
    The chip, and the devices, which programs can be compiled for.

  Raises:
    ValueError: If the topology is unknown, or the platform's compiler is not
      installed.
  """
  match = re.fullmatch(r'(\w+):(\d+(?:x\d+)*)', name)
  chip = CHIPS.get(match[1]) if match else None
  if match is None or chip is None:
    raise ValueError(
      f'--topology must be CHIP:SHAPE with CHIP one of {list(CHIPS)}, as '
      f'{_EXAMPLES}; got {name!r}'
    )
  shape = [int(n) for n in match[2].split('x')]
  if chip.platform == 'cuda' and len(shape) > 1:
    raise ValueError(
      f'--topology={name}: give the number of GPUs, as {match[1]}:8'
    )
  if not math.prod(shape):
    raise ValueError(f'--topology={name} has no device')
  _check_compiler(name, chip)
  try:
    if chip.platform == 'tpu':
      return chip, _tpu(name, shape)
    return chip, _gpu(chip, shape[0])
  except (RuntimeError, ValueError) as error:
    text = ' '.join(str(error).split())
    raise ValueError(
      f'--topology={name} was refused by the compiler ({text:.200}); slices '
      f'that exist are for example {_EXAMPLES}'
    ) from error


def _check_compiler(name, chip):
  if not any(_is_installed(module) for module in _COMPILERS[chip.platform]):
    raise ValueError(
      f'--topology={name} needs the compiler for {chip.name}, which is not '
      f"installed: pip install 'clop-jax[{chip.platform}]'"
    )


def _is_installed(module):
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:
    return False


def chip_of(device: jax.Device) -> Chip | None:
  """Returns the chip of an attached device, or None if it is not known."""
  for chip in CHIPS.values():
    if device.device_kind in chip.kinds:
      return chip
  return None


def _tpu(name, shape):
  # So that the compiler's library does not look for a TPU's host, and does not
  # wait for another process that has locked the TPU of this one.
  for variable, value in (
    ('ALLOW_MULTIPLE_LIBTPU_LOAD', '1'),
    ('TPU_SKIP_MDS_QUERY', '1'),
    ('TPU_ACCELERATOR_TYPE', 'v5litepod-8'),
    ('TPU_WORKER_HOSTNAMES', 'localhost'),
    ('TPU_WORKER_ID', '0'),
  ):
    os.environ.setdefault(variable, value)
  options = {}
  if math.prod(shape) == 1:
    options['chips_per_host_bounds'] = (1, 1, 1)
  return topologies.get_topology_desc(
    platform='tpu', topology_name=name, **options
  ).devices


def _gpu(chip, count):
  return topologies.get_topology_desc(
    platform='cuda',
    topology_name='',
    target_config=_HOPPER.format(
      bandwidth=chip.bandwidth, memory=chip.memory, kind=chip.kinds[0]
    ),
    topology=f'1x1x{count}',
  ).devices
