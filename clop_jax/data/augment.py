"""Random views of images, made on the devices inside jit.

Each example has a key of its own, a pure function of (run key, step, example).
So its views do not depend on the batch it is in, nor on the number of devices.
(Another batch size may round pixels differently.) Images are float32 in [0, 1]
until `normalize`. Between crop and blur they are planar,
`[channels, height, width]`, which XLA compiles to vector code.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math

import dm_pix as pix
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from clop_jax import arguments
from clop_jax.data import images as images_lib
from clop_jax.data import randaugment

_in_32_bits = functools.partial(arguments.in_default_modes, x64=False)


@_in_32_bits
def example_keys(
  key: jax.Array, step: jax.Array, index: jax.Array
) -> jax.Array:
  """Returns a key for each of the examples `index` `[batch]` at a step."""
  step_key = jax.random.fold_in(key, step)
  return jax.vmap(lambda i: jax.random.fold_in(step_key, i))(index)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Random operations that make a view of an image.

  They run in the order crop and resize, flip, RandAugment, jitter, grey, blur,
  solarize, normalize. Operations with probability 0 are not compiled. Images of
  one channel have no saturation, hue and grey.

  Attributes:
    size: Height and width of the view, pixels.
    mean: Mean of each channel, of images in [0, 1].
    std: Standard deviation of each channel, of images in [0, 1].
    crop_probability: Probability of a random crop; otherwise the whole image is
      resized.
    crop_area: Range of the crop's share of the area.
    crop_aspect: Range of the crop's width over height, drawn log-uniformly.
    interpolation: 'bilinear' or 'bicubic', antialiased as in Pillow.
    flip_probability: Probability of a horizontal flip.
    jitter_probability: Probability of the colour jitter as a whole.
    brightness: The factor is drawn from `[1 - brightness, 1 + brightness]`.
    contrast: The factor is drawn from `[1 - contrast, 1 + contrast]`.
    saturation: The factor is drawn from `[1 - saturation, 1 + saturation]`.
    hue: The shift is drawn from `[-hue, hue]`, in turns of the colour circle.
    grey_probability: Probability of dropping the colour.
    blur_probability: Probability of a Gaussian blur.
    blur_sigma: Range of its standard deviation, pixels.
    solarize_probability: Probability of inverting the bright pixels.
    solarize_threshold: Smallest value in [0, 1] that is inverted.
    randaugment_layers: Number of `randaugment` operations.
    randaugment_magnitude: Strength of these operations, in [0, 30].

  Raises:
    ValueError: If a number is out of range. The error names the config's field.

  Reference:
    Chen et al., arXiv 2002.05709, appendix A; solarize: Grill et al., arXiv
    2006.07733, appendix B; RandAugment: Cubuk et al., arXiv 1909.13719.
  """

  size: int
  mean: Sequence[float]
  std: Sequence[float]
  crop_probability: float = 1.0
  crop_area: tuple[float, float] = (0.08, 1.0)
  crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
  interpolation: str = 'bilinear'
  flip_probability: float = 0.5
  jitter_probability: float = 0.8
  brightness: float = 0.4
  contrast: float = 0.4
  saturation: float = 0.4
  hue: float = 0.1
  grey_probability: float = 0.2
  blur_probability: float = 0.0
  blur_sigma: tuple[float, float] = (0.1, 2.0)
  solarize_probability: float = 0.0
  solarize_threshold: float = 0.5
  randaugment_layers: int = 0
  randaugment_magnitude: float = 0.0

  def __post_init__(self):
    for name, value in vars(self).items():
      field = f'config.augment.{name}'
      if name.endswith('_probability') or name == 'solarize_threshold':
        arguments.number(field, value, at_least=0, at_most=1)
      elif name in ('brightness', 'contrast', 'saturation'):
        arguments.number(field, value, at_least=0)
    # Half a turn in both directions is the whole circle.
    arguments.number('config.augment.hue', self.hue, at_least=0, at_most=0.5)
    images_lib.check_crops(
      size=self.size,
      crop_area=self.crop_area,
      crop_aspect=self.crop_aspect,
      interpolation=self.interpolation,
    )
    images_lib.check_range('config.augment.blur_sigma', self.blur_sigma)
    randaugment.check(self.randaugment_layers, self.randaugment_magnitude)


