"""Trains what a config describes, in a workdir that it can go on in.

python -m clop_jax.train --config=configs/digits.py --workdir=runs/digits

The same command again goes on from the last checkpoint; the result is bit for
bit that of a run that was never stopped.
"""

import contextlib
import json
import math
import os
import sys
import time

from absl import flags
import jax
from jax import lax
import ml_collections
from ml_collections import config_flags
import numpy as np
import tqdm

from clop_jax import checkpoint
from clop_jax import command
from clop_jax import experiment
from clop_jax import inputs
from clop_jax import parallel
from clop_jax.data import labels as label_policy
from clop_jax.data import loader
from clop_jax.data import sources


def train(
  config: ml_collections.ConfigDict,
  workdir: str,
  *,
  source: sources.Source | None = None,
  devices=None,
) -> None:
  """Runs, or goes on with, the training in `workdir`.

  Args:
    config: see `defaults`.
    workdir: made if missing. Gets `config.json`, `labels.npz`,
      `checkpoints/<step>/` and `metrics.jsonl`.
    source: training examples of your own, instead of those that `config.data`
      names; see `clop_jax.data.sources`.
    devices: default: all.

  Raises:
    ValueError: for a wrong config, data that do not fit it, a batch that the
      devices cannot share, or a workdir of another config; nothing has been
      written then.
    FloatingPointError: if the loss is not finite; names the step and the last
      checkpoint.
    checkpoint.DamagedCheckpointError: if no checkpoint can be restored.
    OSError: if something cannot be written.
  """
  mesh = parallel.make_mesh(devices)
  parallel.check_batch_size(config.train.batch_size, mesh)
  if source is None:
    source = inputs.training_source(config)
  config = inputs.with_num_classes(config, source)
  true_labels = sources.labels_of(source)
  labels = inputs.training_labels(config, true_labels)
  reader = inputs.training_reader(config, source, labels)
  data = inputs.training_loader(config, reader, mesh)
  total_steps = _total_steps(config, data.steps_per_epoch)
  run = experiment.build(
    config, total_steps=total_steps, steps_per_epoch=data.steps_per_epoch
  )
  # Traced before anything is written: what a wrong value breaks, breaks here.
  target = experiment.abstract_state(run, mesh)
  key = parallel.replicate(mesh, experiment.training_key(config))
  program = _Program(run, data, mesh, target, key)
  chunk = config.train.steps_per_dispatch
  save_every = config.train.checkpoint_every_epochs * data.steps_per_epoch
  log_every = config.train.log_every_steps
  chunks = _chunks(0, total_steps, chunk, (log_every, save_every))
  longest = max(len(steps) for steps in chunks)
  program.lower(longest)

  experiment.save_config(config, workdir)
  _save_labels(os.path.join(workdir, 'labels.npz'), labels, true_labels)
  with checkpoint.Checkpoints(
    os.path.join(workdir, 'checkpoints'), keep=config.train.keep_checkpoints
  ) as checkpoints:
    state = checkpoints.restore_latest(target, warn=_warn)
    if state is None:
      shardings = jax.tree.map(lambda x: x.sharding, target)
      state = jax.jit(run.create_state, out_shardings=shardings)()
    start = int(state.step)
    _print_summary(config, state, program(longest), mesh, total_steps)
    print(
      label_policy.summary(true_labels, labels, config.data.num_classes),
      flush=True,
    )
    if start >= total_steps:
      print(f'step {start} of {total_steps}: already trained')
      return
    if start:
      print(f'going on from step {start} of {total_steps}')
    logger = _MetricsLog(
      os.path.join(workdir, 'metrics.jsonl'),
      start=start,
      total_steps=total_steps,
      batch_size=config.train.batch_size,
    )
    chunks = _chunks(start, total_steps, chunk, (log_every, save_every))
    losses = []
    batches = data.batches(chunks)
    with logger, contextlib.closing(batches):
      for steps, batch in zip(chunks, batches, strict=True):
        state, metrics = program(len(steps))(state, data.resident, batch, key)
        losses.append(metrics['loss'])
        done = steps.stop
        saves = done % save_every == 0 or done == total_steps
        if done % log_every == 0 or saves:
          # Only here does the host wait for the devices.
          _check_finite(losses, done, checkpoints)
          losses.clear()
        if done % log_every == 0:
          logger.write(done, jax.tree.map(lambda x: x[-1], metrics))
        if saves:
          checkpoints.save(state, done)
    checkpoints.wait()


class _Program:
  """The training step, compiled for each number of steps in one dispatch."""

  def __init__(self, run, data, mesh, state, key):
    self._data, self._arguments = data, (state, data.resident)
    self._key, self._lowered, self._compiled = key, {}, {}

    def steps(state, resident, batches, key):
      def one(state, batch):
        return run.step(state, loader.unpack(resident, batch), key)

      if jax.tree.leaves(batches)[0].shape[0] > 1:
        return lax.scan(one, state, batches)
      # A loop of one round would only keep the compiler from looking into it.
      state, metrics = one(state, jax.tree.map(lambda x: x[0], batches))
      return state, jax.tree.map(lambda x: x[None], metrics)

    self._steps = parallel.map_step(
      steps, mesh, batch_axes=(None, None, 1, None)
    )

  def lower(self, count):
    """Traces so many steps, and nothing more."""
    if count not in self._lowered:
      structure = self._data.structure(count)
      self._lowered[count] = self._steps.lower(
        *self._arguments, structure, self._key
      )

  def __call__(self, count):
    """`(state, resident, batches, key) -> (state, metrics)`, compiled."""
    if count not in self._compiled:
      self.lower(count)
      self._compiled[count] = self._lowered[count].compile()
    return self._compiled[count]


