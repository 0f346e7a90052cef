"""Saving and restoring the full training state with Orbax.

Each checkpoint carries a checksum of its state, made on the devices with
integer arithmetic. Orbax itself notices a missing or shortened file but not a
changed byte in an array; and exact integers are the same on any number of
devices.
"""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import functools
import gc
import math
import os
import re
import sys

from absl import logging
from etils import epath
import jax
from jax import lax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from clop_jax import parallel
from clop_jax import train_state

FOLDER = 'checkpoints'  # of a workdir

MODES = ('max', 'min')


class DamagedCheckpointError(Exception):
  """No checkpoint of a folder can be restored."""


class SaveError(OSError):
  """A checkpoint could not be saved; those before it are intact.

  Threads of Orbax may wait for minutes for one that failed, and the process for
  them where it does not end by `os._exit`.
  """


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
      ValueError: if `keep` is below 1 or `best_mode` is unknown.
    """
    if keep < 1:
      raise ValueError(f'keep must be at least 1, got {keep}')
    if best_mode not in MODES:
      raise ValueError(
        f'best_mode must be one of {list(MODES)}, got {best_mode!r}'
      )
    is_remote = '://' in directory
    self._directory = directory if is_remote else os.path.abspath(directory)
    self._read_only = read_only
    self._save_failed = False
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
      self._manager = ocp.CheckpointManager(
        self._directory, options=self._options
      )

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind, error, trace) -> None:
    # Closing waits for the other processes, or for Orbax's threads, which may
    # be what went wrong.
    if error is None or (jax.process_count() == 1 and not self._save_failed):
      self.close()

  def steps(self) -> list[int]:
    """Steps with a checkpoint, oldest first."""
    return sorted(self._manager.all_steps())

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
      SaveError: if it, or an earlier save, failed, on a full disk for example.
    """
    checkpoint = {'state': _fields(state), 'checksum': _checksum(state)}
    with self._save_errors():
      self._manager.save(
        step,
        args=ocp.args.StandardSave(checkpoint),
        metrics=dict(metrics) if metrics else None,
        force=True,
      )

  def wait(self) -> None:
    """Returns when everything that `save` was given is on disk.

    Raises:
      SaveError: if it cannot be written.
    """
    with self._save_errors():
      self._manager.wait_until_finished()

  def raise_failure(self) -> None:
    """Raises the error of a save that has failed, and waits for none.

    Raises:
      SaveError: if one could not be written.
    """
    if not self._manager.is_saving_in_progress():
      self.wait()

  def close(self) -> None:
    """Waits, and lets go of the folder."""
    with self._save_errors():
      self._manager.close()

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
    """
    if step not in self.steps():
      raise ValueError(
        f'there is no checkpoint of step {step} in {self._directory}; there '
        f'are {self.steps()}'
      )
    state, fault = self._restore(step, target)
    if fault is not None:
      raise DamagedCheckpointError(
        f'the checkpoint of step {step} in {self._directory} is damaged, or of '
        f'another version of the model ({fault}); there are {self.steps()}'
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
        any number of devices and processes will do.
      warn: told of each damaged checkpoint.

    Returns:
      The state, or None if there is no checkpoint at all.

    Raises:
      DamagedCheckpointError: if there are checkpoints and none fits: all are
        damaged, or `target` is another model's state.
    """
    steps = self.steps()
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
    wanted = {
      'state': _fields(target),
      'checksum': jax.ShapeDtypeStruct((), jnp.uint32, sharding=scalar),
    }
    restored, fault = self._read(step, ocp.args.StandardRestore(wanted))
    if not parallel.all_agree(fault is None):
      return None, fault or 'another process could not read it'
    if int(_checksum(restored['state'])) != int(restored['checksum']):
      return None, _WRONG_CHECKSUM
    return dataclasses.replace(target, **restored['state']), None

  def _read(self, step, arguments):
    """`(what Orbax gives, None)`, or `(None, what is wrong)`."""
    with _quiet():
      try:
        return self._manager.restore(step, args=arguments), None
      except Exception as error:
        # Damage surfaces as whatever the broken layer raises, a bare Exception
        # from Orbax's array reader included.
        lines = str(error).strip().splitlines()
        fault = (lines[0] if lines else type(error).__name__)[:200]
      gc.collect()  # so that what it left behind complains here, unheard
    return None, fault

  def check(self, step: int) -> str | None:
    """What is wrong with a checkpoint, or None; needs no model to compare."""
    # On this host: what was saved on many devices must not need them.
    restored, fault = self._read(
      step, ocp.args.StandardRestore(fallback_sharding=_here())
    )
    if fault is not None:
      return fault
    if not isinstance(restored, dict) or {*restored} != {'state', 'checksum'}:
      return 'it is not a checkpoint of a training'
    if int(_checksum(restored['state'])) != int(restored['checksum']):
      return _WRONG_CHECKSUM
    return None

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
    self._manager = ocp.CheckpointManager(
      self._directory, options=self._options
    )


_WRONG_CHECKSUM = 'its arrays do not have the checksum they were saved with'


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
  """
  directory = os.path.join(workdir, FOLDER)
  if not epath.Path(directory).is_dir():
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
