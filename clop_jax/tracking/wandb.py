"""Log for Weights & Biases, with the methods of `tensorboard.TensorBoard`."""

import os
from typing import Any

import numpy as np

from clop_jax.runtime import extras
from clop_jax.runtime import files
from clop_jax.tracking import tensorboard

MODES = ('offline', 'online')


def check(mode: str) -> None:
  """Raises ValueError if the mode is not valid or wandb is not installed."""
  if mode not in MODES:
    raise ValueError(f'--wandb must be one of {list(MODES)}, got {mode!r}')
  extras.check(f'--wandb={mode}', 'wandb', 'wandb')


class WandbLog:
  """One run of Weights & Biases. A training that resumes starts another one."""

  def __init__(self, workdir: str, config: dict, *, mode: str, start: int):
    """Starts the run, in the group of all runs of the workdir.

    Args:
      workdir: Workdir of the training. Files go to its `wandb/`, or to that of
        the current folder if the workdir is remote.
      config: Config for the page of the run.
      mode: 'offline' (files to send later) or 'online'.
      start: Step at which the training starts.

    Raises:
      OSError: If the run cannot start.
    """
    import wandb  # takes a second or two

    init: Any = wandb.init
    name = os.path.basename(os.path.normpath(workdir))
    try:
      self._run = init(
        mode=mode,
        project=os.environ.get('WANDB_PROJECT') or 'clop_jax',
        dir=None if files.is_remote(workdir) else os.path.abspath(workdir),
        name=f'{name}, from step {start}' if start else name,
        group=name,
        config=config,
        # The command prints its own output, with a progress bar.
        settings=wandb.Settings(console='off'),
      )
    except wandb.Error as error:
      raise OSError(
        f'--wandb={mode}: {str(error).rstrip(".")}; --wandb=offline writes '
        'files to send later with `wandb sync`'
      ) from error
    self._wandb = wandb

  def scalars(self, step: int, values: dict[str, float]) -> None:
    self._run.log(values, step=step)

  def histogram(self, step: int, tag: str, values: np.ndarray) -> None:
    counts = np.histogram(values, bins=tensorboard.BINS)
    histogram = self._wandb.Histogram(np_histogram=counts)
    self._run.log({tag: histogram}, step=step)

  def picture(self, step: int, tag: str, image: np.ndarray) -> None:
    self._run.log({tag: self._wandb.Image(image)}, step=step)

  def text(self, step: int, tag: str, text: str) -> None:
    """Sends an alert, which can send an e-mail."""
    self._run.alert(tag, f'step {step}: {text}', level='WARN')

  def close(self, failed: bool = False) -> None:
    self._run.finish(exit_code=int(failed))
