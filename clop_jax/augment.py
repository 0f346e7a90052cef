"""Two random views of each image, made on the device inside jit.

Each example has a key of its own, a pure function of (run key, step, example
number): what is drawn for a view does not depend on the batch that the example
came in, nor on how many devices there are. (Its pixels may differ in the last
bit where XLA compiles another batch size into other instructions.) Images are
float32 in [0, 1] until `normalize`.
"""

from collections.abc import Sequence
import functools
import itertools
import math

import dm_pix as pix
import jax
from jax import lax
import jax.numpy as jnp


def example_keys(
  key: jax.Array, step: jax.Array, index: jax.Array
) -> jax.Array:
  """One key per example, from the run's key, the step and the example.

  Args:
    key: the run's PRNG key.
    step: integer scalar.
    index: `[batch]` numbers of the examples in their data set.

  Returns:
    `[batch]` keys.
  """
  step_key = jax.random.fold_in(key, step)
  return jax.vmap(lambda i: jax.random.fold_in(step_key, i))(index)


def two_views(keys: jax.Array, images: jax.Array, **recipe) -> jax.Array:
  """Two independent views of each image.

  Args:
    keys: `[batch]` PRNG keys, see `example_keys`.
    images: `[batch, height, width, channels]`, uint8.
    **recipe: the keyword arguments of `view`.

  Returns:
    `[2, batch, size, size, channels]` float32, normalized.
  """
  both = jax.vmap(lambda key: jax.random.split(key, 2))(keys)
  make = functools.partial(view, **recipe)
  return jax.vmap(jax.vmap(make), in_axes=(1, None))(both, images)


def view(
  key: jax.Array,
  image: jax.Array,
  *,
  size: int,
  mean: Sequence[float],
  std: Sequence[float],
  crop_probability: float = 1.0,
  crop_area: tuple[float, float] = (0.08, 1.0),
  crop_aspect: tuple[float, float] = (3 / 4, 4 / 3),
  flip_probability: float = 0.5,
  jitter_probability: float = 0.8,
  brightness: float = 0.4,
  contrast: float = 0.4,
  saturation: float = 0.4,
  hue: float = 0.1,
  grey_probability: float = 0.2,
  blur_probability: float = 0.0,
  blur_sigma: tuple[float, float] = (0.1, 2.0),
) -> jax.Array:
  """One random view: crop and resize, flip, jitter, grey, blur, normalize.

  An operation whose probability is 0 is left out of the program. Saturation,
  hue and grey mean nothing for an image of one channel and are left out too.

  Args:
    key: a PRNG key.
    image: `[height, width, channels]` uint8, 1 or 3 channels.
    size: height and width of the view, pixels.
    mean: per channel, of images in [0, 1].
    std: per channel, of images in [0, 1].
    crop_probability: of a random crop; otherwise the whole image is resized.
    crop_area: range of the crop's share of the area.
    crop_aspect: range of the crop's width over height, drawn log-uniformly.
    flip_probability: of a horizontal flip.
    jitter_probability: of the colour jitter as a whole.
    brightness: factor from `[1 - brightness, 1 + brightness]`; 0 is off.
    contrast: likewise.
    saturation: likewise.
    hue: turn from `[-hue, hue]`, in turns of the colour circle; 0 is off.
    grey_probability: of dropping the colour.
    blur_probability: of a Gaussian blur.
    blur_sigma: range of its standard deviation, pixels.

  Returns:
    `[size, size, channels]` float32.

  Raises:
    ValueError: if the image's shape or dtype or a probability is wrong.

  Reference:
    Chen et al., arXiv 2002.05709, appendix A.
  """
  if image.ndim != 3 or image.shape[-1] not in (1, 3):
    raise ValueError(
      f'image must have shape [height, width, 1 or 3], got {image.shape}'
    )
  probabilities = {
    'crop_probability': crop_probability,
    'flip_probability': flip_probability,
    'jitter_probability': jitter_probability,
    'grey_probability': grey_probability,
    'blur_probability': blur_probability,
  }
  for name, probability in probabilities.items():
    if not 0 <= probability <= 1:
      raise ValueError(f'{name} must be in [0, 1], got {probability}')
  coloured = image.shape[-1] == 3
  draws = _draw(key)
  x = _random_crop(
    draws, unit_range(image), size, crop_probability, crop_area, crop_aspect
  )
  if flip_probability:
    x = jnp.where(draws['flip'] < flip_probability, x[:, ::-1], x)
  if jitter_probability:
    jittered = _colour_jitter(
      draws,
      x,
      brightness=brightness,
      contrast=contrast,
      saturation=saturation if coloured else 0.0,
      hue=hue if coloured else 0.0,
    )
    x = jnp.where(draws['jitter'] < jitter_probability, jittered, x)
  if grey_probability and coloured:
    x = jnp.where(draws['grey'] < grey_probability, _grey(x), x)
  if blur_probability:
    sigma = _between(draws['blur_sigma'], *blur_sigma)
    x = jnp.where(draws['blur'] < blur_probability, _gaussian_blur(x, sigma), x)
  return normalize(x, mean=mean, std=std)


