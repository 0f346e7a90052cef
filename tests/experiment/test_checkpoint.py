import contextlib
import errno
import gc
import importlib
import os
import pathlib
import resource
import shutil
import time
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clop_jax import train
from clop_jax.experiment import checkpoint
from clop_jax.runtime import parallel
from clop_jax.training import train_state


def make_state(step, mesh):
  state = train_state.TrainState(
    step=jnp.int32(step),
    params={'w': jnp.arange(5000.0).reshape(50, 100) + step},
    batch_stats={'mean': jnp.full(7, 0.5 * step)},
    opt_state=({'trace': jnp.full((50, 100), 2.0 * step)}, jnp.int32(step)),
    prototypes=jnp.eye(4) * step,
  )
  return parallel.replicate(mesh, state)


def target_of(state, mesh):
  sharding = parallel.replicated(mesh)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state
  )


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


# Orbax leaves coroutines behind when a read or a save fails. A command ends
# before they are collected.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)


@pytest.fixture(autouse=True)
def collected():
  yield
  gc.collect()  # here, where their complaints are ignored


@pytest.fixture
def mesh():
  return parallel.make_mesh(jax.devices()[:1])


@pytest.fixture
def folder(tmp_path, mesh):
  """Checkpoints of steps 1, 2 and 3."""
  path = tmp_path / 'checkpoints'
  with checkpoint.Checkpoints(str(path)) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(make_state(step, mesh), step)
  return path


def restore(path, mesh, **kwargs):
  warnings = []
  target = target_of(make_state(0, mesh), mesh)
  with checkpoint.Checkpoints(str(path), **kwargs) as checkpoints:
    return checkpoints.restore_latest(target, warn=warnings.append), warnings


def test_newest_state_is_restored_completely(folder, mesh):
  state, warnings = restore(folder, mesh)
  assert_equal(state, make_state(3, mesh))
  assert not warnings


@flax.struct.dataclass
class LaterState(train_state.TrainState):
  """State of a later version."""

  added: Any = None


def test_new_optional_field_reads_older_checkpoints(folder, mesh):
  before = target_of(make_state(0, mesh), mesh)
  target = LaterState(**vars(before))
  with checkpoint.Checkpoints(str(folder)) as checkpoints:
    state = checkpoints.restore(3, target)
  assert isinstance(state, LaterState) and state.added is None
  assert_equal(
    train_state.TrainState(
      **{k: v for k, v in vars(state).items() if k != 'added'}
    ),
    make_state(3, mesh),
  )


def test_only_the_newest_checkpoints_are_kept(tmp_path, mesh):
  assert restore(tmp_path, mesh) == (None, [])
  with checkpoint.Checkpoints(str(tmp_path), keep=2) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(make_state(step, mesh), step)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3]


def data_files(step_folder):
  """The files of a checkpoint that its arrays are read from, largest first."""
  files = [p for p in pathlib.Path(step_folder).rglob('*') if p.is_file()]
  return sorted(files, key=lambda p: p.stat().st_size, reverse=True)


def truncate(file):
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file):
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 0x10
  file.write_bytes(bytes(content))


@pytest.mark.parametrize(
  ('harm', 'read_only'),
  [
    (truncate, False),
    (flip_a_bit, False),
    (flip_a_bit, True),
    (pathlib.Path.unlink, False),
  ],
)
def test_damaged_newest_checkpoint_falls_back_with_a_warning(
  folder, mesh, harm, read_only, capfd
):
  harm(data_files(folder / '3')[0])
  state, warnings = restore(folder, mesh, read_only=read_only)
  assert_equal(state, make_state(2, mesh))
  assert len(warnings) == 1
  assert 'step 3' in warnings[0] and 'damaged' in warnings[0]
  assert 'Traceback' not in capfd.readouterr().err
  aside = pathlib.Path(f'{folder}_damaged') / '3'
  assert aside.exists() is not read_only
  assert (folder / '3').exists() is read_only
  if not read_only:  # the step can be saved again
    with checkpoint.Checkpoints(str(folder)) as checkpoints:
      checkpoints.save(make_state(3, mesh), 3)
    assert_equal(restore(folder, mesh)[0], make_state(3, mesh))


