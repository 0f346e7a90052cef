"""Cells of a study, trained and evaluated in a process that stays.

`study` starts it, as `python -m clop_jax.cell`, and sends it one cell after
another, or several to train in one program.
"""

import contextlib
import gc
import json
import os
import sys
import time
import traceback

from absl import logging
import jax
import ml_collections

from clop_jax import ensemble
from clop_jax import evaluate
from clop_jax import experiment
from clop_jax import inputs
from clop_jax import preemption
from clop_jax import train
from clop_jax import workdir as workdir_lib
from clop_jax import workers

# In a cell's workdir: what it printed, and how it ended.
LOG = 'log.txt'
RECORD = 'cell.json'


def check(cells: dict[str, dict]) -> tuple[str, str | None]:
  """Looks for what is wrong with cells, without tracing or writing.

  Args:
    cells: the config of each, by name.

  Returns:
    `(platform, fault)`: what JAX runs on here, and one line or None.
  """
  known = set()
  fault = None
  for name, values in cells.items():
    config = ml_collections.ConfigDict(values).lock()
    # Any length will do: that of the data shows only when they are read.
    epochs = max(1, config.train.num_epochs)
    try:
      experiment.build(config, total_steps=1000 * epochs, steps_per_epoch=1000)
      data = json.dumps(values['data'], sort_keys=True)
      if data not in known:
        # Once, and not by all cells at the same time: it may be prepared here.
        known.add(data)
        inputs.with_num_classes(config, inputs.training_source(config))
    except (ValueError, OSError) as error:
      fault = f'cell {name}: {_one_line(error)}'
      break
  return jax.default_backend(), fault


def run(cells: dict[str, tuple[dict, str]]) -> dict[str, dict]:
  """Trains, or goes on with, cells in one program and evaluates each.

  Args:
    cells: config (as JSON has it) and workdir of each, by name; one, or several
      that `ensemble` can train together.

  Returns:
    Of each `status` (done, diverged or failed), `error` (one line or None),
    `train_seconds` (the cell's share of them) and `evaluate_seconds` (None if
    it did not come to that).

  Raises:
    preemption.PreemptionError: after SIGTERM, when the state has been saved.
  """
  outcomes = {}
  configs = {
    name: ml_collections.ConfigDict(values).lock()
    for name, (values, _) in cells.items()
  }
  workdirs = {name: workdir for name, (_, workdir) in cells.items()}
  first, *others = cells
  for name in cells:
    os.makedirs(workdirs[name], exist_ok=True)
  for name in others:
    with open(os.path.join(workdirs[name], LOG), 'a') as log:
      log.write(f'trains together with {first}, whose log this is in\n')

  def end(name, **outcome):
    if name in outcomes:
      return
    nothing = {'error': None, 'train_seconds': None, 'evaluate_seconds': None}
    outcomes[name] = nothing | outcome
    record(workdirs[name], outcomes[name])

  def diverged(number, error):
    # At once: if this is stopped, the others go on without it.
    end(list(cells)[number], status='diverged', error=_one_line(error))

  began = time.monotonic()
  with _printing_to(os.path.join(workdirs[first], LOG)), _ending(end, cells):
    if others:
      ensemble.train_together(
        list(configs.values()), list(workdirs.values()), diverged=diverged
      )
    else:
      train.train(configs[first], workdirs[first])
  share = round((time.monotonic() - began) / len(cells), 2)
  for name in [name for name in cells if name not in outcomes]:
    began = time.monotonic()
    with (
      _printing_to(os.path.join(workdirs[name], LOG)),
      _ending(end, [name], train_seconds=share),
    ):
      evaluate.write(workdirs[name], *evaluate.evaluate(workdirs[name]))
      seconds = round(time.monotonic() - began, 2)
      end(name, status='done', train_seconds=share, evaluate_seconds=seconds)
  # A traceback holds on to the arrays of its frames.
  gc.collect()
  return outcomes


def record(workdir: str, outcome: dict) -> None:
  """Writes how a cell ended, and the commit, into its workdir."""
  text = json.dumps(outcome | {'commit': experiment.commit()}) + '\n'
  workdir_lib.write_whole(os.path.join(workdir, RECORD), text.encode())


@contextlib.contextmanager
def _ending(end, names, **known):
  """Ends cells by what is raised."""
  try:
    yield
  except preemption.PreemptionError:
    raise
  except Exception as error:
    status = 'diverged' if isinstance(error, FloatingPointError) else 'failed'
    if status == 'failed':
      traceback.print_exc()
    for name in names:
      end(name, status=status, error=_one_line(error), **known)


def _one_line(error):
  text = ' '.join(str(error).split())
  if not isinstance(error, (ValueError, OSError, FloatingPointError)):
    text = f'{type(error).__name__}: {text}'
  return text


@contextlib.contextmanager
def _printing_to(path):
  """Sends to a file what is printed, by libraries in C++ as well."""
  streams = (sys.stdout, sys.stderr)
  kept = [os.dup(stream.fileno()) for stream in streams]
  with open(path, 'a') as file:
    for stream in streams:
      os.dup2(file.fileno(), stream.fileno())
  try:
    yield
  finally:
    for stream, descriptor in zip(streams, kept, strict=True):
      stream.flush()
      os.dup2(descriptor, stream.fileno())
      os.close(descriptor)


def _work(task):
  function, *arguments = task
  try:
    return {'check': check, 'run': run}[function](*arguments)
  except preemption.PreemptionError:
    sys.exit(preemption.EXIT_CODE)


if __name__ == '__main__':
  # Orbax and TFDS tell of every file they touch.
  logging.set_verbosity(logging.FATAL)
  workers.serve(_work)
