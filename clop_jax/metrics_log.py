"""`metrics.jsonl`, and the progress of a training for a person to see."""

import json
import math
import sys
import time

from etils import epath
import jax
import tqdm


class MetricsLog:
  """Writes one line for each logged step; a context manager."""

  def __init__(
    self, path: str, *, start: int, total_steps: int, batch_size: int
  ):
    """Cuts the log back to `start`: what was logged later is trained again.

    Args:
      path: of the file; local, or remote as `epath` has it.
      start: the step to go on from.
      total_steps: of the whole run.
      batch_size: images in a step.
    """
    self._path, self._start, self._total_steps = path, start, total_steps
    self._batch_size = batch_size
    self._lines = _lines_until(path, start)
    self._file = None
    if not _is_remote(path):
      partial = epath.Path(f'{path}.partial')
      partial.write_text(''.join(self._lines))
      partial.replace(path)
      self._file = open(path, 'a')  # noqa: SIM115 (closed by __exit__)
    self._is_terminal = sys.stderr.isatty()
    self._bar = tqdm.tqdm(
      total=total_steps,
      initial=start,
      unit='step',
      disable=not self._is_terminal,
    )
    self._began = time.monotonic()

  def __enter__(self) -> 'MetricsLog':
    return self

  def __exit__(self, *exception) -> None:
    self._bar.close()
    if self._file is not None:
      self._file.close()

  def write(self, step: int, metrics: dict[str, float]) -> None:
    """Writes the metrics of a step, and shows some of them.

    Args:
      step: after which they were taken.
      metrics: by name, among them `loss`, `clop_loss` and `effective_rank`.
    """
    # NaN is not JSON; a diagnostic may be NaN where the loss is not.
    entry = {'step': step} | {
      k: v if math.isfinite(v) else None for k, v in sorted(metrics.items())
    }
    line = json.dumps(entry) + '\n'
    if self._file is not None:
      self._file.write(line)
      self._file.flush()
    else:
      # Remote files cannot be added to.
      self._lines.append(line)
      epath.Path(self._path).write_text(''.join(self._lines))
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


class Silent:
  """The log of a process that is not the one that writes."""

  def __enter__(self) -> 'Silent':
    return self

  def __exit__(self, *exception) -> None:
    pass

  def write(self, step: int, metrics: dict[str, float]) -> None:
    """Writes nothing."""


def to_floats(metrics: dict[str, jax.Array]) -> dict[str, float]:
  """The metrics of one step as plain numbers."""
  return {k: float(v) for k, v in jax.device_get(metrics).items()}


def _is_remote(path):
  return '://' in str(path)


def _lines_until(path, step):
  """The lines of a log up to a step."""
  path = epath.Path(path)
  if not path.exists():
    return []
  kept = []
  for line in path.read_text().splitlines(keepends=True):
    try:
      entry = json.loads(line)
    except json.JSONDecodeError:
      break  # a line that a kill cut short is the last one
    if entry['step'] <= step:
      kept.append(line)
  return kept