@_in_32_bits
def two_views(keys: jax.Array, images: jax.Array, recipe: Recipe) -> jax.Array:
  """Returns two views `[2, batch, size, size, channels]` of each image.

  Args:
    keys: PRNG keys `[batch]`, see `example_keys`.
    images: uint8 images `[batch, height, width, channels]`, or
      `[2, batch, height, width, channels]` if the host has cropped an image for
      each view. Then set `crop_probability=0.0`, or they are cropped again.
    recipe: Random operations.
  """
  shape = images.shape
  if len(shape) not in (4, 5) or (len(shape) == 5 and shape[0] != 2):
    raise ValueError(
      'images must have shape [batch, height, width, channels] or [2, batch, '
      f'height, width, channels], got {shape}'
    )
  both = jax.vmap(lambda key: jax.random.split(key, 2))(keys)
  make: Callable = functools.partial(view, recipe=recipe)
  of_view = 0 if images.ndim == 5 else None
  return jax.vmap(jax.vmap(make), in_axes=(1, of_view))(both, images)


@_in_32_bits
def view(key: jax.Array, image: jax.Array, recipe: Recipe) -> jax.Array:
  """Returns a random view `[size, size, channels]` float32, normalized.

  Args:
    key: PRNG key.
    image: uint8 image `[height, width, channels]` with 1 or 3 channels.
    recipe: Random operations.
  """
  if image.ndim != 3 or image.shape[-1] not in (1, 3):
    raise ValueError(
      f'image must have shape [height, width, 1 or 3], got {image.shape}'
    )
  coloured = image.shape[-1] == 3
  draws = _draw(key, recipe.randaugment_layers)
  x = _crop_and_flip(draws, unit_range(image), recipe)
  if recipe.randaugment_layers:
    x = randaugment.apply(
      draws['randaugment'], x, magnitude=recipe.randaugment_magnitude
    )
  if recipe.jitter_probability:
    limits = [recipe.brightness, recipe.contrast]
    limits += [recipe.saturation, recipe.hue] if coloured else [0.0, 0.0]
    x = _colour_jitter(draws, x, recipe.jitter_probability, limits)
  if recipe.grey_probability and coloured:
    grey = draws['grey'] < recipe.grey_probability
    x = jnp.where(grey, randaugment.luma(x), x)
  if recipe.blur_probability:
    sigma = _between(draws['blur_sigma'], *recipe.blur_sigma)
    blurred = draws['blur'] < recipe.blur_probability
    x = jnp.where(blurred, _gaussian_blur(x, sigma), x)
  if recipe.solarize_probability:
    solarized = (draws['solarize'] < recipe.solarize_probability) & (
      x >= recipe.solarize_threshold
    )
    x = jnp.where(solarized, 1 - x, x)
  return normalize(jnp.moveaxis(x, 0, -1), mean=recipe.mean, std=recipe.std)


@_in_32_bits
def unit_range(images: jax.Array) -> jax.Array:
  """Returns uint8 images of any shape as float32 in [0, 1]."""
  if images.dtype != jnp.uint8:
    raise ValueError(f'images must be uint8, got {images.dtype}')
  return images.astype(jnp.float32) / 255


@_in_32_bits
def whole(
  images: jax.Array,
  *,
  size: int,
  mean: Sequence[float],
  std: Sequence[float],
  interpolation: str = 'bilinear',
) -> jax.Array:
  """Returns uint8 images as evaluation sees them: resized and normalized."""
  images = resize(unit_range(images), size, interpolation=interpolation)
  return normalize(images, mean=mean, std=std)


