"""The training state, and the networks applied to images."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
from jax import lax
import jax.numpy as jnp
import optax

from clop_jax.models import adapters


@flax.struct.dataclass
class TrainState:
  """Everything that training changes and a checkpoint holds.

  Attributes:
    step: Number of updates so far, int32 scalar.
    params: Parameters `{'backbone': ..., 'projection_head': ...}`, float32, and
      those of 'predictor' and 'classifier' if there is one.
    batch_stats: Running statistics, with the same keys.
    opt_state: State of the Optax chain.
    prototypes: Prototypes `[num_classes, dim]`.
    prototype_statistics: Statistics of the rule of the prototypes, see
      `prototype_rules`; None for most rules.
    target: Moving average of the parameters of backbone and projection head,
      see `siamese`; None without one.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any  # optax.OptState has names that only Optax resolves
  prototypes: jax.Array
  prototype_statistics: Any = None
  target: Any = None

  @property
  def variables(self) -> dict[str, Any]:
    """`{'params': ..., 'batch_stats': ...}` of both networks."""
    return {'params': self.params, 'batch_stats': self.batch_stats}


def create(
  key: jax.Array,
  *,
  backbone: Any,
  projection_head: Any,
  tx: optax.GradientTransformation,
  image_shape: tuple[int, int, int],
  prototypes: jax.Array,
  prototype_statistics=None,
  backbone_variables=None,
  others: Mapping[str, Any] | None = None,
  has_target: bool = False,
) -> TrainState:
  """Returns the state before the first step; a pure function.

  Args:
    key: PRNG key of the initialization.
    backbone: Backbone from images to features, see `models.adapters`.
    projection_head: Module from features to embeddings.
    tx: Optax chain.
    image_shape: `(height, width, channels)` of a view.
    prototypes: Initial prototypes `[num_classes, dim]`.
    prototype_statistics: Initial statistics, see `TrainState`.
    backbone_variables: Initial `params` and `batch_stats` of the backbone; None
      for random ones.
    others: Flax modules of embeddings ('predictor') and of features
      ('classifier').
    has_target: True to keep a moving average of the networks.
  """
  backbone_key, head_key = jax.random.split(key)
  images = jnp.zeros((1, *image_shape), jnp.float32)
  backbone = adapters.adapt(backbone)
  if backbone_variables is None:
    backbone_variables = backbone.init(backbone_key, images)
  features, _ = backbone.apply(backbone_variables, images, False)
  variables = {
    'backbone': backbone_variables,
    'projection_head': projection_head.init(head_key, features, train=False),
  }
  target = None
  if has_target:
    target = {
      k: jax.tree.map(jnp.copy, v.get('params', {}))
      for k, v in variables.items()
    }
  for name, module in (others or {}).items():
    inputs = features
    if name == 'predictor':
      inputs = jnp.zeros((1, prototypes.shape[-1]))  # embeddings
    variables[name] = module.init(
      jax.random.fold_in(head_key, 1), inputs, train=False
    )
  params = {k: v.get('params', {}) for k, v in variables.items()}
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats={k: v.get('batch_stats', {}) for k, v in variables.items()},
    opt_state=tx.init(params),
    prototypes=prototypes,
    prototype_statistics=prototype_statistics,
    target=target,
  )


def apply_networks(
  backbone: Any,
  projection_head: Any,
  params,
  batch_stats,
  images: jax.Array,
  *,
  train: bool,
  keys: jax.Array | None = None,
):
  """Returns `(features, embeddings, batch_stats)` of normalized images.

  If `train`, batch normalization uses the statistics of these images, and the
  running ones are updated. `params` and `batch_stats` are as in `TrainState`,
  `keys` are one for each image, for dropout and the like.
  """
  new = dict(batch_stats)

  def apply(module, name, x, **options):
    y, new[name] = apply_network(
      module, name, params, batch_stats, x, train=train, **options
    )
    return y

  features = apply(backbone, 'backbone', images, keys=keys)
  embeddings = apply(projection_head, 'projection_head', features)
  return features, embeddings, new


def apply_network(
  network: Any,
  name: str,
  params,
  batch_stats,
  x: jax.Array,
  *,
  train,
  **options,
):
  """Returns the output of one network, and its batch_stats after it."""
  variables = {'params': params[name], 'batch_stats': batch_stats[name]}
  y, updated = adapters.adapt(network).apply(variables, x, train, **options)
  return y, updated.get('batch_stats', batch_stats[name])


def features_of(backbone: Any, key: jax.Array, images: jax.Array) -> jax.Array:
  """Returns the features of a backbone with random variables."""
  backbone = adapters.adapt(backbone)
  return backbone.apply(backbone.init(key, images), images, False)[0]


def keys_of_views(keys: jax.Array, num_views: int) -> jax.Array:
  """Returns one key for each image of each view, view by view."""

  def of_view(number):
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)

  # Numbers 0 and 1 give the two keys of the augmentation.
  return jnp.concatenate([of_view(2 + view) for view in range(num_views)])


def averaged(batch_stats: Any, axis_name: str, *, everything: bool) -> Any:
  """Averages running statistics that differ between the devices.

  Under `jax.shard_map` JAX knows which they are. `everything` averages all.
  """
  return jax.tree.map(
    lambda x: (
      lax.pmean(x, axis_name) if everything or _varies(x, axis_name) else x
    ),
    batch_stats,
  )


def _varies(x: jax.Array, axis_name: str) -> bool:
  aval: Any = jax.typeof(x)
  if hasattr(aval, 'manual_axis_type'):
    return axis_name in aval.manual_axis_type.varying
  return axis_name in aval.vma  # before JAX 0.10
