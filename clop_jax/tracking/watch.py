"""Callback for all that `config.watch` asks for.

Nothing here changes the training. With several processes, all of them compute
embeddings and features; only the main process draws, writes and prints.
"""

import contextlib
import os
from typing import Any

from clop_jax.experiment import metrics_log
from clop_jax.experiment import restored
from clop_jax.experiment import setup as setup_lib
from clop_jax.experiment import workdir as workdir_lib
from clop_jax.runtime import extras
from clop_jax.runtime import parallel
from clop_jax.tracking import collapse_alarm
from clop_jax.tracking import online_probe
from clop_jax.tracking import pictures
from clop_jax.tracking import tensorboard
from clop_jax.tracking import wandb as wandb_log
from clop_jax.training import callback


class Watch(callback.Callback):
  """TensorBoard, Weights & Biases, pictures, probes and collapse warning.

  `docs/watching.md` describes them.
  """

  def __init__(
    self, setup: setup_lib.Setup, workdir: str, *, wandb: str | None = None
  ):
    """Checks the fields and reads a sample; writes nothing.

    Args:
      setup: Run, see `setup.prepare`.
      workdir: Workdir of the run. It gets `tensorboard/`, `wandb/` and
        `probe.jsonl`, as the config says.
      wandb: Mode of Weights & Biases, see `wandb.MODES`. None is off.

    Raises:
      ValueError: If a field of `config.watch` is wrong, a package or the data
        of a probe is missing, or `probe.jsonl` is damaged.
      OSError: If the workdir cannot be written.
    """
    config, epoch = setup.config, setup.data.steps_per_epoch
    self._config, self._workdir, self._wandb = config, workdir, wandb
    fields = config.watch
    if wandb is not None:
      wandb_log.check(wandb)
    self._tensorboard = fields.tensorboard
    if fields.tensorboard and not extras.is_installed('tensorboardX'):
      self._tensorboard = False
      parallel.warn(
        'TensorBoard gets no event files because tensorboardX is not '
        "installed: pip install 'clop-jax[track]'"
      )
    self._sinks, self._closing = [], contextlib.ExitStack()
    self._images_every = 0
    self._probe_every = fields.probe_every_epochs * epoch
    frozen = restored.frozen(setup.experiment, config, setup.mesh)
    if fields.images_every_epochs and (self._tensorboard or wandb):
      field = f'config.watch.images_every_epochs={fields.images_every_epochs}'
      extras.check(field, 'track', 'matplotlib')
      # Shorter runs draw at their end.
      every = min(fields.images_every_epochs, config.train.num_epochs)
      self._images_every = every * epoch
      self._pictures = pictures.Pictures(setup, frozen)
    if self._probe_every:
      self._probe = online_probe.Probe(setup, workdir, frozen)
    self._alarm = collapse_alarm.CollapseAlarm(
      num_classes=config.data.num_classes,
      dim=setup.state.prototypes.shape[-1],
      batch_size=config.train.batch_size,
      share=fields.collapse_share,
      patience=fields.collapse_patience,
      clop_weight=config.loss.clop_weight,
      contrastive=config.loss.contrastive,
    )
    parallel.by_main(self._check_files)

  def _check_files(self):
    if self._tensorboard:
      tensorboard.check(self._workdir)
    if self._probe_every:
      self._probe.check()

  def started(self, steps: range, state: Any) -> None:
    """Opens the files, and makes up for a probe that preemption prevented.

    Args:
      steps: Steps that are left.
      state: Training state at `steps.start`.

    Raises:
      OSError: If something cannot be written, on every process.
      ValueError: On the other processes, if the main process fails.
    """
    owes_probe = False

    def open_files():
      nonlocal owes_probe
      self._open_sinks(steps.start)
      if self._probe_every:
        self._closing.callback(self._probe.close)
        last = self._probe.open(steps.start)
        owes_probe = _passed(range(last, steps.start), self._probe_every)

    parallel.by_main(open_files)
    if self._probe_every and not parallel.all_agree(not owes_probe):
      self._measure(steps.start, state)

  def _open_sinks(self, start):
    # So that a collapse is not reported again.
    log = os.path.join(self._workdir, metrics_log.FILE)
    for entry in metrics_log.entries_until(log, start):
      self._alarm.record(entry['step'], entry.get('effective_rank'))
    if self._tensorboard:
      self._sinks.append(tensorboard.TensorBoard(self._workdir, start=start))
    if self._wandb is not None:
      config = workdir_lib.to_json(self._config)
      self._sinks.append(
        wandb_log.WandbLog(self._workdir, config, mode=self._wandb, start=start)
      )

  def logged(self, step: int, metrics: dict[str, float]) -> None:
    """Logs the metrics of a step, and warns of a collapse."""
    if parallel.is_main():
      self._write_scalars(step, 'train', metrics)
      warning = self._alarm.record(step, metrics['effective_rank'])
      if warning is not None:
        self._warn(step, warning)

  def due(self, steps: range) -> bool:
    """Returns True if pictures or a probe are due after these steps."""
    return _passed(steps, self._images_every) or _passed(
      steps, self._probe_every
    )

  def reached(self, steps: range, state: Any) -> None:
    """Makes the pictures and the probe that were due within a dispatch."""
    if _passed(steps, self._images_every):
      self._draw(steps.stop, state)
    if _passed(steps, self._probe_every):
      self._measure(steps.stop, state)

  def close(self, failed: bool = False) -> None:
    with self._closing as closing:
      for sink in self._sinks:
        closing.callback(sink.close, failed=failed)
      if self._images_every:
        self._pictures.deliver(self._sinks)

  def _draw(self, step, state):
    finite, reason = True, None
    try:
      finite = self._pictures.draw(step, state.variables, self._sinks)
    except RuntimeError as error:  # of XLA, such as too little memory
      reason = str(error).strip().partition('\n')[0]
    if not parallel.all_agree(reason is None):
      self._images_every = 0
      reason = reason or 'another process failed'
      self._warn(step, f'pictures are off, drawing failed: {reason}')
    elif not finite:
      self._warn(step, 'embeddings that are not finite cannot be drawn')

  def _measure(self, step, state):
    try:
      results = self._probe.measure(step, state.variables)
    except FloatingPointError as error:
      self._warn(step, f'no probe: {error}')
    else:
      self._write_scalars(step, 'probe', results)

  def _write_scalars(self, step, group, values):
    tagged = {f'{group}/{k}': v for k, v in values.items() if v is not None}
    for sink in self._sinks:
      sink.scalars(step, tagged)

  def _warn(self, step, message):
    if parallel.is_main():
      metrics_log.say(f'warning: {message}', error=True)
      for sink in self._sinks:
        sink.text(step, 'warning', message)


def _passed(steps, every):
  """Returns True if a multiple of `every` is passed; never if it is 0."""
  return every > 0 and steps.stop // every > steps.start // every