@_in_32_bits
def normalize(
  images: jax.Array, *, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
  """Returns `(images - mean) / std` for a mean and a std of each channel."""
  channels = images.shape[-1]
  for name, values, above in (('mean', mean, -math.inf), ('std', std, 0)):
    field = f'config.augment.{name}'
    if np.shape(values) != (channels,):
      raise ValueError(
        f'{field} must have one number for each of the {channels} channels, '
        f'got {values!r}'
      )
    for value in values:
      arguments.number(field, value, above=above)
  return (images - jnp.asarray(mean)) / jnp.asarray(std)


@_in_32_bits
def resize(
  images: jax.Array, size: int, *, interpolation: str = 'bilinear'
) -> jax.Array:
  """Resizes images `[batch, height, width, channels]`, antialiased."""
  if images.shape[1:3] == (size, size):
    return images
  shape = (images.shape[0], size, size, images.shape[3])
  method = {'bilinear': 'linear', 'bicubic': 'cubic'}[interpolation]
  resized = jax.image.resize(images, shape, method=method, antialias=True)
  # Cubic interpolation overshoots at edges.
  return jnp.clip(resized, 0.0, 1.0) if method == 'cubic' else resized


# All random numbers of a view, uniform in [0, 1), from one generator call: XLA
# would derive a key per operation again in each fused kernel, which took ten
# times as long to compile. Switching an operation off does not change the
# numbers of the others.
_DRAWS = {
  'crop': (),
  'area': (10,),
  'aspect': (10,),
  'place': (2,),
  'flip': (),
  'jitter': (),
  'jitter_amounts': (4,),
  'jitter_order': (4,),
  'grey': (),
  'blur': (),
  'blur_sigma': (),
  # Append new ones here, so that the numbers before stay the same.
  'solarize': (),
}


def _draw(key, randaugment_layers=0):
  """Returns the numbers of `_DRAWS`, and two for each RandAugment layer."""
  shapes = {**_DRAWS, 'randaugment': (randaugment_layers, 2)}
  ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
  uniform = jnp.split(jax.random.uniform(key, (ends[-1],)), ends[:-1])
  return {
    name: part.reshape(shape)
    for (name, shape), part in zip(shapes.items(), uniform, strict=True)
  }


def _between(uniform, low, high):
  return low + uniform * (high - low)


def _crop_and_flip(draws, image, recipe):
  """Returns a random box of the image as planes `[channels, size, size]`."""
  size, interpolation = recipe.size, recipe.interpolation
  height, width, _ = image.shape
  flip = draws['flip'] < recipe.flip_probability
  box = jnp.array([0.0, 0.0, height, width])
  if recipe.crop_probability:
    random_box = _random_box(
      draws, height, width, recipe.crop_area, recipe.crop_aspect
    )
    box = jnp.where(draws['crop'] < recipe.crop_probability, random_box, box)
  elif (height, width) == (size, size):
    planes = jnp.moveaxis(image, -1, 0)
    return jnp.where(flip, planes[..., ::-1], planes)
  top, left, box_height, box_width = box
  columns = _resampling_weights(left, box_width, width, size, interpolation)
  # A third of the numbers that the picture has.
  columns = jnp.where(flip, columns[::-1], columns)
  product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
  if height <= size and interpolation == 'bilinear':
    bands = _interpolate_rows(image, top, box_height, size)
  else:
    rows = _resampling_weights(top, box_height, height, size, interpolation)
    bands = product('yh,hwc->ywc', rows, image)
  planes = product('xw,ywc->cyx', columns, bands)
  # Cubic interpolation overshoots at edges.
  return planes if interpolation == 'bilinear' else jnp.clip(planes, 0.0, 1.0)


def _interpolate_rows(image, start, length, size):
  """Resamples rows as `_resampling_weights`, if nothing shrinks."""
  centers = start + (jnp.arange(size) + 0.5) * (length / size) - 0.5
  above = jnp.floor(centers)
  share = (centers - above)[:, None, None]
  first, last = _touched(start, length, image.shape[0])

  def rows(index):
    index = jnp.clip(index, first, last).astype(jnp.int32)
    return image.at[index].get(mode='promise_in_bounds')

  return (1 - share) * rows(above) + share * rows(above + 1)


def _touched(start, length, source):
  """Returns the first and last pixel that an interval touches, as floats."""
  first = jnp.clip(jnp.floor(start), 0, source - 1)
  # Rounding must not add a pixel that is barely touched.
  last = jnp.clip(jnp.ceil(start + length - 1e-3) - 1, first, source - 1)
  return first, last


def _resampling_weights(start, length, source, size, interpolation):
  """Returns weights `[size, source]` that resample an interval of an axis.

  Antialiased as in Pillow: shrinking averages over the source's pixels.
  """
  scale = length / size
  centers = start + (jnp.arange(size) + 0.5) * scale - 0.5
  pixels = jnp.arange(source)
  distances = jnp.abs(centers[:, None] - pixels) / jnp.maximum(scale, 1.0)
  if interpolation == 'bilinear':
    weights = jnp.maximum(1 - distances, 0.0)
  else:
    weights = _cubic(distances)
  first, last = _touched(start, length, source)
  weights = jnp.where((pixels >= first) & (pixels <= last), weights, 0.0)
  return weights / jnp.sum(weights, axis=1, keepdims=True)


def _cubic(x):
  """Returns Keys' cubic kernel with a = -1/2 for distances >= 0."""
  near = (1.5 * x - 2.5) * x**2 + 1
  far = ((2.5 - 0.5 * x) * x - 4) * x + 2
  return jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))


