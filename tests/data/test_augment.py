import colorsys
import functools

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


def test_view_depends_on_its_example_and_not_on_the_batch():
  images, index = pictures(), np.arange(8) * 37
  make, key = full_views(), jax.random.key(3)
  views = np.asarray(make(key, 5, index, images))
  assert views.shape == (2, 8, SIZE, SIZE, 3)
  assert views.dtype == np.float32
  # [0, 1] until the mean 0.5 and the deviation 0.25 at the very end.
  assert views.min() >= -2 - 1e-5
  assert views.max() <= 2 + 1e-5
  order = np.random.default_rng(0).permutation(8)
  permuted = make(key, 5, index[order], images[order])
  np.testing.assert_array_equal(permuted, views[:, order])
  # Other neighbours at its side.
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


def test_example_keys_are_all_different():
  make = jax.jit(augment.example_keys)
  data = [
    jax.random.key_data(make(key, step, np.arange(20)))
    for key in keys(2)
    for step in range(3)
  ]
  assert len(np.unique(np.concatenate(data), axis=0)) == 120


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


def test_operation_switched_off_leaves_the_others_draws():
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


def test_everything_off_is_exactly_the_normalized_image():
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


@pytest.mark.parametrize(
  ('name', 'identity'),
  [
    ('crop_probability', {'crop_area': (1.0, 1.0), 'crop_aspect': (1.0, 1.0)}),
    (
      'jitter_probability',
      {'brightness': 0, 'contrast': 0, 'saturation': 0, 'hue': 0},
    ),
    ('blur_probability', {'blur_sigma': (1e-3, 1e-3)}),
  ],
)
def test_operation_of_no_strength_changes_nothing(name, identity):
  image = pictures(1, SIZE, SIZE)[0]
  recipe = {**PLAIN, name: 1.0}
  got = view(image, recipe)
  assert np.abs(got - unit(image)).max() > 0.01  # else nothing is shown
  got = view(image, {**recipe, **identity})
  np.testing.assert_allclose(got, unit(image), atol=1e-5)


@pytest.mark.parametrize('channels', [1, 3])
def test_flip_mirrors_left_and_right(channels):
  image = pictures(1, SIZE, SIZE, channels)[0]
  recipe = {**PLAIN, 'flip_probability': 1.0}
  recipe |= {'mean': (0.0,) * channels, 'std': (1.0,) * channels}
  got = view(image, recipe)
  np.testing.assert_allclose(got, unit(image)[:, ::-1], atol=1e-6)


@pytest.mark.parametrize('probability', [0.25, 0.5])
def test_flip_happens_as_often_as_asked(probability):
  image = jnp.asarray(pictures(1, SIZE, SIZE)[0])
  recipe = {**PLAIN, 'flip_probability': probability}
  make = jax.jit(
    jax.vmap(lambda key: augment.view(key, image, augment.Recipe(**recipe)))
  )
  views = np.asarray(make(keys(2000)))
  flipped = np.abs(views - unit(image)[:, ::-1]).max(axis=(1, 2, 3)) < 1e-6
  kept = np.abs(views - unit(image)).max(axis=(1, 2, 3)) < 1e-6
  assert (flipped ^ kept).all()
  # Four standard errors.
  assert abs(flipped.mean() - probability) < 0.045


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
  ours = augment._turn_hue(planes, turn)
  np.testing.assert_allclose(ours[:, 0].T, expected, atol=1e-5)


@pytest.mark.parametrize('turn', [0.1, -0.2])
def test_hue_equals_pillow(turn):
  image = pictures(1)[0]
  hue, *others = Image.fromarray(image).convert('HSV').split()
  shifted = np.asarray(hue, int) + round(turn * 256)
  hue = Image.fromarray((shifted % 256).astype(np.uint8))
  theirs = Image.merge('HSV', (hue, *others)).convert('RGB')
  ours = augment._turn_hue(planar(image), round(turn * 256) / 256)
  # Pillow has 256 hues; where the colour is strong one of them is 6 levels.
  np.testing.assert_allclose(ours, planar(theirs), atol=8 / 255)


@pytest.mark.parametrize('amount', [-0.8, -0.4, 0.0, 0.4, 0.8])
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


@pytest.mark.parametrize('amount', [-0.4, 0.4])
def test_contrast_of_one_channel_equals_pillow(amount):
  image = pictures(1, channels=1)[0]
  got = augment._blend(planar(image), 0.0, amount, 0.0)
  theirs = ImageEnhance.Contrast(Image.fromarray(image[..., 0]))
  expected = unit(theirs.enhance(1 + amount))
  np.testing.assert_allclose(got[0], expected, atol=2 / 255)


