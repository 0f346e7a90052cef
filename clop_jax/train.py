"""Trains the model described by a config, resuming from its workdir.

python -m clop_jax.train --config=configs/digits.py --workdir=runs/digits

Run the same command again to resume from the last checkpoint. The result is bit
for bit that of an unbroken run.
"""

if __name__ == '__main__':
  # SIGTERM may come during the imports below, which take seconds.
  from clop_jax.runtime import preemption

  preemption.listen()

from collections.abc import Callable
import contextlib
import json
import math
import os
from typing import Any

from absl import flags
import jax
import ml_collections
from ml_collections import config_flags
import numpy as np

from clop_jax import cli
from clop_jax.data import labels as label_policy
from clop_jax.data import sources
from clop_jax.experiment import build
from clop_jax.experiment import checkpoint
from clop_jax.experiment import metrics_log
from clop_jax.experiment import setup as setup_lib
from clop_jax.experiment import workdir as workdir_lib
from clop_jax.runtime import files
from clop_jax.runtime import parallel
from clop_jax.runtime import preemption
from clop_jax.tracking import profiling
from clop_jax.tracking import wandb as wandb_log
from clop_jax.tracking import watch
from clop_jax.training import callback


def train(
  config: ml_collections.ConfigDict,
  workdir: str,
  *,
  source: sources.Source | None = None,
  backbone: Any = None,
  contrastive: Callable[..., jax.Array] | None = None,
  devices=None,
  profile_steps: int | None = None,
  watched: bool = True,
  wandb: str | None = None,
) -> None:
  """Trains the model described by a config, resuming from its workdir.

  Args:
    config: Config of the run, see `defaults`.
    workdir: Folder of the run, the same for all processes. It gets
      `config.json`, `labels.npz`, `checkpoints/<step>/`, `metrics.jsonl` and
      the outputs of `config.watch`.
    source: Training examples to use instead of those that `config.data` names,
      see `clop_jax.data.sources`.
    backbone: Backbone to use instead of `config.model.name`: a `flax.linen`
      module or an object as in `clop_jax.models.adapters`. Pass it again to
      resume, evaluate or load.
    contrastive: Loss `(embeddings, labels, *, axis_name) -> scalar` to use
      instead of `config.loss.contrastive`, with the conventions of
      `clop_jax.loss`.
    devices: Devices to train on; None is all.
    profile_steps: Number of steps to record, see `tracking.profiling`.
    watched: If False, ignore `config.watch`; see `tracking.watch`.
    wandb: 'offline' or 'online' logs to Weights & Biases as well.

  Raises:
    ValueError: If a field of the config is invalid, the data do not fit it, the
      devices cannot share the batch, or the workdir belongs to another config
      or is in use. Nothing has been written then.
    preemption.PreemptionError: After SIGTERM, once the state is saved.
    FloatingPointError: If the loss is not finite. The error names the step and
      the last checkpoint.
    checkpoint.DamagedCheckpointError: If no checkpoint can be restored.
    OSError: If something cannot be written.

  Example:
    >>> from clop_jax import defaults
    >>> from clop_jax import train
    >>> config = defaults.get_config()
    >>> config.data.name = 'synthetic'
    >>> train.train(config, 'runs/synthetic')  # doctest: +SKIP
  """
  callbacks: list[callback.Callback] = []
  if profile_steps is not None:
    callbacks.append(profiling.Profiler(workdir, profile_steps))
  setup = setup_lib.prepare(
    config,
    source=source,
    backbone=backbone,
    contrastive=contrastive,
    devices=devices,
  )
  config, examples = setup.config, setup.examples
  initial = None
  if not workdir_lib.has_checkpoint(workdir):
    # Read before anything is written, so that incompatible weights fail first.
    initial = build.initial_weights(config, setup.state)
  if watched:
    callbacks.append(watch.Watch(setup, workdir, wandb=wandb))
  true_labels, labels = examples.true_labels, examples.labels
  with (
    workdir_lib.claim(config, workdir, labels, true_labels),
    workdir_lib.open_checkpoints(config, workdir) as checkpoints,
    contextlib.ExitStack() as stack,
  ):
    for hooks in callbacks:
      stack.enter_context(hooks)
    state = checkpoints.restore_latest(setup.state, warn=parallel.warn)
    if state is None:
      state = _first_state(setup, workdir, initial)
    steps = range(int(state.step), setup.total_steps)
    _print_summary(setup, state)
    _say(label_policy.summary(true_labels, labels, config.data.num_classes))
    if not steps:
      _say(f'step {steps.start} of {steps.stop}: already trained')
      return
    if steps.start:
      _say(f'resuming from step {steps.start} of {steps.stop}')
    if parallel.is_main():
      path = os.path.join(workdir, metrics_log.FILE)
      log = metrics_log.MetricsLog(
        path, steps=steps, batch_size=config.train.batch_size
      )
      callbacks = [stack.enter_context(log), *callbacks]
    for hooks in callbacks:
      hooks.started(steps, state)
    _Loop(setup, checkpoints, callbacks).run(state)


