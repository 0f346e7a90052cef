"""Trains several runs that differ in numbers alone in one program.

The states of all runs are mapped over by `jax.vmap`; the images are one copy.
Each workdir ends as `train.train` leaves it.
"""

from collections.abc import Callable, Sequence
import contextlib
import copy
import functools
import os

import jax
from jax import lax
import jax.numpy as jnp
import ml_collections
import numpy as np

from clop_jax import train
from clop_jax.data import loader
from clop_jax.data import sources
from clop_jax.experiment import build
from clop_jax.experiment import inputs
from clop_jax.experiment import metrics_log
from clop_jax.experiment import workdir as workdir_lib
from clop_jax.runtime import parallel
from clop_jax.runtime import preemption
from clop_jax.training import train_state

# What the runs may differ in.
FIELDS = ('optimizer.learning_rate', 'loss.clop_weight', 'seed')

# Mapped over the runs: all but the step, which they have in common. A condition
# on it then stays one, instead of both branches and a choice.
_AXES = train_state.TrainState(
  step=None,  # type: ignore[arg-type]
  params=0,
  batch_stats=0,
  opt_state=0,
  prototypes=0,  # type: ignore[arg-type]
  prototype_statistics=0,
)


def shared_part(config: dict) -> dict:
  """A config (as JSON has it) without what runs of one program differ in."""
  config = copy.deepcopy(config)
  for field in FIELDS:
    group = config
    *path, last = field.split('.')
    for name in path:
      group = group[name]
    del group[last]
  return config


def train_together(
  configs: Sequence[ml_collections.ConfigDict],
  workdirs: Sequence[str],
  *,
  diverged: Callable[[int, FloatingPointError], None],
  devices=None,
) -> None:
  """Runs, or goes on with, several trainings at the same time.

  They go on from the last step that all of them have saved. One that diverges
  is reported, and the others go on.

  Args:
    configs: that differ in `FIELDS` alone.
    workdirs: one for each.
    diverged: told of the number of a run whose loss is not finite.
    devices: default: all.

  Raises:
    ValueError: as `train.train`, if the configs differ in more, or the images
      do not stay on the device.
    preemption.PreemptionError: after SIGTERM, when all states have been saved.
    checkpoint.DamagedCheckpointError: if a run has no intact checkpoint.
    OSError: if something cannot be written.
  """
  _check_alike(configs)
  mesh = parallel.make_mesh(devices)
  parallel.check_batch_size(configs[0].train.batch_size, mesh)
  source = inputs.training_source(configs[0])
  configs = [inputs.with_num_classes(config, source) for config in configs]
  config = configs[0]
  true_labels = sources.labels_of(source)
  labels = [inputs.training_labels(c, true_labels) for c in configs]
  inputs.check_evaluation(config)
  # Each example's number as its label: a corrupt image is replaced by another
  # one, whose label each run then looks up in its own.
  reader = inputs.training_reader(config, source, np.arange(len(true_labels)))
  if not inputs.is_resident(config, reader):
    raise ValueError(
      'config.data.loader must keep the images on the device for runs to train '
      'together, and these are streamed; train them one by one'
    )
  images, owners = loader.read_all(reader)
  orders = [
    loader.Order(len(images), batch_size=c.train.batch_size, seed=c.seed)
    for c in configs
  ]
  steps_per_epoch = orders[0].steps_per_epoch
  total_steps = train.count_steps(config, steps_per_epoch)
  run = build.build(
    config, total_steps=total_steps, steps_per_epoch=steps_per_epoch
  )
  target = build.abstract_state(run, mesh)
  read_initial = train.initial_reader(config, target, *workdirs)
  numbers = [build.numbers_of(c) for c in configs]
  shared = {
    'key': jnp.stack([build.training_key(c) for c in configs]),
    'numbers': jax.tree.map(lambda *x: np.asarray(x, np.float32), *numbers),
    'label': np.stack([x[owners] for x in labels]).astype(np.int32),
    'image': images,
  }
  if config.loss.pseudo_label_threshold is not None:
    shared['true_label'] = true_labels[owners].astype(np.int32)
  shared = parallel.replicate(mesh, shared)
  program = _program(run, mesh)
  save_every = config.train.checkpoint_every_epochs * steps_per_epoch
  log_every = config.train.log_every_steps
  split = functools.partial(
    train.split_steps,
    stop=total_steps,
    size=config.train.steps_per_dispatch,
    boundaries=(log_every, save_every),
  )
  # Traced before anything is written, as `train` does.
  longest = max(split(0), key=len)
  stacked = jax.eval_shape(_stack, *[target] * len(configs))
  _, metrics = program.lower(
    stacked, shared, _batch(orders, longest, mesh)
  ).out_info
  train.check_best(config, sorted(metrics), total_steps, save_every)

  with contextlib.ExitStack() as stack:
    folders = []
    for c, workdir, own in zip(configs, workdirs, labels, strict=True):
      stack.enter_context(workdir_lib.claim(c, workdir, own, true_labels))
      folders.append(
        stack.enter_context(workdir_lib.open_checkpoints(c, workdir))
      )
    states = _restored(folders, target)
    if states is None:
      create = jax.jit(
        run.create_state,
        out_shardings=jax.tree.map(lambda x: x.sharding, target),
      )
      states = [
        train.first_state(create, c, workdir, mesh, read_initial())
        for c, workdir in zip(configs, workdirs, strict=True)
      ]
    start = int(states[0].step)
    print(f'{len(configs)} runs together from step {start} of {total_steps}')
    if start >= total_steps:
      return
    members = [
      _Member(
        folder,
        stack.enter_context(
          metrics_log.MetricsLog(
            os.path.join(workdir, 'metrics.jsonl'),
            start=start,
            total_steps=total_steps,
            batch_size=config.train.batch_size,
          )
        ),
        functools.partial(diverged, number),
      )
      for number, (folder, workdir) in enumerate(
        zip(folders, workdirs, strict=True)
      )
    ]
    state = jax.jit(_stack, out_shardings=parallel.replicated(mesh))(*states)
    del states
    notice = stack.enter_context(preemption.Notice())
    in_flight = train.InFlight()
    for steps in split(start):
      state, metrics = program(state, shared, _batch(orders, steps, mesh))
      in_flight.add(metrics)
      done = steps.stop
      told = notice.reached(steps)
      logs = done % log_every == 0
      saves = done % save_every == 0 or done == total_steps or told
      for number, member in enumerate(members):
        member.add(jax.tree.map(lambda x, n=number: x[n], metrics))
      if not (logs or saves):
        continue
      for number, member in enumerate(members):
        member.check(done)
        if logs:
          member.log(done)
        if saves:
          member.save(functools.partial(_one, state, number), done)
      if not any(member.alive for member in members):
        return
      if told and done < total_steps:
        for member in members:
          member.checkpoints.wait()
        raise preemption.PreemptionError(
          f'preempted: saved step {done} of {total_steps}'
        )


