"""Saving and restoring the training state with Orbax.

Every checkpoint holds a checksum of its state, because Orbax notices a missing
or truncated file but not a changed byte in an array. The checksum uses
integers, so it does not depend on the number of devices.
"""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import errno
import functools
import gc
import itertools
import math
import os
import re
import sys
import tempfile

from absl import logging
from etils import epath
import jax
from jax import lax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from clop_jax.runtime import files
from clop_jax.runtime import parallel
from clop_jax.training import train_state

FOLDER = 'checkpoints'  # in a workdir

# Orbax uses the path as a glob pattern and reads ':/' as the start of a remote
# path. TensorStore reads a backslash as a slash, and accepts only UTF-8.
_PATTERN = re.compile(r'[\[\]*?]')
_UNUSABLE = re.compile(r'[\[\]*?\\\ud800-\udfff]|:/')

# A missing file or one of another kind is damage. Any other error of the system
# (a permission, a disk, a network) says nothing about the content.
_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
_CODE = re.compile(r"os_error_code='(\d+)'")
_STATUS = re.compile(
  r'\b(PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED|UNAVAILABLE|'
  r'DEADLINE_EXCEEDED|ABORTED|CANCELLED):'
)


class DamagedCheckpointError(Exception):
  """No checkpoint of a folder can be restored."""


class SaveError(OSError):
  """A checkpoint could not be saved; earlier ones are intact.

  Orbax's threads may wait for minutes after a failed save. A process that does
  not want to wait for them must end by `os._exit`.
  """


class UnreadableCheckpointError(OSError):
  """The system cannot read a checkpoint, which may be intact."""


def check_directory(directory: str) -> None:
  """Raises ValueError if Orbax cannot read checkpoints in a folder."""
  wrong = _PATTERN.search(directory) if files.is_remote(directory) else None
  if wrong:
    raise ValueError(
      f'a remote --workdir must have none of [ ] * ? in its path, got '
      f'{wrong[0]!r} in {directory}; use another name'
    )


def system_error(error: BaseException) -> OSError | None:
  """Returns the system's error that made a read fail, None if it was damage.

  Orbax and TensorStore wrap such errors, some of them only as text.
  """
  waiting: list[BaseException | None] = [error]
  seen: list[BaseException] = []
  while waiting:
    one = waiting.pop()
    if one is None or one in seen:
      continue
    seen.append(one)
    waiting += [one.__context__, one.__cause__, *getattr(one, 'exceptions', ())]
    if isinstance(one, MemoryError):
      return OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    # One without a number comes from a remote file system.
    if isinstance(one, OSError) and one.errno not in _DAMAGE:
      return one
    code, status = _CODE.search(str(one)), _STATUS.search(str(one))
    if code and int(code[1]) not in _DAMAGE:
      return OSError(int(code[1]), os.strerror(int(code[1])))
    if status and not code:
      return OSError(errno.EIO, status[1])
  return None


