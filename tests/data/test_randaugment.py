import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from PIL import ImageEnhance
from PIL import ImageOps
import pytest

from clop_jax.data import augment
from clop_jax.data import randaugment

HEIGHT, WIDTH = 21, 32


def picture(channels=3, seed=0):
  """Smooth colours that do not use the whole range."""
  rng = np.random.default_rng(seed)
  y = np.linspace(0, 3, HEIGHT)[:, None, None]
  x = np.linspace(0, 2, WIDTH)[:, None]
  phase = rng.uniform(0, 6, size=channels)
  smooth = 110 + 70 * np.sin(x + y + phase)
  noise = rng.normal(size=(HEIGHT, WIDTH, channels)) * 9
  return np.clip(smooth + noise, 12, 240).astype(np.uint8)


@functools.cache
def operation(magnitude):
  return jax.jit(functools.partial(randaugment.operate, magnitude=magnitude))


def operate(image, name, sign, magnitude):
  planes = jnp.asarray(np.moveaxis(image, -1, 0), jnp.float32)
  which = randaugment.OPERATIONS.index(name)
  result = operation(magnitude)(planes, which, sign)
  return np.moveaxis(np.asarray(result), 0, -1)


def affine(image, matrix):
  """Pillow's own nearest-neighbour gather, about the image's centre."""
  a, b, dx, c, d, dy = matrix
  x, y = WIDTH / 2, HEIGHT / 2
  about = (a, b, x - a * x - b * y + dx, c, d, y - c * x - d * y + dy)
  picture = Image.fromarray(image)
  return picture.transform(
    picture.size, Image.Transform.AFFINE, about, Image.Resampling.NEAREST
  )


def reference(image, name, sign, magnitude):
  """The definition, with Pillow."""
  share = magnitude / 30
  pillow = Image.fromarray(image)
  angle = math.radians(30 * share) * sign
  cos, sin = math.cos(angle), math.sin(angle)
  shear = 0.3 * share * sign
  factor = 1 + 0.9 * share * sign
  moves = {
    'identity': (1, 0, 0, 0, 1, 0),
    'shear_x': (1, shear, 0, 0, 1, 0),
    'shear_y': (1, 0, 0, shear, 1, 0),
    'translate_x': (1, 0, sign * int(150 / 331 * WIDTH * share), 0, 1, 0),
    'translate_y': (1, 0, 0, 0, 1, sign * int(150 / 331 * HEIGHT * share)),
    'rotate': (cos, -sin, 0, sin, cos, 0),
  }
  if name in moves:
    return affine(image, moves[name])
  threshold = 255 * (1 - share)
  colours = {
    'brightness': lambda: ImageEnhance.Brightness(pillow).enhance(factor),
    'color': lambda: ImageEnhance.Color(pillow).enhance(factor),
    'contrast': lambda: ImageEnhance.Contrast(pillow).enhance(factor),
    'sharpness': lambda: ImageEnhance.Sharpness(pillow).enhance(factor),
    'posterize': lambda: ImageOps.posterize(pillow, 8 - round(4 * share)),
    'solarize': lambda: ImageOps.solarize(pillow, threshold),
    'autocontrast': lambda: ImageOps.autocontrast(pillow),
    'equalize': lambda: ImageOps.equalize(pillow),
  }
  return colours[name]()


GEOMETRIC = ('shear_x', 'shear_y', 'translate_x', 'translate_y', 'rotate')


# At 30 every fifth row of a shear falls exactly between two pixels.
@pytest.mark.parametrize('magnitude', [18.0, 29.0])
@pytest.mark.parametrize('sign', [1.0, -1.0])
@pytest.mark.parametrize('name', randaugment.OPERATIONS)
def test_every_operation_equals_pillow(name, sign, magnitude):
  image = picture()
  ours = operate(image, name, sign, magnitude)
  theirs = np.asarray(reference(image, name, sign, magnitude), np.float32)
  difference = np.abs(ours - theirs).max(axis=-1)
  if name in GEOMETRIC:
    # Where a source pixel's edge is hit exactly, rounding may choose.
    assert (difference > 0).mean() < 0.02
  else:
    # Pillow rounds the smooth or grey image to 8 bits, in its own way.
    assert difference.max() <= 2
  if name == 'identity':
    np.testing.assert_array_equal(ours, image)
  else:
    assert np.abs(ours - image).max() >= 3  # posterize drops two bits


def test_magnitude_zero_changes_nothing():
  image = picture()
  for name in randaugment.OPERATIONS:
    changed = np.abs(operate(image, name, 1.0, 0.0) - image).max() > 5
    # These two have no magnitude.
    assert changed == (name in ('autocontrast', 'equalize'))


@pytest.mark.parametrize('value', [0, 77, 255])
def test_flat_image_survives_autocontrast_and_equalize(value):
  image = np.full((HEIGHT, WIDTH, 3), value, np.uint8)
  for name in ('autocontrast', 'equalize'):
    np.testing.assert_array_equal(operate(image, name, 1.0, 18.0), image)


def test_colour_of_one_channel_is_the_identity():
  image = picture(channels=1)
  np.testing.assert_array_equal(operate(image, 'color', 1.0, 18.0), image)
  theirs = ImageOps.equalize(Image.fromarray(image[..., 0]))
  np.testing.assert_array_equal(
    operate(image, 'equalize', 1.0, 18.0)[..., 0], theirs
  )


def test_view_applies_the_operations_of_its_layers():
  image = picture()[:16, :16]
  recipe = augment.Recipe(
    size=16,
    mean=(0.0,) * 3,
    std=(1.0,) * 3,
    crop_probability=0.0,
    flip_probability=0.0,
    jitter_probability=0.0,
    grey_probability=0.0,
    randaugment_layers=3,
    randaugment_magnitude=18.0,
  )
  make = jax.jit(
    jax.vmap(functools.partial(augment.view, recipe=recipe), (0, None))
  )
  keys = jax.random.split(jax.random.key(0), 12)
  for key, view in zip(keys, make(keys, image), strict=True):
    expected = jnp.moveaxis(jnp.asarray(image, jnp.float32), -1, 0)
    for number, sign in np.asarray(augment._draw(key, 3)['randaugment']):
      expected = operation(18.0)(
        expected, int(number * 14), -1.0 if sign < 0.5 else 1.0
      )
    # Another program may round a pixel differently.
    differs = np.abs(np.moveaxis(expected, 0, -1) - view * 255) > 2
    assert differs.mean() < 0.01


def test_layers_do_not_change_the_other_draws():
  key = jax.random.key(3)
  with_layers, without = augment._draw(key, 3), augment._draw(key)
  for name in without:
    if name != 'randaugment':
      np.testing.assert_array_equal(with_layers[name], without[name])
