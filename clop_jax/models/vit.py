"""Vision transformers in Flax: images to features, no classifier.

Layers, their order and their initial values follow torchvision's, so weights
can be exchanged. Random parts (dropout, stochastic depth) take one key for each
image, so that they do not depend on how a batch is split over devices.
"""

import functools
import math
from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

POOLS = ('token', 'mean')


class ViT(nn.Module):
  """A vision transformer without its classifier.

  `__call__(images, train, keys)` maps float images `[batch, height, width,
  channels]` to float32 features `[batch, dim]`. `keys` `[batch]` are PRNG keys,
  needed only in training with dropout or stochastic depth.

  Attributes:
    dim: Dimension of the tokens and the features.
    depth: Number of encoder layers.
    num_heads: Number of attention heads, must divide `dim`.
    patch_size: Height and width of a patch in pixels, must divide the image.
    pool: 'token' for the class token's output, 'mean' for the mean over the
      patches.
    dropout: Probability of dropping an entry after the embedding, the attention
      and each layer of the MLP.
    stochastic_depth: Probability of skipping the last layer's residual
      branches. It grows linearly from 0 at the first layer.
    dtype: Precision of the computation. Parameters, normalizations' statistics
      and features are float32.

  Raises:
    ValueError: If `patch_size` does not divide the image, `num_heads` does not
      divide `dim`, `pool` is unknown, or keys are missing.

  Reference:
    Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv 2010.11929,
    equations 1 to 4. Stochastic depth: Huang et al., arXiv 1603.09382.
  """

  dim: int
  depth: int = 12
  num_heads: int = 12
  patch_size: int = 16
  pool: str = 'token'
  dropout: float = 0.0
  stochastic_depth: float = 0.0
  dtype: Any = jnp.float32

  def __post_init__(self):
    if self.pool not in POOLS:
      raise ValueError(f'pool must be one of {list(POOLS)}, got {self.pool!r}')
    if self.dim % self.num_heads:
      raise ValueError(
        f'num_heads must divide dim={self.dim}, got {self.num_heads}'
      )
    super().__post_init__()

  @nn.compact
  def __call__(
    self, images: jax.Array, train: bool, keys: jax.Array | None = None
  ) -> jax.Array:
    batch, height, width, channels = images.shape
    size = self.patch_size
    if height % size or width % size:
      raise ValueError(
        f'patch_size must divide the image of {height} x {width} pixels, got '
        f'{size}'
      )
    random = _Random(keys) if train else None
    x = nn.Conv(
      self.dim,
      (size, size),
      strides=size,
      padding='VALID',
      kernel_init=nn.initializers.truncated_normal(
        math.sqrt(1 / (channels * size**2))
      ),
      dtype=self.dtype,
      name='conv_proj',
    )(images.astype(self.dtype))
    x = x.reshape(batch, -1, self.dim)
    token = self.param('class_token', nn.initializers.zeros, (1, 1, self.dim))
    token = jnp.broadcast_to(token.astype(x.dtype), (batch, 1, self.dim))
    x = jnp.concatenate([token, x], axis=1)
    positions = self.param(
      'pos_embedding',
      nn.initializers.normal(0.02),
      (1, x.shape[1], self.dim),
    )
    x = _dropout(x + positions.astype(x.dtype), self.dropout, random)
    for index in range(self.depth):
      rate = self.stochastic_depth * index / max(self.depth - 1, 1)
      x = EncoderLayer(
        num_heads=self.num_heads,
        dropout=self.dropout,
        skip=rate,
        dtype=self.dtype,
        name=f'encoder_layer_{index}',
      )(x, random)
    x = _layer_norm(self.dtype, 'ln')(x).astype(jnp.float32)
    return x[:, 0] if self.pool == 'token' else jnp.mean(x[:, 1:], axis=1)


