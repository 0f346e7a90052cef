"""Trains what a config describes, in a workdir that it can go on in.

python -m clop_jax.train --config=configs/digits.py --workdir=runs/digits

The same command again goes on from the last checkpoint; the result is bit for
bit that of a run that was never stopped.
"""

if __name__ == '__main__':
  # SIGTERM may come during the imports below, which take seconds.
  from clop_jax.runtime import preemption

  preemption.listen()

import contextlib
import functools
import json
import math
import os
import types

from absl import flags
import jax
from jax import lax
import ml_collections
from ml_collections import config_flags
import numpy as np

from clop_jax import cli
from clop_jax import defaults
from clop_jax.data import labels as label_policy
from clop_jax.data import loader
from clop_jax.data import sources
from clop_jax.experiment import build
from clop_jax.experiment import checkpoint
from clop_jax.experiment import inputs
from clop_jax.experiment import metrics_log
from clop_jax.experiment import workdir as workdir_lib
from clop_jax.runtime import files
from clop_jax.runtime import parallel
from clop_jax.runtime import preemption
from clop_jax.tracking import callback
from clop_jax.tracking import profiling
from clop_jax.tracking import wandb as wandb_log
from clop_jax.tracking import watch


def train(
  config: ml_collections.ConfigDict,
  workdir: str,
  *,
  source: sources.Source | None = None,
  devices=None,
  profile_steps: int | None = None,
  watched: bool = True,
  wandb: str | None = None,
) -> None:
  """Runs, or goes on with, the training in `workdir`.

  Args:
    config: see `defaults`.
    workdir: made if missing. Gets `config.json`, `labels.npz`,
      `checkpoints/<step>/`, `metrics.jsonl` and what `config.watch` asks for.
      The same for all processes.
    source: training examples of your own, instead of those that `config.data`
      names; see `clop_jax.data.sources`.
    devices: default: all.
    profile_steps: Number of steps to record, see `profiling`. None is none.
    watched: If False, ignore `config.watch`; see `tracking.watch`.
    wandb: 'offline' or 'online' logs to Weights & Biases as well; None: not.

  Raises:
    ValueError: for a wrong config, data that do not fit it, a batch that the
      devices cannot share, or a workdir of another config or that another run
      is using; nothing has been written then.
    preemption.PreemptionError: after SIGTERM, when the state has been saved.
    FloatingPointError: if the loss is not finite; names the step and the last
      checkpoint.
    checkpoint.DamagedCheckpointError: if no checkpoint can be restored.
    OSError: if something cannot be written.
  """
  defaults.check(config)
  callbacks: list[callback.Callback] = []
  if profile_steps is not None:
    callbacks.append(profiling.Profiler(workdir, profile_steps))
  mesh = parallel.make_mesh(devices)
  parallel.check_batch_size(config.train.batch_size, mesh)
  named = source is None
  examples = inputs.training_source(config) if source is None else source
  config = inputs.with_num_classes(config, examples)
  true_labels = sources.labels_of(examples)
  labels = inputs.training_labels(config, true_labels)
  if named:
    inputs.check_evaluation(config)
  reader = inputs.training_reader(config, examples, labels)
  data = inputs.training_loader(config, reader, mesh)
  total_steps = count_steps(config, data.steps_per_epoch)
  run = build.build(
    config, total_steps=total_steps, steps_per_epoch=data.steps_per_epoch
  )
  # Traced before anything is written: what a wrong value breaks, breaks here.
  target = build.abstract_state(run, mesh)
  read_initial = initial_reader(config, target, workdir)
  shared = parallel.replicate(mesh, _shared(config, true_labels))
  shared |= {'resident': data.resident}
  program = Program(run, data, mesh, target, shared)
  chunk = config.train.steps_per_dispatch
  save_every = config.train.checkpoint_every_epochs * data.steps_per_epoch
  log_every = config.train.log_every_steps
  chunks = split_steps(0, total_steps, chunk, (log_every, save_every))
  longest = max(len(steps) for steps in chunks)
  program.lower(longest)
  check_best(config, program.metric_names(longest), total_steps, save_every)
  if watched:
    setup = types.SimpleNamespace(
      config=config,
      run=run,
      target=target,
      source=examples,
      named=named,
      true_labels=true_labels,
      reader=reader,
      data=data,
      mesh=mesh,
    )
    callbacks.append(watch.Watch(setup, workdir, wandb=wandb))
  with (
    workdir_lib.claim(config, workdir, labels, true_labels),
    workdir_lib.open_checkpoints(config, workdir) as checkpoints,
    contextlib.ExitStack() as stack,
  ):
    for hooks in callbacks:
      stack.enter_context(hooks)
    state = checkpoints.restore_latest(target, warn=parallel.warn)
    if state is None:
      shardings = jax.tree.map(lambda x: x.sharding, target)
      create = jax.jit(run.create_state, out_shardings=shardings)
      state = first_state(create, config, workdir, mesh, read_initial())
    start = int(state.step)
    for hooks in callbacks if start < total_steps else []:
      hooks.started(range(start, total_steps), state)
    _print_summary(config, state, program(longest), mesh, total_steps)
    _say(label_policy.summary(true_labels, labels, config.data.num_classes))
    if start >= total_steps:
      _say(f'step {start} of {total_steps}: already trained')
      return
    if start:
      _say(f'going on from step {start} of {total_steps}')
    log: metrics_log.MetricsLog | metrics_log.Silent = metrics_log.Silent()
    if parallel.is_main():
      log = metrics_log.MetricsLog(
        os.path.join(workdir, metrics_log.FILE),
        start=start,
        total_steps=total_steps,
        batch_size=config.train.batch_size,
      )
    chunks = split_steps(start, total_steps, chunk, (log_every, save_every))
    batches = data.batches(chunks)
    with log, contextlib.closing(batches):
      _run(
        program,
        state,
        shared,
        zip(chunks, batches, strict=True),
        total_steps=total_steps,
        log_every=log_every,
        save_every=save_every,
        log=log,
        checkpoints=checkpoints,
        callbacks=callbacks,
      )


