"""How processes find each other, without any others to find."""

import os
import subprocess
import sys
import threading
import types

import jax
from jax._src.clusters import k8s_cluster
import numpy as np
import pytest

from clop_jax.runtime import parallel
from tests import small

# Of the third task of a step with one task on each of four nodes.
SLURM = {
  'SLURM_JOB_ID': '1',
  'SLURM_STEP_NODELIST': 'node[1-4]',
  'SLURM_STEP_NUM_NODES': '4',
  'SLURM_STEP_NUM_TASKS': '4',
  'SLURM_NTASKS': '4',
  'SLURM_PROCID': '2',
  'SLURM_LOCALID': '0',
  'SLURM_GPUS_ON_NODE': '8',
}
# Of the first of two processes that mpirun has started.
OPEN_MPI = {
  'OMPI_MCA_orte_hnp_uri': '4096.0;tcp://10.96.0.1:34911',
  'OMPI_COMM_WORLD_SIZE': '2',
  'OMPI_COMM_WORLD_RANK': '0',
  'OMPI_COMM_WORLD_LOCAL_RANK': '0',
}
POD = {'KUBERNETES_SERVICE_HOST': '10.0.0.1'}


class Met:
  """Connections to nobody."""

  def watch(self, timeout, end):
    pass

  def release(self):
    pass

  def leave(self):
    pass


@pytest.fixture
def calls(monkeypatch):
  """What JAX is asked to join, in an environment without a cluster."""
  for name in os.environ:
    if name.startswith(('SLURM_', 'OMPI_', 'JAX_COORD', 'KUBERNETES_', 'JOB_')):
      monkeypatch.delenv(name)
  seen = []
  monkeypatch.setattr(
    jax.distributed,
    'initialize',
    lambda *arguments, **options: seen.append((arguments, options)),
  )
  for name in ('_number', '_peers'):
    monkeypatch.setattr(parallel, name, None)
  monkeypatch.setattr(parallel.peers, 'meet', lambda *_, **__: Met())
  monkeypatch.setattr(parallel.atexit, 'register', lambda _: None)
  return seen


def set_environment(monkeypatch, names):
  for name, value in names.items():
    monkeypatch.setenv(name, value)


def test_explicit_processes_are_joined_as_they_are_named(calls):
  parallel.start('host:1234', 4, 2, peer_timeout_seconds=7)
  ((arguments, options),) = calls
  assert arguments == ('host:1234', 4, 2)
  assert options['cluster_detection_method'] == 'deactivate'
  # JAX aborts when its own time is over, so ours comes first.
  assert options['heartbeat_timeout_seconds'] > 7
  assert options['initialization_timeout'] > 300
  assert options['shutdown_timeout_seconds'] == 7
  assert parallel.is_joined()


@pytest.mark.parametrize(
  ('address', 'chosen', 'bind'),
  [
    ('127.0.0.1:7', None, '127.0.0.1:7'),
    ('localhost:7', None, '127.0.0.1:7'),
    ('node1:7', None, None),
    ('127.0.0.1:7', '[::]:8', '[::]:8'),
  ],
)
def test_process_0_listens_where_the_address_says(
  address, chosen, bind, calls, monkeypatch
):
  if chosen:
    monkeypatch.setenv('JAX_COORDINATOR_BIND_ADDRESS', chosen)
  parallel.start(address, 2, 0)
  ((_, options),) = calls
  assert options['coordinator_bind_address'] in (bind, bind or '[::]:7')


@pytest.mark.parametrize(
  'names',
  [
    {},
    SLURM | {'SLURM_NTASKS': '1', 'SLURM_STEP_NUM_TASKS': '1'},
    # An interactive step, as of salloc.
    SLURM | {'SLURM_STEP_NUM_TASKS': '1', 'SLURM_PROCID': '0'},
    # A pod that is not of an indexed Job.
    POD,
  ],
)
def test_one_process_has_nobody_to_join(names, calls, monkeypatch):
  set_environment(monkeypatch, names)
  # As JAX finds it outside of a cluster; it has no permission to ask.
  monkeypatch.setitem(sys.modules, 'kubernetes', types.ModuleType('kubernetes'))
  parallel.start()
  parallel.start('host:1234', 1, 0)
  assert not calls and not parallel.is_joined()
  assert {name: os.environ[name] for name in names} == names


