import colorsys
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from PIL import ImageEnhance
from PIL import ImageOps
import pytest
from scipy import stats

from clop_jax.data import augment
from clop_jax.data import images

SIZE = 12
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
RECIPE = {'size': SIZE, 'mean': (0.5,) * 3, 'std': (0.25,) * 3}
OFF = {
  'crop_probability': 0.0,
  'flip_probability': 0.0,
  'jitter_probability': 0.0,
  'grey_probability': 0.0,
  'blur_probability': 0.0,
}
PLAIN = {**OFF, 'size': SIZE, 'mean': (0.0,) * 3, 'std': (1.0,) * 3}


def pictures(batch=8, height=16, width=14, channels=3, seed=0):
  """Smooth colours plus noise, uint8."""
  rng = np.random.default_rng(seed)
  shape = (batch, height, width, channels)
  y = np.linspace(0, 3, height)[:, None, None]
  x = np.linspace(0, 2, width)[:, None]
  phase = rng.uniform(0, 6, size=(batch, 1, 1, channels))
  smooth = 120 + 90 * np.sin(x + y + phase)
  return np.clip(smooth + rng.normal(size=shape) * 15, 0, 255).astype(np.uint8)


def unit(images):
  return np.asarray(images, np.float32) / np.float32(255)


def planar(image):
  """An image of 8 bits as planes in [0, 1]."""
  return jnp.moveaxis(jnp.asarray(unit(image)), -1, 0)


def view(image, recipe, seed=0):
  make = jax.jit(
    functools.partial(augment.view, recipe=augment.Recipe(**recipe))
  )
  return np.asarray(make(jax.random.key(seed), image))


def keys(count, seed=0):
  return jax.random.split(jax.random.key(seed), count)


@functools.cache
def full_views():
  """Every operation at once, compiled once a batch size."""
  recipe = {**RECIPE, 'blur_probability': 0.5}

  def make(key, step, index, images):
    example_keys = augment.example_keys(key, step, index)
    return augment.two_views(example_keys, images, augment.Recipe(**recipe))

  return jax.jit(make)


def test_view_depends_on_its_example_but_not_on_its_batch():
  images, index = pictures(), np.arange(8) * 37
  make, key = full_views(), jax.random.key(3)
  views = np.asarray(make(key, 5, index, images))
  assert views.shape == (2, 8, SIZE, SIZE, 3)
  assert views.dtype == np.float32
  # In [0, 1] until it is normalized with mean 0.5 and std 0.25.
  assert views.min() >= -2 - 1e-5
  assert views.max() <= 2 + 1e-5
  order = np.random.default_rng(0).permutation(8)
  permuted = make(key, 5, index[order], images[order])
  np.testing.assert_array_equal(permuted, views[:, order])
  # Other examples in the batch.
  other = np.where(np.arange(8)[:, None, None, None] < 4, images, 255 - images)
  mixed = make(key, 5, np.where(np.arange(8) < 4, index, index + 1), other)
  np.testing.assert_array_equal(mixed[:, :4], views[:, :4])
  assert (mixed[:, 4:] != views[:, 4:]).any()
  # Another batch size is another program, which may round differently.
  halves = [make(key, 5, index[i : i + 4], images[i : i + 4]) for i in (0, 4)]
  np.testing.assert_allclose(np.concatenate(halves, axis=1), views, atol=1e-5)


def test_views_differ_by_view_step_example_and_run():
  images, index = np.repeat(pictures(1), 8, axis=0), np.arange(8)
  make, key = full_views(), jax.random.key(3)
  views = np.asarray(make(key, 5, index, images))
  np.testing.assert_array_equal(make(key, 5, index, images), views)
  others = {
    'view': views[::-1],
    'step': make(key, 6, index, images),
    'run': make(jax.random.key(4), 5, index, images),
    'example': make(key, 5, index + 8, images),
    'neighbour': np.roll(views, 1, axis=1),
  }
  for other in others.values():
    assert (np.abs(other - views).max(axis=(2, 3, 4)) > 1e-3).all()