def unit_range(images: jax.Array) -> jax.Array:
  """uint8 images of any shape to float32 in [0, 1].

  Raises:
    ValueError: if the images are not uint8.
  """
  if images.dtype != jnp.uint8:
    raise ValueError(f'images must be uint8, got {images.dtype}')
  return images.astype(jnp.float32) / 255


def normalize(
  images: jax.Array, *, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
  """`(images - mean) / std` per channel; images are float32 in [0, 1].

  Raises:
    ValueError: if there is not one mean and one std for each channel.
  """
  channels = images.shape[-1]
  for name, values in (('mean', mean), ('std', std)):
    if len(values) != channels:
      raise ValueError(
        f'{name} must have one number for each of the {channels} channels, got '
        f'{tuple(values)}'
      )
  return (images - jnp.asarray(mean)) / jnp.asarray(std)


def resize(images: jax.Array, size: int) -> jax.Array:
  """`[batch, height, width, channels]` to `size` x `size`, antialiased."""
  if images.shape[1:3] == (size, size):
    return images
  shape = (images.shape[0], size, size, images.shape[3])
  return jax.image.resize(images, shape, method='linear', antialias=True)


# Everything random in a view, as numbers uniform in [0, 1). They come from one
# call of the generator: a key for each operation would be derived again inside
# every kernel that XLA fuses it into, which took ten times as long to compile.
# And an operation that is switched off leaves the others' draws as they were.
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
}


def _draw(key):
  """The numbers of `_DRAWS`, by name."""
  sizes = [math.prod(shape) for shape in _DRAWS.values()]
  ends = list(itertools.accumulate(sizes))
  uniform = jax.random.uniform(key, (ends[-1],))
  parts = jnp.split(uniform, ends[:-1])
  return {
    name: part.reshape(shape)
    for (name, shape), part in zip(_DRAWS.items(), parts, strict=True)
  }


def _between(uniform, low, high):
  return low + uniform * (high - low)


def _random_crop(draws, image, size, probability, area_range, aspect_range):
  """A random box of the image, resampled to `[size, size]`."""
  height, width, channels = image.shape
  box = jnp.array([0.0, 0.0, height, width])
  if probability > 0:
    random_box = _random_box(draws, height, width, area_range, aspect_range)
    box = jnp.where(draws['crop'] < probability, random_box, box)
  elif (height, width) == (size, size):
    return image
  top, left, box_height, box_width = box
  scale = size / jnp.stack([box_height, box_width])
  # Antialiased, as Pillow does: shrinking averages over the source's pixels.
  return jax.image.scale_and_translate(
    image,
    (size, size, channels),
    (0, 1),
    scale,
    -jnp.stack([top, left]) * scale,
    method='linear',
    antialias=True,
    precision=lax.Precision.HIGHEST,
  )


def _random_box(draws, height, width, area_range, aspect_range):
  """Top, left, height, width of a box inside the image, in pixels (float).

  Ten boxes are drawn and the first that fits is taken; if none does, the
  largest centred one within the aspect range. The sides are not rounded to
  pixels, which would distort area and aspect of a small image.
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


def _colour_jitter(draws, image, *, brightness, contrast, saturation, hue):
  """Brightness, contrast, saturation and hue in a random order."""
  # Factors as Pillow's ImageEnhance defines them: a blend with black, with the
  # mean grey, with the grey image. (dm-pix adds a constant for brightness and
  # takes the contrast of each channel.)
  operations = [
    (_brightness, brightness),
    (_contrast, contrast),
    (_saturation, saturation),
    (_hue, hue),
  ]
  used = [i for i, (_, amount) in enumerate(operations) if amount]
  if not used:
    return image
  limits = jnp.array([operations[i][1] for i in used])
  amounts = _between(draws['jitter_amounts'][jnp.array(used)], -limits, limits)
  branches = [operations[i][0] for i in used]
  for which in jnp.argsort(draws['jitter_order'][: len(used)]):
    image = lax.switch(which, branches, image, amounts[which])
  return image


def _brightness(image, amount):
  return jnp.clip((1 + amount) * image, 0.0, 1.0)


def _contrast(image, amount):
  grey = _grey(image) if image.shape[-1] == 3 else image
  return jnp.clip(image + amount * (image - jnp.mean(grey)), 0.0, 1.0)


def _saturation(image, amount):
  return jnp.clip(image + amount * (image - _grey(image)), 0.0, 1.0)


def _hue(image, amount):
  return jnp.clip(pix.adjust_hue(image, amount), 0.0, 1.0)


def _grey(image):
  return pix.rgb_to_grayscale(image, keep_dims=True)


def _gaussian_blur(image, sigma):
  # SimCLR's kernel: a tenth of the image, at least 3 pixels. Blurring pads with
  # zeros, which would darken the border, so the edge is repeated first.
  radius = max(1, image.shape[0] // 20)
  padded = jnp.pad(image, ((radius, radius), (radius, radius), (0, 0)), 'edge')
  return pix.gaussian_blur(padded, sigma, 2 * radius, padding='VALID')