def test_half_written_checkpoint_is_ignored(folder, mesh):
  shutil.copytree(folder / '3', folder / '4.orbax-checkpoint-tmp')
  state, warnings = restore(folder, mesh)
  assert_equal(state, make_state(3, mesh))
  assert not warnings


# Errors of TensorStore.
_TEXTS = [
  ("PERMISSION_DENIED: Error opening \"zarr\" driver: Error reading local file "
   "\"/a/manifest.ocdbt\" [os_error_code='13']", errno.EACCES),
  ("ABORTED: Error reading local file \"/a/b\" [os_error_code='116']",
   errno.ESTALE),
  ("UNKNOWN: Error reading local file \"/a/b\" [os_error_code='5']", errno.EIO),
  ('UNAVAILABLE: Error reading "gs://b/x": HTTP 503', errno.EIO),
  ('RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes', errno.EIO),
  ("NOT_FOUND: \"/a\" does not exist [os_error_code='2']", None),
  ('NOT_FOUND: "/runs/ABORTED/1" does not exist', None),
  ('DATA_LOSS: Error decoding "zarr" chunk: truncated', None),
]  # fmt: skip


@pytest.mark.parametrize(
  ('error', 'number'),
  [
    *[(ValueError(text), number) for text, number in _TEXTS],
    (OSError(errno.EIO, 'x'), errno.EIO),
    (OSError(errno.EMFILE, 'x'), errno.EMFILE),
    (OSError(errno.ENOENT, 'x'), None),
    (OSError(errno.ENOTDIR, 'x'), None),
    (MemoryError(), errno.ENOMEM),
    (KeyError('state'), None),
    (ValueError('MemoryError is a word in a damaged file'), None),
  ],
)
def test_system_errors_are_distinguished_from_damage(error, number):
  wrapped = ValueError('outer')
  wrapped.__cause__ = ExceptionGroup('several', [KeyError('x'), error])
  for one in (error, wrapped):
    found = checkpoint.system_error(one)
    assert (found and found.errno) == number


def test_an_error_of_a_remote_file_system_is_not_damage(
  folder, mesh, monkeypatch
):
  def forbidden(*arguments, **keywords):
    raise OSError('Forbidden')  # without a number, as those of gcsfs

  with checkpoint.Checkpoints(str(folder)) as checkpoints:
    monkeypatch.setattr(checkpoints._manager, 'restore', forbidden)
    with pytest.raises(
      checkpoint.UnreadableCheckpointError, match=r'step 3 .*Forbidden'
    ):
      target = target_of(make_state(0, mesh), mesh)
      checkpoints.restore_latest(target, warn=print)
  assert sorted(os.listdir(folder)) == ['1', '2', '3']


# A step, a file that Orbax looks for, and one that TensorStore reads.
@pytest.mark.parametrize(
  ('fault', 'name'),
  [
    ('permission', '3'),
    ('permission', '3/default/manifest.ocdbt'),
    ('loop', '3/default/_METADATA'),
  ],
)
def test_unreadable_checkpoint_is_an_error_and_stays(fault, name, folder, mesh):
  path = folder / name
  with contextlib.ExitStack() as stack:
    if fault == 'permission':
      importlib.import_module('grp')  # etils imports it, without privileges
      path.chmod(0)
      stack.enter_context(_without_privileges(path))
    else:
      path.rename(folder.parent / 'kept')
      path.symlink_to(path)
    with pytest.raises(
      checkpoint.UnreadableCheckpointError,
      match=rf'step 3 .*(denied|levels).*{name}',
    ):
      restore(folder, mesh)
  assert not pathlib.Path(f'{folder}_damaged').exists()
  assert sorted(os.listdir(folder)) == ['1', '2', '3']