def test_draws_are_uniform_and_independent():
  draws = jax.jit(jax.vmap(augment._draw))(keys(4000))
  columns = np.concatenate(
    [np.reshape(draw, (4000, -1)) for draw in draws.values()], axis=1
  )
  assert columns.min() >= 0
  assert columns.max() < 1
  # Five standard errors.
  np.testing.assert_allclose(columns.mean(axis=0), 0.5, atol=0.023)
  np.testing.assert_allclose(columns.var(axis=0), 1 / 12, atol=0.006)
  correlations = np.corrcoef(columns.T) - np.eye(columns.shape[1])
  assert np.abs(correlations).max() < 0.08


def test_switching_an_operation_off_keeps_the_others_draws():
  image = pictures(1, SIZE, SIZE)[0]
  recipe = {**PLAIN, 'jitter_probability': 0.8}
  recipe |= {'contrast': 0, 'saturation': 0, 'hue': 0}
  seeds = keys(8)
  jittered, flipped = (
    jax.jit(
      jax.vmap(
        functools.partial(augment.view, recipe=augment.Recipe(**r)),
        in_axes=(0, None),
      )
    )(seeds, image)
    for r in (recipe, {**recipe, 'flip_probability': 1.0})
  )
  np.testing.assert_allclose(flipped, jittered[:, :, ::-1], atol=1e-6)
  assert np.ptp(jittered, axis=0).max() > 0.1


def test_view_without_operations_is_the_normalized_image():
  images = pictures(2, SIZE, SIZE)
  recipe = {**OFF, 'size': SIZE, 'mean': MEAN, 'std': STD}
  views = augment.two_views(
    keys(2), jnp.asarray(images), augment.Recipe(**recipe)
  )
  ours = augment.unit_range(jnp.asarray(images))
  ours = augment.normalize(ours, mean=MEAN, std=STD)
  np.testing.assert_array_equal(views, np.stack([ours, ours]))
  expected = (images / 255 - np.array(MEAN)) / np.array(STD)
  np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_flip_mirrors_as_often_as_asked():
  image = jnp.asarray(pictures(1, SIZE, SIZE)[0])
  recipe = {**PLAIN, 'flip_probability': 0.25}
  make = jax.jit(
    jax.vmap(lambda key: augment.view(key, image, augment.Recipe(**recipe)))
  )
  views = np.asarray(make(keys(2000)))
  flipped = np.abs(views - unit(image)[:, ::-1]).max(axis=(1, 2, 3)) < 1e-6
  kept = np.abs(views - unit(image)).max(axis=(1, 2, 3)) < 1e-6
  assert (flipped ^ kept).all()
  # Four standard errors.
  assert abs(flipped.mean() - 0.25) < 0.039


def test_grey_makes_the_channels_equal_to_the_luma():
  image = pictures(1, SIZE, SIZE)[0]
  recipe = {**PLAIN, 'grey_probability': 1.0}
  got = view(image, recipe)
  luma = np.asarray(Image.fromarray(image).convert('L'), np.float32) / 255
  for channel in range(3):
    np.testing.assert_allclose(got[..., channel], luma, atol=1 / 255)
  np.testing.assert_array_equal(got[..., 0], got[..., 1])
  np.testing.assert_array_equal(got[..., 0], got[..., 2])


@pytest.mark.parametrize('turn', [0.1, -0.1, 0.5, -0.37, 0.0])
def test_hue_equals_colorsys(turn):
  image = np.concatenate(
    [
      pictures(1, 5, 5)[0].reshape(-1, 3) / 255,
      # Greys have no hue; pure colours sit on the edges of the circle.
      [[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5]],
      [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]],
    ]
  )
  expected = []
  for pixel in image:
    h, s, v = colorsys.rgb_to_hsv(*pixel)
    expected.append(colorsys.hsv_to_rgb((h + turn) % 1.0, s, v))
  planes = jnp.asarray(image.T[:, None], jnp.float32)
  ours = jax.jit(augment._turn_hue)(planes, turn)
  np.testing.assert_allclose(ours[:, 0].T, expected, atol=1e-5)