class _Member:
  """What is logged and saved of one of the runs, until it diverges."""

  def __init__(self, checkpoints, log, diverged):
    self.checkpoints, self._log, self._diverged = checkpoints, log, diverged
    self._metrics, self._logged = [], []
    self.alive = True

  def add(self, metrics):
    """Keeps the metrics `[steps]` of a dispatch, still on the device."""
    if self.alive:
      self._metrics.append(metrics)

  def check(self, step):
    """Reports a loss that is not finite."""
    if not self.alive:
      return
    try:
      losses = [metrics['loss'] for metrics in self._metrics]
      train.check_finite(losses, step, self.checkpoints)
    except FloatingPointError as error:
      self.alive = False
      self._metrics.clear()
      self._diverged(error)
    del self._metrics[:-1]

  def log(self, step):
    """Writes the metrics of the last step."""
    if self.alive:
      last = {name: x[-1] for name, x in self._metrics[-1].items()}
      self._logged.append(metrics_log.to_floats(last))
      self._log.write(step, self._logged[-1])
      self.checkpoints.raise_failure()

  def save(self, state, step):
    """Saves what `state` gives, unless an earlier go has done so."""
    if self.alive and step not in self.checkpoints.steps():
      self.checkpoints.save(state(), step, train.mean_metrics(self._logged))
    self._logged.clear()


def _check_alike(configs):
  first, *others = [workdir_lib.to_json(config) for config in configs]
  for other in others:
    unlike = workdir_lib.differences(shared_part(first), shared_part(other))
    if unlike:
      raise ValueError(
        f'configs must differ in {", ".join(FIELDS)} alone to train together; '
        f'got {unlike[0]}'
      )


def _program(run, mesh):
  """`(state, shared, batches) -> (state, metrics [runs, steps])`, jitted."""

  def steps(state, shared, batches):
    def member(state, index, label, key, numbers):
      examples = {
        'image': shared['image'][index],
        'label': label[index],
        'index': index,
      }
      if 'true_label' in shared:
        examples['true_label'] = shared['true_label'][index]
      return run.step(state, examples, key, numbers)

    def one(state, index):
      return jax.vmap(member, in_axes=(_AXES, 0, 0, 0, 0), out_axes=(_AXES, 0))(
        state, index, shared['label'], shared['key'], shared['numbers']
      )

    state, metrics = lax.scan(one, state, batches)
    return state, jax.tree.map(lambda x: x.swapaxes(0, 1), metrics)

  return parallel.map_step(steps, mesh, batch_axes=(None, None, 2))


def _batch(orders, steps, mesh):
  """Which examples each run sees: `[steps, runs, batch]`."""
  index = [[order.indices(step) for order in orders] for step in steps]
  return parallel.shard(mesh, np.array(index), axis=2)


def _stack(*states):
  """The states of several runs as one, whose step is the first one's."""
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
  return stacked.replace(step=states[0].step)


@jax.jit
def _one(state, number):
  """The state of one run."""
  own = jax.tree.map(lambda x: x[number], state.replace(step=None))
  return own.replace(step=state.step)


def _restored(folders, target):
  """States of the last step that all have saved, or None."""
  # Sets damaged checkpoints aside.
  states = [
    folder.restore_latest(target, warn=lambda m: print(f'warning: {m}'))
    for folder in folders
  ]
  if any(state is None for state in states):
    return None
  newest = min(int(state.step) for state in states)
  common = set.intersection(*[set(folder.steps()) for folder in folders])
  common = max((step for step in common if step <= newest), default=None)
  if common is None:
    return None
  return [
    state if int(state.step) == common else folder.restore(common, target)
    for folder, state in zip(folders, states, strict=True)
  ]
