"""`metrics.jsonl`, and the progress of a training for a person to see."""

from collections.abc import Mapping
import json
import math
import sys
import time

from etils import epath
import jax
import tqdm

from clop_jax.runtime import files
from clop_jax.training import callback

FILE = 'metrics.jsonl'


class JsonLines:
  """A file of one JSON object for each of some steps.

  Attributes:
    last_step: of the last line; 0 before the first one.
  """

  def __init__(self, path: str, *, start: int):
    """Cuts the file back to `start`: what came later is trained again.

    Args:
      path: of the file; local, or remote as `epath` has it.
      start: the step to go on from.

    Raises:
      ValueError: If the file has a line of something else. It stays as it is.
    """
    self._path = path
    entries = entries_until(path, start)
    self._lines = [json.dumps(entry) + '\n' for entry in entries]
    self.last_step = entries[-1]['step'] if entries else 0
    self._file = None
    if not files.is_remote(path):
      files.write_whole(path, ''.join(self._lines).encode())
      self._file = open(path, 'a')  # noqa: SIM115 (closed by close)

  def write(self, step: int, values: Mapping[str, float | None]) -> None:
    """Writes the line of a step; what is not finite, or None, becomes null."""
    # NaN is not JSON; a diagnostic may be NaN where the loss is not.
    entry = {'step': step} | {
      k: None if v is None or not math.isfinite(v) else v
      for k, v in sorted(values.items())
    }
    line = json.dumps(entry) + '\n'
    self.last_step = step
    if self._file is not None:
      self._file.write(line)
      self._file.flush()
    else:
      # Remote files cannot be added to.
      self._lines.append(line)
      epath.Path(self._path).write_text(''.join(self._lines))

  def close(self) -> None:
    """Closes the file."""
    if self._file is not None:
      self._file.close()


class MetricsLog(callback.Callback):
  """Writes one line for each logged step, and prints progress."""

  def __init__(self, path: str, *, steps: range, batch_size: int):
    """Cuts the log back to `steps.start`: later steps are trained again.

    Args:
      path: Path of the file, local or remote as `epath` has it.
      steps: Steps that are left.
      batch_size: Number of images in a step.
    """
    self._start, self._total_steps = steps.start, steps.stop
    self._batch_size = batch_size
    self._lines = JsonLines(path, start=steps.start)
    self._is_terminal = sys.stderr.isatty()
    self._bar = tqdm.tqdm(
      total=steps.stop,
      initial=steps.start,
      unit='step',
      disable=not self._is_terminal,
    )
    self._began = time.monotonic()

  def close(self, failed: bool = False) -> None:
    """Closes the file and the progress bar."""
    self._bar.close()
    self._lines.close()

  def logged(self, step: int, metrics: dict[str, float]) -> None:
    """Writes the metrics of a step, and prints some of them.

    Args:
      step: Step after which they were taken.
      metrics: Metrics by name, among them `loss`, `clop_loss` and
        `effective_rank`.
    """
    self._lines.write(step, metrics)
    self._show(step, metrics)

  def _show(self, step, metrics):
    seconds = time.monotonic() - self._began
    steps_per_second = (step - self._start) / seconds
    images_per_second = steps_per_second * self._batch_size
    shown = {
      'loss': f'{metrics["loss"]:.4f}',
      'clop': f'{metrics["clop_loss"]:.4f}',
      'effective rank': f'{metrics["effective_rank"]:.1f}',
      'images/s': f'{images_per_second:,.0f}',
    }
    if self._is_terminal:
      self._bar.set_postfix(shown, refresh=False)
      self._bar.update(step - self._bar.n)
      return
    left = (self._total_steps - step) / steps_per_second
    parts = ', '.join(f'{name} {value}' for name, value in shown.items())
    print(
      f'step {step}/{self._total_steps}: {parts}, {left:.0f} s left', flush=True
    )


def say(message: str, *, error: bool = False) -> None:
  """Prints a line, around the progress bar if there is one.

  Args:
    message: the line.
    error: to standard error, instead of standard output.
  """
  stream = sys.stderr if error else sys.stdout
  tqdm.tqdm.write(message, file=stream)
  stream.flush()


def to_floats(metrics: dict[str, jax.Array]) -> dict[str, float]:
  """The metrics of one step as plain numbers."""
  return {k: float(v) for k, v in jax.device_get(metrics).items()}


def check(path: str) -> None:
  """Checks that a file of `JsonLines` can be read, if it exists.

  Raises:
    ValueError: If a line holds something else.
  """
  _entries(path)


def entries_until(path: str, step: int) -> list[dict]:
  """The lines of a file of `JsonLines` up to a step; none if it is missing.

  Raises:
    ValueError: If a line holds something else.
  """
  return [entry for entry in _entries(path) if entry['step'] <= step]


def _entries(path):
  if not files.exists(path):
    return []
  return list(files.read_json_lines(path, fix='correct or remove that line'))
