"""Cells of a study, trained and evaluated in a process that stays.

`study` starts it, as `python -m clop_jax.study.cell`, and sends it one cell
after another, or several to train in one program.
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
import numpy as np

from clop_jax import defaults
from clop_jax import evaluate
from clop_jax import train
from clop_jax.data import loader
from clop_jax.data import sources
from clop_jax.experiment import build
from clop_jax.experiment import inputs
from clop_jax.runtime import files
from clop_jax.runtime import parallel
from clop_jax.runtime import preemption
from clop_jax.study import ensemble
from clop_jax.study import workers

# In a cell's workdir: what it printed, and how it ended.
LOG = 'log.txt'
RECORD = 'cell.json'
# The fields of `RECORD` and their types, but for times, which may be missing.
FIELDS = {'status': str, 'error': str | None, 'commit': str | None}
_LONGEST_ERROR = 300
_USER_ERRORS = (ValueError, OSError, FloatingPointError)


def check(cells: dict[str, dict]) -> tuple[str, str | None]:
  """Looks for what is wrong with cells, without training or writing.

  Args:
    cells: the config of each, by name.

  Returns:
    `(platform, fault)`: what JAX runs on here, and one line or None.
  """
  data, lengths = {}, {}
  fault = None
  for name, values in cells.items():
    config = ml_collections.ConfigDict(values).lock()
    read = json.dumps([values['data'], values['eval']], sort_keys=True)
    traced = json.dumps(ensemble.shared_part(values), sort_keys=True)
    try:
      defaults.check(config)
      _check_watch(config)
      if read not in data:
        # Once, and not by all cells at the same time: it may be prepared here.
        data[read] = _check_data(config)
      if traced not in lengths:
        lengths[traced] = _check_step(config, *data[read])
      build.build(config, **lengths[traced])
    except Exception as error:
      if not isinstance(error, _USER_ERRORS):
        traceback.print_exc()
      fault = f'cell {name}: {_one_line(error)}'
      break
  return jax.default_backend(), fault


def _check_watch(config):
  if config.watch.probe_every_epochs:
    raise ValueError(
      'config.watch.probe_every_epochs must be 0: the cells of a study are not '
      f'watched but evaluated; got {config.watch.probe_every_epochs}'
    )


def _check_data(config):
  """The training source and its true labels, if both splits will do."""
  source = inputs.training_source(config)
  config = inputs.with_num_classes(config, source)
  if not config.data.test_split:
    raise ValueError(
      'config.data.test_split must name a split: a study evaluates each cell; '
      f'got {config.data.test_split!r}'
    )
  inputs.evaluation_reader(config, *inputs.labelled_source(config, 'test'))
  return source, sources.labels_of(source)


def _check_step(config, source, true_labels):
  """Traces a training step on shapes; gives the lengths for `build`."""
  mesh = parallel.make_mesh()
  batch_size = config.train.batch_size
  parallel.check_batch_size(batch_size, mesh)
  config = inputs.with_num_classes(config, source)
  labels = inputs.training_labels(config, true_labels)
  reader = inputs.training_reader(config, source, labels)
  order = loader.Order(len(reader), batch_size=batch_size, seed=config.seed)
  lengths = {
    'total_steps': train.count_steps(config, order.steps_per_epoch),
    'steps_per_epoch': order.steps_per_epoch,
  }
  run = build.build(config, **lengths)
  integers = jax.ShapeDtypeStruct((batch_size,), np.int32)
  image = jax.ShapeDtypeStruct((batch_size, *reader.shape), np.uint8)
  batch = {'image': image, 'label': integers, 'index': integers}
  if config.loss.pseudo_label_threshold is not None:
    batch['true_label'] = integers
  step = parallel.map_step(run.step, mesh, batch_axes=(None, 0, None))
  key = build.training_key(config)
  state = jax.eval_shape(run.create_state)
  build.initial_weights(config, state)  # refuses those that do not fit
  _, metrics = jax.eval_shape(step, state, batch, key)
  save_every = config.train.checkpoint_every_epochs * order.steps_per_epoch
  train.check_best(config, sorted(metrics), lengths['total_steps'], save_every)
  return lengths


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
  began, trained = time.monotonic(), None

  def end(name, status, error=None, evaluate_seconds=None):
    if name in outcomes:
      return
    seconds = (trained or time.monotonic()) - began
    outcomes[name] = {
      'status': status,
      'error': error,
      'train_seconds': round(seconds / len(cells), 2),
      'evaluate_seconds': evaluate_seconds,
    }
    # A folder that cannot be written to ends this cell alone.
    with contextlib.suppress(OSError):
      record(workdirs[name], outcomes[name])

  def diverged(number, error):
    # At once: if this is stopped, the others go on without it.
    end(list(cells)[number], 'diverged', _cause(error))

  with _ending(end, cells):
    for name in cells:
      os.makedirs(workdirs[name], exist_ok=True)
    for name in others:
      with open(os.path.join(workdirs[name], LOG), 'a') as log:
        log.write(f'trains together with {first}, whose log this is in\n')
    with _printing_to(os.path.join(workdirs[first], LOG)), _ending(end, cells):
      if others:
        ensemble.train_together(
          list(configs.values()), list(workdirs.values()), diverged=diverged
        )
      else:
        train.train(configs[first], workdirs[first], watched=False)
  trained = time.monotonic()
  for name in [name for name in cells if name not in outcomes]:
    start = time.monotonic()
    with _printing_to(os.path.join(workdirs[name], LOG)), _ending(end, [name]):
      request = evaluate.Request(workdirs[name])
      evaluate.evaluate(request).write(workdirs[name])
      end(name, 'done', evaluate_seconds=round(time.monotonic() - start, 2))
  # A traceback holds on to the arrays of its frames.
  gc.collect()
  return outcomes


def record(workdir: str, outcome: dict) -> None:
  """Writes how a cell ended, and the commit, into its workdir."""
  text = json.dumps(outcome | {'commit': build.commit()}) + '\n'
  files.write_whole(os.path.join(workdir, RECORD), text.encode())


@contextlib.contextmanager
def _ending(end, names):
  """Ends cells by what is raised."""
  try:
    yield
  except preemption.PreemptionError:
    raise
  except Exception as error:
    traceback.print_exc()
    status = 'diverged' if isinstance(error, FloatingPointError) else 'failed'
    for name in names:
      end(name, status, _cause(error))


def _one_line(error):
  text = ' '.join(str(error).split())
  if not isinstance(error, _USER_ERRORS):
    text = f'{type(error).__name__}: {text}'
  return text


def _cause(error):
  """What goes into the table; the log has the whole."""
  text = _one_line(error)
  if isinstance(error, FloatingPointError):
    # What follows is advice for a run that is alone.
    text = text.split(';')[0]
  if len(text) > _LONGEST_ERROR:
    text = f'{text[: _LONGEST_ERROR - 3]}...'
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
  workers.serve(_work, end=preemption.ask)
