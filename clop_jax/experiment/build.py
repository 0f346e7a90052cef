"""Builds networks, optimizer and train step from a config.

All commands use this module, so a field has one meaning. `defaults.check` has
checked the fields, one by one, before.
"""

from collections.abc import Callable
import dataclasses
import functools
import os
import subprocess
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from clop_jax import loss
from clop_jax import prototypes
from clop_jax.data import augment
from clop_jax.experiment import components
from clop_jax.models import torchvision
from clop_jax.runtime import parallel
from clop_jax.training import optimizer
from clop_jax.training import prototype_rules
from clop_jax.training import train_state
from clop_jax.training import train_step

# Initial prototypes of each kind.
_PROTOTYPES = {
  'orthonormal': prototypes.orthonormal_prototypes,
  'simplex_etf': prototypes.simplex_etf_prototypes,
  'random': prototypes.random_prototypes,
  'learned': prototypes.orthonormal_prototypes,
  'aligned': prototypes.orthonormal_prototypes,
}

_ALIGNMENTS = {
  'procrustes': lambda means, before: prototypes.align_prototypes(means),
  'assignment': prototypes.assign_prototypes,
}


@dataclasses.dataclass(frozen=True)
class Experiment(components.Networks):
  """Networks, optimizer and train step of a config; see `build`.

  Attributes:
    tx: Optax chain.
    create_state: Pure function `(key=..., backbone_variables=...) -> state` of
      the state before the first step. The key is by default that of the
      config's seed. The backbone is random unless its variables are given, see
      `InitialWeights`.
    step: Function `(state, batch, key, numbers=...) -> (state, metrics)`:
      `train_step.train_step` with everything else bound. `numbers` are by
      default those of the config, see `numbers_of`.
  """

  tx: optax.GradientTransformation
  create_state: Callable[..., train_state.TrainState]
  step: Callable


def build(
  config: ml_collections.ConfigDict,
  *,
  total_steps: int,
  steps_per_epoch: int,
  backbone: Any = None,
  contrastive: Callable[..., jax.Array] | None = None,
  platform: str | None = None,
) -> Experiment:
  """Builds the networks, the optimizer and the train step of a config.

  Args:
    config: Config of the run.
    total_steps: Number of steps of the whole run.
    steps_per_epoch: Number of steps in an epoch.
    backbone: Backbone to use instead of `config.model.name`.
    contrastive: Loss to use instead of `config.loss.contrastive`.
    platform: Platform for `model.dtype='auto'` and automatic block sizes:
      'cpu', 'gpu' or 'tpu'. None is JAX's default.

  Raises:
    ValueError: If fields contradict each other.
  """
  networks = components.networks(config, backbone=backbone, platform=platform)
  config_numbers = numbers_of(config)
  clop_step = _first_step(config, 'loss.clop_after_epochs', steps_per_epoch)

  optimizer_at = functools.partial(
    _optimizer_at, config, total_steps, steps_per_epoch
  )
  parts = train_step.Parts(
    backbone=networks.backbone,
    projection_head=networks.projection_head,
    recipe=recipe(config),
    contrastive=components.contrastive_loss(
      config, contrastive=contrastive, platform=platform
    ),
    clop_weight=config_numbers['clop_weight'],
    clop=functools.partial(
      loss.clop_loss,
      distance=config.loss.clop_distance,
      temperature=config.loss.clop_temperature,
      repulsion=config.loss.clop_repulsion,
    ),
    prototype_rule=_prototype_rule(config, steps_per_epoch),
    pseudo_labels=_pseudo_labels(config, steps_per_epoch),
    log_every=config.train.log_every_steps,
    bn_scope=config.model.bn_scope,
    num_micro_batches=config.train.num_micro_batches,
    predictor=networks.predictor,
    classifier=networks.classifier,
    cross_entropy_weight=config.loss.cross_entropy_weight,
    target=config.method.target,
    target_momentum=_target_momentum(config, total_steps),
    **optimizer_at(config_numbers['learning_rate']),
  )

  def step(state, batch, key, numbers=None):
    numbers = config_numbers if numbers is None else numbers
    clop_weight = numbers['clop_weight']
    if clop_step:
      clop_weight *= state.step >= clop_step
    parts_now = dataclasses.replace(
      parts, clop_weight=clop_weight, **optimizer_at(numbers['learning_rate'])
    )
    return train_step.train_step(
      state, batch, key, parts_now, axis_name=parallel.DATA_AXIS
    )

  return Experiment(
    **vars(networks),
    tx=parts.tx,
    create_state=functools.partial(_create_state, config, parts),
    step=step,
  )


def _optimizer_at(config, total_steps, steps_per_epoch, learning_rate):
  """Returns the Optax chain and the schedule for a base learning rate."""
  fields = config.optimizer
  schedule = optimizer.warmup_cosine(
    learning_rate,
    total_steps=total_steps,
    warmup_steps=round(fields.warmup_epochs * steps_per_epoch),
  )
  tx = optimizer.create(
    fields.name,
    schedule,
    momentum=fields.momentum,
    weight_decay=fields.weight_decay,
    trust_coefficient=fields.trust_coefficient,
    clip_norm=fields.clip_norm,
    rate_in_momentum=fields.rate_in_momentum,
  )
  return {'tx': tx, 'schedule': schedule}


def _target_momentum(config, total_steps):
  """Returns BYOL's schedule, from `method.momentum` to 1 like a cosine."""
  decay = optax.cosine_decay_schedule(1 - config.method.momentum, total_steps)
  return lambda step: 1 - decay(step)


