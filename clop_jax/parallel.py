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


def split(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
  """The sharding of what is split over the devices along `axis`."""
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, DATA_AXIS))


def shard(mesh: Mesh, tree, *, axis: int = 0):
  """Splits host arrays over the devices along `axis`.

  Every process passes the same global arrays and keeps the rows of its own
  devices.
  """
  sharding = split(mesh, axis=axis)

  def place(x):
    x = np.asarray(x)
    return jax.make_array_from_callback(
      x.shape, sharding, lambda position: x[position]
    )

  return jax.tree.map(place, tree)


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """The rows of the global batch that this process's devices hold, ascending.

  Raises:
    ValueError: if `batch_size` is not a positive multiple of the devices.
  """
  check_batch_size(batch_size, mesh)
  positions = split(mesh).addressable_devices_indices_map((batch_size,))
  return np.sort(
    np.concatenate([np.arange(batch_size)[p] for p in positions.values()])
  )


def shard_local(mesh: Mesh, tree, *, axis: int = 0):
  """Global arrays from what each process has of them along `axis`.

  Each process passes the rows that `local_rows` names, in that order.
  """
  sharding = split(mesh, axis=axis)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), tree
  )


def map_step(step: Callable, mesh: Mesh, *, batch_axes: Sequence[int | None]):
  """Maps a step written for one shard over the mesh, and compiles it.

  Args:
    step: `(state, ...) -> (state, metrics)`; it sees its shard of the split
      arguments, may use collectives over `DATA_AXIS`, and returns what is the
      same on every device (checked while tracing).
    mesh: see `make_mesh`.
    batch_axes: for each argument, the axis that is split over the devices, or
      None where every device has the whole.

  Returns:
    The jitted global function. It donates its first argument: the old state's
    memory becomes the new one's.
  """
  specs = tuple(
    PartitionSpec() if axis is None else split(mesh, axis=axis).spec
    for axis in batch_axes
  )
  mapped = jax.shard_map(
    step, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=True
  )
  return jax.jit(mapped, donate_argnums=0)