@pytest.mark.parametrize('amount', [-0.4, 0.8])
@pytest.mark.parametrize(
  ('which', 'theirs'),
  [
    (0, ImageEnhance.Brightness),
    (1, ImageEnhance.Contrast),
    (2, ImageEnhance.Color),
  ],
)
def test_colour_operations_equal_pillow(which, theirs, amount):
  image = pictures(1)[0]
  got = augment._blend(planar(image), *np.eye(3)[which] * amount)
  expected = theirs(Image.fromarray(image)).enhance(1 + amount)
  np.testing.assert_allclose(got, planar(expected), atol=2 / 255)


def test_contrast_of_one_channel_equals_pillow():
  image = pictures(1, channels=1)[0]
  got = augment._blend(planar(image), 0.0, 0.4, 0.0)
  theirs = ImageEnhance.Contrast(Image.fromarray(image[..., 0]))
  np.testing.assert_allclose(got[0], unit(theirs.enhance(1.4)), atol=2 / 255)


def test_jitter_draws_its_amounts_from_the_whole_range():
  # Brightness alone of a mid grey returns the drawn factor.
  image = jnp.full((SIZE, SIZE, 3), 100, jnp.uint8)
  recipe = {**PLAIN, 'jitter_probability': 0.7}
  recipe |= {'brightness': 0.4, 'contrast': 0, 'saturation': 0, 'hue': 0}
  make = jax.jit(
    jax.vmap(lambda key: augment.view(key, image, augment.Recipe(**recipe)))
  )
  views = np.asarray(make(keys(2000)))
  assert np.ptp(views, axis=(1, 2, 3)).max() < 1e-6
  factors = views[:, 0, 0, 0] * 255 / 100
  changed = np.abs(factors - 1) > 1e-6
  # Four standard errors.
  assert abs(changed.mean() - 0.7) < 0.041
  uniform = (factors[changed] - 0.6) / 0.8
  assert stats.kstest(uniform, 'uniform').pvalue > 1e-3


def test_jitter_applies_its_operations_in_every_order():
  image = planar(pictures(1, SIZE, SIZE)[0])
  limits = [0.8, 0.8, 0.8, 0.3]

  def make(key):
    draws = augment._draw(key)
    got = augment._colour_jitter(draws, image, 1.0, limits)
    return got, draws['jitter_amounts'], draws['jitter_order']

  views, uniforms, ranks = jax.jit(jax.vmap(make))(keys(1200))
  blend, turn_hue = jax.jit(augment._blend), jax.jit(augment._turn_hue)
  amounts = (2 * np.asarray(uniforms) - 1) * limits
  orders = np.argsort(ranks, axis=1)
  for view, amount, order in zip(views[:100], amounts, orders, strict=False):
    expected = image
    for which in order:
      if which == 3:
        expected = turn_hue(expected, amount[3])
      else:
        expected = blend(expected, *np.eye(3)[which] * amount[which])
    np.testing.assert_allclose(view, expected, atol=2e-5)
  _, counts = np.unique(orders, axis=0, return_counts=True)
  assert len(counts) == 24
  assert stats.chisquare(counts).pvalue > 1e-3


def test_solarize_equals_pillow():
  image = pictures(1, SIZE, SIZE)[0]
  recipe = {**PLAIN, 'solarize_probability': 1.0, 'solarize_threshold': 0.2}
  theirs = ImageOps.solarize(Image.fromarray(image), 0.2 * 255)
  np.testing.assert_allclose(view(image, recipe), unit(theirs), atol=1e-6)


def test_each_view_may_have_an_image_of_its_own():
  images = pictures(6, SIZE, SIZE).reshape(2, 3, SIZE, SIZE, 3)
  views = augment.two_views(
    keys(3), jnp.asarray(images), augment.Recipe(**PLAIN)
  )
  np.testing.assert_allclose(views, unit(images), atol=1e-6)


def boxes(height, width, area, aspect, count=3000):
  """Top, left, height and width of random boxes."""

  def draw(key):
    draws = augment._draw(key)
    return augment._random_box(draws, height, width, area, aspect)

  return np.asarray(jax.jit(jax.vmap(draw))(keys(count)), np.float64).T


