"""Saving and restoring the full training state with Orbax.

Each checkpoint carries a checksum of its state, made on the devices with
integer arithmetic. Orbax itself notices a missing or shortened file but not a
changed byte in an array; and exact integers are the same on any number of
devices.
"""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import errno
import functools
import gc
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

# Orbax finds files of a checkpoint by a pattern that the folder's path is in.
_PATTERN = re.compile(r'[\[\]*?]')
# TensorStore takes a backslash for a slash and only UTF-8, and Orbax takes ':/'
# for the start of a remote path.
_UNUSABLE = re.compile(r'[\[\]*?\\\ud800-\udfff]|:/')

# What the system says of a file that is missing or another kind of file.
# Anything else (a permission, a disk, a network) tells nothing of its content.
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
# The same among the statuses of TensorStore, with what they mean.
_STATUSES = {
  'PERMISSION_DENIED': errno.EACCES,
  'UNAUTHENTICATED': errno.EACCES,
  'RESOURCE_EXHAUSTED': errno.ENOMEM,
  'UNAVAILABLE': errno.EIO,
  'DEADLINE_EXCEEDED': errno.ETIMEDOUT,
  'ABORTED': errno.EIO,
  'CANCELLED': errno.EIO,
}


class DamagedCheckpointError(Exception):
  """No checkpoint of a folder can be restored."""


class SaveError(OSError):
  """A checkpoint could not be saved; those before it are intact.

  Threads of Orbax may wait for minutes for one that failed, and the process for
  them where it does not end by `os._exit`.
  """


class UnreadableCheckpointError(OSError):
  """A checkpoint may be intact, but the system cannot read it now."""


def check_directory(directory: str) -> None:
  """Raises ValueError if Orbax could not read checkpoints in a folder."""
  temporary = tempfile.gettempdir()
  if _needs_link(directory) and _UNUSABLE.search(temporary):
    raise ValueError(
      f'--workdir={files.as_text(directory)} needs a link in the folder for '
      r'temporary files, whose own path must have none of [ ] * ? \, got '
      f'{temporary!r}; set TMPDIR to another folder'
    )
  wrong = _PATTERN.search(directory) if files.is_remote(directory) else None
  if wrong:
    raise ValueError(
      f'a remote --workdir must have none of [ ] * ? in its path, got '
      f'{wrong[0]!r} in {directory}; use another name'
    )


def _needs_link(directory):
  path = os.path.abspath(directory)
  return not files.is_remote(directory) and bool(_UNUSABLE.search(path))


def system_error(error: BaseException) -> OSError | None:
  """Returns what the system refused, if an error comes from that.

  Orbax and TensorStore wrap such errors in others, some of them only as text.

  Args:
    error: Error of a read.

  Returns:
    The system's error, or None if the error says that data are damaged or
    missing.
  """
  for one in _chain(error):
    if isinstance(one, MemoryError):
      return OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    if isinstance(one, OSError) and one.errno not in _DAMAGE:
      return one
    found = _in_text(str(one))
    if found is not None:
      return found
  return None


def _chain(error):
  """The error, and those that it comes from."""
  waiting = [error]
  seen = set()
  while waiting:
    one = waiting.pop()
    if one is None or id(one) in seen:
      continue
    seen.add(id(one))
    yield one
    waiting += [one.__context__, one.__cause__, *getattr(one, 'exceptions', ())]


def _in_text(text):
  """The system's error in a message of TensorStore."""
  code = re.search(r"os_error_code='(\d+)'", text)
  status = re.search(rf'\b({"|".join(_STATUSES)}):', text)
  if code:
    number = int(code[1])
    if number in _DAMAGE:
      return None
    reason = os.strerror(number)
  elif status:
    number, reason = _STATUSES[status[1]], status[1]
  else:
    return None
  names = re.findall(
    r'(?:local file|opening file:?|GCS object) "([^"]+)"', text
  )
  return OSError(number, reason, names[-1] if names else None)


