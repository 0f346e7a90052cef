"""Saving and restoring the full training state with Orbax.

Each checkpoint carries a checksum of its state, made on the devices with
integer arithmetic. Orbax itself notices a missing or shortened file but not a
changed byte in an array; and exact integers are the same on any number of
devices.
"""

from collections.abc import Callable
import contextlib
import gc
import os
import shutil
import sys

from absl import logging
import jax
from jax import lax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from clop_jax import train_state


class DamagedCheckpointError(Exception):
  """No checkpoint of a folder can be restored."""


class Checkpoints:
  """The checkpoints of one run, `directory/<step>/`, saved asynchronously."""

  def __init__(self, directory: str, *, keep: int = 3, read_only: bool = False):
    """Opens the folder; creates it unless `read_only`.

    Args:
      directory: absolute or relative path.
      keep: how many of the newest checkpoints stay.
      read_only: for evaluation: nothing in the folder is changed.

    Raises:
      ValueError: if `keep` is below 1.
    """
    if keep < 1:
      raise ValueError(f'keep must be at least 1, got {keep}')
    self._directory = os.path.abspath(directory)
    self._read_only = read_only
    self._options = ocp.CheckpointManagerOptions(
      max_to_keep=None if read_only else keep,
      create=not read_only,
      read_only=read_only,
    )
    self._manager = ocp.CheckpointManager(
      self._directory, options=self._options
    )

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *exception) -> None:
    self.close()

  def steps(self) -> list[int]:
    """Steps with a checkpoint, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, state: train_state.TrainState, step: int) -> None:
    """Starts to save; the state may be donated as soon as this returns.

    Raises:
      OSError: if an earlier save failed, on a full disk for example.
    """
    checkpoint = {'state': state, 'checksum': _checksum(state)}
    self._manager.save(step, args=ocp.args.StandardSave(checkpoint))

  def wait(self) -> None:
    """Returns when everything that `save` was given is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and lets go of the folder."""
    self._manager.close()

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
        leaves with `sharding`.
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
    """`(state, None)`, or `(None, what is wrong)`."""
    scalar = jax.tree.leaves(target)[0].sharding
    wanted = {
      'state': target,
      'checksum': jax.ShapeDtypeStruct((), jnp.uint32, sharding=scalar),
    }
    fault = None
    with _quiet():
      try:
        restored = self._manager.restore(
          step, args=ocp.args.StandardRestore(wanted)
        )
      except Exception as error:
        # Damage surfaces as whatever the broken layer raises, a bare Exception
        # from Orbax's array reader included.
        lines = str(error).strip().splitlines()
        fault = (lines[0] if lines else type(error).__name__)[:200]
      if fault:
        gc.collect()  # so that what it left behind complains here, unheard
        return None, fault
    if int(_checksum(restored['state'])) != int(restored['checksum']):
      return None, 'its arrays do not have the checksum they were saved with'
    return restored['state'], None

  def _set_aside(self, steps):
    if self._read_only or not steps:
      return
    aside = f'{self._directory}_damaged'
    self._manager.close()
    os.makedirs(aside, exist_ok=True)
    for step in steps:
      place = os.path.join(aside, str(step))
      attempt = 1
      while os.path.exists(place):
        attempt += 1
        place = os.path.join(aside, f'{step}.{attempt}')
      shutil.move(os.path.join(self._directory, str(step)), place)
    self._manager = ocp.CheckpointManager(
      self._directory, options=self._options
    )


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


@jax.jit
def _checksum(tree) -> jax.Array:
  """A uint32 that changes with any single changed entry of the tree."""
  total = jnp.zeros((), jnp.uint32)
  for leaf in jax.tree.leaves(tree):
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