@pytest.mark.parametrize(('height', 'width'), [(10, 40), (40, 10)])
def test_crop_is_the_largest_centred_one_if_no_random_one_fits(height, width):
  aspect = (3 / 4, 4 / 3)
  top, left, box_height, box_width = boxes(height, width, (0.9, 1.0), aspect)
  np.testing.assert_allclose(top, (height - box_height) / 2, atol=1e-4)
  np.testing.assert_allclose(left, (width - box_width) / 2, atol=1e-4)
  np.testing.assert_allclose(np.minimum(box_height, box_width), 10, atol=1e-4)
  ratio = aspect[1] if width > height else aspect[0]
  np.testing.assert_allclose(box_width / box_height, ratio, atol=1e-4)


@pytest.mark.parametrize(('height', 'width'), [(32, 32), (40, 80)])
def test_crops_have_the_same_distribution_as_on_the_host(height, width):
  area, aspect = (0.08, 1.0), (3 / 4, 4 / 3)
  ours = boxes(height, width, area, aspect)
  rng = np.random.default_rng(0)
  theirs = np.transpose(
    [images._random_box(height, width, area, aspect, rng) for _ in ours[0]]
  )
  assert (ours >= -1e-4).all()
  assert (ours[:2] + ours[2:] <= np.array([[height], [width]]) + 1e-4).all()
  for measure in (
    lambda b: b[0],
    lambda b: b[1],
    lambda b: b[2] * b[3],
    lambda b: b[3] / b[2],
  ):
    test = stats.ks_2samp(measure(ours), measure(theirs), method='asymp')
    assert test.pvalue > 1e-3


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
@pytest.mark.parametrize('size', [6, 24])
def test_resizing_equals_pillow(size, interpolation):
  image = pictures(1, 24, 18)[0]
  filter_ = Image.Resampling[interpolation.upper()]
  expected = unit(Image.fromarray(image).resize((size, size), filter_))
  recipe = {**PLAIN, 'size': size, 'interpolation': interpolation}
  got = view(image, recipe)
  np.testing.assert_allclose(got, expected, atol=2 / 255)
  resized = augment.resize(
    jnp.asarray(unit(image))[None], size, interpolation=interpolation
  )
  np.testing.assert_allclose(resized[0], expected, atol=2 / 255)


def test_crop_shows_the_box_it_drew(monkeypatch):
  # A box on whole pixels that is as large as the view is a plain slice.
  box = jnp.array([3.0, 2.0, SIZE, SIZE])
  monkeypatch.setattr(augment, '_random_box', lambda *_: box)
  image = pictures(1, 20, 17)[0]
  recipe = {**PLAIN, 'crop_probability': 1.0}
  got = view(image, recipe)
  expected = unit(image)[3 : 3 + SIZE, 2 : 2 + SIZE]
  np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
@pytest.mark.parametrize('size', [12, 40])
def test_crop_shows_no_pixel_outside_of_it(size, interpolation, monkeypatch):
  top, left, height, width = 3.25, 4.5, 20.25, 15.5
  image = np.full((40, 32, 3), 255, np.uint8)
  image[3:24, 4:20] = 100  # what the box touches
  monkeypatch.setattr(
    augment, '_random_box', lambda *_: jnp.array([top, left, height, width])
  )
  monkeypatch.setattr(
    images, '_random_box', lambda *_: (top, left, height, width)
  )
  recipe = {
    **PLAIN,
    'size': size,
    'crop_probability': 1.0,
    'interpolation': interpolation,
  }
  np.testing.assert_allclose(view(image, recipe), 100 / 255, atol=1e-5)
  crops = images.random_crops(
    Image.fromarray(image),
    size,
    count=1,
    crop_area=(0.1, 1.0),
    crop_aspect=(0.5, 2.0),
    rng=np.random.default_rng(0),
    interpolation=interpolation,
  )
  assert (crops == 100).all()


@pytest.mark.parametrize(('size', 'radius'), [(SIZE, 1), (48, 2)])
def test_blur_is_a_gaussian_with_the_edge_repeated(size, radius):
  image = pictures(1, size, size)[0]
  sigma = 1.3
  recipe = {**PLAIN, 'size': size, 'blur_probability': 1.0}
  recipe['blur_sigma'] = (sigma, sigma)
  got = view(image, recipe)
  offsets = np.arange(-radius, radius + 1)
  kernel = np.exp(-(offsets**2) / (2 * sigma**2))
  kernel /= kernel.sum()
  expected = image.astype(np.float64) / 255
  for axis in (0, 1):
    pad = [(0, 0)] * 3
    pad[axis] = (radius, radius)
    padded = np.pad(expected, pad, mode='edge')
    expected = sum(
      weight * np.take(padded, np.arange(size) + i, axis=axis)
      for i, weight in enumerate(kernel)
    )
  np.testing.assert_allclose(got, expected, atol=1e-5)