@pytest.mark.parametrize(
  ('names', 'expected'),
  [
    (SLURM, ('node1:61441', 4, 2)),
    # A step of fewer tasks than its job has.
    (SLURM | {'SLURM_NTASKS': '9'}, ('node1:61441', 4, 2)),
    # mpirun within an interactive step.
    (
      SLURM | {'SLURM_STEP_NUM_TASKS': '1'} | OPEN_MPI,
      ('10.96.0.1:61441', 2, 0),
    ),
    (POD | {'JOB_COMPLETION_INDEX': '1'}, ('job-0.pods:55527', 3, 1)),
  ],
)
def test_a_cluster_is_joined_as_jax_finds_it(
  names, expected, calls, monkeypatch
):
  set_environment(monkeypatch, names)
  cluster = k8s_cluster.K8sCluster
  for name, answer in (
    ('is_env_present', 'KUBERNETES_SERVICE_HOST' in names),
    ('get_coordinator_address', 'job-0.pods:55527'),
    ('get_process_count', 3),
  ):
    monkeypatch.setattr(cluster, name, lambda answer=answer, **_: answer)
  parallel.start()
  ((arguments, _),) = calls
  assert arguments == expected


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((None, 2, 0), 'got no --coordinator_address; give all three'),
    (('host:1', None, None), 'got no --num_processes and no --process_id'),
    (('host:1', 2, 2), r'--process_id must be in \[0, --num_processes=2\)'),
    (('host:1', 2, -1), 'got -1'),
    (('host', 2, 0), "--coordinator_address must be .* got 'host'"),
    (('host:99999', 1, 0), "--coordinator_address must be .* 'host:99999'"),
  ],
)
def test_half_a_description_is_refused(arguments, message, calls):
  with pytest.raises(ValueError, match=message):
    parallel.start(*arguments)
  assert not calls


def test_a_slurm_task_has_all_devices_of_a_node_that_it_has_alone(
  calls, monkeypatch
):
  set_environment(monkeypatch, SLURM)
  parallel.start()
  # Two tasks a node share its devices as JAX has it.
  monkeypatch.setenv('SLURM_STEP_NUM_NODES', '2')
  parallel.start()
  # As the user has it.
  monkeypatch.setenv('JAX_LOCAL_DEVICE_IDS', '0,1')
  parallel.start()
  devices = [options['local_device_ids'] for _, options in calls]
  assert devices == [list(range(8)), [0], None]


def test_no_cluster_is_no_error():
  # In a process of its own: JAX joins nobody once it has looked for devices.
  names = {k: v for k, v in os.environ.items() if not k.startswith('SLURM')}
  code = (
    'import jax\n'
    'from clop_jax.runtime import parallel\n'
    'parallel.start()\n'
    'print(jax.distributed.is_initialized(), jax.process_count())\n'
  )
  result = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    cwd=small.ROOT,
    env=names,
  )
  assert result.stdout == 'False 1\n', result.stderr


@pytest.mark.parametrize(
  ('names', 'message'),
  [
    ({'JAX_COORDINATOR_ADDRESS': 'host:1'}, 'JAX_COORDINATOR_ADDRESS=host:1'),
    (SLURM | {'SLURM_STEP_NUM_TASKS': 'x'}, r"'x'.*--coordinator_address"),
    # Not in a pod, so the package cannot be configured.
    (POD | {'JOB_COMPLETION_INDEX': '0'}, "'config'.*--coordinator_address"),
  ],
)
def test_a_cluster_that_is_half_there_is_an_error(
  names, message, calls, monkeypatch
):
  set_environment(monkeypatch, names)
  monkeypatch.setitem(sys.modules, 'kubernetes', types.ModuleType('kubernetes'))
  with pytest.raises(ValueError, match=message):
    parallel.start()
  assert not calls


def test_jax_that_cannot_join_is_given_up(calls, monkeypatch):
  never = threading.Event()
  monkeypatch.setattr(
    jax.distributed, 'initialize', lambda *_, **__: never.wait()
  )
  with pytest.raises(TimeoutError, match='host:1 within 1 s; unset http_proxy'):
    parallel.start('host:1', 2, 1, join_timeout_seconds=1)
  never.set()


def test_one_process_agrees_with_itself_and_is_the_main_one():
  assert parallel.is_main()
  assert parallel.all_agree(True) is True
  assert parallel.all_agree(False) is False
  assert not parallel.is_lost_peer(ValueError('Gloo: connection closed'))


def test_replicated_keys_and_arrays_are_on_every_device():
  mesh = parallel.make_mesh()
  tree = {'key': jax.random.key(3), 'x': np.arange(4)}
  placed = parallel.replicate(mesh, tree)
  assert len(placed['key'].sharding.device_set) == 8
  assert len(placed['x'].sharding.device_set) == 8
  assert jax.random.bits(placed['key']) == jax.random.bits(tree['key'])
