"""Device mesh, mapping a step over it, and the processes of a run.

The mesh has one axis, `DATA_AXIS`. The batch is split over it, and everything
else is replicated.
"""

from collections.abc import Callable, Sequence
import contextlib
import logging
import os
import sys
import threading
import time

import jax
from jax._src import clusters
from jax.experimental import multihost_utils
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from clop_jax.runtime import peers

DATA_AXIS = 'data'

# Words in the errors of JAX's layers after another process has died.
_LOST = ('gloo', 'nccl', 'connection', 'heartbeat', 'coordination', 'socket')

# Number of this process and its connections, if there are several.
_number: int | None = None
_peers: peers.Peers | None = None
_ending = threading.Lock()


def start(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  peer_timeout_seconds: int = 60,
  join_timeout_seconds: int = 300,
) -> None:
  """Joins the processes of one run. Call it before anything else of JAX.

  Without arguments, JAX detects SLURM, TPU pods, Jobs of Kubernetes, Open MPI
  and others. If it finds none, the run has one process.

  Args:
    coordinator_address: `host:port` of process 0, the same for all. An IPv6
      address needs brackets.
    num_processes: Number of processes.
    process_id: Number of this process, from 0.
    peer_timeout_seconds: Seconds of silence after which a process counts as
      lost, which ends the others.
    join_timeout_seconds: Seconds to wait for the other processes at the start.

  Raises:
    ValueError: If only some of the three are given, they contradict each other,
      or the cluster's environment is incomplete.
    TimeoutError: If another process does not arrive.
  """
  arguments = {
    '--coordinator_address': coordinator_address,
    '--num_processes': num_processes,
    '--process_id': process_id,
  }
  missing = [name for name, value in arguments.items() if value is None]
  bind = devices = None
  if coordinator_address is None or num_processes is None or process_id is None:
    if len(missing) < len(arguments):
      raise ValueError(
        f'{", ".join(arguments)} go together, got no '
        f'{" and no ".join(missing)}; pass all three, or none of them for one '
        'process or a cluster that JAX detects'
      )
    cluster = _detect(join_timeout_seconds)
    if cluster is None:
      return
    address, num_processes, process_id, devices = cluster
  else:
    address = peers.parse_address(coordinator_address)
    bind = peers.bind_address(address)
    if not 0 <= process_id < num_processes:
      raise ValueError(
        f'--process_id must be in [0, --num_processes={num_processes}), got '
        f'{process_id}'
      )
  if num_processes == 1:
    return
  if chosen := os.environ.get('JAX_COORDINATOR_BIND_ADDRESS'):
    bind = peers.parse_address(chosen, 'JAX_COORDINATOR_BIND_ADDRESS')
  global _number, _peers
  _number = process_id
  _peers = peers.meet(
    address, process_id, num_processes, timeout=join_timeout_seconds, bind=bind
  )
  _peers.watch(peer_timeout_seconds, _lose_peer)
  # gRPC would send the traffic between the processes to an HTTP proxy. JAX
  # warns of this variable as of those that name a proxy.
  os.environ['no_grpc_proxy'] = address.host  # noqa: SIM112
  logging.getLogger('jax._src.distributed').setLevel(logging.ERROR)
  jax.distributed.initialize(
    str(address),
    num_processes,
    process_id,
    local_device_ids=devices,
    cluster_detection_method='deactivate',
    initialization_timeout=join_timeout_seconds,
    # JAX aborts with a stack trace after this time, so `peers` comes first.
    heartbeat_timeout_seconds=peer_timeout_seconds + 30,
    shutdown_timeout_seconds=peer_timeout_seconds,
    coordinator_bind_address=None if bind is None else str(bind),
  )


_CHANGED = ('SLURM_NTASKS', 'KUBERNETES_SERVICE_HOST')  # by `_detect`


def _detect(timeout):
  """Returns `(address, processes, number, local devices)`, or None."""
  before = {x: os.environ.get(x) for x in _CHANGED}
  # JAX takes the number of tasks of the job, which an interactive step inherits
  # from it.
  if tasks := os.environ.get('SLURM_STEP_NUM_TASKS'):
    os.environ['SLURM_NTASKS'] = tasks
  # JAX fails in a pod that does not belong to an indexed Job.
  if 'JOB_COMPLETION_INDEX' not in os.environ:
    os.environ.pop('KUBERNETES_SERVICE_HOST', None)
  preset = os.environ.get('JAX_COORDINATOR_ADDRESS')
  try:
    address, count, number, devices = (
      clusters.ClusterEnv.auto_detect_unset_distributed_params(
        preset, None, None, None, None, timeout
      )
    )
  except Exception as error:  # of as many kinds as there are clusters
    text = ' '.join(str(error).split())
    raise ValueError(
      f'JAX cannot find the processes of this cluster ({text:.500}); pass '
      '--coordinator_address, --num_processes and --process_id (localhost:1, '
      '1 and 0 for a single process)'
    ) from error
  finally:
    # Other libraries read these variables as well.
    for name, value in before.items():
      os.environ.pop(name, None)
      if value is not None:
        os.environ[name] = value
  if count is None or number is None:
    if preset is None:
      return None
    raise ValueError(
      f'JAX_COORDINATOR_ADDRESS={preset} is set, but JAX detects no cluster; '
      'unset it, or pass --coordinator_address, --num_processes and '
      '--process_id'
    )
  if 'JAX_LOCAL_DEVICE_IDS' in os.environ:
    devices = None  # JAX reads it
  elif str(count) == os.environ.get('SLURM_STEP_NUM_NODES'):
    # JAX takes one device for each task, but this task has the whole node.
    devices = list(range(int(os.environ.get('SLURM_GPUS_ON_NODE', 1))))
  address = peers.parse_address(address, 'the address of process 0')
  return address, count, number, devices


