"""Devices: the mesh, mapping a step over it, and arrays placed on it.

The only file that knows how many devices there are. The mesh has one axis,
`DATA_AXIS`: the batch is split over it, everything else is replicated.
"""

from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

DATA_AXIS = 'data'


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A 1-D mesh over the devices (default: all, of all processes)."""
  devices = jax.devices() if devices is None else list(devices)
  return jax.make_mesh(
    (len(devices),), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices
  )


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
  """Refuses a batch that the devices cannot share evenly.

  Raises:
    ValueError: if `batch_size` is not a positive multiple of the devices.
  """
  if batch_size < 1 or batch_size % mesh.size:
    raise ValueError(
      f'batch_size must be a positive multiple of the {mesh.size} devices, got '
      f'{batch_size}; nearest: {max(1, batch_size // mesh.size) * mesh.size}'
    )


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of what every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def replicate(mesh: Mesh, tree):
  """Puts a tree of arrays (or PRNG keys) whole on every device."""
  return jax.device_put(tree, replicated(mesh))


def shard(mesh: Mesh, tree):
  """Splits the first axis of host arrays over the devices.

  Every process passes the same global arrays and keeps the rows of its own
  devices.
  """
  sharding = NamedSharding(mesh, PartitionSpec(DATA_AXIS))

  def place(x):
    x = np.asarray(x)
    return jax.make_array_from_callback(
      x.shape, sharding, lambda position: x[position]
    )

  return jax.tree.map(place, tree)


def map_step(step: Callable, mesh: Mesh, *, sharded: Sequence[bool]):
  """Maps a step written for one shard over the mesh, and compiles it.

  Args:
    step: `(state, ...) -> (state, metrics)`; it sees its shard of the sharded
      arguments, may use collectives over `DATA_AXIS`, and returns what is the
      same on every device (checked while tracing).
    mesh: see `make_mesh`.
    sharded: for each argument, whether its first axis is split over devices.

  Returns:
    The jitted global function. It donates its first argument: the old state's
    memory becomes the new one's.
  """
  specs = tuple(
    PartitionSpec(DATA_AXIS) if s else PartitionSpec() for s in sharded
  )
  mapped = jax.shard_map(
    step, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=True
  )
  return jax.jit(mapped, donate_argnums=0)
