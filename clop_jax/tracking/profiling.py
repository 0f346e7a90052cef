"""Records some steps of a run, and says where their time went.

The trace is JAX's own, for TensorBoard's profile plugin and Perfetto;
`breakdown` reads it again.
"""

from collections.abc import Callable, Sequence
import os
import pathlib
import time

import jax

from clop_jax.runtime import files
from clop_jax.tracking import breakdown


class Off:
  """Records nothing."""

  def __enter__(self) -> 'Off':
    return self

  def __exit__(self, *exception) -> None:
    pass

  def dispatched(self, steps: range, state) -> None:
    """Does nothing."""

  def finished(self, steps: range, state) -> None:
    """Does nothing."""


class Recorder:
  """Records whole dispatches of a run, but for the first one.

  In the first one devices and host warm up. All programs that follow are
  compiled before the recording begins. What lies between two dispatches is
  recorded with them: waiting for data, log lines, checkpoints.
  """

  def __init__(
    self,
    workdir: str,
    num_steps: int,
    chunks: Sequence[range],
    program: Callable[[int], jax.stages.Compiled],
  ):
    """Chooses what to record.

    Args:
      workdir: the files go to its `profile/`.
      num_steps: to record, or a few more: dispatches are whole.
      chunks: the steps of each dispatch that is left of the run.
      program: compiles a dispatch of so many steps.
    """
    self._folder = pathlib.Path(workdir) / 'profile'
    self._program, self._asked = program, num_steps
    self._chunks, self._tracing = [], False
    for chunk in chunks[1:]:
      if self._num_steps >= num_steps:
        break
      self._chunks.append(chunk)
    if not self._chunks:
      print(
        '--profile: nothing is recorded; only one dispatch is left of the run, '
        'and the first one is never recorded',
        flush=True,
      )

  def __enter__(self) -> 'Recorder':
    return self

  def __exit__(self, *exception) -> None:
    if self._tracing:  # the run ends early
      jax.profiler.stop_trace()

  @property
  def _num_steps(self):
    return sum(map(len, self._chunks))

  def dispatched(self, steps: range, state) -> None:
    """To be called after each dispatch; ends the recording if it is time to.

    Args:
      steps: that were dispatched.
      state: their result.
    """
    if not self._tracing:
      return
    last = steps.stop == self._chunks[-1].stop
    if last:
      jax.block_until_ready(state)
    self._annotation.__exit__(None, None, None)
    if last:
      self._stop()

  def finished(self, steps: range, state) -> None:
    """To be called when all is done that follows a dispatch; may begin.

    Args:
      steps: that were dispatched.
      state: their result.
    """
    if self._chunks and steps.stop == self._chunks[0].start:
      self._start(state)
    if self._tracing:
      # TensorBoard tells the steps apart by it.
      self._annotation = jax.profiler.StepTraceAnnotation(
        'train', step_num=steps.stop
      )
      self._annotation.__enter__()

  def _start(self, state):
    for chunk in self._chunks:
      self._program(len(chunk))
    options = jax.profiler.ProfileOptions()
    # An event for each call of a Python function would slow the host down.
    options.python_tracer_level = 0
    jax.block_until_ready(state)
    jax.profiler.start_trace(
      self._folder, create_perfetto_trace=True, profiler_options=options
    )
    self._tracing, self._began = True, time.perf_counter_ns()

  def _stop(self):
    wall_ns = time.perf_counter_ns() - self._began
    jax.profiler.stop_trace()
    self._tracing = False
    traces = self._folder.glob('plugins/profile/*/*.xplane.pb')
    trace = max(traces, key=os.path.getmtime)
    # In the order in which they ran.
    lengths = dict.fromkeys(map(len, self._chunks))
    result = breakdown.break_down(
      breakdown.read_events(jax.profiler.ProfileData.from_file(str(trace))),
      [
        breakdown.read_program(self._program(length).as_text())
        for length in lengths
      ],
      wall_ns=wall_ns,
      num_steps=self._num_steps,
    )
    first, last = self._chunks[0].start + 1, self._chunks[-1].stop
    fewer = ''
    if self._num_steps < self._asked:
      fewer = f' (--profile={self._asked}, but no more were left)'
    text = (
      f'profile: {self._num_steps} steps recorded, {first} to {last}, in '
      f'{len(self._chunks)} dispatch(es){fewer}\n{breakdown.to_text(result)}'
      f'trace: {trace.parent}\n'
    )
    (self._folder / 'breakdown.txt').write_text(text)
    print(text, end='', flush=True)


def check(num_steps: int, workdir: str) -> None:
  """Refuses what cannot be recorded.

  Raises:
    ValueError: if `num_steps` is below 1, or `workdir` is not a local folder
      with a name in UTF-8.
    OSError: if its `profile/` cannot be written to.
  """
  if num_steps < 1:
    raise ValueError(f'--profile must be at least 1 step, got {num_steps}')
  if '://' in workdir:
    raise ValueError(
      f'--profile writes to local folders alone, got --workdir={workdir}; '
      'profile a short run in a local one'
    )
  if files.as_text(workdir) != workdir:
    raise ValueError(
      '--profile writes to folders with names in UTF-8 alone, got '
      f'--workdir={files.as_text(workdir)}; use another one'
    )
  path = os.path.join(workdir, 'profile', 'breakdown.txt')
  files.check_writable(path, f'--profile={num_steps}')
