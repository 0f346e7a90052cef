"""Devices that are not attached, to compile for, and their peak figures.

The compiler of a platform runs without its hardware. It needs the extra `tpu`
or `cuda` of this package.
"""

from collections.abc import Sequence
import dataclasses
import math
import os
import re

import jax
from jax.experimental import topologies

from clop_jax.runtime import extras


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
    """Returns the seconds on the slowest link of a ring of devices."""
    reached, bandwidth = 1.0, math.inf
    for neighbours, link in self.links:
      if reached < devices:
        bandwidth = min(bandwidth, link)
      reached *= neighbours
    return 0.0 if devices == 1 else sent / bandwidth


def _tpu_chip(version, kind, memory, bandwidth, flops, neighbours, link):
  name = f'TPU {version}'
  return Chip(
    name, 'tpu', (kind, name), memory, bandwidth, flops, ((neighbours, link),)
  )


def _hopper_chip(name, kind, memory, bandwidth):
  # NVLink in a node of 8, and one 400 Gbit/s adapter for each GPU beyond.
  links = ((8, 450e9), (math.inf, 50e9))
  return Chip(name, 'cuda', (kind,), memory, bandwidth, 989e12, links, 0.75)


# TPU links are counted in one direction, half of the published figure, with all
# links of the torus busy.
CHIPS = {
  'v5e': _tpu_chip('v5e', 'TPU v5 lite', 16 * 2**30, 819e9, 197e12, 256, 200e9),
  'v5p': _tpu_chip('v5p', 'TPU v5', 95 * 2**30, 2765e9, 459e12, 8960, 600e9),
  'v6e': _tpu_chip(
    'v6e', 'TPU v6 lite', 32 * 2**30, 1640e9, 918e12, 256, 400e9
  ),
  'h100': _hopper_chip(
    'H100 SXM', 'NVIDIA H100 80GB HBM3', 84942979072, 3352e9
  ),
  'h200': _hopper_chip('H200 SXM', 'NVIDIA H200', 150754820096, 4800e9),
}

_EXAMPLES = 'v5e:2x2, v5e:16x16, v5p:2x2x1, v6e:4x4, h100:1, h100:8, h200:8'
# One module of the platform must be installed. The platform is also the extra.
_COMPILERS = {
  'tpu': ('libtpu',),
  'cuda': ('jax_cuda12_plugin', 'jax_cuda13_plugin'),
}

# The compiler for GPUs needs the device's limits. H100 and H200 share them.
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


def is_compiler_installed(chip: Chip) -> bool:
  """Returns True if programs can be compiled for the chip."""
  return any(map(extras.is_installed, _COMPILERS[chip.platform]))


def devices(name: str) -> tuple[Chip, Sequence[jax.Device]]:
  """Returns the chip and the devices of a topology, to compile programs for.

  Args:
    name: `CHIP:SHAPE`. For a TPU, SHAPE is that of the slice, as 'v5e:4x4'; for
      a GPU, the number of devices, as 'h100:8'.

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
  if not is_compiler_installed(chip):
    raise ValueError(
      f'--topology={name} needs the compiler for {chip.name}, which is not '
      f"installed: pip install 'clop-jax[{chip.platform}]'"
    )
  try:
    if chip.platform == 'tpu':
      return chip, _tpu(name, shape)
    return chip, _gpu(chip, shape[0])
  except (RuntimeError, ValueError) as error:
    text = ' '.join(str(error).split())
    raise ValueError(
      f'the compiler refused --topology={name} ({text:.200}); examples of '
      f'slices that exist: {_EXAMPLES}'
    ) from error


def chip_of(device: jax.Device) -> Chip | None:
  """Returns the chip of an attached device, or None if it is not known."""
  for chip in CHIPS.values():
    if device.device_kind in chip.kinds:
      return chip
  return None


def _tpu(name, shape):
  # libtpu must not look for a TPU's host, or wait for the process that uses the
  # TPU of this machine.
  os.environ.update(
    {
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
      'TPU_SKIP_MDS_QUERY': '1',
      'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
      'TPU_WORKER_HOSTNAMES': 'localhost',
      'TPU_WORKER_ID': '0',
    }
    | os.environ
  )
  single = {'chips_per_host_bounds': (1, 1, 1)} if math.prod(shape) == 1 else {}
  return topologies.get_topology_desc(
    platform='tpu', topology_name=name, **single
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
