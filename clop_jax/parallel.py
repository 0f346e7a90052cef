"""Devices: the mesh, mapping a step over it, and arrays placed on it.

The only file that knows how many devices there are. The mesh has one axis,
`DATA_AXIS`: the batch is split over it, everything else is replicated.
"""

from collections.abc import Callable, Sequence
import os
import sys
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

DATA_AXIS = 'data'

# What JAX says where there is no cluster that it knows.
_NO_CLUSTER = 'coordinator_address should be defined'

# Of what the layers below raise when another process has gone.
_LOST = ('gloo', 'nccl', 'connection', 'heartbeat', 'coordination', 'socket')


def start(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  peer_timeout_seconds: int = 60,
) -> None:
  """Joins the processes of one run; call it before anything else of JAX.

  Without arguments JAX looks for SLURM, a TPU pod (Cloud or GKE), Open MPI and
  others, and where it finds none there is one process and nothing to do.

  Args:
    coordinator_address: `host:port` of process 0, the same for all.
    num_processes: how many there are.
    process_id: which one this is, from 0.
    peer_timeout_seconds: after which a process that is not heard of counts as
      dead, which ends the others.

  Raises:
    ValueError: if only some of the three are given, or make no sense.
    RuntimeError: if the others do not come, or a cluster cannot be joined.
  """
  timeouts: dict[str, Any] = {
    'heartbeat_timeout_seconds': peer_timeout_seconds,
    'shutdown_timeout_seconds': peer_timeout_seconds,
  }
  given = {
    '--coordinator_address': coordinator_address,
    '--num_processes': num_processes,
    '--process_id': process_id,
  }
  missing = [name for name, value in given.items() if value is None]
  if num_processes is not None and process_id is not None and not missing:
    if not 0 <= process_id < num_processes:
      raise ValueError(
        f'--process_id must be in [0, --num_processes={num_processes}), got '
        f'{process_id}'
      )
    if num_processes > 1:
      jax.distributed.initialize(
        coordinator_address,
        num_processes,
        process_id,
        cluster_detection_method='deactivate',
        **timeouts,
      )
    return
  if len(missing) < len(given):
    raise ValueError(
      f'{", ".join(given)} go together, got no {" and no ".join(missing)}; '
      'give all three, or none of them on one process and where JAX finds '
      'the cluster'
    )
  tasks = int(os.environ.get('SLURM_NTASKS', 0))
  if tasks == 1:
    return
  devices = None
  if tasks and tasks == int(os.environ.get('SLURM_STEP_NUM_NODES', 0)):
    # One task a node: JAX would take one device a task, and leave the others
    # of the node idle.
    devices = list(range(int(os.environ.get('SLURM_GPUS_ON_NODE', 1))))
  try:
    jax.distributed.initialize(local_device_ids=devices, **timeouts)
  except ValueError as error:
    if _NO_CLUSTER not in str(error):
      raise


def is_main() -> bool:
  """Whether this process is the one that writes and talks."""
  return jax.process_index() == 0


def all_agree(fine: bool) -> bool:
  """Whether `fine` holds on every process; all wait for one another here."""
  if jax.process_count() == 1:
    return fine
  return bool(multihost_utils.process_allgather(np.bool_(fine)).all())


def by_main(work: Callable[[], None]) -> None:
  """Calls `work` on the main process; all learn whether it went well.

  Raises:
    ValueError: as `work` does; on the other processes, if it raises anything.
    OSError: as `work` does.
  """
  error = None
  if is_main():
    try:
      work()
    except (ValueError, OSError) as caught:
      error = caught
  if not all_agree(error is None):
    raise error or ValueError('process 0 could not begin; it says why')


def from_main(tree):
  """The main process's arrays on the host, on every process of the run."""
  return multihost_utils.broadcast_one_to_all(tree)


def warn(message: str) -> None:
  """Prints a warning, of all processes the main one alone."""
  if is_main():
    print(f'warning: {message}', file=sys.stderr, flush=True)


def is_lost_peer(error: Exception) -> bool:
  """Whether an error can come from another process of the run that has gone."""
  text = str(error).lower()
  return jax.distributed.is_initialized() and any(x in text for x in _LOST)


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
  """Puts a tree of arrays (or PRNG keys) whole on every device.

  Every process passes the same ones.
  """
  sharding = replicated(mesh)
  if sharding.is_fully_addressable:
    return jax.device_put(tree, sharding)

  # `device_put` is for the devices of this process.
  def place(x):
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      data = place(np.asarray(jax.random.key_data(x)))
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

  return jax.tree.map(place, tree)


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