class Checkpoints:
  """The checkpoints of one run, `directory/<step>/`, saved asynchronously."""

  def __init__(
    self,
    directory: str,
    *,
    keep: int = 3,
    best_metric: str | None = None,
    best_mode: str = 'max',
    read_only: bool = False,
  ):
    """Opens the folder, and creates it unless `read_only`.

    Args:
      directory: Path of the folder, local or remote (`gs://`, `s3://`).
      keep: Number of newest checkpoints to keep.
      best_metric: Name of a metric passed to `save`. The checkpoint with its
        best value is kept as well.
      best_mode: 'max' if a high value is better, else 'min'.
      read_only: True leaves the folder unchanged, for evaluation.

    Raises:
      ValueError: If Orbax cannot read checkpoints in such a folder.
    """
    check_directory(directory)
    self._is_remote = files.is_remote(directory)
    self._directory = (
      directory if self._is_remote else os.path.abspath(directory)
    )
    self._read_only, self._save_failed = read_only, False
    self._link = None
    self._place = self._usable()
    policies = ocp.checkpoint_managers
    preserved = [policies.LatestN(keep)]
    score = None
    if best_metric is not None:
      score = functools.partial(_score, best_metric, best_mode)
      preserved.append(policies.BestN(get_metric_fn=score, n=1))
    self._has_best = best_metric is not None
    options = ocp.CheckpointManagerOptions(
      preservation_policy=(
        None if read_only else policies.AnyPreservationPolicy(preserved)
      ),
      best_fn=score,
      create=not read_only,
      read_only=read_only,
      # Otherwise threads wait for minutes to write into a folder that could
      # not be created.
      async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )
    with _quiet():
      self._manager = ocp.CheckpointManager(
        self._place,
        options=options,
        item_handlers=ocp.StandardCheckpointHandler(),
      )

  def _usable(self):
    """Returns the path of the folder, or of a link if Orbax needs one."""
    if self._is_remote or not _UNUSABLE.search(self._directory):
      return self._directory
    if not self._read_only:
      os.makedirs(self._directory, exist_ok=True)
    self._link = tempfile.TemporaryDirectory(prefix='clop_jax_')
    link = os.path.join(self._link.name, FOLDER)
    os.symlink(self._directory, link)
    return link

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind, error, trace) -> None:
    # Closing waits for the other processes and for Orbax's threads, either of
    # which may have failed.
    if error is None or (jax.process_count() == 1 and not self._save_failed):
      self.close()

  def steps(self) -> list[int]:
    """Returns the steps with a checkpoint, oldest first."""
    if self._is_remote or not files.is_folder(self._directory):
      return sorted(self._manager.all_steps())
    # Orbax skips folders that it cannot open, so an older checkpoint would look
    # like the newest.
    return sorted(map(int, filter(str.isdigit, os.listdir(self._directory))))

  def best_step(self) -> int | None:
    """Returns the step of the best checkpoint by `best_metric`, if any."""
    return self._manager.best_step() if self._has_best else None

  def metrics(self, step: int) -> dict[str, float]:
    """Returns the metrics that a checkpoint was saved with."""
    return self._manager.metrics(step) or {}

  def save(
    self,
    state: train_state.TrainState,
    step: int,
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Starts to save; the state may be donated as soon as this returns.

    Args:
      state: Training state, the same on every process.
      step: Name of the checkpoint.
      metrics: Metrics by name, among them `best_metric`.

    Raises:
      SaveError: If this or an earlier save failed, for example on a full disk,
        or the folder was removed.
    """
    parallel.by_main(self._check_present)
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    # A field that is None is not saved, so that checkpoints from before it
    # existed look the same.
    fields = {k: v for k, v in fields.items() if v is not None}
    with self._save_errors():
      self._manager.save(
        step,
        args=ocp.args.StandardSave(
          {'state': fields, 'checksum': _checksum(fields)}
        ),
        metrics=dict(metrics) if metrics else None,
        force=True,
      )

  def _check_present(self):
    """Raises SaveError if the folder is gone; Orbax would create it again."""
    if not self._is_remote and not files.is_folder(self._directory):
      raise SaveError(
        errno.ENOENT,
        'the folder was removed while the run was using it; put it back, or '
        'train again in a new workdir',
        files.as_text(self._directory),
      )

  def wait(self) -> None:
    """Waits until all saves are on disk, or raises SaveError."""
    with self._save_errors():
      self._manager.wait_until_finished()
    parallel.by_main(self._check_present)

  def raise_failure(self) -> None:
    """Raises the SaveError of a failed save without waiting for any."""
    if not self._manager.is_saving_in_progress():
      # Not `wait`, because the processes come here at different times.
      with self._save_errors():
        self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the last save and releases the folder."""
    try:
      with self._save_errors():
        self._manager.close()
    finally:
      if self._link is not None:
        self._link.cleanup()

  @contextlib.contextmanager
  def _save_errors(self):
    """Raises the system's error, which Orbax may hide, as a SaveError."""
    try:
      yield
    except (OSError, ValueError) as error:
      number, place = getattr(error, 'errno', None), self._directory
      if isinstance(error, OSError):
        place = error.filename or place
      elif code := _CODE.search(str(error)):
        number = int(code[1])
      else:
        raise
      self._save_failed = True
      reason = os.strerror(number) if number else ' '.join(str(error).split())
      raise SaveError(
        number, f'the checkpoint cannot be saved: {reason}', place
      ) from error

  def restore(
    self, step: int, target: train_state.TrainState
  ) -> train_state.TrainState:
    """Returns the state of one step; see `restore_latest`.

    Raises:
      ValueError: If there is no such checkpoint. The error lists the others.
      DamagedCheckpointError: If it is damaged, or of another model.
      UnreadableCheckpointError: If the system cannot read it.
    """
    steps = self.steps()
    if step not in steps:
      raise ValueError(
        f'there is no checkpoint of step {step} in {self._directory}; there '
        f'are {steps}'
      )
    state, fault = self._restore(step, target)
    if fault is not None:
      raise DamagedCheckpointError(
        f'the checkpoint of step {step} in {self._directory} is damaged, or of '
        f'another version of the model ({fault}); there are {steps}'
      )
    return state

  def restore_latest(
    self,
    target: train_state.TrainState,
    *,
    warn: Callable[[str], None] = logging.warning,
  ) -> train_state.TrainState | None:
    """Returns the newest intact state, None if there is no checkpoint.

    A damaged checkpoint is reported through `warn`, and the one before it is
    tried. Unless `read_only`, damaged ones are moved to `<directory>_damaged/`
    so that training can save that step again.

    Args:
      target: Shapes, dtypes and shardings of the state, as
        `jax.ShapeDtypeStruct` leaves with `sharding`. The devices and processes
        may differ from those that saved it. Fields that are None, such as
        `opt_state` for evaluation, stay None.
      warn: Function that reports a damaged checkpoint.

    Raises:
      DamagedCheckpointError: If no checkpoint fits: all are damaged, or
        `target` is the state of another model.
      UnreadableCheckpointError: If the system cannot read one. It may be
        intact, so it stays where it is and no older one replaces it.
    """
    steps = self.steps()
    damaged = []
    for step in reversed(steps):
      state, fault = self._restore(step, target)
      if fault is None:
        self._set_aside(damaged)
        return state
      damaged.append(step)
      warn(
        f'the checkpoint of step {step} in {self._directory} is damaged '
        f'({fault}); falling back to the one before it'
      )
    if not steps:
      return None
    raise DamagedCheckpointError(
      f'all checkpoints in {self._directory} are damaged, or of another '
      f'version of the model (steps {steps}); nothing was changed. Train again '
      'in a new workdir, or put an intact copy back'
    )

  def check(self, step: int) -> str | None:
    """Returns the fault of a checkpoint, or None; needs no model."""
    # One device suffices, whatever devices saved it.
    device = jax.local_devices()[0]
    return self._read(step, jax.sharding.SingleDeviceSharding(device))[1]

  def _restore(self, step, target):
    """Returns `(state, None)` or `(None, fault)`, the same on all processes."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(target)
    arrays, fault = self._read(step, leaves[0][1].sharding)
    if fault is not None:
      return None, fault
    arrays, restored = _by_name(arrays), []
    for path, leaf in leaves:
      name = _name(path)
      restored.append(arrays.get(name))
      if getattr(restored[-1], 'shape', None) != leaf.shape:
        return None, f'{name} must have shape {list(leaf.shape)}'
    return structure.unflatten(restored), None

  def _read(self, step, sharding):
    """Returns `(state as nested dictionaries, None)` or `(None, fault)`.

    All arrays are read, whether needed or not, because the checksum covers
    them.

    Raises:
      UnreadableCheckpointError: On all processes, if the system of one of them
        cannot read it.
    """
    contents = fault = refusal = None
    with _quiet():
      try:
        wanted = jax.tree.map(
          lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
          self._manager.item_metadata(step).tree,
        )
        arguments = ocp.args.StandardRestore(wanted)
        contents = self._manager.restore(step, args=arguments)
      except Exception as error:
        # Damage surfaces as whatever the broken layer raises, even a bare
        # Exception from Orbax's array reader.
        lines = str(error).replace(self._place, self._directory).splitlines()
        fault = files.as_text(next(filter(None, lines), type(error).__name__))
        refusal = self._refusal(step) or system_error(error)
      gc.collect()  # collects unfinished coroutines while they are silenced
    if not parallel.all_agree(refusal is None):
      raise self._unreadable(step, refusal)
    if not parallel.all_agree(fault is None):
      return None, (fault or 'another process could not read it')[:200]
    if not isinstance(contents, dict) or {*contents} != {'state', 'checksum'}:
      return None, 'it is not a checkpoint of a training run'
    if int(_checksum(contents['state'])) != int(contents['checksum']):
      return None, 'its arrays do not have the checksum they were saved with'
    return contents['state'], None

  def _refusal(self, step):
    """Returns the error of the first file that the system refuses, if any.

    To Orbax, a file that it cannot open does not exist.
    """
    if self._is_remote:
      return None

    def fail(error):
      raise error

    folder = os.path.join(self._directory, str(step))
    try:
      for place, _, names in os.walk(folder, onerror=fail):
        for name in names:
          with open(os.path.join(place, name), 'rb') as file:
            file.read(1)
    except OSError as error:
      return None if error.errno in _DAMAGE else error
    return None

  def _unreadable(self, step, refusal):
    reason, place = 'another process cannot read it', self._directory
    if refusal is not None:
      reason = refusal.strerror or str(refusal) or type(refusal).__name__
      place = str(refusal.filename or os.path.join(place, str(step)))
      place = place.replace(self._place, self._directory)
    error = UnreadableCheckpointError(
      f'the checkpoint of step {step} cannot be read ({reason}: '
      f'{files.as_text(place)}); nothing was changed. Make it readable and run '
      'the same command again'
    )
    error.errno = None if refusal is None else refusal.errno
    return error

  def _set_aside(self, steps):
    """Moves damaged checkpoints to a folder beside this one."""
    if self._read_only or not steps:
      return
    if parallel.is_main():
      aside = epath.Path(f'{self._directory}_damaged')
      aside.mkdir(parents=True, exist_ok=True)
      for step in steps:
        names = (f'{step}.{n}' if n else f'{step}' for n in itertools.count())
        place = next(x for x in map(aside.joinpath, names) if not x.exists())
        (epath.Path(self._directory) / str(step)).rename(place)
    parallel.all_agree(True)  # the other processes must look only afterwards
    self._manager.reload()


def _score(name, mode, metrics):
  """Returns a metric so that more is better; a missing one is the worst."""
  value = metrics.get(name, math.nan)
  if math.isnan(value):
    return -math.inf
  return value if mode == 'max' else -value


@dataclasses.dataclass(frozen=True)
class Found:
  """A checkpoint of a workdir.

  Attributes:
    step: Step of the checkpoint.
    fault: Description of the damage, None if it is intact.
    metrics: Metrics by name that it was saved with.
  """

  step: int
  fault: str | None
  metrics: dict[str, float]


def verify(workdir: str) -> list[Found]:
  """Returns the checkpoints of a workdir, oldest first, and their faults.

  Every array is read and compared with the checksum of its checkpoint. Nothing
  is changed. One process and one device suffice.

  Raises:
    ValueError: If the workdir has no folder of checkpoints.
    UnreadableCheckpointError: If the system cannot read a checkpoint.
  """
  directory = os.path.join(workdir, FOLDER)
  if not files.is_folder(directory):
    raise ValueError(f'workdir={workdir} has no folder {FOLDER}')
  with Checkpoints(directory, read_only=True) as checkpoints:
    found = []
    for step in checkpoints.steps():
      fault = checkpoints.check(step)
      metrics = checkpoints.metrics(step) if fault is None else {}
      found.append(Found(step, fault, metrics))
    return found


@contextlib.contextmanager
def _quiet():
  """Silences the unfinished coroutines and threads of a failed read.

  Their hundred lines would bury the failure itself, which is raised.
  """
  hook = sys.unraisablehook
  sys.unraisablehook = lambda _: None
  try:
    yield
  finally:
    sys.unraisablehook = hook


def _name(path):
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _by_name(tree):
  """Returns the leaves of a tree by name.

  Unlike paths, names are the same for a tree that is read without a model.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {_name(path): leaf for path, leaf in leaves}


@jax.jit
def _checksum(tree) -> jax.Array:
  """Returns a uint32 that changes with any single changed entry of a tree."""
  total = jnp.zeros((), jnp.uint32)
  for _, leaf in sorted(_by_name(tree).items()):
    bits = _bits(leaf).ravel()
    # Each entry goes through a permutation of the 32-bit numbers that depends
    # on its place, so no single change can vanish, and several cancel only by
    # chance (a plain weighted sum would miss an even number of sign flips).
    x = bits + lax.iota(jnp.uint32, bits.size) * jnp.uint32(0x9E3779B9)
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    x = x ^ (x >> 16)
    total = total * jnp.uint32(1000003) + jnp.sum(x)
  return total


def _bits(x):
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint32)
  width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
  return lax.bitcast_convert_type(x, width).astype(jnp.uint32)