@contextlib.contextmanager
def _without_privileges(path):
  """Acts as a user who is not root, but can reach the path."""
  with contextlib.ExitStack() as stack:
    if os.geteuid() == 0:
      for above in path.parents:
        if 'pytest' in str(above):
          stack.callback(above.chmod, above.stat().st_mode)
          above.chmod(0o777)
      os.seteuid(65534)
      stack.callback(os.seteuid, 0)
    yield


@pytest.mark.parametrize('name', ['run[1]', 'x\\y', 'l\udcff', 'gs:/y'])
def test_local_folder_may_have_any_name(name, tmp_path, mesh):
  folder = os.path.join(tmp_path, name, 'checkpoints')
  with checkpoint.Checkpoints(folder) as checkpoints:
    checkpoints.save(make_state(1, mesh), 1)
    link = pathlib.Path(checkpoints._place)
    assert link.is_symlink()
  assert os.listdir(folder) == ['1'] and not link.parent.exists()
  if name == 'run[1]':
    state, warnings = restore(folder, mesh, read_only=True)
    assert_equal(state, make_state(1, mesh))
    assert not warnings


def test_removed_folder_is_an_error_and_is_not_recreated(folder, mesh):
  with checkpoint.Checkpoints(str(folder)) as checkpoints:
    shutil.rmtree(folder)
    with pytest.raises(OSError, match=rf'was removed .*{folder}'):
      checkpoints.save(make_state(4, mesh), 4)
  assert not folder.exists()


def test_only_damaged_checkpoints_are_an_error_and_stay(folder, mesh):
  for step in (1, 2, 3):
    for file in data_files(folder / str(step))[:1]:
      truncate(file)
  with pytest.raises(
    checkpoint.DamagedCheckpointError,
    match=r'all checkpoints.*\[1, 2, 3\]\); nothing',
  ):
    restore(folder, mesh)
  assert sorted(os.listdir(folder)) == ['1', '2', '3']


def test_checksum_depends_on_every_entry_and_their_order():
  tree = {'a': jnp.arange(6.0), 'b': jnp.array([1, 2], jnp.int32)}
  sums = {int(checkpoint._checksum(tree))}
  for i in range(6):
    changed = tree | {'a': tree['a'].at[i].add(1e-6 + i * 1e-6)}
    sums.add(int(checkpoint._checksum(changed)))
  sums.add(int(checkpoint._checksum(tree | {'b': tree['b'][::-1]})))
  sums.add(int(checkpoint._checksum(tree | {'a': -tree['a']})))
  assert len(sums) == 9


def save_all(path, mesh, metrics, **options):
  with checkpoint.Checkpoints(str(path), **options) as checkpoints:
    for step, values in enumerate(metrics, 1):
      checkpoints.save(make_state(step, mesh), step, values)
    checkpoints.wait()
    return checkpoints.steps(), checkpoints.best_step()


@pytest.mark.parametrize(
  ('mode', 'best'),
  [('max', 2), ('min', 3)],
)
def test_best_and_newest_are_kept(mode, best, tmp_path, mesh):
  accuracies = [0.5, 0.9, 0.1, 0.4, 0.6]
  metrics = [{'accuracy': value, 'loss': 1.0} for value in accuracies]
  options = {'keep': 1, 'best_metric': 'accuracy', 'best_mode': mode}
  assert save_all(tmp_path, mesh, metrics, **options) == ([best, 5], best)
  # It is still known when the folder is opened again.
  target = target_of(make_state(0, mesh), mesh)
  with checkpoint.Checkpoints(
    str(tmp_path), read_only=True, **options
  ) as checkpoints:
    assert checkpoints.best_step() == best
    assert_equal(checkpoints.restore(best, target), make_state(best, mesh))
    with pytest.raises(ValueError, match=r'no checkpoint of step 4 .*5\]'):
      checkpoints.restore(4, target)


