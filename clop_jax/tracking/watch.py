"""Watching a training: TensorBoard, Weights & Biases, probes and a warning.

Nothing here changes what is trained. In a run of several processes all of them
call the same methods at the same steps, since embeddings and features are made
on all devices; only the main process draws, writes and talks.
"""

from collections.abc import Iterator
import contextlib
import functools
import os

import jax
import ml_collections
import numpy as np

from clop_jax.data import loader
from clop_jax.data import reader as reader_lib
from clop_jax.data import sources
from clop_jax.evaluation import protocol
from clop_jax.experiment import build
from clop_jax.experiment import metrics_log
from clop_jax.experiment import restored
from clop_jax.experiment import workdir as workdir_lib
from clop_jax.runtime import parallel
from clop_jax.tracking import collapse_alarm
from clop_jax.tracking import pictures
from clop_jax.tracking import tensorboard
from clop_jax.tracking import wandb as wandb_log
from clop_jax.training import train_state

FOLDER = 'tensorboard'
PROBES_FILE = 'probe.jsonl'
_PROBES = {
  'knn': (protocol.knn,),
  'linear': (protocol.linear,),
  'both': (protocol.knn, protocol.linear),
}


class Off:
  """Watches nothing."""

  def check(self, workdir: str) -> None:
    """Has nothing to write."""

  def prepare(self, steps: range) -> None:
    """Does nothing."""

  def writing(self, workdir: str, start: int, state) -> contextlib.nullcontext:
    """Writes nothing."""
    return contextlib.nullcontext()

  def logged(self, step: int, metrics: dict[str, float]) -> None:
    """Does nothing."""

  def due(self, steps: range) -> bool:
    """Nothing ever is."""
    return False

  def reached(self, steps: range, state) -> None:
    """Does nothing."""