def _random_box(draws, height, width, area_range, aspect_range):
  """Returns top, left, height, width of a box in the image, in pixels (float).

  The box is the first of ten random ones that fits, or else the largest centred
  one in the aspect range. Rounding to pixels would distort small images.
  """
  area = _between(draws['area'], *area_range)
  log_aspect_range = (math.log(aspect) for aspect in aspect_range)
  aspect = jnp.exp(_between(draws['aspect'], *log_aspect_range))
  heights = jnp.sqrt(area * height * width / aspect)
  widths = heights * aspect
  fits = (heights <= height) & (widths <= width)
  first = jnp.argmax(fits)
  fallback_aspect = min(max(width / height, aspect_range[0]), aspect_range[1])
  fallback_height = min(height, width / fallback_aspect)
  fallback = jnp.array([fallback_height, fallback_height * fallback_aspect])
  any_fits = jnp.any(fits)
  sides = jnp.where(
    any_fits, jnp.stack([heights[first], widths[first]]), fallback
  )
  free = jnp.array([height, width]) - sides
  place = jnp.where(any_fits, draws['place'], 0.5)
  return jnp.concatenate([place * free, sides])


def _colour_jitter(draws, planes, probability, limits):
  """Changes brightness, contrast, saturation and hue in a random order.

  A switch between four operations at four places would compute all sixteen. But
  three of the operations are one formula, `_blend`, which is the identity for
  zeros. So there are three blends before hue and three after it, and the order
  determines which of their amounts are zero.
  """
  limits, hue = jnp.array(limits), limits[3]
  amounts = _between(draws['jitter_amounts'], -limits, limits)
  amounts = jnp.where(draws['jitter'] < probability, amounts, 0.0)
  ranks = draws['jitter_order']

  def place(operation, carry):
    steps, turn = carry
    rank = ranks[operation]
    row = jnp.sum(ranks[:3] < rank) + (3 * (rank > ranks[3]) if hue else 0)
    cell = (jnp.arange(steps.shape[0]) == row)[:, None] & (
      jnp.arange(3) == operation
    )
    turn = jnp.where(operation == 3, amounts[3], turn)
    return jnp.where(cell, amounts[operation], steps), turn

  # In loops, because XLA stores their results in memory. It would repeat other
  # arithmetic for each pixel, and without vector instructions. The zero depends
  # on the draws, so that shard_map sees it vary over the devices.
  zero = 0 * amounts[0]
  steps = jnp.zeros((6 if hue else 3, 3)) + zero
  steps, turn = lax.fori_loop(0, 4, place, (steps, zero))
  planes = _blends(planes, steps[:3])
  return _blends(_turn_hue(planes, turn), steps[3:]) if hue else planes


def _blends(planes, steps):
  return lax.scan(lambda x, step: (_blend(x, *step), None), planes, steps)[0]


def _blend(planes, brightness, contrast, saturation):
  """Applies Pillow's ImageEnhance with a factor of 1 + amount.

  At most one amount is not zero. The blend is with black, with the mean grey or
  with the grey image. (dm-pix adds a constant for brightness, and takes the
  contrast of each channel.)
  """
  grey = randaugment.luma(planes)
  change = (
    brightness * planes
    + contrast * (planes - jnp.mean(grey))
    + saturation * (planes - grey)
  )
  return jnp.clip(planes + change, 0.0, 1.0)


def _turn_hue(planes, turn):
  """Turns the hue of RGB planes; HSV's saturation and value stay."""
  red, green, blue = planes
  high = jnp.maximum(jnp.maximum(red, green), blue)
  low = jnp.minimum(jnp.minimum(red, green), blue)
  spread = high - low
  scale = 1 / jnp.where(spread > 0, spread, 1.0)
  # In sixths of the circle. (dm-pix uses remainders, which are slow.)
  hue = jnp.where(
    high == red,
    (green - blue) * scale,
    jnp.where(
      high == green, 2 + (blue - red) * scale, 4 + (red - green) * scale
    ),
  )
  hue += 6 * turn
  hue -= 6 * jnp.floor(hue / 6)
  distance = jnp.abs(hue - jnp.array([3.0, 2.0, 4.0])[:, None, None])
  first = (jnp.arange(3) == 0)[:, None, None]
  shares = jnp.where(first, distance - 1, 2 - distance)
  turned = low + spread * jnp.clip(shares, 0.0, 1.0)
  # The conversion to hue and back is not exact.
  return jnp.where(turn == 0, planes, turned)


def _gaussian_blur(planes, sigma):
  # SimCLR's kernel: a tenth of the image, at least 3 pixels. The edge is
  # repeated first, because zero padding would darken the border.
  radius = max(1, planes.shape[1] // 20)
  padded = jnp.pad(planes, ((0, 0), (radius, radius), (radius, radius)), 'edge')
  # dm-pix fails if the channels are not last.
  padded = jnp.moveaxis(padded, 0, -1)
  blurred = pix.gaussian_blur(padded, sigma, 2 * radius, padding='VALID')
  return jnp.moveaxis(blurred, -1, 0)
