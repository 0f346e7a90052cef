"""`metrics.jsonl`, and the progress that a training prints."""

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
  """A file with one JSON object per logged step.

  Attributes:
    last_step: Step of the last line, 0 if there is none.
  """

  def __init__(self, path: str, *, start: int):
    """Removes lines after step `start`, because those are trained again.

    Raises:
      ValueError: If a line is damaged. The file is not changed then.
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
    """Writes the line of a step; NaN and infinity become null."""
    entry = {'step': step} | {
      k: None if v is None or not math.isfinite(v) else v
      for k, v in sorted(values.items())
    }
    line = json.dumps(entry) + '\n'
    self.last_step = step
    if self._file is not None:
      self._file.write(line)
      self._file.flush()
    else:  # remote files cannot be appended to
      self._lines.append(line)
      epath.Path(self._path).write_text(''.join(self._lines))

  def close(self) -> None:
    """Closes the file."""
    if self._file is not None:
      self._file.close()


class MetricsLog(callback.Callback):
  """Writes a line for each logged step, and prints progress."""

  def __init__(self, path: str, *, steps: range, batch_size: int):
    """Opens the log for the steps that are left; see `JsonLines`."""
    self._total_steps = steps.stop
    self._batch_size = batch_size
    self._lines = JsonLines(path, start=steps.start)
    self._is_terminal = sys.stderr.isatty()
    self._bar = tqdm.tqdm(
      total=steps.stop,
      initial=steps.start,
      unit='step',
      disable=not self._is_terminal,
    )
    self._first: tuple[int, float] | None = None

  def close(self, failed: bool = False) -> None:
    """Closes the file and the progress bar."""
    self._bar.close()
    self._lines.close()

  def logged(self, step: int, metrics: dict[str, float]) -> None:
    """Writes the metrics of a step, and prints some of them."""
    self._lines.write(step, metrics)
    shown = {
      'loss': f'{metrics["loss"]:.4f}',
      'clop': f'{metrics["clop_loss"]:.4f}',
      'effective rank': f'{metrics["effective_rank"]:.1f}',
    }
    left = ''
    if self._first is None:
      # Earlier steps waited for the compiler, so they do not show the speed.
      self._first = (step, time.monotonic())
    else:
      first, began = self._first
      rate = (step - first) / (time.monotonic() - began)
      shown['images/s'] = f'{rate * self._batch_size:,.0f}'
      left = f', {(self._total_steps - step) / rate:.0f} s left'
    if self._is_terminal:
      self._bar.set_postfix(shown, refresh=False)
      self._bar.update(step - self._bar.n)
      return
    parts = ', '.join(f'{name} {value}' for name, value in shown.items())
    print(f'step {step}/{self._total_steps}: {parts}{left}', flush=True)


def say(message: str, *, error: bool = False) -> None:
  """Prints a line above the progress bar, on stderr if `error`."""
  stream = sys.stderr if error else sys.stdout
  tqdm.tqdm.write(message, file=stream)
  stream.flush()


def to_floats(metrics: dict[str, jax.Array]) -> dict[str, float]:
  """Returns the metrics of one step as Python numbers."""
  return {k: float(v) for k, v in jax.device_get(metrics).items()}


def check(path: str) -> None:
  """Raises ValueError if a file of `JsonLines` has a damaged line."""
  entries_until(path, math.inf)


def entries_until(path: str, step: float) -> list[dict]:
  """Returns the lines of a file of `JsonLines` up to a step.

  Raises:
    ValueError: If a line is damaged.
  """
  if not files.exists(path):
    return []
  entries = files.read_json_lines(path, fix='correct or remove that line')
  return [entry for entry in entries if entry['step'] <= step]