def _total_steps(config, steps_per_epoch):
  """The one place where epochs become steps."""
  for name in (
    'log_every_steps',
    'checkpoint_every_epochs',
    'num_epochs',
    'num_micro_batches',
    'steps_per_dispatch',
  ):
    value = config.train[name]
    if value < 1:
      raise ValueError(f'config.train.{name} must be at least 1, got {value}')
  return config.train.num_epochs * steps_per_epoch


def _chunks(start, stop, size, boundaries):
  """Ranges of at most `size` steps that end where a boundary's multiple is."""
  chunks = []
  while start < stop:
    ends = [(start // every + 1) * every for every in boundaries]
    end = min(start + size, stop, *ends)
    chunks.append(range(start, end))
    start = end
  return chunks


def _save_labels(path, labels, true_labels):
  if not os.path.exists(path):
    label_policy.save(path, labels, true_labels)
  elif not np.array_equal(label_policy.load(path), labels):
    raise ValueError(
      f'{path} was made from other data than config.data gives now '
      f'({label_policy.load(path).size:,} examples there, {labels.size:,} '
      'here); use another --workdir, or the same data'
    )


def _check_finite(losses, step, checkpoints):
  values = np.concatenate(jax.device_get(losses))
  broken = np.flatnonzero(~np.isfinite(values))
  if not broken.size:
    return
  first = step - len(values) + 1 + int(broken[0])
  checkpoints.wait()
  saved = checkpoints.steps()
  last = f'the one of step {saved[-1]}' if saved else 'none yet'
  raise FloatingPointError(
    f'the loss is {values[broken[0]]} at step {first}; the last good '
    f'checkpoint is {last}. Lower config.optimizer.learning_rate or set '
    'config.optimizer.clip_norm, with a new --workdir'
  )


class _MetricsLog:
  """`metrics.jsonl`, and the progress for a person to see."""

  def __init__(self, path, *, start, total_steps, batch_size):
    _drop_after(path, start)
    self._file = open(path, 'a')  # noqa: SIM115 (closed by __exit__)
    self._batch_size = batch_size
    self._total_steps = total_steps
    self._is_terminal = sys.stderr.isatty()
    self._bar = tqdm.tqdm(
      total=total_steps,
      initial=start,
      unit='step',
      disable=not self._is_terminal,
    )
    self._start, self._began = start, time.monotonic()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self._bar.close()
    self._file.close()

  def write(self, step, metrics):
    values = {k: float(v) for k, v in jax.device_get(metrics).items()}
    # NaN is not JSON; a diagnostic may be NaN where the loss is not.
    line = {'step': step} | {
      k: v if math.isfinite(v) else None for k, v in sorted(values.items())
    }
    self._file.write(json.dumps(line) + '\n')
    self._file.flush()
    seconds = time.monotonic() - self._began
    steps_per_second = (step - self._start) / seconds
    images_per_second = steps_per_second * self._batch_size
    shown = {
      'loss': f'{values["loss"]:.4f}',
      'clop': f'{values["clop_loss"]:.4f}',
      'effective rank': f'{values["effective_rank"]:.1f}',
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


def _drop_after(path, step):
  """Cuts the log back to `step`: what was logged later is trained again."""
  if not os.path.exists(path):
    return
  kept = []
  with open(path) as file:
    for line in file:
      try:
        entry = json.loads(line)
      except json.JSONDecodeError:
        break  # a line that a kill cut short is the last one
      if entry['step'] <= step:
        kept.append(line)
  partial = f'{path}.partial'
  with open(partial, 'w') as file:
    file.writelines(kept)
  os.replace(partial, path)


def _print_summary(config, state, compiled, mesh, total_steps):
  parameters = sum(x.size for x in jax.tree.leaves(state.params))
  # The compiler counts one device's program, and a loop's body once.
  flops = (compiled.cost_analysis() or {}).get('flops', math.nan) * mesh.size
  device = mesh.devices.flat[0]
  print(
    f'{config.data.name}: {parameters:,} parameters, {flops / 1e9:.2f} GFLOP a '
    f'step of {config.train.batch_size} images (two views each), '
    f'{total_steps:,} steps\n'
    f'{mesh.size} device(s): {device.device_kind}; jax {jax.__version__}',
    flush=True,
  )


def _warn(message):
  print(f'warning: {message}', file=sys.stderr, flush=True)


def define_flags() -> None:
  """Defines the command's flags; importing this module defines none."""
  config_flags.DEFINE_config_file('config', None, 'A file of configs/.')
  flags.DEFINE_string(
    'workdir', None, 'Folder of the run: config, checkpoints, metrics.'
  )


def main() -> None:
  """The command."""
  if not flags.FLAGS.workdir:
    raise ValueError('--workdir must name a folder for the run, got none')
  if flags.FLAGS.config is None:
    raise ValueError('--config must name a file of configs/, got none')
  train(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == '__main__':
  command.run(main, define_flags)
