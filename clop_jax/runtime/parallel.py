"""Devices: the mesh, mapping a step over it, and arrays placed on it.

The only file that knows how many devices there are. The mesh has one axis,
`DATA_AXIS`: the batch is split over it, everything else is replicated.
"""

import atexit
from collections.abc import Callable, Sequence
import contextlib
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

# Process 0 releases the others once JAX listens; a second later otherwise.
_LISTENS_AFTER_SECONDS = 0.2

# Of what the layers below raise when another process has gone.
_LOST = ('gloo', 'nccl', 'connection', 'heartbeat', 'coordination', 'socket')

# Of the run that this process has joined.
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
  """Joins the processes of one run; call it before anything else of JAX.

  Without arguments JAX looks for SLURM, a TPU pod (Cloud or GKE), a Job of
  Kubernetes, Open MPI and others, and where it finds none there is one process
  and nothing to do.

  Args:
    coordinator_address: `host:port` of process 0, the same for all. An IPv6
      address needs brackets.
    num_processes: Number of processes.
    process_id: Number of this process, from 0.
    peer_timeout_seconds: Seconds after which a process that gives no sign
      counts as lost, which ends the others.
    join_timeout_seconds: Seconds to wait for the other processes at the start.

  Raises:
    ValueError: If only some of the three are given, or make no sense, or a
      cluster cannot be understood.
    TimeoutError: If the others do not come.
  """
  given = {
    '--coordinator_address': coordinator_address,
    '--num_processes': num_processes,
    '--process_id': process_id,
  }
  missing = [name for name, value in given.items() if value is None]
  bind = devices = None
  if coordinator_address is None or num_processes is None or process_id is None:
    if len(missing) < len(given):
      raise ValueError(
        f'{", ".join(given)} go together, got no {" and no ".join(missing)}; '
        'give all three, or none of them on one process and where JAX finds '
        'the cluster'
      )
    found = _detect(join_timeout_seconds)
    if found is None:
      return
    address, num_processes, process_id, devices = found
  else:
    address = peers.parse_address(coordinator_address)
    bind = peers.bind_address(address)
    if not 0 <= process_id < num_processes:
      raise ValueError(
        f'--process_id must be in [0, --num_processes={num_processes}), got '
        f'{process_id}'
      )
  if num_processes > 1:
    _join(
      address,
      num_processes,
      process_id,
      bind=bind,
      devices=devices,
      peer_timeout=peer_timeout_seconds,
      join_timeout=join_timeout_seconds,
    )


def _detect(timeout):
  """`(address, processes, number, local devices)` of a cluster, or None."""
  environment = {}
  # Slurm's interactive steps keep the number of tasks of the whole job, which
  # is the one that JAX takes.
  if tasks := os.environ.get('SLURM_STEP_NUM_TASKS'):
    environment['SLURM_NTASKS'] = tasks
  # Only indexed Jobs of Kubernetes have it; in all other pods JAX would fail.
  if 'JOB_COMPLETION_INDEX' not in os.environ:
    environment['KUBERNETES_SERVICE_HOST'] = None
  given = os.environ.get('JAX_COORDINATOR_ADDRESS')
  try:
    with _changed_environment(environment):
      found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        given, None, None, None, None, timeout
      )
  except Exception as error:
    # As many kinds as there are clusters.
    text = ' '.join(str(error).split())
    raise ValueError(
      f'JAX cannot find the processes of this cluster ({text:.500}); pass '
      '--coordinator_address, --num_processes and --process_id (localhost:1, '
      '1 and 0 for a single process)'
    ) from error
  address, count, number, devices = found
  if count is None or number is None:
    if given is None:
      return None
    raise ValueError(
      f'JAX_COORDINATOR_ADDRESS={given} is set, but no cluster was found; '
      'unset it, or pass --coordinator_address, --num_processes and '
      '--process_id'
    )
  address = peers.parse_address(address, 'the address of process 0')
  if 'JAX_LOCAL_DEVICE_IDS' in os.environ:
    devices = None  # JAX reads it
  elif str(count) == os.environ.get('SLURM_STEP_NUM_NODES'):
    # One task a node: JAX would take one device a task, and leave the others
    # of the node idle.
    devices = list(range(int(os.environ.get('SLURM_GPUS_ON_NODE', 1))))
  return address, count, number, devices


@contextlib.contextmanager
def _changed_environment(changes):
  """Sets variables of the environment; None unsets one."""
  before = {name: os.environ.get(name) for name in changes}

  def apply(values):
    for name, value in values.items():
      os.environ.pop(name, None)
      if value is not None:
        os.environ[name] = value

  apply(changes)
  try:
    yield
  finally:
    apply(before)


def _join(address, count, number, *, bind, devices, peer_timeout, join_timeout):
  """Meets the other processes, and then lets JAX join them."""
  global _number, _peers
  _number = number
  chosen = os.environ.get('JAX_COORDINATOR_BIND_ADDRESS')
  if chosen:
    bind = peers.parse_address(chosen, 'JAX_COORDINATOR_BIND_ADDRESS')
  _peers = peers.meet(address, number, count, timeout=join_timeout, bind=bind)
  atexit.register(_leave_unless_failed)
  failures = []

  def initialize():
    try:
      jax.distributed.initialize(
        str(address),
        count,
        number,
        local_device_ids=devices,
        cluster_detection_method='deactivate',
        # JAX aborts when these are over, so ours are shorter.
        initialization_timeout=join_timeout + 60,
        heartbeat_timeout_seconds=peer_timeout + 30,
        shutdown_timeout_seconds=peer_timeout,
        coordinator_bind_address=None if bind is None else str(bind),
      )
    except BaseException as error:
      failures.append(error)

  # JAX does not return before all have come, not even for Ctrl-C.
  thread = threading.Thread(target=initialize, daemon=True)
  thread.start()
  if number == 0:
    thread.join(_LISTENS_AFTER_SECONDS)
    _peers.release()
  _peers.watch(peer_timeout, _lose_peer)
  thread.join(join_timeout)
  if thread.is_alive():
    raise TimeoutError(
      f'all {count} processes came, but JAX could not join them over {address} '
      f'within {join_timeout} s; unset http_proxy, https_proxy and grpc_proxy '
      'in the environment'
    )
  if failures:
    raise failures[0]


def leave() -> None:
  """Says goodbye to the other processes of the run, if there are any."""
  if _peers is not None:
    _peers.leave()


def _leave_unless_failed():
  if not hasattr(sys, 'last_value'):
    leave()


def _lose_peer(message):
  end(
    f'{message}; start all processes again: training resumes from the last '
    'checkpoint'
  )


def end(message: str, code: int = 1) -> None:
  """Prints one line and ends this process, from any thread.

  Not by way of JAX's farewell, which waits for processes that may be dead.
  """
  if not _ending.acquire(blocking=False):
    threading.Event().wait()  # another thread is at it
  whose = '' if _number is None else f'process {_number}: '
  print(f'error: {whose}{message}', file=sys.stderr, flush=True)
  if _number == 0:
    # The end of process 0 ends the others roughly; those that are about to say
    # the same get the time to.
    time.sleep(3)
  with contextlib.suppress(Exception):
    sys.stdout.flush()
  os._exit(code)


def is_joined() -> bool:
  """True if this process is one of several, or waits for the others."""
  return _number is not None


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
    raise error or ValueError('process 0 has failed; see its message')


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