def test_images_of_one_channel_are_augmented():
  images = pictures(2, channels=1)
  recipe = {'size': 9, 'mean': (0.5,), 'std': (0.5,), 'blur_probability': 0.5}
  make = jax.jit(
    functools.partial(augment.two_views, recipe=augment.Recipe(**recipe))
  )
  views = np.asarray(make(keys(2), images))
  assert views.shape == (2, 2, 9, 9, 1)
  # Normalization comes last.
  assert np.abs(views).max() <= 1 + 1e-5
  assert np.abs(views[0] - views[1]).max() > 0.01


@pytest.mark.parametrize(
  ('shape', 'dtype', 'changes', 'message'),
  [
    ((4, 4, 3), jnp.float32, {}, 'images.*float32'),
    ((4, 4), jnp.uint8, {}, r'image.*\(4, 4\)'),
    ((4, 4, 4), jnp.uint8, {}, r'image.*\(4, 4, 4\)'),
    *(
      ((4, 4, 3), jnp.uint8, {name: value}, rf'augment\.{name}.*{got}')
      for name, value, got in (
        ('mean', (0.5,), r'3 channels.*0\.5'),
        ('mean', 0.5, r'3 channels.*0\.5'),
        ('mean', (0.5, np.nan, 0.5), 'nan'),
        ('std', (0.5, 0.5), r'3 channels.*0\.5'),
        ('std', (0.2, 0.0, 0.2), '0'),
        ('std', (0.2, np.inf, 0.2), 'inf'),
      )
    ),
  ],
)
def test_wrong_images_are_named(shape, dtype, changes, message):
  recipe = augment.Recipe(**{**PLAIN, **changes})
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(
      functools.partial(augment.view, recipe=recipe),
      jax.random.key(0),
      jax.ShapeDtypeStruct(shape, dtype),
    )


def test_images_of_three_views_are_named():
  images = jnp.zeros((3, 1, 4, 4, 3), jnp.uint8)
  with pytest.raises(ValueError, match=r'images.*\(3, 1, 4, 4, 3\)'):
    augment.two_views(keys(3), images, augment.Recipe(**PLAIN))


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('brightness', -0.1),
    ('contrast', np.inf),
    ('saturation', None),
    ('hue', 0.6),
    ('size', 0),
    ('size', 8.5),
    ('crop_area', (0.4, 1.5)),
    ('crop_area', 0.5),
    ('crop_area', 'ab'),
    ('crop_aspect', (2.0, 0.5)),
    ('blur_sigma', (0, 1)),
    ('blur_sigma', (1, np.inf)),
    ('interpolation', 'lanczos'),
    ('crop_probability', 1.1),
    ('flip_probability', '1'),
    ('jitter_probability', np.nan),
    ('solarize_threshold', 1.5),
    ('randaugment_layers', 1.5),
    ('randaugment_magnitude', 31),
  ],
)
def test_wrong_numbers_of_a_recipe_are_named(name, value):
  message = rf'augment\.{name} .*{re.escape(str(value))}'
  with pytest.raises(ValueError, match=message):
    augment.Recipe(**{**PLAIN, name: value})


def test_limits_of_the_ranges_are_allowed():
  limits = {
    'size': 1,
    'crop_area': (1.0, 1.0),
    'crop_aspect': [0.01, 100.0],
    'brightness': 3.0,
    'hue': 0.5,
    'mean': np.zeros(3, np.float32),
    'std': np.full(3, 1e-3, np.float32),
  }
  image = jnp.zeros((SIZE, SIZE, 3), jnp.uint8)
  make = functools.partial(augment.view, recipe=augment.Recipe(**limits))
  assert jax.eval_shape(make, jax.random.key(0), image).shape == (1, 1, 3)