class Watch:
  """What of a run is watched; see `docs/watching.md`."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    *,
    run: build.Experiment,
    target: train_state.TrainState,
    source: sources.Source,
    true_labels: np.ndarray,
    reader: reader_lib.Reader,
    data: loader.Loader,
    mesh: jax.sharding.Mesh,
    named: bool = True,
    wandb: str | None = None,
  ):
    """Checks what is asked for and reads a sample; writes nothing.

    Args:
      config: see `defaults`; `data.num_classes` is known.
      run: what is trained.
      target: its state, or the shapes of it.
      source: training examples.
      true_labels: `[n]` of the source, -1 where nobody knows.
      reader: what training reads.
      data: the loader of the run.
      mesh: see `parallel.make_mesh`.
      named: whether `config.data` names the source.
      wandb: mode of Weights & Biases, see `wandb_log`; None: without.

    Raises:
      ValueError: for a wrong field of `config.watch`, or a probe that there
        are no data for.
    """
    fields = config.watch
    if wandb is not None:
      wandb_log.check(wandb)
    self._config, self._mesh, self._wandb = config, mesh, wandb
    self._alarm = collapse_alarm.CollapseAlarm(
      num_classes=config.data.num_classes,
      dim=target.prototypes.shape[-1],
      batch_size=config.train.batch_size,
      share=fields.collapse_share,
      patience=fields.collapse_patience,
      clop_weight=config.loss.clop_weight,
      contrastive=config.loss.contrastive,
    )
    epoch = data.steps_per_epoch
    self._images_every = self._probe_every = 0
    if fields.tensorboard or wandb is not None:
      # The shortest runs have them at their end.
      every = min(fields.images_every_epochs, config.train.num_epochs)
      self._images_every = every * epoch
    self._frozen = restored.frozen(run, config, mesh)
    if self._images_every:
      self._pictures = pictures.Pictures(
        config,
        frozen=self._frozen,
        variables=target.variables,
        dim=target.prototypes.shape[-1],
        source=source,
        true_labels=true_labels,
        reader=reader,
        data=data,
        mesh=mesh,
      )
    if fields.probe_every_epochs:
      self._probe_every = fields.probe_every_epochs * epoch
      self._readers = _probe_readers(config, mesh, named)
    self._sinks, self._probes, self._owes_probe = [], None, False

  def check(self, workdir: str) -> None:
    """Refuses what could not be written to, before anything is written.

    Args:
      workdir: of the run.

    Raises:
      OSError: if there is such a place.
      ValueError: if `probe.jsonl` is damaged; on the other processes, if the
        main process raises.
    """
    parallel.by_main(lambda: self._check(workdir))

  def _check(self, workdir):
    if self._config.watch.tensorboard:
      folder = os.path.join(workdir, FOLDER)
      _naming_events(tensorboard.check, folder)
    if self._probe_every:
      metrics_log.check(os.path.join(workdir, PROBES_FILE))

  def prepare(self, steps: range) -> None:
    """Begins to compile what draws, if anything will be drawn.

    To be called once the workdir is claimed, since a process does not end
    before its compilers do, and before the training step is compiled, beside
    which this goes on.

    Args:
      steps: that are left of the run.
    """
    if _passed(steps, self._images_every):
      self._pictures.prepare()

  @contextlib.contextmanager
  def writing(self, workdir: str, start: int, state) -> Iterator[None]:
    """Opens what is written to, for as long as the training goes on.

    Args:
      workdir: of the run; gets `tensorboard/`, `wandb/` and `probe.jsonl`, as
        far as the config says so.
      start: the step to go on from.
      state: at that step.

    Raises:
      OSError: if something cannot be written; on every process, then.
      ValueError: on the others, if the main process raises.
    """
    with contextlib.ExitStack() as stack:
      parallel.by_main(lambda: self._open(stack, workdir, start))
      # The one that was due when the run was told to end; also where that was
      # after a later step of the same dispatch.
      if self._probe_every and not parallel.all_agree(not self._owes_probe):
        self._measure(start, state)
      yield

  def _open(self, stack, workdir, start):
    # What the goes before this one have warned of is not told again.
    log = os.path.join(workdir, metrics_log.FILE)
    for entry in metrics_log.entries_until(log, start):
      rank = entry.get('effective_rank')
      self._alarm.hear(entry['step'], np.nan if rank is None else rank)
    if self._config.watch.tensorboard:
      folder = os.path.join(workdir, FOLDER)
      file = _naming_events(tensorboard.EventFile, folder, start=start)
      stack.callback(file.close)
      self._sinks.append(file)
    if self._wandb is not None:
      config = workdir_lib.to_json(self._config)
      log = wandb_log.WandbLog(workdir, config, mode=self._wandb, start=start)
      stack.push(lambda kind, *_: log.close(failed=kind is not None))
      self._sinks.append(log)
    if self._probe_every:
      path = os.path.join(workdir, PROBES_FILE)
      self._probes = metrics_log.JsonLines(path, start=start)
      stack.callback(self._probes.close)
      done = range(self._probes.last_step, start)
      self._owes_probe = _passed(done, self._probe_every)

  def logged(self, step: int, metrics: dict[str, float]) -> None:
    """To be called with what the log gets.

    Args:
      step: after which the metrics were taken.
      metrics: by name, among them `effective_rank`.
    """
    if not parallel.is_main():
      return
    self._write_scalars(step, 'train', metrics)
    warning = self._alarm.hear(step, metrics['effective_rank'])
    if warning is not None:
      self._warn(step, warning)

  def due(self, steps: range) -> bool:
    """Whether `reached` has work to do after these steps."""
    return any(
      _passed(steps, every) for every in (self._images_every, self._probe_every)
    )

  def reached(self, steps: range, state) -> None:
    """To be called after a dispatch; every process does.

    What is due within a dispatch is done at its end.

    Args:
      steps: that were dispatched.
      state: their result; not changed and not kept.
    """
    if _passed(steps, self._images_every):
      self._draw(steps.stop, state)
    if _passed(steps, self._probe_every):
      self._measure(steps.stop, state)

  def _draw(self, step, state):
    """The sample's spectrum and picture, and the views of the last step."""
    failure = self._pictures.failure()
    if not parallel.all_agree(failure is None):
      self._images_every = 0
      self._warn(
        step,
        f'no pictures: what draws them cannot be compiled ({_short(failure)})',
      )
    elif not self._pictures.draw(step, state.variables, self._sinks):
      self._warn(step, 'embeddings that are not finite cannot be drawn')

  def _measure(self, step, state):
    """The probes."""
    apply = functools.partial(self._frozen, state.variables)
    features, labels = {}, {}
    for split, reader in self._readers.items():
      features[split], _, labels[split] = protocol.extract(
        self._config, reader, apply, self._mesh
      )
    found = {}
    try:
      # By every process: the others would only wait for this one.
      for measure in _PROBES[self._config.watch.probe]:
        found |= measure(self._config, features, labels)
    except FloatingPointError as error:
      self._warn(step, f'no probe: {error}')
      return
    if not parallel.is_main():
      return
    self._probes.write(step, found)
    self._write_scalars(step, 'probe', found)
    shown = ', '.join(
      f'{name} {found[name]:.4f}'
      for name in ('knn_top1', 'linear_top1')
      if name in found
    )
    metrics_log.say(f'step {step}: {shown}')

  def _write_scalars(self, step, group, values):
    tagged = {
      f'{group}/{name}': value
      for name, value in values.items()
      if value is not None  # what there was nothing to measure by
    }
    for sink in self._sinks:
      sink.scalars(step, tagged)

  def _warn(self, step, message):
    if parallel.is_main():
      metrics_log.say(f'warning: {message}', error=True)
      for sink in self._sinks:
        sink.text(step, 'warning', message)


def _naming_events(work, folder, **arguments):
  """Calls `work`; an error of it says what it is of, and the way out."""
  try:
    return work(folder, **arguments)
  except OSError as error:
    failure = OSError(
      f"TensorBoard's events cannot be written to {folder} "
      f'({error.strerror or error}); make it writable, or pass '
      '--config.watch.tensorboard=false',
    )
    failure.errno = error.errno  # the command knows a full disk by it
    raise failure from error


def _probe_readers(config, mesh, named):
  """Of the splits of the protocol, or a ValueError that says what is wrong."""
  field = f'config.watch.probe_every_epochs={config.watch.probe_every_epochs}'
  if not named or not config.data.test_split:
    why = (
      'config.data.test_split is empty'
      if named
      else 'a source of your own comes without one'
    )
    raise ValueError(
      f'{field} needs a test split, and {why}; set it to 0 and evaluate '
      'afterwards'
    )
  try:
    parallel.check_batch_size(config.eval.batch_size, mesh)
    return protocol.readers(config)
  except ValueError as error:
    raise ValueError(f'{field}: {error}') from error


def _passed(steps, every):
  """Whether a multiple of `every` (0: none) is among the ends of the steps."""
  return every > 0 and steps.stop // every > steps.start // every


def _short(error):
  """The first line of an error; None is that of another process."""
  if error is None:
    return 'on another process'
  first = str(error).strip().partition('\n')[0]
  return f'{type(error).__name__}: {first}' if first else type(error).__name__
