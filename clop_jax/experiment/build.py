"""From a config to the objects it names, and the config of a workdir.

`train`, `evaluate` and the other commands share this file and, with it, one
meaning of every field. Nothing below it reads a config.
"""

import dataclasses
import functools
import os
import subprocess
from collections.abc import Callable

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import ml_collections
import optax

from clop_jax import loss
from clop_jax import prototypes
from clop_jax.data import augment
from clop_jax.data import images
from clop_jax.models import heads
from clop_jax.models import resnet
from clop_jax.models import torchvision
from clop_jax.runtime import parallel
from clop_jax.training import optimizer
from clop_jax.training import prototype_rules
from clop_jax.training import train_state
from clop_jax.training import train_step

_BACKBONES = {
  8: resnet.ResNet8,
  18: resnet.ResNet18,
  34: resnet.ResNet34,
  50: resnet.ResNet50,
}

# How each kind begins.
_PROTOTYPES = {
  'orthonormal': prototypes.orthonormal_prototypes,
  'simplex_etf': prototypes.simplex_etf_prototypes,
  'random': prototypes.random_prototypes,
  'learned': prototypes.orthonormal_prototypes,
  'aligned': prototypes.orthonormal_prototypes,
}


def _procrustes(class_means, before):
  del before
  return prototypes.align_prototypes(class_means)


_ALIGNMENTS = {
  'procrustes': _procrustes,
  'assignment': prototypes.assign_prototypes,
}

_DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class _LossFields:
  """`config.loss`, and the platform that an automatic block size is for."""

  fields: ml_collections.ConfigDict
  platform: str | None

  def __getattr__(self, name):
    return getattr(self.fields, name)

  def rows(self, embeddings, axis_name):
    """The block size for these embeddings."""
    if self.fields.block_size is not None:
      return self.fields.block_size
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    views, batch, _ = embeddings.shape
    return loss.choose_block_size(
      views * batch * devices, devices, platform=self.platform
    )


def _nt_xent(config, embeddings, labels, axis_name):
  del labels
  return loss.nt_xent_loss(
    embeddings,
    temperature=config.temperature,
    block_size=config.rows(embeddings, axis_name),
    axis_name=axis_name,
  )


def _supcon(config, embeddings, labels, axis_name):
  return loss.supcon_loss(
    embeddings,
    labels,
    temperature=config.temperature,
    variant=config.supcon_variant,
    block_size=config.rows(embeddings, axis_name),
    axis_name=axis_name,
  )


def _dcl(config, embeddings, labels, axis_name):
  del labels
  return loss.dcl_loss(
    embeddings, temperature=config.temperature, axis_name=axis_name
  )


def _vicreg(config, embeddings, labels, axis_name):
  del labels
  invariance, variance, covariance = config.vicreg_weights
  return loss.vicreg_loss(
    embeddings,
    invariance_weight=invariance,
    variance_weight=variance,
    covariance_weight=covariance,
    axis_name=axis_name,
  )


def _barlow_twins(config, embeddings, labels, axis_name):
  del labels
  return loss.barlow_twins_loss(
    embeddings, redundancy_weight=config.barlow_weight, axis_name=axis_name
  )


def _no_contrastive_loss(config, embeddings, labels, axis_name):
  del config, embeddings, labels, axis_name
  return jnp.zeros((), jnp.float32)


_CONTRASTIVE = {
  'nt_xent': _nt_xent,
  'supcon': _supcon,
  'dcl': _dcl,
  'vicreg': _vicreg,
  'barlow_twins': _barlow_twins,
  'none': _no_contrastive_loss,
}


