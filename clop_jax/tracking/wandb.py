"""Weights & Biases, for those who ask for it; takes what `tensorboard` does."""

import importlib.util
import io
import os
from typing import Any

import numpy as np
from PIL import Image

from clop_jax.tracking import tensorboard

MODES = ('offline', 'online')


def check(mode: str) -> None:
  """Refuses what cannot be, before anything is written.

  Args:
    mode: of `MODES`.

  Raises:
    ValueError: if the mode is another one, or the library is not installed.
  """
  if mode not in MODES:
    raise ValueError(f'--wandb must be one of {list(MODES)}, got {mode!r}')
  spec = importlib.util.find_spec('wandb')
  # A folder of that name, as the library leaves behind, is no module.
  if spec is None or spec.origin is None:
    raise ValueError(
      f'--wandb={mode} needs the library of Weights & Biases: '
      "pip install 'clop-jax[wandb]'"
    )


class WandbLog:
  """A run of Weights & Biases, one for each go of a training."""

  def __init__(self, workdir: str, config: dict, *, mode: str, start: int):
    """Begins it.

    The project is the environment's `WANDB_PROJECT`, or `clop_jax`; the goes of
    one workdir are a group, named as the folder is.

    Args:
      workdir: of the training; its `wandb/` gets the files (a remote one: that
        of the current folder).
      config: for the run's page.
      mode: `offline` (files to send later) or `online`.
      start: the step to go on from.

    Raises:
      OSError: if the run cannot begin.
    """
    # A second or two, which only those who ask should pay.
    import wandb

    init: Any = wandb.init
    name = os.path.basename(os.path.normpath(workdir))
    try:
      self._run = init(
        mode=mode,
        project=os.environ.get('WANDB_PROJECT') or 'clop_jax',
        dir=None if '://' in workdir else os.path.abspath(workdir),
        name=f'{name}, from step {start}' if start else name,
        group=name,
        config=config,
        # The output is the command's own, with its progress bar.
        settings=wandb.Settings(console='off'),
      )
    except wandb.Error as error:
      raise OSError(
        f'--wandb={mode}: {str(error).rstrip(".")}; --wandb=offline writes '
        'files to send later, by `wandb sync`'
      ) from error
    self._wandb = wandb

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """See `tensorboard.EventFile.scalars`."""
    self._run.log(values, step=step)

  def histogram(self, step: int, tag: str, values: np.ndarray) -> None:
    """See `tensorboard.EventFile.histogram`."""
    counts = np.histogram(values, bins=tensorboard.BINS)
    made = self._wandb.Histogram(np_histogram=counts)
    self._run.log({tag: made}, step=step)

  def picture(self, step: int, tag: str, png: bytes) -> None:
    """See `tensorboard.EventFile.picture`."""
    with Image.open(io.BytesIO(png)) as image:
      self._run.log({tag: self._wandb.Image(image)}, step=step)

  def text(self, step: int, tag: str, text: str) -> None:
    """An alert, which can send a mail; see `tensorboard.EventFile.text`."""
    self._run.alert(tag, f'step {step}: {text}', level='WARN')

  def close(self, failed: bool = False) -> None:
    """Ends the run, and sends what is left to send."""
    self._run.finish(exit_code=int(failed))
