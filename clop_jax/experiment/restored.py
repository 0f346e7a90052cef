"""A trained run, restored and frozen: images to features and embeddings."""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
from typing import Any

from etils import epath
import jax
from jax.sharding import Mesh
import jax.numpy as jnp
import ml_collections
import optax

from clop_jax.data import augment
from clop_jax.experiment import build
from clop_jax.experiment import checkpoint
from clop_jax.experiment import components
from clop_jax.experiment import workdir as workdir_lib
from clop_jax.runtime import files
from clop_jax.runtime import parallel
from clop_jax.training import train_state


@dataclasses.dataclass(frozen=True)
class Restored:
  """A checkpoint of a run, as functions of images; see `load`.

  Attributes:
    config: Config of the run.
    experiment: Networks of the run.
    mesh: Mesh of the devices that hold the variables.
    step: Step of the checkpoint.
    variables: `{'params': ..., 'batch_stats': ...}`, each with the parts
      'backbone' and 'projection_head'.
    prototypes: Prototypes `[num_classes, dim]`.
    pure: Jitted function `(variables, images) -> (features, embeddings)` of
      uint8 images `[batch, height, width, channels]` of any size. It returns
      float32 features `[batch, feature_dim]` and embeddings `[batch, dim]` (not
      normalized). Images are resized to the size of the run's views and
      normalized as in training. Batch normalization is in evaluation mode. All
      transformations of JAX apply.
  """

  config: ml_collections.ConfigDict
  experiment: components.Networks
  mesh: Mesh
  step: int
  variables: Any
  prototypes: jax.Array
  pure: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]

  def apply(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns `(features, embeddings)` of uint8 images."""
    return self.pure(self.variables, images)


def load(
  workdir: str, *, which: str = 'latest', backbone: Any = None, devices=None
) -> Restored:
  """Restores a checkpoint; nothing but the workdir is needed.

  Args:
    workdir: Workdir of a run.
    which: Checkpoint: 'latest', 'best' (by `train.keep_best`) or a step.
    backbone: Backbone of the run, if it was passed to `train.train`.
    devices: Devices for the variables, by default all of all processes.

  Returns:
    The run.

  Raises:
    ValueError: If the workdir is missing or holds no run, or has no such
      checkpoint. The error lists the existing ones.
    checkpoint.DamagedCheckpointError: If no checkpoint can be restored.
  """
  config = workdir_lib.load_config(workdir)
  mesh = parallel.make_mesh(devices)
  networks = components.networks(config, backbone=backbone)
  target = _abstract_state(networks, config, mesh)
  with _checkpoints(config, workdir) as checkpoints:
    if which == 'latest':
      state = checkpoints.restore_latest(target, warn=parallel.warn)
    else:
      state = checkpoints.restore(_step(checkpoints, str(which)), target)
  return Restored(
    config=config,
    experiment=networks,
    mesh=mesh,
    step=int(state.step),
    variables=state.variables,
    prototypes=state.prototypes,
    pure=frozen(networks, config, mesh),
  )


def steps(workdir: str) -> list[int]:
  """Returns the steps of a run's checkpoints, oldest first.

  Raises:
    ValueError: If the workdir is missing or holds no run or no checkpoint.
  """
  return check(workdir, 'all')


def check(workdir: str, which: str) -> list[int]:
  """Checks, before any long work, that a run has a checkpoint.

  Args:
    workdir: Workdir of a run.
    which: Checkpoint as in `load`, or 'all'.

  Returns:
    The steps of all checkpoints, oldest first.

  Raises:
    ValueError: As `load`.
  """
  with _checkpoints(workdir_lib.load_config(workdir), workdir) as checkpoints:
    found = checkpoints.steps()
    step = None if which in ('latest', 'all') else _step(checkpoints, which)
  if step is not None and step not in found:
    raise ValueError(
      f'there is no checkpoint of step {step} in {workdir}; there are {found}'
    )
  return found


def frozen(
  networks, config: ml_collections.ConfigDict, mesh: Mesh
) -> Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]:
  """Returns `Restored.pure` for some networks.

  Args:
    networks: Networks as `backbone` and `projection_head`.
    config: Config of the run.
    mesh: Mesh of the devices, over which the outputs are replicated.
  """
  recipe, channels = config.augment, config.data.channels

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
      networks.backbone,
      networks.projection_head,
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
  advice = ''
  if images.shape[-1:] == (channels,) and images.ndim == 3:
    advice = '; for one image use images[None]'
  elif fits:
    advice = '; for [0, 1] use (255 * images).round().astype(jnp.uint8)'
  raise ValueError(
    f'images must be uint8 [batch, height, width, {channels}], as the run was '
    f'trained on, got {images.dtype} {list(images.shape)}{advice}'
  )


@contextlib.contextmanager
def _checkpoints(config, workdir):
  """Opens the checkpoints of a workdir; raises ValueError if there are none."""
  with contextlib.ExitStack() as stack:
    found = []
    if files.is_folder(epath.Path(workdir) / checkpoint.FOLDER):
      checkpoints = stack.enter_context(
        workdir_lib.open_checkpoints(config, workdir, read_only=True)
      )
      found = checkpoints.steps()
    if not found:
      raise ValueError(
        f'--workdir={workdir} holds no checkpoint yet; train first: python -m '
        f'clop_jax.train --config=... --workdir={workdir}'
      )
    yield checkpoints


def _abstract_state(networks, config, mesh):
  """Returns the shapes of the part of a checkpoint that evaluation needs."""
  size, channels = config.augment.size, config.data.channels

  def create():
    state = train_state.create(
      jax.random.key(0),
      backbone=networks.backbone,
      projection_head=networks.projection_head,
      tx=optax.identity(),
      image_shape=(size, size, channels),
      prototypes=jnp.zeros(()),
    )
    images = jnp.zeros((1, size, size, channels), jnp.float32)
    _, embeddings, _ = train_state.apply_networks(
      networks.backbone,
      networks.projection_head,
      state.params,
      state.batch_stats,
      images,
      train=False,
    )
    classes, dim = config.data.num_classes, embeddings.shape[-1]
    return dataclasses.replace(
      state, opt_state=None, prototypes=jnp.zeros((classes, dim))
    )

  return build.abstract(create, mesh)


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