def test_jitter_draws_its_amounts_from_the_whole_range():
  # Brightness alone of a mid grey gives the drawn factor back.
  image = jnp.full((SIZE, SIZE, 3), 100, jnp.uint8)
  recipe = {**PLAIN, 'jitter_probability': 1.0}
  recipe |= {'brightness': 0.4, 'contrast': 0, 'saturation': 0, 'hue': 0}
  make = jax.jit(
    jax.vmap(lambda key: augment.view(key, image, augment.Recipe(**recipe)))
  )
  views = np.asarray(make(keys(2000)))
  assert np.ptp(views, axis=(1, 2, 3)).max() < 1e-6
  factors = views[:, 0, 0, 0] * 255 / 100
  assert 0.6 - 1e-5 < factors.min() < 0.605
  assert 1.395 < factors.max() < 1.4 + 1e-5
  assert abs(factors.mean() - 1) < 0.022
  assert abs(factors.std() - 0.8 / np.sqrt(12)) < 0.012


def test_jitter_applies_its_operations_one_after_the_other_in_every_order():
  image = planar(pictures(1, SIZE, SIZE)[0])
  limits = {'brightness': 0.8, 'contrast': 0.8, 'saturation': 0.8, 'hue': 0.3}

  def make(key):
    draws = augment._draw(key)
    got = augment._colour_jitter(draws, image, probability=1.0, **limits)
    return got, draws['jitter_amounts'], draws['jitter_order']

  views, uniforms, ranks = jax.jit(jax.vmap(make))(keys(1200))
  blend, turn_hue = jax.jit(augment._blend), jax.jit(augment._turn_hue)
  amounts = (2 * np.asarray(uniforms) - 1) * list(limits.values())
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


def test_jitter_leaves_an_image_alone_as_often_as_asked():
  image = pictures(1, SIZE, SIZE)[0]
  recipe = {**PLAIN, 'jitter_probability': 0.7}
  make = jax.jit(
    jax.vmap(lambda key: augment.view(key, image, augment.Recipe(**recipe)))
  )
  views = np.asarray(make(keys(1000)))
  same = np.abs(views - unit(image)).max(axis=(1, 2, 3)) < 1e-6
  # Four standard errors.
  assert abs(same.mean() - 0.3) < 0.058


@pytest.mark.parametrize('threshold', [0.5, 0.2])
def test_solarize_equals_pillow(threshold):
  image = pictures(1, SIZE, SIZE)[0]
  recipe = {**PLAIN, 'solarize_probability': 1.0}
  got = view(image, {**recipe, 'solarize_threshold': threshold})
  theirs = ImageOps.solarize(Image.fromarray(image), threshold * 255)
  np.testing.assert_allclose(got, unit(theirs), atol=1e-6)


def test_images_of_each_view_are_kept_apart():
  images = pictures(6, SIZE, SIZE).reshape(2, 3, SIZE, SIZE, 3)
  views = augment.two_views(
    keys(3), jnp.asarray(images), augment.Recipe(**PLAIN)
  )
  np.testing.assert_allclose(views, unit(images), atol=1e-6)
  with pytest.raises(ValueError, match=r'got \(3, 1, 12, 12, 3\)'):
    augment.two_views(
      keys(3),
      images.reshape(6, SIZE, SIZE, 3)[:3, None],
      augment.Recipe(**PLAIN),
    )


