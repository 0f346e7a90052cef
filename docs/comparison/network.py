"""The small network of docs/comparison.md, fast on a CPU."""

from flax import linen as nn
import jax
import jax.numpy as jnp


class ConvNet(nn.Module):
  """Three strided 3x3 convolutions: images to 128 features."""

  @nn.compact
  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    x = images
    for width in (32, 64, 128):
      x = nn.Conv(width, (3, 3), strides=2, use_bias=False)(x)
      # Over the global batch, as in the ResNets.
      axis_name = 'data' if train else None
      norm = nn.BatchNorm(not train, momentum=0.9, axis_name=axis_name)
      x = nn.relu(norm(x))
    return jnp.mean(x, axis=(1, 2))