class EncoderLayer(nn.Module):
  """Self-attention and an MLP, each normalized before and added after."""

  num_heads: int
  dropout: float
  skip: float
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, random) -> jax.Array:
    batch, tokens, dim = x.shape
    dense = functools.partial(
      nn.Dense,
      kernel_init=nn.initializers.xavier_uniform(),
      dtype=self.dtype,
    )
    y = _layer_norm(self.dtype, 'ln_1')(x)
    y = dense(3 * dim, name='in_proj')(y)
    y = y.reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
    query, key, value = jnp.moveaxis(y, 2, 0)
    y = _attention(query, key, value)
    y = dense(dim, name='out_proj')(y.reshape(batch, tokens, dim))
    y = _dropout(y, self.dropout, random)
    x = x + _skip(y, self.skip, random)
    y = _layer_norm(self.dtype, 'ln_2')(x)
    y = dense(4 * dim, name='mlp_1')(y)
    y = _dropout(nn.gelu(y, approximate=False), self.dropout, random)
    y = _dropout(dense(dim, name='mlp_2')(y), self.dropout, random)
    return x + _skip(y, self.skip, random)


def _attention(query, key, value):
  """Softmax attention `[batch, tokens, heads, head_dim]`."""
  attend = jax.nn.dot_product_attention
  if query.dtype == jnp.bfloat16 and jax.default_backend() == 'gpu':
    # cuDNN's kernel never writes the [tokens, tokens] weights to memory. JAX
    # can only trace it where there is a GPU.
    return lax.platform_dependent(
      query,
      key,
      value,
      cuda=functools.partial(attend, implementation='cudnn'),
      default=attend,
    )
  return attend(query, key, value)


class _Random:
  """Keys for one image each, split anew for each use."""

  def __init__(self, keys):
    self._keys = keys
    self._uses = 0

  def keep(self, rate, shape):
    """Returns a mask `[batch, *shape]` that is true with `1 - rate`."""
    if self._keys is None:
      raise ValueError(
        'keys must be given to train with dropout or stochastic_depth, got None'
      )
    self._uses += 1
    keys = jax.vmap(lambda key: jax.random.fold_in(key, self._uses))(self._keys)
    return jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape))(
      keys
    )


def _dropout(x, rate, random):
  if not rate or random is None:
    return x
  return jnp.where(random.keep(rate, x.shape[1:]), x / (1 - rate), 0)


def _skip(x, rate, random):
  """Drops the whole branch of an image; see stochastic depth."""
  if not rate or random is None:
    return x
  keep = random.keep(rate, (1,) * (x.ndim - 1))
  return jnp.where(keep, x / (1 - rate), 0)


def _layer_norm(dtype, name):
  return nn.LayerNorm(epsilon=1e-6, dtype=dtype, name=name)


def resize_positions(positions: jax.Array, num_patches: int) -> jax.Array:
  """Interpolates position embeddings to another number of patches.

  Args:
    positions: `[1, 1 + n, dim]`, the class token's first, of a square image.
    num_patches: Number of patches of the new, square image.

  Returns:
    `[1, 1 + num_patches, dim]`, bicubic; the class token's unchanged.

  Raises:
    ValueError: If a number of patches is not a square.
  """
  old, new = math.isqrt(positions.shape[1] - 1), math.isqrt(num_patches)
  for name, count, side in (
    ('positions', positions.shape[1] - 1, old),
    ('num_patches', num_patches, new),
  ):
    if side**2 != count or not side:
      raise ValueError(f'{name} must be of a square image, got {count} patches')
  dim = positions.shape[2]
  grid = positions[:, 1:].reshape(1, old, old, dim)
  grid = jax.image.resize(grid, (1, new, new, dim), 'bicubic')
  return jnp.concatenate(
    [positions[:, :1], grid.reshape(1, num_patches, dim)], axis=1
  )


ViTTi = functools.partial(ViT, dim=192, num_heads=3)
ViTS = functools.partial(ViT, dim=384, num_heads=6)
ViTB = functools.partial(ViT, dim=768, num_heads=12)