@pytest.mark.parametrize(
  ('height', 'width', 'area', 'aspect'),
  [
    (32, 32, (0.08, 1.0), (3 / 4, 4 / 3)),
    (20, 30, (0.2, 0.5), (0.5, 2.0)),
    (8, 8, (0.3, 0.3), (1.0, 1.0)),
    # No box of this area and aspect fits: the centred fallback.
    (10, 40, (0.9, 1.0), (3 / 4, 4 / 3)),
    (40, 10, (0.9, 1.0), (3 / 4, 4 / 3)),
  ],
)
def test_crop_boxes_are_inside_and_in_the_ranges(height, width, area, aspect):

  def draw(key):
    draws = augment._draw(key)
    return augment._random_box(draws, height, width, area, aspect)

  boxes = np.asarray(jax.jit(jax.vmap(draw))(keys(2000)), np.float64)
  top, left, box_height, box_width = boxes.T
  slack = 1e-4
  assert (top >= -slack).all()
  assert (left >= -slack).all()
  assert (top + box_height <= height + slack).all()
  assert (left + box_width <= width + slack).all()
  aspects = box_width / box_height
  assert (aspects >= aspect[0] - slack).all()
  assert (aspects <= aspect[1] + slack).all()
  areas = box_height * box_width / (height * width)
  if area[0] < 0.9:
    assert (areas >= area[0] - slack).all()
    assert (areas <= area[1] + slack).all()
    # The ranges and the free places are used, not one corner of them.
    if aspect[0] < aspect[1]:
      assert 0.3 < (aspects < 1).mean() < 0.7
      assert np.log(aspects).min() < 0.9 * np.log(aspect[0])
      assert np.log(aspects).max() > 0.9 * np.log(aspect[1])
    assert areas.min() < area[0] + 0.05
    assert areas.max() > area[1] - 0.1
    for place, free in ((top, height - box_height), (left, width - box_width)):
      share = place / np.maximum(free, slack)
      assert abs(share[free > 1].mean() - 0.5) < 0.04
      assert np.ptp(share[free > 1]) > 0.95
  else:
    np.testing.assert_allclose(top, (height - box_height) / 2, atol=slack)
    np.testing.assert_allclose(left, (width - box_width) / 2, atol=slack)
    np.testing.assert_allclose(np.minimum(box_height, box_width), 10, atol=0.5)
    assert areas.max() < 0.4


@pytest.mark.parametrize(('height', 'width'), [(32, 32), (40, 80)])
def test_crop_boxes_have_the_distribution_of_the_host_s(height, width):
  """Which tests/data/test_images.py holds to the reference definition."""
  ranges = (0.08, 1.0), (3 / 4, 4 / 3)

  def draw(key):
    return augment._random_box(augment._draw(key), height, width, *ranges)

  ours = np.asarray(jax.jit(jax.vmap(draw))(keys(3000)), np.float64)
  rng = np.random.default_rng(0)
  theirs = np.array(
    [images._random_box(height, width, *ranges, rng) for _ in range(3000)]
  )
  for measure in (
    lambda b: b[:, 0],
    lambda b: b[:, 1],
    lambda b: b[:, 2] * b[:, 3],
    lambda b: b[:, 3] / b[:, 2],
  ):
    test = stats.ks_2samp(measure(ours), measure(theirs), method='asymp')
    assert test.pvalue > 1e-3


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
@pytest.mark.parametrize('size', [6, 24])
def test_whole_image_is_resized_as_pillow_does(size, interpolation):
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


def test_resize_to_the_same_size_is_the_identity():
  images = jnp.asarray(unit(pictures(2, SIZE, SIZE)))
  np.testing.assert_array_equal(augment.resize(images, SIZE), images)


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
@pytest.mark.parametrize('size', [4, 12, 40])
def test_crop_shows_nothing_of_what_is_beside_it(
  size, interpolation, monkeypatch
):
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
    image,
    size,
    count=1,
    crop_area=(0.1, 1.0),
    crop_aspect=(0.5, 2.0),
    rng=np.random.default_rng(0),
    interpolation=interpolation,
  )
  assert (crops == 100).all()


@pytest.mark.parametrize('size', [SIZE, 48])
def test_blur_keeps_constants_also_at_the_border(size):
  image = jnp.full((size, size, 3), 200, jnp.uint8)
  recipe = {**PLAIN, 'size': size, 'blur_probability': 1.0}
  recipe['blur_sigma'] = (2.0, 2.0)
  got = view(image, recipe)
  assert got.shape == image.shape
  np.testing.assert_allclose(got, 200 / 255, atol=1e-5)


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
  assert abs(got.mean() - image.mean() / 255) < 0.01


def test_images_of_one_channel_go_through_everything():
  images = pictures(2, channels=1)
  recipe = {'size': 9, 'mean': (0.5,), 'std': (0.5,), 'blur_probability': 0.5}
  make = jax.jit(
    functools.partial(augment.two_views, recipe=augment.Recipe(**recipe))
  )
  views = np.asarray(make(keys(2), images))
  assert views.shape == (2, 2, 9, 9, 1)
  # Jitter and blur keep to [0, 1] and normalization comes last.
  assert views.min() >= -1 - 1e-5
  assert views.max() <= 1 + 1e-5
  assert np.abs(views[0] - views[1]).max() > 0.01


