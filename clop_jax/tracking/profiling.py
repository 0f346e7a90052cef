"""Trace of some training steps, recorded by `jax.profiler`."""

import contextlib
import os
from typing import Any

import jax

from clop_jax.runtime import files
from clop_jax.runtime import parallel
from clop_jax.training import callback

FOLDER = 'profile'


class Profiler(callback.Callback):
  """Records whole dispatches after the first, in which everything warms up.

  The trace also has what happens between dispatches: waiting for data, log
  lines, checkpoints.
  """

  def __init__(self, workdir: str, num_steps: int):
    """Checks the arguments.

    Args:
      workdir: Workdir of the run; the trace goes to its `profile/`.
      num_steps: Number of steps. It is rounded up to whole dispatches.

    Raises:
      ValueError: If `num_steps` is below 1, or `workdir` is not a local folder
        with a name in UTF-8.
      OSError: If the folder cannot be written.
    """
    if num_steps < 1:
      raise ValueError(f'--profile must be at least 1 step, got {num_steps}')
    if files.is_remote(workdir) or files.as_text(workdir) != workdir:
      raise ValueError(
        '--profile needs a local workdir with a name in UTF-8, got '
        f'--workdir={files.as_text(workdir)}'
      )
    self._folder = os.path.join(workdir, FOLDER)
    files.check_writable(
      os.path.join(self._folder, 'trace'), f'--profile={num_steps}'
    )
    self._num_steps = num_steps
    self._done = not parallel.is_main()  # the main process records
    self._recorded: range | None = None
    self._annotation: Any = contextlib.ExitStack()

  def started(self, steps: range, state: Any) -> None:
    self._last = steps.stop

  def reached(self, steps: range, state: Any) -> None:
    """Starts the trace after the first dispatch, and stops it when it is full.

    Args:
      steps: Steps of the dispatch.
      state: Training state after them.
    """
    if self._done:
      return
    if self._recorded is None:
      if steps.stop == self._last:
        return
      jax.block_until_ready(state)
      self._start(steps.stop)
    else:
      self._annotation.close()
      self._recorded = range(self._recorded.start, steps.stop)
      if len(self._recorded) >= self._num_steps:
        jax.block_until_ready(state)
        self._stop()
        return
    # Marks the steps for TensorBoard and XProf.
    self._annotation.enter_context(
      jax.profiler.StepTraceAnnotation('train', step_num=steps.stop)
    )

  def close(self, failed: bool = False) -> None:
    """Writes the trace of a run that ends early."""
    if self._done:
      return
    if self._recorded is not None:
      self._stop()
    else:
      print(
        '--profile: nothing is recorded; no step is left after the first '
        'dispatch',
        flush=True,
      )

  def _start(self, step):
    options = jax.profiler.ProfileOptions()
    # An event for each call of a Python function would slow down the host.
    options.python_tracer_level = 0
    jax.profiler.start_trace(
      self._folder, create_perfetto_trace=True, profiler_options=options
    )
    self._recorded = range(step, step)

  def _stop(self):
    self._done = True
    jax.profiler.stop_trace()
    first, last = self._recorded.start + 1, self._recorded.stop
    print(
      f'profile: steps {first} to {last} are in {self._folder}; open it with '
      f'`xprof --logdir={self._folder}` or TensorBoard (pip install xprof), '
      'or open its perfetto_trace.json.gz on https://ui.perfetto.dev',
      flush=True,
    )
