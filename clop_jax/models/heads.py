"""Heads on top of a backbone's features."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from clop_jax.models import resnet


class ProjectionHead(nn.Module):
  """SimCLR's projection head: features to float32 embeddings.

  Hidden layers are dense, batch normalization (optional) and ReLU. The last
  layer is linear: behind a ReLU the embeddings could not reach a prototype with
  negative entries.

  `__call__(features, train)`: `[batch, feature_dim]` to `[batch, dim]`.

  Attributes:
    dim: Dimension of the embeddings.
    hidden_dim: Width of the hidden layers.
    num_layers: Number of dense layers. If 0, the features are the embeddings.
    use_bn: True for batch normalization in the hidden layers.
    bn_scope: As for `resnet.ResNet`.
    axis_name: As for `resnet.ResNet`.
    dtype: Precision of the hidden layers. The last one is float32.

  Reference:
    Chen et al., arXiv 2002.05709, sections 2.1 and 4.2.
  """

  dim: int
  hidden_dim: int
  num_layers: int = 2
  use_bn: bool = True
  bn_scope: str = 'global'
  axis_name: str | None = None
  dtype: Any = jnp.float32

  def __post_init__(self):
    resnet.bn_axis(self.bn_scope, self.axis_name)
    super().__post_init__()

  @nn.compact
  def __call__(self, features: jax.Array, train: bool) -> jax.Array:
    x = features
    for index in range(self.num_layers - 1):
      # Batch normalization would remove the bias.
      x = nn.Dense(
        self.hidden_dim,
        use_bias=not self.use_bn,
        dtype=self.dtype,
        name=f'dense{index + 1}',
      )(x)
      if self.use_bn:
        x = nn.BatchNorm(
          use_running_average=not train,
          momentum=0.9,
          epsilon=1e-5,
          dtype=self.dtype,
          axis_name=resnet.bn_axis(self.bn_scope, self.axis_name),
          name=f'bn{index + 1}',
        )(x)
      x = nn.relu(x)
    if self.num_layers == 0:
      return x.astype(jnp.float32)
    name = f'dense{self.num_layers}'
    return nn.Dense(self.dim, dtype=jnp.float32, name=name)(x)


class LinearHead(nn.Module):
  """Linear classifier: features `[batch, dim]` to float32 logits."""

  num_classes: int

  @nn.compact
  def __call__(self, features: jax.Array, train: bool = False) -> jax.Array:
    del train  # for the signature of the other networks
    # With zeros every class is equally likely before training.
    return nn.Dense(
      self.num_classes, kernel_init=nn.initializers.zeros, dtype=jnp.float32
    )(features)