def test_normalize_is_per_channel():
  image = pictures(1)[0]
  expected = np.stack(
    [
      (image[..., c].astype(np.float64) / 255 - MEAN[c]) / STD[c]
      for c in range(3)
    ],
    axis=-1,
  )
  ours = augment.normalize(jnp.asarray(unit(image)), mean=MEAN, std=STD)
  np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize(
  ('mean', 'std', 'message'),
  [
    ((0.5,), STD, 'mean must have one number for each of the 3 channels'),
    (MEAN, (0.5, 0.5), r'std must have one .* 3 channels, got \(0.5, 0.5\)'),
    (0.5, STD, r'config.augment.mean must have one number for .*, got 0.5'),
    ((0.5, np.nan, 0.5), STD, 'config.augment.mean must have one number'),
    (MEAN, (0.2, 0.0, 0.2), r'config.augment.std must have one number > 0 for'),
    (
      MEAN,
      (0.2, -0.1, 0.2),
      r'config.augment.std must have one number > 0 for',
    ),
    (MEAN, (0.2, np.inf, 0.2), r'config.augment.std must have one number > 0'),
  ],
)
def test_normalize_refuses_what_is_not_one_number_for_each_channel(
  mean, std, message
):
  with pytest.raises(ValueError, match=message):
    augment.normalize(jnp.zeros((4, 4, 3)), mean=mean, std=std)


@pytest.mark.parametrize(
  ('shape', 'dtype', 'message'),
  [
    ((4, 4, 3), jnp.float32, 'images must be uint8, got float32'),
    ((4, 4, 3), jnp.int32, 'images must be uint8, got int32'),
    ((4, 4), jnp.uint8, r'height, width, 1 or 3\], got \(4, 4\)'),
    ((4, 4, 4), jnp.uint8, r'height, width, 1 or 3\], got \(4, 4, 4\)'),
    ((2, 4, 4, 3), jnp.uint8, r'got \(2, 4, 4, 3\)'),
  ],
)
def test_wrong_images_are_refused(shape, dtype, message):
  with pytest.raises(ValueError, match=message):
    augment.view(
      jax.random.key(0), jnp.zeros(shape, dtype), augment.Recipe(**PLAIN)
    )


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    *(
      ({name: value}, rf'config.augment.{name} must be a number >= 0, got')
      for name in ('brightness', 'contrast', 'saturation')
      for value in (-0.1, float('nan'), float('inf'), None)
    ),
    ({'hue': -0.1}, r'config.augment.hue must be in \[0, 0.5\], got -0.1'),
    ({'hue': 0.6}, r'config.augment.hue must be in \[0, 0.5\], got 0.6'),
    *(
      (
        {'size': size},
        'config.augment.size must be a whole number of pixels >=',
      )
      for size in (0, -3, 8.5, None)
    ),
    *(
      (
        {'crop_area': value},
        'augment.crop_area must be two numbers 0 < low <= high <= 1, got',
      )
      for value in ((0.4, 1.5), (0.9, 0.1), (0, 1), 0.5, (0.1,), 'ab', None)
    ),
    *(
      (
        {name: value},
        f'config.augment.{name} must be two numbers 0 < low <= high, got',
      )
      for name in ('crop_aspect', 'blur_sigma')
      for value in ((0, 1), (-1, 1), (2.0, 0.5), (1, float('inf')), 1.0, [])
    ),
    ({'flip_probability': '1'}, r'config.augment.flip_probability must be in'),
    ({'solarize_threshold': 1.5}, r'solarize_threshold must be in \[0, 1\]'),
    ({'randaugment_layers': -1}, 'randaugment_layers must be an integer >= 0'),
    ({'randaugment_layers': 1.5}, 'randaugment_layers must be an integer >= 0'),
    (
      {'randaugment_magnitude': 31},
      r'randaugment_magnitude must be in \[0, 30',
    ),
  ],
)
def test_impossible_numbers_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    augment.Recipe(**{**PLAIN, **arguments})


@pytest.mark.parametrize('name', [*OFF, 'solarize_probability'])
@pytest.mark.parametrize('probability', [-0.1, 1.1, float('nan')])
def test_impossible_probability_is_named(name, probability):
  with pytest.raises(ValueError, match=rf'augment.{name} must be in \[0, 1\]'):
    augment.Recipe(**{**PLAIN, name: probability})


def test_limits_of_the_ranges_are_possible():
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
