"""One cell of a study: checked before the study starts, trained, evaluated."""

import contextlib
import gc
import json
import os
import sys
import time
import traceback
from typing import Any

import jax
import ml_collections

from clop_jax import defaults
from clop_jax import evaluate
from clop_jax import train
from clop_jax.experiment import build
from clop_jax.experiment import inputs
from clop_jax.experiment import setup
from clop_jax.runtime import files
from clop_jax.runtime import preemption
from clop_jax.study import grid

# Files in a cell's workdir: what it printed, and its outcome.
LOG, RECORD = 'log.txt', 'cell.json'
# Diverging is a result: the cell would diverge again.
FINAL = ('done', 'diverged')
_FIELDS = {'status': str, 'error': str | None, 'commit': str | None}
_LONGEST_ERROR = 300
_USER_ERRORS = (ValueError, OSError, FloatingPointError)
# Arguments of the compiled step: cells that differ in them share a program.
_TRACED = ('optimizer.learning_rate', 'loss.clop_weight', 'seed')


def check(cells: dict[str, dict]) -> tuple[str, str | None]:
  """Looks for errors in the configs of cells, without training or writing.

  Args:
    cells: Config of each cell (as JSON has it), by name.

  Returns:
    `(platform, fault)`: JAX's platform in this process, and the first error as
    one line, or None.
  """
  data, programs = {}, {}
  for name, values in cells.items():
    config = ml_collections.ConfigDict(values).lock()
    read = json.dumps([values['data'], values['eval']], sort_keys=True)
    untraced = grid.applied(values, dict.fromkeys(_TRACED))
    program = json.dumps(untraced, sort_keys=True)
    try:
      defaults.check(config)
      if config.watch.probe_every_epochs:
        raise ValueError(
          'config.watch.probe_every_epochs must be 0, got '
          f'{config.watch.probe_every_epochs}: a study evaluates its cells '
          'instead of watching them'
        )
      if read not in data:
        # Once here, and not in all jobs at once: this may prepare a data set.
        data[read] = _check_data(config)
      if program not in programs:
        programs[program] = _check_step(config, data[read])
      build.build(config, **programs[program])
    except _USER_ERRORS as error:
      return jax.default_backend(), f'cell {name}: {_one_line(error)}'
    except Exception as error:
      error.add_note(f'cell {name}')
      raise
  return jax.default_backend(), None


def _check_data(config):
  """Checks both splits and returns the training source."""
  source = inputs.training_source(config)
  config = inputs.with_num_classes(config, source)
  if not config.data.test_split:
    raise ValueError(
      'config.data.test_split must name a split, which a study evaluates on; '
      f'got {config.data.test_split!r}'
    )
  inputs.evaluation_reader(config, *inputs.labelled_source(config, 'test'))
  return source


def _check_step(config, source):
  """Traces a training step on shapes and returns the lengths for `build`."""
  run = setup.prepare(config, source=source, load=False)
  build.initial_weights(run.config, run.state)  # raises if they do not fit
  return {
    'total_steps': run.total_steps,
    'steps_per_epoch': run.data.steps_per_epoch,
  }


def run(values: dict, workdir: str, **record) -> None:
  """Trains a cell, or resumes its training, and evaluates it.

  Writes `cell.json` with `status` (done, diverged or failed), `error` (one line
  or None), `train_seconds` and `evaluate_seconds`.

  Args:
    values: Config of the cell, as JSON has it.
    workdir: Folder of the cell.
    **record: Further fields of `cell.json`.

  Raises:
    preemption.PreemptionError: After SIGTERM, once the state is saved.
  """
  config = ml_collections.ConfigDict(values).lock()
  outcome: dict[str, Any] = {'status': 'done', 'error': None}
  times = [time.monotonic()]
  try:
    with _printing_to(os.path.join(workdir, LOG)):
      try:
        train.train(config, workdir, watched=False)
        times.append(time.monotonic())
        evaluate.evaluate(evaluate.Request(workdir)).write(workdir)
      except Exception:
        traceback.print_exc()
        raise
  except preemption.PreemptionError:
    raise
  except Exception as error:
    diverged = isinstance(error, FloatingPointError)
    outcome['status'] = 'diverged' if diverged else 'failed'
    outcome['error'] = _cause(error)
  times.append(time.monotonic())
  outcome['train_seconds'] = round(times[1] - times[0], 2)
  done = outcome['status'] == 'done'
  outcome['evaluate_seconds'] = round(times[2] - times[1], 2) if done else None
  # A folder that cannot be written stops this cell only.
  with contextlib.suppress(OSError):
    write_record(workdir, outcome | record)
  gc.collect()  # a traceback keeps the arrays of its frames alive


def write_record(workdir: str, outcome: dict) -> None:
  """Writes the outcome of a cell, and the commit, into its workdir."""
  text = json.dumps(outcome | {'commit': build.commit()}) + '\n'
  files.write_whole(os.path.join(workdir, RECORD), text.encode())


def read_record(workdir: str) -> dict | None:
  """Returns the outcome of a cell, or None if it is missing or damaged."""
  return read(os.path.join(workdir, RECORD), _FIELDS)


def read(path: str, fields: dict) -> dict | None:
  """Returns the object of a JSON file if its fields have these types."""
  try:
    content = files.read_json(path, fix='')
  except (ValueError, FileNotFoundError, NotADirectoryError):
    return None
  valid = all(
    isinstance(content.get(x, ()), kind) for x, kind in fields.items()
  )
  return content if valid else None


def _one_line(error):
  text = ' '.join(str(error).split())
  if not isinstance(error, _USER_ERRORS):
    text = f'{type(error).__name__}: {text}'
  return text


def _cause(error):
  """Returns the error for the table, shortened."""
  text = _one_line(error)
  if isinstance(error, FloatingPointError):
    text = text.split(';')[0]  # the rest is advice for a single run
  if len(text) > _LONGEST_ERROR:
    text = f'{text[: _LONGEST_ERROR - 3]}...'
  return text


@contextlib.contextmanager
def _printing_to(path):
  """Appends all output to a file, also that of C++ libraries."""
  streams = (sys.stdout, sys.stderr)
  kept = [os.dup(stream.fileno()) for stream in streams]
  try:
    with open(path, 'a') as file:
      for stream in streams:
        os.dup2(file.fileno(), stream.fileno())
    yield
  finally:
    for stream, descriptor in zip(streams, kept, strict=True):
      stream.flush()
      os.dup2(descriptor, stream.fileno())
      os.close(descriptor)
