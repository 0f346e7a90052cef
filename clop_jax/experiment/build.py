"""Builds networks, optimizer and train step from a config.

All commands use this module, so a field has one meaning. `defaults.check` has
checked the fields, one by one, before.
"""

from collections.abc import Callable
import dataclasses
import functools
import os
import subprocess

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import ml_collections
import optax

from clop_jax import loss
from clop_jax import prototypes
from clop_jax.data import augment
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
class Networks:
  """The Flax modules of a config.

  Attributes:
    backbone: Module from images to features.
    projection_head: Module from features to embeddings.
  """

  backbone: nn.Module
  projection_head: nn.Module


@dataclasses.dataclass(frozen=True)
class Experiment(Networks):
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


def networks(
  config: ml_collections.ConfigDict, *, platform: str | None = None
) -> Networks:
  """Builds the networks of a config; see `build` for the platform."""
  model = config.model
  shared = {
    'bn_scope': model.bn_scope,
    'axis_name': parallel.DATA_AXIS,
    'dtype': compute_dtype(model.dtype, platform),
  }
  backbone = _BACKBONES[model.depth](
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
    config: Config of the run.
    total_steps: Number of steps of the whole run.
    steps_per_epoch: Number of steps in an epoch.
    platform: Platform for `model.dtype='auto'` and automatic block sizes:
      'cpu', 'gpu' or 'tpu'. None is JAX's default.

  Raises:
    ValueError: If fields contradict each other.
  """
  built = networks(config, platform=platform)
  config_numbers = numbers_of(config)
  clop_step = _first_step(config, 'loss.clop_after_epochs', steps_per_epoch)

  def optimizer_at(learning_rate):
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

  parts = train_step.Parts(
    backbone=built.backbone,
    projection_head=built.projection_head,
    recipe=recipe(config),
    contrastive=_contrastive_loss(config, platform),
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
    backbone=parts.backbone,
    projection_head=parts.projection_head,
    tx=parts.tx,
    create_state=functools.partial(_create_state, config, parts),
    step=step,
  )


def _contrastive_loss(config, platform):
  """Returns the function `(embeddings, labels, axis_name) -> loss`."""
  fields = config.loss
  if fields.contrastive == 'none' and not fields.clop_weight:
    raise ValueError(
      "config.loss.contrastive is 'none' and config.loss.clop_weight is 0: "
      'nothing is left to train on'
    )

  def block_size(embeddings, axis_name):
    if fields.block_size is not None:
      return fields.block_size
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    views, batch, _ = embeddings.shape
    rows = views * batch * devices
    return loss.choose_block_size(rows, devices, platform=platform)

  def contrastive(z, labels, *, axis_name):
    options = {'axis_name': axis_name}
    if fields.contrastive in ('nt_xent', 'supcon', 'dcl'):
      options['temperature'] = fields.temperature
    if fields.contrastive in ('nt_xent', 'supcon'):
      options['block_size'] = block_size(z, axis_name)
    match fields.contrastive:
      case 'nt_xent':
        return loss.nt_xent_loss(z, **options)
      case 'supcon':
        variant = fields.supcon_variant
        return loss.supcon_loss(z, labels, variant=variant, **options)
      case 'dcl':
        return loss.dcl_loss(z, **options)
      case 'vicreg':
        terms = ('invariance', 'variance', 'covariance')
        for term, weight in zip(terms, fields.vicreg_weights, strict=True):
          options[f'{term}_weight'] = weight
        return loss.vicreg_loss(z, **options)
      case 'barlow_twins':
        weight = fields.barlow_weight
        return loss.barlow_twins_loss(z, redundancy_weight=weight, **options)
      case 'none':
        return jnp.zeros((), jnp.float32)

  return contrastive


def _create_state(config, parts, key=None, backbone_variables=None):
  """Returns the state before the first step; see `Experiment`."""
  size = config.augment.size
  image_shape = (size, size, config.data.channels)
  key = jax.random.key(config.seed) if key is None else key
  init_key, prototype_key = jax.random.split(key)
  dim = config.model.embedding_dim
  if config.model.head_layers == 0:
    # Without a head the features are the embeddings.
    features, _ = jax.eval_shape(
      functools.partial(parts.backbone.init_with_output, train=False),
      init_key,
      jax.ShapeDtypeStruct((1, *image_shape), jnp.float32),
    )
    dim = features.shape[-1]
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


def compute_dtype(name, platform=None):
  """Returns the dtype that the networks compute in, for `model.dtype`."""
  if name == 'auto':
    platform = platform or jax.default_backend()
    name = 'float32' if platform == 'cpu' else 'bfloat16'
  return {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}[name]


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