class _Loop:
  """Runs the steps of a training, logs them and saves checkpoints."""

  def __init__(self, setup, checkpoints, callbacks):
    self._setup, self._checkpoints = setup, checkpoints
    self._callbacks = callbacks
    # Losses that were not checked yet, and `(step, losses, metrics)` to log.
    self._losses, self._due = [], []
    self._since_save = []

  def run(self, state) -> None:
    """Trains to the end, or to the end of a dispatch after SIGTERM."""
    setup, start = self._setup, int(state.step)
    total_steps, save_every = setup.total_steps, setup.save_every
    chunks = setup.chunks(start)
    pending = None
    saved = done = start
    with (
      contextlib.closing(setup.data.batches(chunks)) as batches,
      preemption.Notice() as notice,
    ):
      dispatches = zip(chunks, batches, strict=True)
      for steps, batch in _until_notice(dispatches, notice):
        program = setup.program(len(steps))
        state, metrics = program(state, setup.shared, batch)
        # Log only now: the devices have their next steps while the host waits
        # for the numbers of the last ones.
        self._log_due()
        # At most two dispatches are unfinished. That keeps the devices busy,
        # and a state to save after SIGTERM is not tens of dispatches away.
        jax.block_until_ready(pending)
        pending = metrics
        done = steps.stop
        preempted = notice.reached(steps)
        self._add(done, metrics)
        # Skip this when preempted: there is little time left. It comes before
        # the save, so that results lost here are computed again.
        if not preempted:
          self._call(steps, state)
        if preempted or done % save_every == 0 or done == total_steps:
          self._save(state, done)
          saved = done
        if preempted:
          break
      if saved < done:  # the data could not be read after the notice
        self._save(state, done)
      self._checkpoints.wait()
    if done < total_steps:
      what = f'saved step {done}' if start < done else f'still at step {done}'
      raise preemption.PreemptionError(
        f'preempted: {what} of {total_steps}; rerun the same command to resume'
      )

  def _add(self, step, metrics):
    """Keeps the losses of a dispatch, and its metrics if they are logged."""
    self._losses.append(metrics['loss'])
    if step % self._setup.config.train.log_every_steps == 0:
      self._due.append((step, [*self._losses], metrics))
      self._losses.clear()

  def _call(self, steps, state):
    if any(hooks.due(steps) for hooks in self._callbacks):
      self._log_all(steps.stop)
    for hooks in self._callbacks:
      hooks.reached(steps, state)

  def _log_due(self):
    """Waits for the metrics of logged steps, and logs them."""
    for step, losses, metrics in self._due:
      check_finite(losses, step, self._checkpoints)
      # Index on the host, where nothing is compiled.
      last = {k: v[-1] for k, v in jax.device_get(metrics).items()}
      entry = metrics_log.to_floats(last)
      self._since_save.append(entry)
      for hooks in self._callbacks:
        hooks.logged(step, entry)
      self._checkpoints.raise_failure()
    self._due.clear()

  def _log_all(self, step):
    """Logs what is due, and checks all losses up to `step`."""
    self._log_due()
    if self._losses:
      check_finite(self._losses, step, self._checkpoints)
      self._losses.clear()

  def _save(self, state, step):
    self._log_all(step)
    self._checkpoints.save(state, step, _means(self._since_save))
    self._since_save.clear()


