"""Joining the processes of a run, with JAX replaced, and placing arrays."""

import os
import sys
import types

import jax
from jax._src.clusters import k8s_cluster
import numpy as np
import pytest

from clop_jax.runtime import parallel

# The third task of a step with one task on each of four nodes.
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
# The first of two processes that mpirun started.
OPEN_MPI = {
  'OMPI_MCA_orte_hnp_uri': '4096.0;tcp://10.96.0.1:34911',
  'OMPI_COMM_WORLD_SIZE': '2',
  'OMPI_COMM_WORLD_RANK': '0',
  'OMPI_COMM_WORLD_LOCAL_RANK': '0',
}
POD = {'KUBERNETES_SERVICE_HOST': '10.0.0.1'}


class Met:
  """Connections to no process."""

  def watch(self, timeout, end):
    pass


@pytest.fixture
def calls(monkeypatch):
  """Calls of `jax.distributed.initialize`, in an environment of no cluster."""
  for name in os.environ:
    if name.startswith(('SLURM_', 'OMPI_', 'JAX_COORD', 'KUBERNETES_', 'JOB_')):
      monkeypatch.delenv(name)
  monkeypatch.setenv('no_grpc_proxy', '')
  seen = []
  monkeypatch.setattr(
    jax.distributed,
    'initialize',
    lambda *arguments, **options: seen.append((arguments, options)),
  )
  for name in ('_number', '_peers'):
    monkeypatch.setattr(parallel, name, None)
  monkeypatch.setattr(parallel.peers, 'meet', lambda *_, **__: Met())
  return seen


def set_environment(monkeypatch, names):
  # `start` itself changes some of them, which monkeypatch undoes.
  for name, value in names.items():
    monkeypatch.setenv(name, value)


def test_explicit_processes_are_joined(calls):
  parallel.start('host:1234', 4, 2, peer_timeout_seconds=7)
  ((arguments, options),) = calls
  assert arguments == ('host:1234', 4, 2)
  # JAX aborts when its own time is over, so ours comes first.
  assert options['heartbeat_timeout_seconds'] > 7
  assert parallel.is_joined()
  # The processes do not talk through an HTTP proxy.
  assert os.environ['no_grpc_proxy'] == 'host'  # noqa: SIM112


@pytest.mark.parametrize(
  ('address', 'chosen', 'bind'),
  [
    ('127.0.0.1:7', None, '127.0.0.1:7'),
    ('localhost:7', None, '127.0.0.1:7'),
    ('node1:7', None, '[::]:7'),
    ('127.0.0.1:7', '[::]:8', '[::]:8'),
  ],
)
def test_process_0_listens_on_the_address(
  address, chosen, bind, calls, monkeypatch
):
  if chosen:
    monkeypatch.setenv('JAX_COORDINATOR_BIND_ADDRESS', chosen)
  parallel.start(address, 2, 0)
  ((_, options),) = calls
  assert options['coordinator_bind_address'] == bind


@pytest.mark.parametrize(
  'names',
  [
    {},
    SLURM | {'SLURM_NTASKS': '1', 'SLURM_STEP_NUM_TASKS': '1'},
    # An interactive step, as of `srun --pty bash`.
    SLURM | {'SLURM_STEP_NUM_TASKS': '1', 'SLURM_PROCID': '0'},
    # A pod that does not belong to an indexed Job.
    POD,
  ],
)
def test_a_single_process_joins_no_other(names, calls, monkeypatch):
  set_environment(monkeypatch, names)
  # JAX finds this package, but has no permission to ask the cluster.
  monkeypatch.setitem(sys.modules, 'kubernetes', types.ModuleType('kubernetes'))
  parallel.start()
  parallel.start('host:1234', 1, 0)
  assert not calls and not parallel.is_joined()
  assert {name: os.environ.get(name) for name in names} == names


@pytest.mark.parametrize(
  ('names', 'expected'),
  [
    (SLURM, ('node1:61441', 4, 2)),
    # A step with fewer tasks than its job.
    (SLURM | {'SLURM_NTASKS': '9'}, ('node1:61441', 4, 2)),
    # mpirun within an interactive step.
    (
      SLURM | {'SLURM_STEP_NUM_TASKS': '1'} | OPEN_MPI,
      ('10.96.0.1:61441', 2, 0),
    ),
    (POD | {'JOB_COMPLETION_INDEX': '1'}, ('job-0.pods:55527', 3, 1)),
  ],
)
def test_a_cluster_that_jax_detects_is_joined(
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
    ((None, 2, 0), 'got no --coordinator_address;'),
    (('host:1', None, None), 'got no --num_processes and no --process_id'),
    (('host:1', 2, 2), r'--process_id must be in \[0, --num_processes=2\)'),
    (('host:1', 2, -1), 'got -1'),
    (('host', 2, 0), "--coordinator_address must be .* got 'host'"),
    (('host:99999', 1, 0), "--coordinator_address must be .* 'host:99999'"),
  ],
)
def test_incomplete_arguments_are_an_error(arguments, message, calls):
  with pytest.raises(ValueError, match=message):
    parallel.start(*arguments)
  assert not calls


def test_a_slurm_task_that_has_a_node_alone_has_all_its_devices(
  calls, monkeypatch
):
  set_environment(monkeypatch, SLURM)
  parallel.start()
  # Two tasks share a node.
  monkeypatch.setenv('SLURM_STEP_NUM_NODES', '2')
  parallel.start()
  monkeypatch.setenv('JAX_LOCAL_DEVICE_IDS', '0,1')
  parallel.start()
  devices = [options['local_device_ids'] for _, options in calls]
  assert devices == [list(range(8)), [0], None]


@pytest.mark.parametrize(
  ('names', 'message'),
  [
    ({'JAX_COORDINATOR_ADDRESS': 'host:1'}, 'JAX_COORDINATOR_ADDRESS=host:1'),
    (SLURM | {'SLURM_STEP_NUM_TASKS': 'x'}, r"'x'.*--coordinator_address"),
    # JAX cannot configure the package outside of a pod.
    (POD | {'JOB_COMPLETION_INDEX': '0'}, "'config'.*--coordinator_address"),
  ],
)
def test_an_incomplete_cluster_is_an_error(names, message, calls, monkeypatch):
  set_environment(monkeypatch, names)
  monkeypatch.setitem(sys.modules, 'kubernetes', types.ModuleType('kubernetes'))
  with pytest.raises(ValueError, match=message):
    parallel.start()
  assert not calls


def test_a_single_process_is_the_main_one():
  assert parallel.is_main()
  assert parallel.all_agree(True) is True
  assert parallel.all_agree(False) is False
  assert not parallel.is_lost_peer(ValueError('Gloo: connection closed'))


def test_keys_and_arrays_are_replicated_to_every_device():
  mesh = parallel.make_mesh()
  tree = {'key': jax.random.key(3), 'x': np.arange(4)}
  placed = parallel.replicate(mesh, tree)
  assert len(placed['key'].sharding.device_set) == 8
  assert len(placed['x'].sharding.device_set) == 8
  assert jax.random.bits(placed['key']) == jax.random.bits(tree['key'])
