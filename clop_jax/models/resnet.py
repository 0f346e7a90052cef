"""ResNet backbones in Flax: images to features, without a classifier.

Strides, explicit padding and parameter names follow torchvision, so weights can
be converted (see `torchvision`). The stride of a bottleneck is in its 3x3
convolution (ResNet v1.5).
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

STEMS = ('cifar', 'imagenet')
BN_SCOPES = ('global', 'device')

# He initialization over the fan-out keeps the scale of gradients.
_KERNEL_INIT = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


def bn_axis(bn_scope: str, axis_name: str | None) -> str | None:
  """Returns the axis over which batch normalization averages statistics."""
  if bn_scope not in BN_SCOPES:
    raise ValueError(
      f'bn_scope must be one of {list(BN_SCOPES)}, got {bn_scope!r}'
    )
  return axis_name if bn_scope == 'global' else None


def _conv(features, kernel_size, strides, dtype, name):
  return nn.Conv(
    features,
    (kernel_size, kernel_size),
    strides=strides,
    # 'SAME' pads unevenly at stride 2, PyTorch does not.
    padding=(kernel_size - 1) // 2,
    use_bias=False,
    kernel_init=_KERNEL_INIT,
    dtype=dtype,
    name=name,
  )


class BasicBlock(nn.Module):
  """Two 3x3 convolutions and a shortcut."""

  filters: int
  strides: int
  norm: Callable[..., nn.Module]
  last_scale: Callable[..., jax.Array]
  dtype: Any

  expansion = 1

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = _conv(self.filters, 3, self.strides, self.dtype, 'conv1')(x)
    y = nn.relu(self.norm(name='bn1')(y))
    y = _conv(self.filters, 3, 1, self.dtype, 'conv2')(y)
    y = self.norm(name='bn2', scale_init=self.last_scale)(y)
    return nn.relu(_shortcut(self, x, y.shape) + y)


class BottleneckBlock(nn.Module):
  """1x1, 3x3 and 1x1 convolutions and a shortcut."""

  filters: int
  strides: int
  norm: Callable[..., nn.Module]
  last_scale: Callable[..., jax.Array]
  dtype: Any

  expansion = 4

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = _conv(self.filters, 1, 1, self.dtype, 'conv1')(x)
    y = nn.relu(self.norm(name='bn1')(y))
    y = _conv(self.filters, 3, self.strides, self.dtype, 'conv2')(y)
    y = nn.relu(self.norm(name='bn2')(y))
    y = _conv(self.filters * self.expansion, 1, 1, self.dtype, 'conv3')(y)
    y = self.norm(name='bn3', scale_init=self.last_scale)(y)
    return nn.relu(_shortcut(self, x, y.shape) + y)


def _shortcut(block, x, shape):
  if x.shape == shape:
    return x
  x = _conv(shape[-1], 1, block.strides, block.dtype, 'downsample_conv')(x)
  return block.norm(name='downsample_bn')(x)


class ResNet(nn.Module):
  """ResNet without a classifier.

  `__call__(images, train)`: float images `[batch, height, width, channels]` to
  float32 features `[batch, feature_dim]`, the global average pool of the last
  stage.

  Attributes:
    stage_sizes: Number of blocks in each stage. Every stage but the first
      halves the image.
    block: `BasicBlock` or `BottleneckBlock`.
    width: Number of filters of the first stage.
    width_multiplier: Factor on the filters of every stage.
    stem: 'cifar' (3x3, stride 1, no pooling, for images up to 64 px) or
      'imagenet' (7x7, stride 2, then max pooling).
    zero_init_last_bn: True to start each block as the identity (the scale of
      its last batch normalization is 0).
    bn_scope: 'global' for batch statistics over all devices, or 'device'.
    axis_name: Mapped axis of the batch, or None outside a mapped function.
    dtype: Precision of the computation. Parameters and batch statistics are
      float32.

  Reference:
    He et al., "Deep residual learning for image recognition", arXiv 1512.03385,
    table 1 and section 4.2 (the small ones).
  """

  stage_sizes: Sequence[int]
  block: type[nn.Module]
  width: int = 64
  width_multiplier: float = 1.0
  stem: str = 'cifar'
  zero_init_last_bn: bool = False
  bn_scope: str = 'global'
  axis_name: str | None = None
  dtype: Any = jnp.float32

  def __post_init__(self):
    if self.stem not in STEMS:
      raise ValueError(f'stem must be one of {list(STEMS)}, got {self.stem!r}')
    bn_axis(self.bn_scope, self.axis_name)
    super().__post_init__()

  @nn.compact
  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    norm = functools.partial(
      nn.BatchNorm,
      use_running_average=not train,
      momentum=0.9,
      epsilon=1e-5,
      dtype=self.dtype,
      axis_name=bn_axis(self.bn_scope, self.axis_name),
    )
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    width = round(self.width * self.width_multiplier)
    x = images.astype(self.dtype)
    kernel_size, strides = (7, 2) if self.stem == 'imagenet' else (3, 1)
    x = _conv(width, kernel_size, strides, self.dtype, 'conv1')(x)
    x = nn.relu(norm(name='bn1')(x))
    if self.stem == 'imagenet':
      x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    for stage, num_blocks in enumerate(self.stage_sizes):
      for index in range(num_blocks):
        x = self.block(
          filters=width * 2**stage,
          strides=2 if stage > 0 and index == 0 else 1,
          norm=norm,
          last_scale=zeros if self.zero_init_last_bn else ones,
          dtype=self.dtype,
          name=f'layer{stage + 1}_{index}',
        )(x)
    return jnp.mean(x.astype(jnp.float32), axis=(1, 2))


# The smallest of the paper's CIFAR family, for tests and CPUs.
ResNet8 = functools.partial(
  ResNet, stage_sizes=(1, 1, 1), block=BasicBlock, width=16
)
ResNet18 = functools.partial(ResNet, stage_sizes=(2, 2, 2, 2), block=BasicBlock)
ResNet34 = functools.partial(ResNet, stage_sizes=(3, 4, 6, 3), block=BasicBlock)
ResNet50 = functools.partial(
  ResNet, stage_sizes=(3, 4, 6, 3), block=BottleneckBlock
)