def _until_notice(chunks, notice):
  """Yields from `chunks`; after a notice, a failed read only ends them.

  A preemption often takes away the storage of the data as well.
  """
  try:
    yield from chunks
  except Exception:
    if not notice.came():
      raise


def _first_state(setup, workdir, initial):
  """Returns the state before the first step.

  `initial`, if not None, are the weights of the backbone. Their path and hash
  are written to `initial_weights.json` in the workdir.
  """
  shardings = jax.tree.map(lambda x: x.sharding, setup.state)
  create = jax.jit(setup.experiment.create_state, out_shardings=shardings)
  key = parallel.replicate(setup.mesh, jax.random.key(setup.config.seed))
  if initial is None:
    return create(key)
  if parallel.is_main():
    # The path in the config does not identify the file's content.
    record = {'path': initial.path, 'sha256': initial.sha256}
    files.write_whole(
      os.path.join(workdir, 'initial_weights.json'),
      f'{json.dumps(record, indent=2)}\n'.encode(),
    )
  _say(f'the backbone starts from {initial.path} (sha256 {initial.sha256})')
  variables = parallel.from_main(initial.variables)
  return create(key, parallel.replicate(setup.mesh, variables))


def _means(logged):
  """Returns the mean of each metric over the logged steps."""
  names = logged[0] if logged else ()
  return {
    name: float(np.mean([entry[name] for entry in logged])) for name in names
  }


def check_finite(losses, step, checkpoints):
  """Raises FloatingPointError if a loss of the steps up to `step` is not."""
  values = np.concatenate(jax.device_get(losses))
  broken = np.flatnonzero(~np.isfinite(values))
  if not broken.size:
    return
  first = step - len(values) + 1 + int(broken[0])
  failure = None
  try:
    checkpoints.wait()
  except checkpoint.SaveError as error:
    failure = error
  saved = checkpoints.steps()
  last = f'the one of step {saved[-1]}' if saved else 'none yet'
  if failure is not None:
    last += f' ({failure})'
  raise FloatingPointError(
    f'the loss is {values[broken[0]]} at step {first}; the last good '
    f'checkpoint is {last}. Lower config.optimizer.learning_rate or set '
    'config.optimizer.clip_norm, with a new --workdir'
  ) from failure


def _print_summary(setup, state):
  config, mesh = setup.config, setup.mesh
  parameters = sum(x.size for x in jax.tree.leaves(state.params))
  compiled = setup.program(setup.longest)
  # The compiler counts the program of one device, and the body of a loop once.
  flops = (compiled.cost_analysis() or {}).get('flops', math.nan) * mesh.size
  device = mesh.devices.flat[0]
  _say(
    f'{config.data.name}: {parameters:,} parameters, {flops / 1e9:.2f} GFLOP a '
    f'step of {config.train.batch_size} images (two views each), '
    f'{setup.total_steps:,} steps\n'
    f'{mesh.size} device(s): {device.device_kind}; jax {jax.__version__}'
  )


def _say(message):
  if parallel.is_main():
    print(message, flush=True)


def define_flags() -> None:
  """Defines the command's flags; importing this module defines none."""
  config_flags.DEFINE_config_file('config', None, 'A file of configs/.')
  flags.DEFINE(
    cli.PATH,
    'workdir',
    None,
    'Folder of the run: config, checkpoints, metrics.',
  )
  flags.DEFINE_integer(
    'profile',
    None,
    'Record N steps for TensorBoard or Perfetto, and print the path.',
    lower_bound=1,
  )
  flags.DEFINE_enum(
    'wandb',
    None,
    wandb_log.MODES,
    'Log to Weights & Biases as well (pip install clop-jax[wandb]).',
  )


def main() -> None:
  """The command."""
  if not flags.FLAGS.workdir:
    raise ValueError('--workdir must name a folder for the run, got none')
  if flags.FLAGS.config is None:
    raise ValueError('--config must name a file of configs/, got none')
  train(
    flags.FLAGS.config,
    flags.FLAGS.workdir,
    profile_steps=flags.FLAGS.profile,
    wandb=flags.FLAGS.wandb,
  )


if __name__ == '__main__':
  cli.run(main, define_flags)
