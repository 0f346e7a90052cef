"""The training state, its creation, and the networks applied to images."""

from typing import Any

import flax.struct
from flax import linen as nn
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
  """All that training changes, and all that a checkpoint holds.

  Attributes:
    step: updates made so far, int32 scalar.
    params: `{'backbone': ..., 'projection_head': ...}`, float32.
    batch_stats: running statistics, with the same two keys.
    opt_state: of the Optax chain.
    prototypes: `[num_classes, dim]`.
    prototype_statistics: what the rule of the prototypes keeps, see
      `prototype_rules`; None for most.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any  # optax.OptState has names that only Optax resolves
  prototypes: jax.Array
  prototype_statistics: Any = None

  @property
  def variables(self) -> dict[str, Any]:
    """Of both networks: `{'params': ..., 'batch_stats': ...}`."""
    return {'params': self.params, 'batch_stats': self.batch_stats}


def create(
  key: jax.Array,
  *,
  backbone: nn.Module,
  projection_head: nn.Module,
  tx: optax.GradientTransformation,
  image_shape: tuple[int, int, int],
  prototypes: jax.Array,
  prototype_statistics=None,
  backbone_variables=None,
) -> TrainState:
  """The state before the first step; pure, so it can be jitted or only shaped.

  Args:
    key: PRNG key of the initialization.
    backbone: images to features.
    projection_head: features to embeddings.
    tx: the Optax chain.
    image_shape: `(height, width, channels)` of a view.
    prototypes: `[num_classes, dim]`.
    prototype_statistics: see `TrainState`.
    backbone_variables: `params` and `batch_stats` that the backbone starts
      from; None: its own initialization.

  Returns:
    The state.
  """
  backbone_key, head_key = jax.random.split(key)
  images = jnp.zeros((1, *image_shape), jnp.float32)
  if backbone_variables is None:
    backbone_variables = backbone.init(backbone_key, images, train=False)
  features = backbone.apply(backbone_variables, images, train=False)
  head_variables = projection_head.init(head_key, features, train=False)
  params = {
    'backbone': backbone_variables['params'],
    'projection_head': head_variables.get('params', {}),
  }
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats={
      'backbone': backbone_variables.get('batch_stats', {}),
      'projection_head': head_variables.get('batch_stats', {}),
    },
    opt_state=tx.init(params),
    prototypes=prototypes,
    prototype_statistics=prototype_statistics,
  )


def apply_networks(
  backbone: nn.Module,
  projection_head: nn.Module,
  params,
  batch_stats,
  images: jax.Array,
  *,
  train: bool,
):
  """Images through both networks.

  Args:
    backbone: images to features.
    projection_head: features to embeddings.
    params: as in `TrainState`.
    batch_stats: as in `TrainState`.
    images: `[batch, height, width, channels]`, normalized.
    train: batch statistics of these images (True) or the running ones.

  Returns:
    `(features [batch, feature_dim], embeddings [batch, dim], batch_stats)`;
    the last unchanged unless `train`.
  """
  new_batch_stats = {}

  def apply(module, name, x):
    variables = {'params': params[name], 'batch_stats': batch_stats[name]}
    y, updated = module.apply(
      variables, x, train=train, mutable=['batch_stats'] if train else []
    )
    new_batch_stats[name] = updated.get('batch_stats', batch_stats[name])
    return y

  features = apply(backbone, 'backbone', images)
  embeddings = apply(projection_head, 'projection_head', features)
  return features, embeddings, new_batch_stats
