"""Saving and restoring the training state with Orbax.

Every checkpoint holds a checksum of its state. Orbax notices a missing or
shortened file, but not a changed byte in an array. The checksum uses integers,
so it is the same on any number of devices.
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

FOLDER = 'checkpoints'  # of a workdir

MODES = ('max', 'min')

# Orbax uses the path as a glob pattern and takes ':/' for the start of a remote
# path. TensorStore takes a backslash for a slash, and accepts only UTF-8.
_PATTERN = re.compile(r'[\[\]*?]')
_UNUSABLE = re.compile(r'[\[\]*?\\\ud800-\udfff]|:/')

# Errors that mean damage: a file is missing or of another kind. Any other error
# (a permission, a disk, a network) says nothing about the content.
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
_CODE = re.compile(r"os_error_code='(\d+)'")
_STATUS = re.compile(
  r'\b(PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED|UNAVAILABLE|'
  r'DEADLINE_EXCEEDED|ABORTED|CANCELLED):'
)
_WRONG_CHECKSUM = 'its arrays do not have the checksum they were saved with'


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
  """Returns the system's error behind an error of a read.

  Orbax and TensorStore wrap such errors in others, some of them only as text.

  Args:
    error: Error of a read.

  Returns:
    The system's error, or None if data are damaged or missing.
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
    """Opens the folder and creates it unless `read_only`.

    Args:
      directory: Path of the folder, local or remote (`gs://`, `s3://`).
      keep: Number of newest checkpoints to keep.
      best_metric: Name of a metric passed to `save`. The checkpoint with its
        best value is kept as well.
      best_mode: 'max' if a high value is better, else 'min'.
      read_only: True leaves the folder unchanged, for evaluation.

    Raises:
      ValueError: If `keep` is below 1, `best_mode` is unknown, or Orbax cannot
        read checkpoints in such a folder.
    """
    check_directory(directory)
    if keep < 1:
      raise ValueError(f'keep must be at least 1, got {keep}')
    if best_mode not in MODES:
      raise ValueError(
        f'best_mode must be one of {list(MODES)}, got {best_mode!r}'
      )
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
      self._manager = ocp.CheckpointManager(self._place, options=options)

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
    # Closing waits for the other processes and for Orbax's threads, which may
    # be what failed.
    if error is None or (jax.process_count() == 1 and not self._save_failed):
      self.close()

  def steps(self) -> list[int]:
    """Returns the steps with a checkpoint, oldest first."""
    if self._is_remote or not files.is_folder(self._directory):
      return sorted(self._manager.all_steps())
    # Orbax leaves out a folder that it cannot look at, as if an older one were
    # the newest.
    return sorted(map(int, filter(str.isdigit, os.listdir(self._directory))))

  def best_step(self) -> int | None:
    """Returns the step of the best checkpoint by `best_metric`, if any."""
    return self._manager.best_step() if self._has_best else None

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
      SaveError: If this or an earlier save failed, on a full disk for example,
        or the folder was removed.
    """
    parallel.by_main(self._check_present)
    checkpoint = {'state': _fields(state), 'checksum': _checksum(state)}
    with self._save_errors():
      self._manager.save(
        step,
        args=ocp.args.StandardSave(checkpoint),
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
    """Waits until everything passed to `save` is on disk.

    Raises:
      SaveError: If it cannot be written, or the folder was removed.
    """
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
    """Returns the state of one step.

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
    """Returns the newest intact state.

    A damaged checkpoint is reported through `warn` and the one before it is
    tried. Unless `read_only`, damaged ones are moved to `<directory>_damaged/`
    so that training can save that step again.

    Args:
      target: Shapes, dtypes and shardings of the state, as
        `jax.ShapeDtypeStruct` leaves with `sharding`. The devices and processes
        need not be those that saved it. If its `opt_state` is None, so is that
        of the result; further fields may be None, too.
      warn: Function that reports a damaged checkpoint.

    Returns:
      The state, or None if there is no checkpoint.

    Raises:
      DamagedCheckpointError: If no checkpoint fits: all are damaged, or
        `target` is the state of another model.
      UnreadableCheckpointError: If the system cannot read one. It may be
        intact, so it stays where it is and no older one takes its place.
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

  def _restore(self, step, target):
    """Returns `(state, None)` or `(None, fault)`, the same on all processes."""
    scalar = jax.tree.leaves(target)[0].sharding
    fields = _fields(target)
    wanted = {
      'state': fields,
      'checksum': jax.ShapeDtypeStruct((), jnp.uint32, sharding=scalar),
    }
    fault = None
    if target.opt_state is None:
      # Evaluation does not know the optimizer, but the checksum includes it.
      wanted, fault = self._guarded(step, lambda: self._saved(step, scalar))
    if parallel.all_agree(fault is None):
      arguments = ocp.args.StandardRestore(wanted)
      restored, fault = self._read(step, arguments)
    if not parallel.all_agree(fault is None):
      return None, fault or 'another process could not read it'
    fault = _fault(restored)
    if fault is not None:
      return None, fault
    try:
      state = _selected(restored['state'], fields)
    except ValueError as error:
      return None, str(error)
    return dataclasses.replace(target, **state), None

  def _saved(self, step, sharding):
    """Returns the shapes and dtypes of all arrays of a checkpoint."""
    # The manager knows no metadata before it has restored something.
    folder = epath.Path(self._place) / str(step) / 'default'
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      ocp.StandardCheckpointHandler().metadata(folder).tree,
    )

  def _read(self, step, arguments):
    """Returns the contents of a checkpoint; see `_guarded`."""
    return self._guarded(
      step, lambda: self._manager.restore(step, args=arguments)
    )

  def _guarded(self, step, work):
    """Returns `(work(), None)` or `(None, fault)`.

    Raises:
      UnreadableCheckpointError: On all processes, if the system of one of them
        cannot read it.
    """
    restored = fault = refusal = None
    with _quiet():
      try:
        restored = work()
      except Exception as error:
        # Damage surfaces as whatever the broken layer raises, even a bare
        # Exception from Orbax's array reader.
        lines = str(error).replace(self._place, self._directory).splitlines()
        fault = files.as_text(next(filter(None, lines), type(error).__name__))
        fault = fault[:200]
        refusal = self._refusal(step) or system_error(error)
      gc.collect()  # collects unfinished coroutines while they are silenced
    if not parallel.all_agree(refusal is None):
      raise self._unreadable(step, refusal)
    return restored, fault

  def _refusal(self, step):
    """Returns the error of the first file that the system refuses, if any.

    Orbax takes a file that it cannot look at for one that does not exist.
    """
    if self._is_remote:
      return None
    try:
      for folder, _, names in os.walk(
        os.path.join(self._directory, str(step)), onerror=_raise
      ):
        for name in names:
          with open(os.path.join(folder, name), 'rb') as file:
            file.read(1)
    except OSError as error:
      return system_error(error)
    return None

  def _unreadable(self, step, refusal):
    reason, place = 'another process cannot read it', self._directory
    if refusal is not None:
      reason = refusal.strerror or str(refusal) or type(refusal).__name__
      place = str(refusal.filename or os.path.join(place, str(step)))
    error = UnreadableCheckpointError(
      f'the checkpoint of step {step} cannot be read ({reason}: '
      f'{files.as_text(place.replace(self._place, self._directory))}); nothing '
      'was changed. Make it readable and run the same command again'
    )
    error.errno = None if refusal is None else refusal.errno
    return error

  def check(self, step: int) -> str | None:
    """Returns the fault of a checkpoint, or None; needs no model."""
    # On this host, so that one device can check what many have saved.
    restored, fault = self._read(
      step, ocp.args.StandardRestore(fallback_sharding=_here())
    )
    return _fault(restored) if fault is None else fault

  def metrics(self, step: int) -> dict[str, float]:
    """Returns the metrics that a checkpoint was saved with."""
    return self._manager.metrics(step) or {}

  def _set_aside(self, steps):
    """Moves damaged checkpoints to a folder beside this one."""
    if self._read_only or not steps:
      return
    if parallel.is_main():
      aside = epath.Path(f'{self._directory}_damaged')
      aside.mkdir(parents=True, exist_ok=True)
      for step in steps:
        names = itertools.chain(
          [f'{step}'], (f'{step}.{n}' for n in itertools.count(2))
        )
        place = next(x for x in map(aside.joinpath, names) if not x.exists())
        (epath.Path(self._directory) / str(step)).rename(place)
    parallel.all_agree(True)  # the other processes must look only afterwards
    self._manager.reload()


def _raise(error):
  raise error


def _fault(restored):
  """Returns what is wrong with the contents of a checkpoint, or None."""
  if not isinstance(restored, dict) or {*restored} != {'state', 'checksum'}:
    return 'it is not a checkpoint of a training run'
  if int(_checksum(restored['state'])) != int(restored['checksum']):
    return _WRONG_CHECKSUM
  return None


def _score(name, mode, metrics):
  """Returns a metric such that more is better; a missing one is the worst."""
  value = metrics.get(name, math.nan)
  if math.isnan(value):
    return -math.inf
  return value if mode == 'max' else -value


def _here():
  return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


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

  The failure itself is raised, and their hundred lines would bury it.
  """
  hook = sys.unraisablehook
  sys.unraisablehook = lambda _: None
  try:
    yield
  finally:
    sys.unraisablehook = hook


def _fields(state):
  """Returns the fields of a state that are not None.

  Orbax distinguishes a missing field from one that is None, so checkpoints from
  before a field existed could not be read.
  """
  fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
  return {name: value for name, value in fields.items() if value is not None}


def _selected(state, fields):
  """Returns the arrays of a restored state that belong to some fields."""
  leaves, structure = jax.tree_util.tree_flatten_with_path(fields)
  saved = dict(jax.tree_util.tree_leaves_with_path(state))
  for path, leaf in leaves:
    if path not in saved or saved[path].shape != leaf.shape:
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      raise ValueError(f'{name} must have shape {list(leaf.shape)}')
  return structure.unflatten([saved[path] for path, _ in leaves])


@jax.jit
def _checksum(tree) -> jax.Array:
  """Returns a uint32 that changes with any single changed entry of a tree."""
  total = jnp.zeros((), jnp.uint32)
  # By name, because a tree that is read without a model is nested differently.
  named = {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  for _, leaf in sorted(named.items()):
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
