"""How processes find each other, without any others to find."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from clop_jax import parallel
from tests import small

SLURM = {
  'SLURM_NTASKS': '4',
  'SLURM_STEP_NUM_NODES': '4',
  'SLURM_GPUS_ON_NODE': '8',
}


@pytest.fixture
def calls(monkeypatch):
  """What JAX is asked to join."""
  for name in SLURM:
    monkeypatch.delenv(name, raising=False)
  seen = []
  monkeypatch.setattr(
    jax.distributed,
    'initialize',
    lambda *arguments, **options: seen.append((arguments, options)),
  )
  return seen


def test_explicit_processes_are_joined_as_they_are_named(calls):
  parallel.start('host:1234', 4, 2, peer_timeout_seconds=7)
  ((arguments, options),) = calls
  assert arguments == ('host:1234', 4, 2)
  assert options['cluster_detection_method'] == 'deactivate'
  assert options['heartbeat_timeout_seconds'] == 7
  assert options['shutdown_timeout_seconds'] == 7


def test_one_process_has_nobody_to_join(calls, monkeypatch):
  parallel.start('host:1234', 1, 0)
  monkeypatch.setenv('SLURM_NTASKS', '1')
  parallel.start()
  assert not calls


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((None, 2, 0), 'got no --coordinator_address; give all three'),
    (('host:1', None, None), 'got no --num_processes and no --process_id'),
    (('host:1', 2, 2), r'--process_id must be in \[0, --num_processes=2\)'),
    (('host:1', 2, -1), 'got -1'),
  ],
)
def test_half_a_description_is_refused(arguments, message, calls):
  with pytest.raises(ValueError, match=message):
    parallel.start(*arguments)
  assert not calls


def test_a_slurm_task_has_all_devices_of_a_node_that_it_has_alone(
  calls, monkeypatch
):
  for name, value in SLURM.items():
    monkeypatch.setenv(name, value)
  parallel.start()
  # Two tasks a node share its devices as JAX has it.
  monkeypatch.setenv('SLURM_STEP_NUM_NODES', '2')
  parallel.start()
  devices = [options['local_device_ids'] for _, options in calls]
  assert devices == [list(range(8)), None]


def test_no_cluster_is_no_error():
  # In a process of its own: JAX joins nobody once it has looked for devices.
  names = {k: v for k, v in os.environ.items() if not k.startswith('SLURM')}
  code = (
    'import jax\n'
    'from clop_jax import parallel\n'
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


def test_a_cluster_that_is_half_there_is_an_error(calls, monkeypatch):
  def broken(**options):
    raise ValueError('Number of processes must be defined.')

  monkeypatch.setattr(jax.distributed, 'initialize', broken)
  with pytest.raises(ValueError, match='Number of processes'):
    parallel.start()


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