def leave() -> None:
  """Tells the other processes, if any, that this one ends as planned."""
  if _peers is not None:
    _peers.leave()


def _lose_peer(message):
  end(
    f'{message}; start all processes again: training resumes from the last '
    'checkpoint'
  )


def end(message: str, code: int = 1) -> None:
  """Prints an error and ends this process, from any thread.

  It skips JAX's shutdown, which waits for processes that may be dead.
  """
  if not _ending.acquire(blocking=False):
    threading.Event().wait()  # another thread is ending the process
  prefix = '' if _number is None else f'process {_number}: '
  print(f'error: {prefix}{message}', file=sys.stderr, flush=True)
  if _number == 0:
    # JAX aborts the others when process 0 ends. They may have an error of their
    # own to print.
    time.sleep(3)
  with contextlib.suppress(Exception):
    sys.stdout.flush()
  os._exit(code)


def is_joined() -> bool:
  """Returns True if the run has, or waits for, several processes."""
  return _number is not None


def is_main() -> bool:
  """Returns True on the process that writes and prints."""
  return jax.process_index() == 0


def all_agree(fine: bool) -> bool:
  """Returns True if `fine` is True on every process. A collective call."""
  if jax.process_count() == 1:
    return fine
  return bool(multihost_utils.process_allgather(np.bool_(fine)).all())


def by_main(work: Callable[[], None]) -> None:
  """Calls `work` on the main process. A collective call.

  Raises:
    ValueError: If `work` raises it, and on the other processes if `work` fails.
    OSError: If `work` raises it.
  """
  error = None
  if is_main():
    try:
      work()
    except (ValueError, OSError) as caught:
      error = caught
  if not all_agree(error is None):
    raise error or ValueError('process 0 failed; see its log')


def from_main(tree):
  """Returns the main process's arrays, on the host. A collective call."""
  return multihost_utils.broadcast_one_to_all(tree)


def warn(message: str) -> None:
  """Prints a warning on the main process."""
  if is_main():
    print(f'warning: {message}', file=sys.stderr, flush=True)


def is_lost_peer(error: Exception) -> bool:
  """Returns True if another process that died may have caused the error."""
  text = str(error).lower()
  return jax.distributed.is_initialized() and any(x in text for x in _LOST)


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns a 1-D mesh over devices (default: those of all processes)."""
  devices = jax.devices() if devices is None else list(devices)
  return jax.make_mesh(
    (len(devices),), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices
  )


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
  """Raises ValueError unless the devices can share a batch evenly."""
  if batch_size < 1 or batch_size % mesh.size:
    raise ValueError(
      f'batch_size must be a positive multiple of the {mesh.size} devices, got '
      f'{batch_size}; nearest: {max(1, batch_size // mesh.size) * mesh.size}'
    )


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
  """Returns the sharding of an array that is split along `axis`."""
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, DATA_AXIS))


def replicate(mesh: Mesh, tree):
  """Copies arrays and PRNG keys, the same on every process, to every device."""
  return _place(tree, replicated(mesh))


def shard(mesh: Mesh, tree, *, axis: int = 0):
  """Splits arrays, the same on every process, over the devices."""
  return _place(tree, split(mesh, axis=axis))


def _place(tree, sharding):
  def place(x):
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      data = place(jax.random.key_data(x))
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    x = np.asarray(x)
    # `device_put` would compare the arrays of all processes.
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

  return jax.tree.map(place, tree)


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """Returns the rows of the global batch on this process's devices, ascending.

  Raises:
    ValueError: If `batch_size` is not a positive multiple of the devices.
  """
  check_batch_size(batch_size, mesh)
  positions = split(mesh).addressable_devices_indices_map((batch_size,))
  return np.sort(
    np.concatenate([np.arange(batch_size)[p] for p in positions.values()])
  )


def shard_local(mesh: Mesh, tree, *, axis: int = 0):
  """Returns global arrays from each process's `local_rows` along `axis`."""
  sharding = split(mesh, axis=axis)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), tree
  )


def map_step(step: Callable, mesh: Mesh, *, batch_axes: Sequence[int | None]):
  """Maps a step written for one shard over the mesh, and compiles it.

  Args:
    step: Function `(state, ...) -> (state, metrics)` of one shard. It may use
      collectives over `DATA_AXIS`, and its results must be equal on every
      device, which is checked while tracing.
    mesh: See `make_mesh`.
    batch_axes: For each argument, the axis that is split over the devices, or
      None if every device has the whole.

  Returns:
    The jitted global function. It donates its first argument.
  """
  specs = tuple(
    PartitionSpec() if axis is None else split(mesh, axis=axis).spec
    for axis in batch_axes
  )
  mapped = jax.shard_map(
    step, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=True
  )
  return jax.jit(mapped, donate_argnums=0)