def test_missing_or_nan_metric_is_never_the_best(tmp_path, mesh):
  metrics = [{}, {'loss': 2.0}, {'loss': float('nan')}, None, {'loss': 3.0}]
  steps, best = save_all(
    tmp_path, mesh, metrics, keep=5, best_metric='loss', best_mode='min'
  )
  assert (steps, best) == ([1, 2, 3, 4, 5], 2)


@contextlib.contextmanager
def folder_is_gone(path):
  path.rename(f'{path}.before')
  path.write_text('')
  yield


@contextlib.contextmanager
def large_files_are_refused(path):
  del path
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
  ('harm', 'seen_by'),
  [
    (folder_is_gone, 'the log'),
    (large_files_are_refused, 'the log'),
    (large_files_are_refused, 'a diverged loss'),
  ],
)
def test_failed_save_is_raised_before_the_next_one(
  harm, seen_by, tmp_path, mesh
):
  path = tmp_path / 'checkpoints'
  began = time.monotonic()
  with (
    pytest.raises(checkpoint.SaveError, match=str(path)),
    checkpoint.Checkpoints(str(path)) as checkpoints,
  ):
    checkpoints.save(make_state(1, mesh), 1)
    checkpoints.wait()
    with harm(path):
      checkpoints.save(make_state(2, mesh), 2)
      if seen_by == 'a diverged loss':
        with pytest.raises(FloatingPointError) as diverged:
          train.check_finite([np.array([np.nan])], 3, checkpoints)
        raise diverged.value.__cause__
      while time.monotonic() - began < 30:
        checkpoints.raise_failure()
        time.sleep(0.01)
  assert time.monotonic() - began < 30


def test_verify_returns_metrics_and_faults(tmp_path, mesh):
  folder = tmp_path / 'checkpoints'
  metrics = [{'loss': 3.0}, {'loss': 2.0}, {'loss': 1.0}]
  save_all(folder, mesh, metrics, keep=3, best_metric='loss')
  found = checkpoint.verify(str(tmp_path))
  assert [entry.step for entry in found] == [1, 2, 3]
  assert [entry.fault for entry in found] == [None] * 3
  assert [entry.metrics for entry in found] == metrics
  flip_a_bit(data_files(folder / '2')[0])
  truncate(data_files(folder / '3')[0])
  before = sorted(os.listdir(folder))
  first, second, third = checkpoint.verify(str(tmp_path))
  assert first.fault is None
  assert second.fault is not None and third.fault is not None
  assert sorted(os.listdir(folder)) == before
  with pytest.raises(ValueError, match='has no folder checkpoints'):
    checkpoint.verify(str(folder))


@pytest.mark.parametrize(('before', 'after'), [(1, 8), (8, 2)])
def test_state_is_restored_and_verified_on_other_devices(
  before, after, tmp_path
):
  mesh = parallel.make_mesh(jax.devices()[:before])
  save_all(tmp_path / 'checkpoints', mesh, [None])
  (found,) = checkpoint.verify(str(tmp_path))  # on one device
  assert found.fault is None
  mesh = parallel.make_mesh(jax.devices()[:after])
  state, warnings = restore(tmp_path / 'checkpoints', mesh)
  assert not warnings
  assert_equal(state, make_state(1, mesh))
  assert state.params['w'].sharding == parallel.replicated(mesh)


def test_remote_path_is_given_to_orbax_unchanged(monkeypatch):
  seen = []

  def manager(directory, **_):
    seen.append(directory)

  monkeypatch.setattr(checkpoint.ocp, 'CheckpointManager', manager)
  checkpoint.Checkpoints('gs://bucket/run/checkpoints')
  checkpoint.Checkpoints('runs/a')
  assert seen == ['gs://bucket/run/checkpoints', os.path.abspath('runs/a')]
  with pytest.raises(ValueError, match=r'--workdir .*s3://bucket/run\[1\]'):
    checkpoint.Checkpoints('s3://bucket/run[1]')