def _run(
  program,
  state,
  shared,
  chunks,
  *,
  total_steps,
  log_every,
  save_every,
  log,
  checkpoints,
  callbacks,
):
  """The steps of `chunks`, `(steps, batch)` each, logged and saved."""
  losses, due, logged = [], [], []
  start = saved = done = int(state.step)
  in_flight = InFlight()

  def write_due():
    """Waits for the metrics that are to be logged, and logs them."""
    for step, since_last, metrics in due:
      check_finite(since_last, step, checkpoints)
      # Taken on the host, where it compiles nothing.
      last = {k: v[-1] for k, v in jax.device_get(metrics).items()}
      logged.append(metrics_log.to_floats(last))
      log.write(step, logged[-1])
      for hooks in callbacks:
        hooks.logged(step, logged[-1])
      checkpoints.raise_failure()
    due.clear()

  def write_all(step):
    """Logs what is due, and checks all losses up to `step`."""
    write_due()
    if losses:
      check_finite(losses, step, checkpoints)
      losses.clear()

  def save(step, state):
    write_all(step)
    checkpoints.save(state, step, mean_metrics(logged))
    logged.clear()

  with preemption.Notice() as notice:
    for steps, batch in _until_notice(chunks, notice):
      state, metrics = program(len(steps))(state, shared, batch)
      # Only now: the devices have the next steps while the host waits for the
      # numbers of the last ones.
      write_due()
      in_flight.add(metrics)
      losses.append(metrics['loss'])
      done = steps.stop
      told = notice.reached(steps)
      if done % log_every == 0:
        due.append((done, [*losses], metrics))
        losses.clear()
      # When preempted there is no time for it.
      if not told:
        if any(hooks.due(steps) for hooks in callbacks):
          write_all(done)
        # Before the save: what is lost here is trained again.
        for hooks in callbacks:
          hooks.reached(steps, state)
      if told or done % save_every == 0 or done == total_steps:
        save(done, state)
        saved = done
      if told:
        break
    if saved < done:  # the data could not be read after the notice
      save(done, state)
    checkpoints.wait()
    if done < total_steps:
      what = f'saved step {done}' if start < done else f'still at step {done}'
      raise preemption.PreemptionError(
        f'preempted: {what} of {total_steps}; rerun the same command to resume'
      )


