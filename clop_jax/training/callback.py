"""Hooks that the training loop calls."""

from typing import Any


class Callback:
  """Base class of callbacks; a context manager that closes itself.

  In a run of several processes, all of them call the same hooks at the same
  steps. A hook must not change or keep the training state, because the next
  dispatch donates it.
  """

  def started(self, steps: range, state: Any) -> None:
    """Prepares for the remaining steps; `state` is that of `steps.start`."""

  def logged(self, step: int, metrics: dict[str, float]) -> None:
    """Receives the metrics of a logged step."""

  def due(self, steps: range) -> bool:
    """Returns True if metrics must be logged up to now before `reached`."""
    return False

  def reached(self, steps: range, state: Any) -> None:
    """Receives the steps of a dispatch and the state at `steps.stop`."""

  def close(self, failed: bool = False) -> None:
    """Closes files; `failed` is True if training ends with an exception."""

  def __enter__(self):
    return self

  def __exit__(self, kind, *exception) -> None:
    self.close(failed=kind is not None)