def _create_state(config, parts, key=None, backbone_variables=None):
  """Returns the state before the first step; see `Experiment`."""
  size = config.augment.size
  image_shape = (size, size, config.data.channels)
  key = jax.random.key(config.seed) if key is None else key
  init_key, prototype_key = jax.random.split(key)
  dim = config.model.embedding_dim
  if config.model.head_layers == 0:
    # Without a head the features are the embeddings.
    dim = jax.eval_shape(
      functools.partial(train_state.features_of, parts.backbone, init_key),
      jax.ShapeDtypeStruct((1, *image_shape), jnp.float32),
    ).shape[-1]
  initial = _PROTOTYPES[config.prototypes.kind](
    prototype_key, config.data.num_classes, dim
  )
  return train_state.create(
    init_key,
    backbone=parts.backbone,
    projection_head=parts.projection_head,
    tx=parts.tx,
    image_shape=image_shape,
    prototypes=initial,
    prototype_statistics=parts.prototype_rule.statistics(initial),
    backbone_variables=backbone_variables,
    others={
      name: network
      for name in ('predictor', 'classifier')
      if (network := getattr(parts, name)) is not None
    },
    has_target=parts.target == 'moving_average',
  )


def numbers_of(config: ml_collections.ConfigDict) -> dict[str, float]:
  """Returns the numbers of a config that the compiled step takes as arguments.

  Runs that differ only in these and in the seed share one compiled program.
  """
  return {
    'learning_rate': optimizer.scaled_learning_rate(
      config.optimizer.learning_rate,
      config.train.batch_size,
      config.optimizer.scaling,
    ),
    'clop_weight': config.loss.clop_weight,
  }


def _first_step(config, field, steps_per_epoch):
  """Returns the first step after the number of epochs in a field."""
  group, name = field.split('.')
  after, epochs = config[group][name], config.train.num_epochs
  if after >= epochs:
    raise ValueError(
      f'config.{field} must be below config.train.num_epochs={epochs}, or it '
      f'would never begin; got {after}'
    )
  return after * steps_per_epoch


def _prototype_rule(config, steps_per_epoch):
  fields = config.prototypes
  if fields.kind == 'learned':
    return prototype_rules.Learned(fields.learning_rate)
  if fields.kind != 'aligned':
    return prototype_rules.Fixed()
  every = fields.align_every_epochs
  field = 'prototypes.align_after_epochs'
  return prototype_rules.Aligned(
    align=_ALIGNMENTS[fields.align_by],
    first_step=_first_step(config, field, steps_per_epoch),
    every_steps=None if every is None else every * steps_per_epoch,
    steps_per_epoch=steps_per_epoch,
  )


def _pseudo_labels(config, steps_per_epoch):
  """Returns the function that labels unlabelled examples, if any."""
  fields = config.loss
  if fields.pseudo_label_threshold is None:
    return None
  field = 'loss.pseudo_label_after_epochs'
  first = _first_step(config, field, steps_per_epoch)

  def label(embeddings, labels, prototypes_, step):
    pseudo_labels = prototypes.pseudo_labels(
      embeddings,
      labels,
      prototypes_,
      threshold=fields.pseudo_label_threshold,
      temperature=fields.clop_temperature,
    )
    return jnp.where(step >= first, pseudo_labels, labels)

  return label


def recipe(config: ml_collections.ConfigDict) -> augment.Recipe:
  """Returns the random operations that make the views."""
  fields = config.augment.to_dict()
  if config.data.host_crops:
    fields['crop_probability'] = 0.0  # the workers have cropped already
  return augment.Recipe(**fields)


def training_key(config: ml_collections.ConfigDict) -> jax.Array:
  """Returns the PRNG key of all train steps."""
  return jax.random.fold_in(jax.random.key(config.seed), 1)


def abstract_state(experiment: Experiment, mesh) -> train_state.TrainState:
  """Returns shapes, dtypes and shardings of the state, for restoring."""
  return abstract(experiment.create_state, mesh)


def abstract(create: Callable, mesh):
  """Returns what `create` would return, as shapes replicated over a mesh."""
  sharding = parallel.replicated(mesh)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    jax.eval_shape(create),
  )


@dataclasses.dataclass(frozen=True)
class InitialWeights:
  """The weights in the file `model.initial_weights`.

  Attributes:
    path: Path of the file.
    sha256: Hash of the file.
    variables: `params` and `batch_stats` of the backbone, float32 on the host.
  """

  path: str
  sha256: str
  variables: dict


def initial_weights(
  config: ml_collections.ConfigDict, state: train_state.TrainState
) -> InitialWeights | None:
  """Returns the weights that the backbone starts from, None if it is random.

  Args:
    config: Config of the run.
    state: Training state, or its shapes.

  Raises:
    ValueError: If the file is missing or damaged, or its names or shapes do not
      fit the backbone. The error lists all that do not fit.
  """
  path = config.model.initial_weights
  if path is None:
    return None
  like = {
    'params': state.params['backbone'],
    'batch_stats': state.batch_stats['backbone'],
  }
  try:
    weights, sha256 = torchvision.read(path)
    variables = torchvision.from_torchvision(weights, like)
  except ValueError as error:
    raise ValueError(
      f'config.model.initial_weights={path!r}: {error}'
    ) from error
  return InitialWeights(path, sha256, variables)


def commit() -> str | None:
  """Returns the git commit of this code, with '-dirty' if it was changed.

  Outside a checkout of this project it is None, also for a package that is
  installed inside the checkout of another project.
  """
  output = ''
  for arguments in (
    ['ls-files', '--error-unmatch', __file__],
    ['describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'],
  ):
    command = ['git', '-C', os.path.dirname(os.path.abspath(__file__))]
    try:
      output = subprocess.check_output(
        [*command, *arguments], stderr=subprocess.DEVNULL, text=True
      )
    except (OSError, subprocess.CalledProcessError):
      return None
  return output.strip() or None