def _until_notice(chunks, notice):
  """Yields from `chunks`; a failure to read ends them if the notice came.

  What ends a run often takes away what it reads from as well.
  """
  try:
    yield from chunks
  except Exception:
    if not notice.came():
      raise


class InFlight:
  """Dispatches that the devices have not done yet: two at most.

  The host runs ahead of the devices, by tens of dispatches if nothing stops it.
  What it has dispatched cannot be taken back, so a state to be saved after
  SIGTERM is minutes away where a step takes one. Two are enough to keep the
  devices busy: when one is done the next has been queued for as long as that
  one took, and the host has as long again to queue another.
  """

  def __init__(self):
    """Nothing has been dispatched yet."""
    self._last = None

  def add(self, results) -> None:
    """Adds a dispatch by its results; waits for the one before it."""
    if self._last is not None:
      jax.block_until_ready(self._last)
    self._last = results


def _shared(config, true_labels):
  """Arguments of every dispatch other than the data."""
  # Numbers are arguments, not constants: runs that differ in them alone share
  # what JAX's compilation cache holds.
  numbers = jax.tree.map(np.float32, build.numbers_of(config))
  shared = {'key': build.training_key(config), 'numbers': numbers}
  if config.loss.pseudo_label_threshold is not None:
    shared['true_label'] = true_labels.astype(np.int32)
  return shared


def abstract_program(
  config: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh,
  *,
  num_examples: int,
  image_shape: tuple[int, int, int],
  platform: str | None = None,
) -> 'Program':
  """The program that `train` would run, on shapes instead of arrays.

  It can be traced, and lowered for another platform, but not called.

  Args:
    config: See `defaults`; `data.num_classes` must be set.
    mesh: Mesh of the devices, which need not be attached to this process.
    num_examples: Number of training images.
    image_shape: `(height, width, channels)` of the images in the data set.
    platform: Platform whose defaults the config takes, see `build.build`.
      None is the mesh's.

  Returns:
    The program.

  Raises:
    ValueError: If a field of the config is invalid, or the batch does not fit
      the devices or the data.
  """
  data = inputs.abstract_loader(
    config, mesh, num_examples=num_examples, image_shape=image_shape
  )
  run = build.build(
    config,
    total_steps=count_steps(config, data.steps_per_epoch),
    steps_per_epoch=data.steps_per_epoch,
    platform=platform or mesh.devices.flat[0].platform,
  )
  sharding = parallel.replicated(mesh)
  shared = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    jax.eval_shape(lambda: _shared(config, np.zeros(num_examples, np.int32))),
  )
  shared |= {'resident': data.resident}
  state = build.abstract_state(run, mesh)
  return Program(run, data, mesh, state, shared)


class Program:
  """The training step, compiled for each number of steps in one dispatch."""

  def __init__(self, run, data, mesh, state, shared):
    """Traces nothing yet.

    Args:
      run: See `build.Experiment`.
      data: Loader whose `structure` the batches have.
      mesh: See `parallel.make_mesh`.
      state: Training state, or its shapes.
      shared: Arguments of every dispatch, or their shapes: `resident`, `key`,
        `numbers` and, with pseudo-labels, `true_label`.
    """
    self.arguments = (state, shared)
    self.steps_per_epoch = data.steps_per_epoch
    self._data = data
    self._lowered, self._compiled = {}, {}

    def steps(state, shared, batches):
      def one(state, batch):
        examples = loader.unpack(shared['resident'], batch)
        if 'true_label' in shared:
          index = examples['index']
          examples = examples | {'true_label': shared['true_label'][index]}
        return run.step(state, examples, shared['key'], shared['numbers'])

      if jax.tree.leaves(batches)[0].shape[0] > 1:
        return lax.scan(one, state, batches)
      # A loop of one round would only keep the compiler from looking into it.
      state, metrics = one(state, jax.tree.map(lambda x: x[0], batches))
      return state, jax.tree.map(lambda x: x[None], metrics)

    self._steps = parallel.map_step(steps, mesh, batch_axes=(None, None, 1))

  def trace(self, count):
    """Traces a dispatch of `count` steps."""
    return self._steps.trace(*self.arguments, self._data.structure(count))

  def lower(self, count):
    """Lowers a dispatch of `count` steps for this process's platform."""
    if count not in self._lowered:
      self._lowered[count] = self.trace(count).lower()

  def metric_names(self, count):
    """What a lowered program reports."""
    _, metrics = self._lowered[count].out_info
    return sorted(metrics)

  def __call__(self, count):
    """`(state, shared, batches) -> (state, metrics)`, compiled."""
    if count not in self._compiled:
      self.lower(count)
      self._compiled[count] = self._lowered[count].compile()
    return self._compiled[count]