@dataclasses.dataclass(frozen=True)
class Networks:
  """The networks of a config; see `networks`.

  Attributes:
    backbone: Module from images to features.
    projection_head: Module from features to embeddings.
  """

  backbone: nn.Module
  projection_head: nn.Module


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What a config names, built; see `build`.

  Attributes:
    backbone: images to features.
    projection_head: features to embeddings.
    tx: the Optax chain.
    create_state: `(key=..., backbone_variables=...) -> state` before the first
      step, pure; the key is that of the config's seed unless one is given, and
      the backbone is random unless its variables are, see `InitialWeights`.
    step: `(state, batch, key, numbers=...) -> (state, metrics)`,
      `train_step.train_step` with everything else bound. `numbers` are those of
      the config unless they are given, see `numbers_of`.
  """

  backbone: nn.Module
  projection_head: nn.Module
  tx: optax.GradientTransformation
  create_state: Callable[..., train_state.TrainState]
  step: Callable


def networks(
  config: ml_collections.ConfigDict, *, platform: str | None = None
) -> Networks:
  """Builds the networks of a config.

  Args:
    config: Config, see `defaults`.
    platform: Platform for `model.dtype='auto'`, see `build`.

  Raises:
    ValueError: If the depth or the dtype is unknown.
  """
  model = config.model
  shared = {
    'bn_scope': model.bn_scope,
    'axis_name': parallel.DATA_AXIS,
    'dtype': compute_dtype(model.dtype, platform),
  }
  backbone = _choose(_BACKBONES, 'model.depth', model.depth)(
    stem=model.stem,
    width_multiplier=model.width_multiplier,
    zero_init_last_bn=model.zero_init_last_bn,
    **shared,
  )
  projection_head = heads.ProjectionHead(
    dim=model.embedding_dim,
    hidden_dim=model.head_hidden_dim,
    num_layers=model.head_layers,
    use_bn=model.head_bn,
    **shared,
  )
  return Networks(backbone, projection_head)


def build(
  config: ml_collections.ConfigDict,
  *,
  total_steps: int,
  steps_per_epoch: int,
  platform: str | None = None,
) -> Experiment:
  """Builds the networks, the optimizer and the train step of a config.

  Args:
    config: Config, see `defaults`.
    total_steps: Number of steps of the whole run.
    steps_per_epoch: Number of steps in an epoch.
    platform: Platform for which `model.dtype='auto'` and automatic block sizes
      are chosen: 'cpu', 'gpu' or 'tpu'. None is JAX's default.

  Returns:
    The experiment.

  Raises:
    ValueError: If the value of a field is wrong; the valid ones are named.
  """
  built = networks(config, platform=platform)
  numbers = numbers_of(config)
  optimizer_at = functools.partial(
    _optimizer_at,
    config,
    total_steps=total_steps,
    warmup_steps=round(config.optimizer.warmup_epochs * steps_per_epoch),
  )
  parts = train_step.Parts(
    backbone=built.backbone,
    projection_head=built.projection_head,
    recipe=recipe(config),
    contrastive=_contrastive_loss(config, platform),
    clop_weight=numbers['clop_weight'],
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
    **optimizer_at(numbers['learning_rate']),
  )
  return Experiment(
    backbone=parts.backbone,
    projection_head=parts.projection_head,
    tx=parts.tx,
    create_state=functools.partial(
      _create_state, config, parts, _prototype_maker(config)
    ),
    step=functools.partial(
      _step,
      parts,
      optimizer_at,
      numbers,
      _first_clop_step(config, steps_per_epoch),
    ),
  )


def _step(
  parts,
  optimizer_at,
  own_numbers,
  first_clop_step,
  state,
  batch,
  key,
  numbers=None,
):
  """Takes a train step; see `Experiment`."""
  numbers = own_numbers if numbers is None else numbers
  clop_weight = numbers['clop_weight']
  if first_clop_step:
    clop_weight *= state.step >= first_clop_step
  parts = dataclasses.replace(
    parts, clop_weight=clop_weight, **optimizer_at(numbers['learning_rate'])
  )
  return train_step.train_step(
    state, batch, key, parts, axis_name=parallel.DATA_AXIS
  )


def _optimizer_at(config, learning_rate, *, total_steps, warmup_steps):
  """Returns the Optax chain and the schedule for a base learning rate."""
  schedule = optimizer.warmup_cosine(
    learning_rate, total_steps=total_steps, warmup_steps=warmup_steps
  )
  tx = optimizer.create(
    config.optimizer.name,
    schedule,
    momentum=config.optimizer.momentum,
    weight_decay=config.optimizer.weight_decay,
    trust_coefficient=config.optimizer.trust_coefficient,
    clip_norm=config.optimizer.clip_norm,
    rate_in_momentum=config.optimizer.rate_in_momentum,
  )
  return {'tx': tx, 'schedule': schedule}


def _contrastive_loss(config, platform):
  contrastive = _choose(
    _CONTRASTIVE, 'loss.contrastive', config.loss.contrastive
  )
  if config.loss.contrastive == 'none' and not config.loss.clop_weight:
    raise ValueError(
      "config.loss.contrastive is 'none' and config.loss.clop_weight is 0: "
      'nothing is left to train on'
    )
  return functools.partial(contrastive, _LossFields(config.loss, platform))


def _prototype_maker(config):
  images.check_size('config.augment.size', config.augment.size)
  return _choose(_PROTOTYPES, 'prototypes.kind', config.prototypes.kind)


def _create_state(
  config, parts, make_prototypes, key=None, backbone_variables=None
):
  """Returns the state before the first step; see `Experiment`."""
  size = config.augment.size
  image_shape = (size, size, config.data.channels)
  key = jax.random.key(config.seed) if key is None else key
  init_key, prototype_key = jax.random.split(key)
  dim = config.model.embedding_dim
  if config.model.head_layers == 0:
    # No head: the features are the embeddings.
    features, _ = jax.eval_shape(
      functools.partial(parts.backbone.init_with_output, train=False),
      init_key,
      jax.ShapeDtypeStruct((1, *image_shape), jnp.float32),
    )
    dim = features.shape[-1]
  prototypes_ = make_prototypes(prototype_key, config.data.num_classes, dim)
  return train_state.create(
    init_key,
    backbone=parts.backbone,
    projection_head=parts.projection_head,
    tx=parts.tx,
    image_shape=image_shape,
    prototypes=prototypes_,
    prototype_statistics=parts.prototype_rule.statistics(prototypes_),
    backbone_variables=backbone_variables,
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


def _first_clop_step(config, steps_per_epoch):
  """Steps that are trained without CLOP."""
  after, epochs = config.loss.clop_after_epochs, config.train.num_epochs
  if not 0 <= after < epochs:
    raise ValueError(
      'config.loss.clop_after_epochs must be at least 0 and below '
      f'config.train.num_epochs={epochs}, or there would be no CLOP term at '
      f'all; got {after}'
    )
  return after * steps_per_epoch


def _prototype_rule(config, steps_per_epoch):
  """What becomes of the prototypes of that kind."""
  fields = config.prototypes
  if fields.kind == 'learned':
    return prototype_rules.Learned(fields.learning_rate)
  if fields.kind != 'aligned':
    return prototype_rules.Fixed()
  align = _choose(_ALIGNMENTS, 'prototypes.align_by', fields.align_by)
  first, every = fields.align_after_epochs, fields.align_every_epochs
  epochs = config.train.num_epochs
  if not 1 <= first < epochs:
    raise ValueError(
      'config.prototypes.align_after_epochs must be at least 1 and below '
      f'config.train.num_epochs={epochs}, or there would be no CLOP term at '
      f'all; got {first}'
    )
  if every is not None and every < 1:
    raise ValueError(
      'config.prototypes.align_every_epochs must be None or at least 1, got '
      f'{every}'
    )
  return prototype_rules.Aligned(
    align=align,
    first_step=first * steps_per_epoch,
    every_steps=None if every is None else every * steps_per_epoch,
    steps_per_epoch=steps_per_epoch,
  )


def _pseudo_labels(config, steps_per_epoch):
  """Labels for unlabelled examples, or None if there are to be none."""
  fields, epochs = config.loss, config.train.num_epochs
  if fields.pseudo_label_threshold is None:
    return None
  if not 0 < fields.pseudo_label_threshold <= 1:
    raise ValueError(
      'config.loss.pseudo_label_threshold must be None or in (0, 1], got '
      f'{fields.pseudo_label_threshold}'
    )
  after = fields.pseudo_label_after_epochs
  if not 0 <= after < epochs:
    raise ValueError(
      'config.loss.pseudo_label_after_epochs must be at least 0 and below '
      f'config.train.num_epochs={epochs}, or there would be none at all; got '
      f'{after}'
    )

  def label(embeddings, labels, prototypes_, step):
    guessed = prototypes.pseudo_labels(
      embeddings,
      labels,
      prototypes_,
      threshold=fields.pseudo_label_threshold,
      temperature=fields.clop_temperature,
    )
    return jnp.where(step >= after * steps_per_epoch, guessed, labels)

  return label


def recipe(config: ml_collections.ConfigDict) -> augment.Recipe:
  """Returns the random operations that make the views."""
  fields = config.augment.to_dict()
  if config.data.host_crops:
    fields['crop_probability'] = 0.0  # the workers have cropped already
  return augment.Recipe(**fields)


def training_key(config: ml_collections.ConfigDict) -> jax.Array:
  """The key of everything random in the steps of a run."""
  return jax.random.fold_in(jax.random.key(config.seed), 1)


def compute_dtype(name, platform=None):
  """Returns the type that the networks compute in, for `model.dtype`."""
  if name == 'auto':
    platform = platform or jax.default_backend()
    name = 'float32' if platform == 'cpu' else 'bfloat16'
  return _choose(_DTYPES, 'model.dtype', name, also=['auto'])


def _choose(table, field, name, also=()):
  if name not in table:
    valid = [*also, *table]
    raise ValueError(f'config.{field} must be one of {valid}, got {name!r}')
  return table[name]


def abstract_state(experiment: Experiment, mesh) -> train_state.TrainState:
  """Shapes, dtypes and shardings of the state, for restoring."""
  sharding = parallel.replicated(mesh)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    jax.eval_shape(experiment.create_state),
  )


@dataclasses.dataclass(frozen=True)
class InitialWeights:
  """What `model.initial_weights` names; see `initial_weights`.

  Attributes:
    path: of the file.
    sha256: of the file.
    variables: `params` and `batch_stats` of the backbone, float32 on the host.
  """

  path: str
  sha256: str
  variables: dict


def initial_weights(
  config: ml_collections.ConfigDict, state: train_state.TrainState
) -> InitialWeights | None:
  """Reads the weights that the backbone is to start from.

  Args:
    config: see `defaults`.
    state: of the run, or its shapes.

  Returns:
    The weights; None if the config names none.

  Raises:
    ValueError: if the file is missing or damaged, or its names or shapes do not
      fit the backbone; all that do not are listed.
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
  """The git commit of this code, '-dirty' if changed; None outside git."""
  folder = os.path.dirname(os.path.abspath(__file__))
  try:
    # Only a checkout of this project: an installed package may lie in another
    # project's.
    result = subprocess.run(
      ['git', '-C', folder, 'ls-files', '--error-unmatch', __file__],
      capture_output=True,
      text=True,
    )
    if result.returncode:
      return None
    result = subprocess.run(
      [
        'git',
        '-C',
        folder,
        'describe',
        '--always',
        '--dirty',
        '--abbrev=40',
        '--exclude=*',
      ],
      capture_output=True,
      text=True,
    )
  except OSError:
    return None
  return result.stdout.strip() or None
