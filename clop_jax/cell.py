"""One cell of a study, trained and evaluated in a process that stays.

`study` starts it, as `python -m clop_jax.cell`, and sends it one cell after
another.
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

from clop_jax import evaluate
from clop_jax import experiment
from clop_jax import inputs
from clop_jax import preemption
from clop_jax import train
from clop_jax import workers

LOG = 'log.txt'  # of a cell's workdir: what it printed


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
        source = inputs.training_source(config)
        num_classes = inputs.with_num_classes(config, source).data.num_classes
        if num_classes < 2:
          raise ValueError(
            f'config.data.num_classes must be at least 2, got {num_classes}'
          )
    except (ValueError, OSError) as error:
      fault = f'cell {name}: {_one_line(error)}'
      break
  return jax.default_backend(), fault


def run(values: dict, workdir: str) -> dict:
  """Trains, or goes on with, a cell and evaluates it.

  Args:
    values: its config, as JSON has it.
    workdir: of the cell.

  Returns:
    `status` (done, diverged or failed), `error` (one line or None),
    `train_seconds` and `evaluate_seconds` (None if it did not come to that).

  Raises:
    preemption.PreemptionError: after SIGTERM, when the state has been saved.
  """
  config = ml_collections.ConfigDict(values).lock()
  outcome = {
    'status': 'done',
    'error': None,
    'train_seconds': None,
    'evaluate_seconds': None,
  }
  os.makedirs(workdir, exist_ok=True)
  with _printing_to(os.path.join(workdir, LOG)):
    try:
      began = time.monotonic()
      train.train(config, workdir)
      trained = time.monotonic()
      outcome['train_seconds'] = round(trained - began, 2)
      evaluate.write(workdir, *evaluate.evaluate(workdir))
      outcome['evaluate_seconds'] = round(time.monotonic() - trained, 2)
    except FloatingPointError as error:
      outcome |= {'status': 'diverged', 'error': _one_line(error)}
    except preemption.PreemptionError:
      raise
    except Exception as error:
      traceback.print_exc()
      outcome |= {'status': 'failed', 'error': _one_line(error)}
    if outcome['error']:
      print(f'{outcome["status"]}: {outcome["error"]}')
  # A traceback holds on to the arrays of its frames.
  gc.collect()
  return outcome


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
  return {'check': check, 'run': run}[function](*arguments)


if __name__ == '__main__':
  # Orbax and TFDS tell of every file they touch.
  logging.set_verbosity(logging.FATAL)
  workers.serve(_work)
