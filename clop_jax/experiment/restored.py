"""A trained run, restored and frozen: images to features and embeddings."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from etils import epath
import jax
from jax.sharding import Mesh
import jax.numpy as jnp
import ml_collections

from clop_jax.data import augment
from clop_jax.experiment import build as experiment_lib
from clop_jax.experiment import checkpoint
from clop_jax.experiment import workdir as workdir_lib
from clop_jax.runtime import files
from clop_jax.runtime import parallel
from clop_jax.training import train_state


@dataclasses.dataclass(frozen=True)
class Restored:
  """A checkpoint of a run, as functions of images; see `load`.

  Attributes:
    config: of the run.
    experiment: what the config names, among it the Flax modules.
    mesh: the devices it is on.
    step: of the checkpoint.
    variables: `{'params': ..., 'batch_stats': ...}`, each with the parts
      'backbone' and 'projection_head'.
    prototypes: `[num_classes, dim]`.
    pure: `(variables, images) -> (features, embeddings)`, jitted: uint8 images
      `[batch, height, width, channels]` of any size to float32 features
      `[batch, feature_dim]` and embeddings `[batch, dim]` (not normalized).
      Images are resized to the size of the run's views and normalized as in
      training; batch normalization is in evaluation mode. Any function of JAX
      can be applied to it.
  """

  config: ml_collections.ConfigDict
  experiment: experiment_lib.Experiment
  mesh: Mesh
  step: int
  variables: Any
  prototypes: jax.Array
  pure: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]

  def apply(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`(features, embeddings)` of uint8 images, with the run's variables."""
    return self.pure(self.variables, images)


def load(workdir: str, *, which: str = 'latest', devices=None) -> Restored:
  """Restores a checkpoint; nothing but the workdir is needed.

  Args:
    workdir: of a run.
    which: checkpoint: 'latest', 'best' (by `train.keep_best`) or a step.
    devices: default: all, of all processes.

  Returns:
    The run.

  Raises:
    ValueError: if the workdir is missing or holds no run, or has no such
      checkpoint; names those that there are.
    checkpoint.DamagedCheckpointError: if no checkpoint can be restored.
  """
  config = workdir_lib.load_config(workdir)
  mesh = parallel.make_mesh(devices)
  # The schedule's length is no part of the state: any will do here.
  run = experiment_lib.build(
    config, total_steps=config.train.num_epochs, steps_per_epoch=0
  )
  state = _restore(config, workdir, run, mesh, str(which))
  return Restored(
    config=config,
    experiment=run,
    mesh=mesh,
    step=int(state.step),
    variables=state.variables,
    prototypes=state.prototypes,
    pure=frozen(run, config, mesh),
  )


def steps(workdir: str) -> list[int]:
  """The steps of a run's checkpoints, oldest first.

  Raises:
    ValueError: if the workdir is missing or holds no run or no checkpoint.
  """
  config = workdir_lib.load_config(workdir)
  found = []
  if files.is_folder(epath.Path(workdir) / checkpoint.FOLDER):
    with workdir_lib.open_checkpoints(
      config, workdir, read_only=True
    ) as checkpoints:
      found = checkpoints.steps()
  if not found:
    raise _no_checkpoint(workdir)
  return found


def check(workdir: str, which: str) -> list[int]:
  """Refuses a checkpoint that a run does not have, before any long work.

  Args:
    workdir: of a run.
    which: as of `load`; or 'all'.

  Returns:
    As `steps`.

  Raises:
    ValueError: as `load`.
  """
  found = steps(workdir)
  if which in ('latest', 'all'):
    return found
  config = workdir_lib.load_config(workdir)
  with workdir_lib.open_checkpoints(
    config, workdir, read_only=True
  ) as checkpoints:
    step = _step(checkpoints, which)
  if step not in found:
    raise ValueError(
      f'there is no checkpoint of step {step} in {workdir}; there are {found}'
    )
  return found


def frozen(
  experiment: experiment_lib.Experiment,
  config: ml_collections.ConfigDict,
  mesh: Mesh,
) -> Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]:
  """`Restored.pure` of an experiment's networks."""
  recipe, channels = config.augment, config.data.channels

  # Whole on every device, so that every process has them.
  @functools.partial(jax.jit, out_shardings=parallel.replicated(mesh))
  def apply(variables, images):
    _check_images(images, channels)
    x = augment.whole(
      images,
      size=recipe.size,
      mean=recipe.mean,
      std=recipe.std,
      interpolation=recipe.interpolation,
    )
    features, embeddings, _ = train_state.apply_networks(
      experiment.backbone,
      experiment.projection_head,
      variables['params'],
      variables['batch_stats'],
      x,
      train=False,
    )
    return features, embeddings

  return apply


def _check_images(images, channels):
  fits = images.ndim == 4 and images.shape[-1] == channels
  if fits and images.dtype == jnp.uint8:
    return
  way_out = ''
  if images.shape[-1:] == (channels,) and images.ndim == 3:
    way_out = '; of one image: images[None]'
  elif fits:
    way_out = '; of [0, 1]: (255 * images).round().astype(jnp.uint8)'
  raise ValueError(
    f'images must be uint8 [batch, height, width, {channels}], as the run was '
    f'trained on, got {images.dtype} {list(images.shape)}{way_out}'
  )


def _restore(config, workdir, run, mesh, which):
  directory = epath.Path(workdir) / checkpoint.FOLDER
  state = None
  if files.is_folder(directory):
    with workdir_lib.open_checkpoints(
      config, workdir, read_only=True
    ) as checkpoints:
      target = experiment_lib.abstract_state(run, mesh)
      if which == 'latest':
        state = checkpoints.restore_latest(target, warn=parallel.warn)
      else:
        state = checkpoints.restore(_step(checkpoints, which), target)
  if state is None:
    raise _no_checkpoint(workdir)
  return state


def _no_checkpoint(workdir):
  return ValueError(
    f'--workdir={workdir} holds no checkpoint yet; train first: python -m '
    f'clop_jax.train --config=... --workdir={workdir}'
  )


def _step(checkpoints, which):
  if which == 'best':
    step = checkpoints.best_step()
    if step is None:
      raise ValueError(
        "--checkpoint (which) 'best' needs a run that kept it: train with "
        '--config.train.keep_best=METRIC'
      )
    return step
  if not which.isdigit():
    raise ValueError(
      "--checkpoint (which) must be 'latest', 'best' or a step of "
      f'{checkpoints.steps()}, got {which!r}'
    )
  return int(which)
