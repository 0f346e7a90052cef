"""Hooks that the training loop calls."""

from typing import Any


class Callback:
  """Base class of callbacks; a context manager that closes itself.

  In a run of several processes, all of them call the same hooks at the same
  steps.
  """

  def started(self, steps: range, state: Any) -> None:
    """Prepares for a run, before its first step.

    Args:
      steps: Steps that are left.
      state: Training state at `steps.start`, not to be changed or kept.
    """

  def logged(self, step: int, metrics: dict[str, float]) -> None:
    """Receives the metrics of a logged step."""

  def due(self, steps: range) -> bool:
    """Returns True if metrics must be logged up to now before `reached`."""
    return False

  def reached(self, steps: range, state: Any) -> None:
    """Receives the result of a dispatch.

    Args:
      steps: Steps of the dispatch.
      state: Training state at `steps.stop`, not to be changed. It is donated to
        the next dispatch.
    """

  def close(self, failed: bool = False) -> None:
    """Writes what is left and closes files.

    Args:
      failed: True if the training ends with an exception.
    """

  def __enter__(self):
    return self

  def __exit__(self, kind, *exception) -> None:
    self.close(failed=kind is not None)