@contextlib.contextmanager
def _without_warnings():
  """Without what Orbax warns of a folder that is to be read only."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)


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
    """Opens the folder; creates it unless `read_only`.

    Args:
      directory: absolute or relative path, or a remote one (`gs://`, `s3://`),
        which goes to Orbax as it is.
      keep: how many of the newest checkpoints stay.
      best_metric: of the metrics that `save` is given; the checkpoint that is
        the best by it stays as well. None: none does.
      best_mode: 'max' or 'min', which is better.
      read_only: for evaluation: nothing in the folder is changed.

    Raises:
      ValueError: if `keep` is below 1, `best_mode` is unknown, or Orbax could
        not read checkpoints in such a folder.
    """
    check_directory(directory)
    if keep < 1:
      raise ValueError(f'keep must be at least 1, got {keep}')
    if best_mode not in MODES:
      raise ValueError(
        f'best_mode must be one of {list(MODES)}, got {best_mode!r}'
      )
    is_remote = files.is_remote(directory)
    self._directory = directory if is_remote else os.path.abspath(directory)
    self._read_only = read_only
    self._save_failed = self._opened = False
    self._link = None
    policies = ocp.checkpoint_managers
    preserved = [policies.LatestN(keep)]
    score = None
    if best_metric is not None:
      score = functools.partial(_score, best_metric, best_mode)
      preserved.append(policies.BestN(get_metric_fn=score, n=1))
    self._has_best = best_metric is not None
    with _without_warnings() if read_only else contextlib.nullcontext():
      self._options = ocp.CheckpointManagerOptions(
        preservation_policy=(
          None if read_only else policies.AnyPreservationPolicy(preserved)
        ),
        best_fn=score,
        create=not read_only,
        read_only=read_only,
        # Otherwise threads that are to write into a folder wait minutes for one
        # that could not be made.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
      )
      self._place = self._usable()
      self._manager = self._open()
    self._folder = None
    if not read_only and not is_remote and files.is_folder(self._directory):
      # As long as it is open, no other folder can get its number.
      self._folder = os.open(self._directory, os.O_RDONLY)

  def _open(self):
    """A manager of the folder.

    Raises:
      OSError: If the system refuses it.
    """
    with _quiet():
      try:
        return ocp.CheckpointManager(self._place, options=self._options)
      except Exception as error:
        refusal = system_error(error)
        if refusal is None:
          raise
        failure = OSError(
          f'{files.as_text(self._directory)} cannot be opened '
          f'({self._brief(refusal)})'
        )
        failure.errno = refusal.errno
        raise failure from error

  def _usable(self):
    """The folder's path, or a link to it if Orbax cannot use the path."""
    if not _needs_link(self._directory):
      return self._directory
    if not self._read_only:
      os.makedirs(self._directory, exist_ok=True)
    self._link = tempfile.TemporaryDirectory(prefix='clop_jax_')
    link = os.path.join(self._link.name, FOLDER)
    os.symlink(self._directory, link)
    return link

  def _check_present(self):
    """Raises SaveError if the folder was removed since it was opened.

    Orbax would make it again, in a workdir without anything else in it.
    """
    if self._folder is None:
      return
    is_there = files.exists(self._directory)
    if not is_there or not os.path.samestat(
      os.stat(self._directory), os.fstat(self._folder)
    ):
      raise SaveError(
        errno.ENOENT,
        'the folder was removed or replaced while the run was using it; put it '
        'back, or train again in a new workdir',
        files.as_text(self._directory),
      )

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind, error, trace) -> None:
    # Closing waits for the other processes, or for Orbax's threads, which may
    # be what went wrong.
    if error is None or (jax.process_count() == 1 and not self._save_failed):
      self.close()

  def steps(self) -> list[int]:
    """Steps with a checkpoint, oldest first.

    Raises:
      OSError: if the system does not say whether a step has one.
    """
    hidden = self._hidden()
    if hidden is not None:
      raise self._unreadable(*hidden)
    return sorted(self._manager.all_steps())

  def _hidden(self):
    """`(step, error)` of a checkpoint that cannot be looked at, or None.

    Orbax leaves it out of its list, as if an older one were the newest.
    """
    if files.is_remote(self._directory) or not files.exists(self._directory):
      return None
    for name in sorted(filter(str.isdigit, os.listdir(self._directory))):
      try:
        files.is_folder(os.path.join(self._directory, name))
      except OSError as error:
        return int(name), error
    return None

  def _agreed_steps(self):
    """As `steps`. All processes raise if one of them does."""
    hidden = self._hidden()
    if not parallel.all_agree(hidden is None):
      raise self._unreadable(*(hidden or (None, None)))
    return self.steps()

  def best_step(self) -> int | None:
    """The step of the best checkpoint by `best_metric`, if there is one."""
    return self._manager.best_step() if self._has_best else None

  def save(
    self,
    state: train_state.TrainState,
    step: int,
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Starts to save; the state may be donated as soon as this returns.

    Args:
      state: the same on every process.
      step: its name.
      metrics: by name; `best_metric` is taken from them.

    Raises:
      SaveError: if it, or an earlier save, failed, on a full disk for example,
        or because the folder was removed.
      OSError: if the first checkpoint, once written, cannot be opened.
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
    if not self._opened:
      self.wait()
      self._check_opens(step)
      self._opened = True

  def _check_opens(self, step):
    """Raises OSError, on all processes, if a new checkpoint cannot be opened.

    Only metadata are read. What no later run could read would be noticed much
    too late otherwise.
    """
    fault = None
    with _quiet():
      try:
        self._manager.item_metadata(step)
      except Exception as error:
        fault = self._brief(error)
    if not parallel.all_agree(fault is None):
      raise OSError(
        f'the checkpoint of step {step} was written to '
        f'{files.as_text(self._directory)} but cannot be opened there '
        f'({fault or "another process cannot open it"}); try a new --workdir '
        'on another file system'
      )

  def wait(self) -> None:
    """Returns when everything that `save` was given is on disk.

    Raises:
      SaveError: if it cannot be written, or the folder was removed.
    """
    with self._save_errors():
      self._manager.wait_until_finished()
    parallel.by_main(self._check_present)

  def raise_failure(self) -> None:
    """Raises the error of a save that has failed, and waits for none.

    Raises:
      SaveError: if one could not be written.
    """
    if not self._manager.is_saving_in_progress():
      # Not `wait`: the processes come here at different times.
      with self._save_errors():
        self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and lets go of the folder."""
    try:
      with self._save_errors():
        self._manager.close()
    finally:
      if self._link is not None:
        self._link.cleanup()
      if self._folder is not None:
        os.close(self._folder)
        self._folder = None

  @contextlib.contextmanager
  def _save_errors(self):
    """Raises what the system refused, which Orbax may hide, as a SaveError."""
    try:
      yield
    except (OSError, ValueError) as error:
      number, place = getattr(error, 'errno', None), self._directory
      if isinstance(error, OSError):
        place = error.filename or place
      elif code := re.search(r"os_error_code='(\d+)'", str(error)):
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
    """The state of one step.

    Raises:
      ValueError: if there is no such checkpoint (those that exist are listed).
      DamagedCheckpointError: if it is damaged, or another model's.
      UnreadableCheckpointError: if the system cannot read it.
    """
    steps = self._agreed_steps()
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
    """The newest state that is whole.

    A damaged checkpoint is named through `warn` and the one before it is tried.
    Unless `read_only`, damaged ones are moved to `<directory>_damaged/` so that
    training can save that step again.

    Args:
      target: shapes, dtypes and shardings of the state: `jax.ShapeDtypeStruct`
        leaves with `sharding`. They need not be those that it was saved with:
        any number of devices and processes will do. If its `opt_state` is None,
        so is that of the result, and further fields may be None, too.
      warn: told of each damaged checkpoint.

    Returns:
      The state, or None if there is no checkpoint at all.

    Raises:
      DamagedCheckpointError: if there are checkpoints and none fits: all are
        damaged, or `target` is another model's state.
      UnreadableCheckpointError: if the system cannot read one. It may be
        intact, so it stays where it is and no older one takes its place.
    """
    steps = self._agreed_steps()
    if not steps:
      return None
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
    raise DamagedCheckpointError(
      f'all checkpoints in {self._directory} are damaged, or of another '
      f'version of the model (steps {steps}); nothing was changed. Train again '
      'in a new workdir, or put an intact copy back'
    )

  def _restore(self, step, target):
    """`(state, None)` or `(None, what is wrong)`, alike on all processes."""
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
    """See `_guarded`."""
    return self._guarded(
      step, lambda: self._manager.restore(step, args=arguments)
    )

  def _guarded(self, step, work):
    """`(what work gives, None)`, or `(None, what is wrong)`.

    Raises:
      UnreadableCheckpointError: On all processes, if the system of one of them
        cannot read it.
    """
    restored = fault = refusal = None
    with _quiet():
      try:
        restored = work()
      except Exception as error:
        # Damage surfaces as whatever the broken layer raises, a bare Exception
        # from Orbax's array reader included.
        fault = self._brief(error)
        refusal = system_error(error) or self._refusal(step)
      gc.collect()  # so that what it left behind complains here, unheard
    if not parallel.all_agree(refusal is None):
      raise self._unreadable(step, refusal)
    return restored, fault

  def _refusal(self, step):
    """The system's error at a file of a checkpoint, if there is one.

    Orbax takes a file that it cannot look at for one that does not exist.
    """
    if files.is_remote(self._directory):
      return None
    try:
      _open_all(os.path.join(self._directory, str(step)))
    except OSError as error:
      return system_error(error)
    return None

  def _unreadable(self, step, refusal):
    reason, place = 'another process cannot read it', self._directory
    if refusal is not None:
      reason = refusal.strerror or str(refusal) or type(refusal).__name__
      place = self._named(refusal.filename or os.path.join(place, str(step)))
    which = 'a checkpoint' if step is None else f'the checkpoint of step {step}'
    error = UnreadableCheckpointError(
      f'{which} cannot be read ({reason}: '
      f'{files.as_text(place)}); nothing was changed. Make it readable and run '
      'the same command again'
    )
    error.errno = None if refusal is None else refusal.errno
    return error

  def _brief(self, error):
    """The first line of an error."""
    lines = self._named(str(error)).strip().splitlines()
    return files.as_text((lines[0] if lines else type(error).__name__)[:200])

  def _named(self, text):
    """A text with the folder's own path instead of that of the link."""
    return str(text).replace(self._place, self._directory)

  def check(self, step: int) -> str | None:
    """What is wrong with a checkpoint, or None; needs no model to compare."""
    # On this host: what was saved on many devices must not need them.
    restored, fault = self._read(
      step, ocp.args.StandardRestore(fallback_sharding=_here())
    )
    return _fault(restored) if fault is None else fault

  def metrics(self, step: int) -> dict[str, float]:
    """The metrics that a checkpoint was saved with."""
    return self._manager.metrics(step) or {}

  def _set_aside(self, steps):
    if self._read_only or not steps:
      return
    self._manager.close()
    if parallel.is_main():
      aside = epath.Path(f'{self._directory}_damaged')
      aside.mkdir(parents=True, exist_ok=True)
      for step in steps:
        place = aside / str(step)
        attempt = 1
        while place.exists():
          attempt += 1
          place = aside / f'{step}.{attempt}'
        (epath.Path(self._directory) / str(step)).rename(place)
    parallel.all_agree(True)  # the others must not look before it is done
    self._manager = self._open()


def _fault(restored):
  """Returns what is wrong with the content of a checkpoint, or None."""
  if not isinstance(restored, dict) or {*restored} != {'state', 'checksum'}:
    return 'it is not a checkpoint of a training'
  if int(_checksum(restored['state'])) != int(restored['checksum']):
    return 'its arrays do not have the checksum they were saved with'
  return None


def _open_all(folder):
  """Opens every file below a folder, and raises what the system refuses."""

  def fail(error):
    raise error

  for place, _, names in os.walk(folder, onerror=fail):
    for name in names:
      with open(os.path.join(place, name), 'rb') as file:
        file.read(1)


def _score(name, mode, metrics):
  """The metric so that more is better; one that is missing is the worst."""
  value = metrics.get(name, math.nan)
  if math.isnan(value):
    return -math.inf
  return value if mode == 'max' else -value


def _here():
  return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


@dataclasses.dataclass(frozen=True)
class Found:
  """A checkpoint of a workdir; see `verify`.

  Attributes:
    step: its name.
    fault: what is wrong with it; None if it is whole.
    metrics: that it was saved with, by name.
  """

  step: int
  fault: str | None
  metrics: dict[str, float]


def verify(workdir: str) -> list[Found]:
  """What checkpoints a workdir has, oldest first, and whether they are whole.

  Every array is read and compared with the checksum of its checkpoint; nothing
  is changed. One process and one device will do, whatever saved them.

  Raises:
    ValueError: if the workdir has no folder of checkpoints.
    UnreadableCheckpointError: if the system cannot read a checkpoint.
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
  """Hushes what a failed read leaves behind in threads and coroutines.

  The failure itself is raised and reported; its hundred lines of unfinished
  coroutines would bury that report.
  """
  hook = sys.unraisablehook
  sys.unraisablehook = lambda _: None
  try:
    yield
  finally:
    sys.unraisablehook = hook


def _fields(state):
  """The state's fields but those that are None.

  Orbax would tell a state that lacks such a field from one that has it as None:
  checkpoints from before there was the field could not be read.
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
  """A uint32 that changes with any single changed entry of the tree."""
  total = jnp.zeros((), jnp.uint32)
  # By name: what is read without a model to fit it to is nested otherwise.
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
