"""RandAugment: random operations of one strength.

Under vmap every image has its own operations, and a switch would compute all of
them for each image. Instead, a layer is three steps, each of which is the
identity for most operations: an affine gather (operations that move pixels), a
table of 256 values per channel (operations that map values), and a blend as in
Pillow's ImageEnhance.
"""

import math

import jax
from jax import lax
import jax.numpy as jnp

from clop_jax import arguments

OPERATIONS = (
  'identity',
  'shear_x',
  'shear_y',
  'translate_x',
  'translate_y',
  'rotate',
  'brightness',
  'color',
  'contrast',
  'sharpness',
  'posterize',
  'solarize',
  'autocontrast',
  'equalize',
)
MAX_MAGNITUDE = 30


def check(layers: int, magnitude: float):
  """Raises ValueError if a number is out of range."""
  arguments.count('config.augment.randaugment_layers', layers, at_least=0)
  arguments.number(
    'config.augment.randaugment_magnitude',
    magnitude,
    at_least=0,
    at_most=MAX_MAGNITUDE,
  )


def apply(
  uniform: jax.Array, planes: jax.Array, *, magnitude: float
) -> jax.Array:
  """Applies one of `OPERATIONS` for each layer, rounding to 8 bits as Pillow.

  Args:
    uniform: Random numbers `[layers, 2]` in [0, 1), for operation and sign.
    planes: Image `[channels, height, width]` float32 in [0, 1].
    magnitude: Strength of the operations, in [0, 30].

  Reference:
    Cubuk et al., arXiv 1909.13719; ranges of the operations as in torchvision.
  """

  def layer(pixels, numbers):
    which = jnp.floor(numbers[0] * len(OPERATIONS)).astype(jnp.int32)
    sign = jnp.where(numbers[1] < 0.5, -1.0, 1.0)
    return operate(pixels, which, sign, magnitude=magnitude), None

  # A loop, so that the program does not grow with the number of layers.
  pixels, _ = lax.scan(layer, jnp.round(planes * 255), uniform)
  return pixels / 255


def operate(
  pixels: jax.Array, which: jax.Array, sign: jax.Array, *, magnitude: float
) -> jax.Array:
  """Applies the operation `OPERATIONS[which]`; pixels beside the image are 0.

  Args:
    pixels: Image `[channels, height, width]`, integers 0 to 255 as float32.
    which: Index in `OPERATIONS`.
    sign: Direction of the operation, 1.0 or -1.0.
    magnitude: Strength, in [0, 30].
  """
  share = magnitude / MAX_MAGNITUDE
  pixels = _warp(pixels, which, sign, share)
  pixels = _map_values(pixels, which, share)
  return _enhance(pixels, which, sign * 0.9 * share)


def luma(planes: jax.Array) -> jax.Array:
  """Returns 1 or 3 planes as a grey one `[1, height, width]`, as Pillow."""
  if planes.shape[0] == 1:
    return planes
  return 0.299 * planes[:1] + 0.587 * planes[1:2] + 0.114 * planes[2:]


def _is(which, name):
  return which == OPERATIONS.index(name)


def _warp(pixels, which, sign, share):
  """Applies the geometric operations: nearest pixel under an affine map."""
  channels, height, width = pixels.shape

  def amount(name, strength):
    return jnp.where(_is(which, name), sign * strength, 0.0)

  angle = amount('rotate', math.radians(30 * share))
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  # About the centre. (torchvision shears about the corner.)
  y = (jnp.arange(height) + 0.5 - height / 2)[:, None]
  x = jnp.arange(width) + 0.5 - width / 2
  source_y = cos * y + (sin + amount('shear_y', 0.3 * share)) * x
  source_x = cos * x + (amount('shear_x', 0.3 * share) - sin) * y
  # Whole pixels, as in torchvision.
  source_y += amount('translate_y', int(150 / 331 * height * share))
  source_x += amount('translate_x', int(150 / 331 * width * share))
  row = jnp.floor(source_y + height / 2).astype(jnp.int32)
  column = jnp.floor(source_x + width / 2).astype(jnp.int32)
  inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
  index = jnp.where(inside, row * width + column, 0)
  flat = pixels.reshape(channels, height * width)
  return jnp.where(inside, flat[:, index], 0.0)


def _map_values(pixels, which, share):
  """Applies the operations that are a table of each channel's 256 values."""
  channels = jnp.arange(pixels.shape[0])[:, None, None]
  values = pixels.astype(jnp.int32)
  counts = jnp.zeros((pixels.shape[0], 256), jnp.int32)
  counts = counts.at[channels, values].add(1, mode='promise_in_bounds')
  ramp = jnp.arange(256)
  low = jnp.argmax(counts > 0, axis=1, keepdims=True)
  high = 255 - jnp.argmax(counts[:, ::-1] > 0, axis=1, keepdims=True)
  stretched = (ramp - low) * 255 // jnp.maximum(high - low, 1)
  # Pillow does not count the brightest value.
  total = pixels.shape[1] * pixels.shape[2]
  step = (total - jnp.take_along_axis(counts, high, axis=1)) // 255
  before = jnp.cumsum(counts, axis=1) - counts
  equalized = (step // 2 + before) // jnp.maximum(step, 1)
  dropped = 2 ** round(share * 4)
  table = jnp.select(
    [
      _is(which, 'posterize'),
      _is(which, 'solarize') & (ramp >= 255 * (1 - share)),
      _is(which, 'autocontrast') & (high > low),
      _is(which, 'equalize') & (step > 0),
    ],
    [ramp // dropped * dropped, 255 - ramp, stretched, equalized],
    ramp,
  )
  table = jnp.clip(table, 0, 255).astype(jnp.float32)
  return table.at[channels, values].get(mode='promise_in_bounds')


def _enhance(pixels, which, amount):
  """Blends with black, the grey image, its mean, or a smoothed image."""
  grey = jnp.round(luma(pixels))
  other = jnp.select(
    [_is(which, name) for name in ('brightness', 'color', 'contrast')],
    [jnp.zeros_like(pixels), grey + 0 * pixels, jnp.round(jnp.mean(grey))],
    _smooth(pixels),
  )
  blended = jnp.clip(jnp.floor(pixels + amount * (pixels - other)), 0.0, 255.0)
  first, last = OPERATIONS.index('brightness'), OPERATIONS.index('sharpness')
  return jnp.where((which >= first) & (which <= last), blended, pixels)


def _smooth(pixels):
  """Returns the 3 x 3 mean with five-fold centre; borders do not change."""
  rows = pixels[:, :-2] + pixels[:, 1:-1] + pixels[:, 2:]
  both = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
  inner = pixels[:, 1:-1, 1:-1]
  return pixels.at[:, 1:-1, 1:-1].set(jnp.round((both + 4 * inner) / 13))
