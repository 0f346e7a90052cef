"""The training state, and the networks applied to images."""

from typing import Any

import flax.struct
from flax import linen as nn
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
  """Everything that training changes and a checkpoint holds.

  Attributes:
    step: Number of updates so far, int32 scalar.
    params: Parameters `{'backbone': ..., 'projection_head': ...}`, float32.
    batch_stats: Running statistics, with the same two keys.
    opt_state: State of the Optax chain.
    prototypes: Prototypes `[num_classes, dim]`.
    prototype_statistics: Statistics of the rule of the prototypes, see
      `prototype_rules`; None for most rules.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any  # optax.OptState has names that only Optax resolves
  prototypes: jax.Array
  prototype_statistics: Any = None

  @property
  def variables(self) -> dict[str, Any]:
    """`{'params': ..., 'batch_stats': ...}` of both networks."""
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
  """Returns the state before the first step; a pure function.

  Args:
    key: PRNG key of the initialization.
    backbone: Module from images to features.
    projection_head: Module from features to embeddings.
    tx: Optax chain.
    image_shape: `(height, width, channels)` of a view.
    prototypes: Initial prototypes `[num_classes, dim]`.
    prototype_statistics: Initial statistics, see `TrainState`.
    backbone_variables: Initial `params` and `batch_stats` of the backbone; None
      for random ones.
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
  """Returns `(features, embeddings, batch_stats)` of normalized images.

  If `train`, batch normalization uses the statistics of these images, and the
  running ones are updated. `params` and `batch_stats` are as in `TrainState`.
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
