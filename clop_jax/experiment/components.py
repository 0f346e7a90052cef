"""Backbone, projection head and contrastive loss that a config names."""

from collections.abc import Callable
import dataclasses
import functools
import inspect
from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import ml_collections

from clop_jax import fields
from clop_jax import loss
from clop_jax.models import adapters
from clop_jax.models import backbones
from clop_jax.models import heads
from clop_jax.runtime import names
from clop_jax.runtime import parallel

# Functions of `(embeddings, axis_name=...)`, except supcon, which takes labels.
LOSSES = {
  'nt_xent': loss.nt_xent_loss,
  'supcon': loss.supcon_loss,
  'dcl': loss.dcl_loss,
  'vicreg': loss.vicreg_loss,
  'barlow_twins': loss.barlow_twins_loss,
  'alignment_uniformity': loss.alignment_uniformity_loss,
  'spectral': loss.spectral_contrastive_loss,
  'sigmoid': loss.sigmoid_loss,
  'w_mse': loss.w_mse_loss,
  'invariance': loss.invariance_loss,
}
_TEMPERED = ('nt_xent', 'supcon', 'dcl')
BLOCKED = ('nt_xent', 'supcon')


@dataclasses.dataclass(frozen=True)
class Networks:
  """The networks of a config.

  Attributes:
    backbone: Backbone from images to features.
    projection_head: Flax module from features to embeddings.
    predictor: Flax module from embeddings to predictions, or None.
    classifier: Flax module from features to logits, or None.
    dtype: Dtype of the computation.
  """

  backbone: adapters.Checked
  projection_head: nn.Module
  predictor: nn.Module | None
  classifier: nn.Module | None
  dtype: Any


def networks(
  config: ml_collections.ConfigDict,
  *,
  backbone: Any = None,
  platform: str | None = None,
) -> Networks:
  """Builds the networks of a config.

  Args:
    config: Config of the run.
    backbone: Backbone that was passed from Python, see `models.adapters`.
    platform: Platform for `model.dtype='auto'`; None is JAX's default.

  Raises:
    ValueError: If `model.name` or `model.options` is wrong, or the run was
      trained with a backbone from Python and none is passed.
  """
  model = config.model
  dtype = _dtype(model.dtype, platform)
  shared = {
    'bn_scope': model.bn_scope,
    'axis_name': parallel.DATA_AXIS,
    'dtype': dtype,
  }
  projection_head = heads.ProjectionHead(
    dim=model.embedding_dim,
    hidden_dim=model.head_hidden_dim,
    num_layers=model.head_layers,
    use_bn=model.head_bn,
    **shared,
  )
  predictor = None
  if config.method.predictor:
    if not model.head_layers:
      raise ValueError(
        'config.method.predictor=True needs a projection head, got '
        'config.model.head_layers=0; raise head_layers'
      )
    predictor = heads.ProjectionHead(
      dim=model.embedding_dim,
      hidden_dim=config.method.predictor_hidden_dim,
      **shared,
    )
  classifier = None
  if config.loss.cross_entropy_weight:
    classifier = heads.LinearHead(config.data.num_classes)
  if backbone is None:
    backbone = _named_backbone(model, shared)
  return Networks(
    adapters.adapt(backbone, f'backbone {model.name}'),
    projection_head,
    predictor,
    classifier,
    dtype,
  )


def _named_backbone(model, shared):
  if model.name == fields.GIVEN:
    raise ValueError(
      f"config.model.name={model.name!r}: this run's backbone was passed to "
      'train.train; pass it again, as in clop_jax.load(workdir, '
      "backbone=...), or train with a name 'package.module:attribute'"
    )
  make = names.resolve('model.name', model.name, backbones.BACKBONES)
  options = model.options.to_dict()
  if model.name in backbones.RESNETS:
    options |= shared | {
      'stem': model.stem,
      'width_multiplier': model.width_multiplier,
      'zero_init_last_bn': model.zero_init_last_bn,
    }
  elif model.name in backbones.VITS:
    options['dtype'] = shared['dtype']
  return names.call('model.options', make, **options)


def uses_labels(config: ml_collections.ConfigDict) -> bool:
  """Returns True if a run may train on labels, as a user's own loss may."""
  name = config.loss.contrastive
  is_free = name == 'none' or (name in LOSSES and name != 'supcon')
  weights = config.loss.clop_weight, config.loss.cross_entropy_weight
  return any(weights) or not is_free


def contrastive_loss(
  config: ml_collections.ConfigDict,
  *,
  contrastive: Callable[..., jax.Array] | None = None,
  platform: str | None = None,
) -> Callable[..., jax.Array]:
  """Returns the function `(embeddings, labels, axis_name=...) -> loss`.

  Args:
    config: Config of the run.
    contrastive: Such a function that was passed from Python.
    platform: Platform for automatic block sizes; None is JAX's default.

  Raises:
    ValueError: If `loss.contrastive` or `loss.options` is wrong.
  """
  choice = config.loss
  if choice.contrastive == 'none':
    if not choice.clop_weight and not choice.cross_entropy_weight:
      raise ValueError(
        "config.loss.contrastive is 'none', config.loss.clop_weight is 0 and "
        'config.loss.cross_entropy_weight is 0: nothing is left to train on'
      )
    return lambda z, labels, *, axis_name: jnp.zeros((), jnp.float32)
  if contrastive is not None:
    return _checked('contrastive', contrastive)
  if choice.contrastive == fields.GIVEN:
    raise ValueError(
      f'config.loss.contrastive={fields.GIVEN!r}: the loss of this run was '
      'passed to train.train; pass it again as contrastive=...'
    )
  ours = {**LOSSES, 'none': None}
  function = names.resolve('loss.contrastive', choice.contrastive, ours)
  options = choice.options.to_dict()
  if choice.contrastive not in LOSSES:
    names.check_call('loss.options', function, 0, 0, axis_name='', **options)
    return _checked(choice.contrastive, functools.partial(function, **options))
  if choice.contrastive in _TEMPERED:
    options = {'temperature': choice.temperature} | options
  takes_labels = 'labels' in inspect.signature(function).parameters
  names.check_call(
    'loss.options', function, *[0] * (1 + takes_labels), **options
  )

  def ours_of(z, labels, *, axis_name):
    more = {}
    if choice.contrastive in BLOCKED:
      more['block_size'] = _block_size(z, axis_name, choice, platform)
    arguments = (z, labels) if takes_labels else (z,)
    return function(*arguments, axis_name=axis_name, **options, **more)

  return ours_of


def _checked(name, function):
  """Returns a user's loss with its result checked while tracing."""

  def contrastive(z, labels, *, axis_name):
    value = function(z, labels, axis_name=axis_name)
    shape = getattr(value, 'shape', None)
    if shape != ():
      raise ValueError(
        f'the loss {name} must return a scalar, got '
        f'{type(value).__name__ if shape is None else f"shape {shape}"}'
      )
    return jnp.asarray(value, jnp.float32)

  return contrastive


def _block_size(embeddings, axis_name, choice, platform):
  if choice.block_size is not None:
    return choice.block_size
  devices = 1 if axis_name is None else lax.axis_size(axis_name)
  views, batch, _ = embeddings.shape
  rows = views * batch * devices
  return loss.choose_block_size(rows, devices, platform=platform)


def _dtype(name, platform):
  """Returns the dtype that the networks compute in, for `model.dtype`."""
  if name == 'auto':
    platform = platform or jax.default_backend()
    name = 'float32' if platform == 'cpu' else 'bfloat16'
  return {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}[name]