def initial_reader(config, target, *workdirs):
  """A function to what the backbones start from, or None.

  What is not going on from a checkpoint has the file read already, so that one
  that does not fit is refused before anything is written.
  """
  read = functools.cache(lambda: build.initial_weights(config, target))
  if not all(workdir_lib.has_checkpoint(workdir) for workdir in workdirs):
    read()
  return read


def first_state(create, config, workdir, mesh, initial):
  """The state before the first step; what it starts from is put on record.

  Args:
    create: `build.Experiment.create_state`, jitted.
    config: of the run.
    workdir: gets `initial_weights.json` if there are any.
    mesh: see `parallel.make_mesh`.
    initial: see `build.initial_weights`.

  Returns:
    The state.
  """
  key = parallel.replicate(mesh, jax.random.key(config.seed))
  if initial is None:
    return create(key)
  if parallel.is_main():
    # The path alone, which the config has, would not tell one file that was
    # there from another.
    record = {'path': initial.path, 'sha256': initial.sha256}
    files.write_whole(
      os.path.join(workdir, 'initial_weights.json'),
      f'{json.dumps(record, indent=2)}\n'.encode(),
    )
  _say(f'the backbone starts from {initial.path} (sha256 {initial.sha256})')
  variables = parallel.from_main(initial.variables)
  return create(key, parallel.replicate(mesh, variables))


def count_steps(config, steps_per_epoch):
  """The one place where epochs become steps."""
  steps = config.train.num_epochs * steps_per_epoch
  if steps >= 2**31:
    raise ValueError(
      f'config.train.num_epochs={config.train.num_epochs} makes {steps:,} '
      f'steps, and at most {2**31 - 1:,} can be counted'
    )
  return steps


def split_steps(start, stop, size, boundaries):
  """Ranges of at most `size` steps that end where a boundary's multiple is."""
  chunks = []
  while start < stop:
    ends = [(start // every + 1) * every for every in boundaries]
    end = min(start + size, stop, *ends)
    chunks.append(range(start, end))
    start = end
  return chunks


def check_best(config, names, total_steps, save_every):
  """Refuses to keep the best by what nothing is logged of."""
  best, log_every = config.train.keep_best, config.train.log_every_steps
  if best is not None and best not in names:
    raise ValueError(
      f'config.train.keep_best must be one of {names}, or None; got {best!r}'
    )
  if best is not None and log_every > min(save_every, total_steps):
    raise ValueError(
      f'config.train.log_every_steps={log_every} logs nothing between two '
      f'checkpoints ({save_every} steps), and config.train.keep_best={best!r} '
      'goes by the log; lower log_every_steps'
    )


def mean_metrics(logged):
  """Mean of each metric over the lines of the log since the last checkpoint."""
  if not logged:
    return {}
  return {
    name: float(np.mean([entry[name] for entry in logged]))
    for name in logged[0]
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


def _print_summary(config, state, compiled, mesh, total_steps):
  parameters = sum(x.size for x in jax.tree.leaves(state.params))
  # The compiler counts one device's program, and a loop's body once.
  flops = (compiled.cost_analysis() or {}).get('flops', math.nan) * mesh.size
  device = mesh.devices.flat[0]
  _say(
    f'{config.data.name}: {parameters:,} parameters, {flops / 1e9:.2f} GFLOP a '
    f'step of {config.train.batch_size} images (two views each), '
    f'{total_steps:,} steps\n'
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
    'Record a trace of this many steps in WORKDIR/profile.',
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
