"""Heads on top of a backbone's features."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from clop_jax.models import resnet


class ProjectionHead(nn.Module):
  """SimCLR's projection head: features to embeddings, float32 out.

  `num_layers - 1` times dense, batch normalization (optional) and ReLU, then a
  dense layer. The last layer is linear: behind a ReLU the embeddings could not
  reach a prototype that has negative entries.

  `__call__(features, train)`: `[batch, feature_dim]` to `[batch, dim]`.

  Attributes:
    dim: dimension of the embeddings.
    hidden_dim: width of the hidden layers.
    num_layers: dense layers; 0 hands the features on as the embeddings.
    use_bn: batch normalization in the hidden layers.
    bn_scope: as in `resnet.ResNet`.
    axis_name: as in `resnet.ResNet`.
    dtype: precision of the hidden layers; the last one is float32.

  Raises:
    ValueError: for an unknown `bn_scope`.

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
    resnet.bn_axis(self.bn_scope, self.axis_name)  # refuses an unknown scope
    super().__post_init__()

  @nn.compact
  def __call__(self, features: jax.Array, train: bool) -> jax.Array:
    x = features
    for index in range(self.num_layers - 1):
      # The bias would be taken out again by the normalization.
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
  """A linear classifier on features: `[batch, dim]` to float32 logits."""

  num_classes: int

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    # Zeros: before training every class is equally likely.
    return nn.Dense(
      self.num_classes, kernel_init=nn.initializers.zeros, dtype=jnp.float32
    )(features)
