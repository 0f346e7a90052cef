import io

import numpy as np
from PIL import Image
import pytest
from scipy import stats

from clop_jax.data import images


def picture(mode='RGB', size=(6, 5)):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, size=(size[1], size[0], 3)).astype(np.uint8)
  return Image.fromarray(pixels).convert(mode)


def encoded(image, kind='PNG'):
  file = io.BytesIO()
  image.save(file, format=kind)
  return file.getvalue()


@pytest.mark.parametrize('kind', ['PNG', 'BMP', 'TIFF', 'WEBP', 'JPEG'])
def test_formats_of_pillow_are_decoded(kind, tmp_path):
  data = encoded(picture(), kind)
  path = tmp_path / 'image'
  path.write_bytes(data)
  with Image.open(path) as expected:
    for source in (data, str(path)):
      np.testing.assert_array_equal(images.decode(source, 'x'), expected)


@pytest.mark.parametrize(
  ('mode', 'channels'),
  [('L', 1), ('1', 1), ('LA', 1), ('RGBA', 3), ('P', 3), ('CMYK', 3)],
)
def test_modes_become_grey_or_rgb(mode, channels):
  image = picture(mode)
  kind = 'TIFF' if mode == 'CMYK' else 'PNG'
  decoded = images.decode(encoded(image, kind), 'x')
  expected = image.convert('L' if channels == 1 else 'RGB')
  np.testing.assert_array_equal(decoded, expected)
  assert images.is_grey(image) == (channels == 1)
  # The same as a Pillow image in a source.
  if channels == 3:
    with pytest.raises(ValueError, match=r'x: .*3 channels.*channels=1'):
      images.to_channels(image, 1, 'x')
  taken = images.to_channels(image, 3, 'x')
  np.testing.assert_array_equal(taken, expected.convert('RGB'))


def test_deep_images_become_eight_bits():
  deep = np.array([[0, 255, 256, 65535]], np.uint16)
  pgm = b'P5 4 1 65535\n' + deep.astype('>u2').tobytes()
  for data in (encoded(Image.fromarray(deep)), pgm):
    np.testing.assert_array_equal(images.decode(data, 'x'), [[0, 0, 1, 255]])


@pytest.mark.parametrize(
  ('tags', 'expected'), [({281: 4095}, [0, 1, 255]), ({}, [0, 0, 15])]
)
def test_twelve_bits_are_scaled_by_their_tag_or_noted(tags, expected, capsys):
  images._print_once.cache_clear()
  file = io.BytesIO()
  deep = Image.fromarray(np.array([[0, 16, 4095]], np.uint16))
  deep.save(file, 'TIFF', tiffinfo=tags)
  for _ in range(2):
    decoded = images.decode(file.getvalue(), 'x')
    np.testing.assert_array_equal(decoded, [expected])
  assert capsys.readouterr().err.count('4095') == (not tags)


def test_large_image_is_not_corrupt(monkeypatch):
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10)
  with pytest.raises(images.LargeImageError, match=r'x\.png.*30 pixels'):
    images.decode(encoded(picture()), 'x.png')


ORIENTATION = 0x0112


@pytest.mark.parametrize(
  ('orientation', 'stored'),
  [
    (1, lambda x: x),
    (2, lambda x: x[:, ::-1]),
    (3, lambda x: x[::-1, ::-1]),
    (4, lambda x: x[::-1]),
    (5, lambda x: x.swapaxes(0, 1)),
    (6, lambda x: np.rot90(x, 1)),
    (7, lambda x: x[::-1, ::-1].swapaxes(0, 1)),
    (8, lambda x: np.rot90(x, -1)),
  ],
)
def test_exif_orientation_is_applied(orientation, stored):
  seen = picture()
  exif = Image.Exif()
  exif[ORIENTATION] = orientation
  file = io.BytesIO()
  pixels = Image.fromarray(np.ascontiguousarray(stored(np.asarray(seen))))
  pixels.save(file, format='PNG', exif=exif)
  np.testing.assert_array_equal(images.decode(file.getvalue(), 'x'), seen)


@pytest.mark.parametrize('exif', [b'Exif\0\0no TIFF header', b'Exif\0\0II*\0'])
def test_damaged_exif_does_not_make_an_image_corrupt(exif):
  file = io.BytesIO()
  picture().save(file, format='JPEG', exif=exif)
  decoded = images.decode(file.getvalue(), 'x')
  # Upright images are not copied, otherwise they would have no format.
  assert decoded.format == 'JPEG'
  np.testing.assert_array_equal(
    decoded, images.decode(encoded(picture(), 'JPEG'), 'x')
  )


@pytest.mark.parametrize(
  'data', [b'', b'no image', encoded(picture(), 'JPEG')[:100]]
)
def test_corrupt_image_is_named(data):
  with pytest.raises(images.CorruptImageError, match=r'cat/7\.png.*skip_corr'):
    images.decode(data, 'cat/7.png')


def test_missing_file_is_not_corrupt(tmp_path):
  with pytest.raises(FileNotFoundError):
    images.decode(str(tmp_path / 'none.png'), 'none.png')


@pytest.mark.parametrize(
  ('image', 'channels', 'message'),
  [
    (np.zeros((2, 2, 3), np.uint8), 1, 'x: .*3 channels.*channels=3'),
    (np.zeros((2, 2, 4), np.uint8), 3, r'x: .*\(2, 2, 4\); .*\.\.\., :3'),
    (
      np.zeros((3, 8, 8), np.uint8),
      3,
      r'x: .*\(3, 8, 8\); .*moveaxis\(image, 0, -1\)',
    ),
    (np.zeros((2, 2, 3), np.float32), 3, 'x: .*uint8.*float32'),
    (np.zeros((2, 2), np.uint8), 1, r'x: .*\(2, 2\)'),
    (np.zeros((0, 5, 3), np.uint8), 3, 'x: .*one pixel'),
    (Image.new('RGB', (5, 0)), 3, 'x: .*one pixel'),
    (Image.fromarray(np.zeros((2, 2), np.float32)), 1, 'x: .*mode .F'),
  ],
)
def test_wrong_image_is_named(image, channels, message):
  with pytest.raises(ValueError, match=message):
    images.to_channels(image, channels, 'x')


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize(('height', 'width'), [(6, 10), (9, 6)])
def test_center_crop_shows_the_middle(height, width, channels):
  rng = np.random.default_rng(1)
  shape = (height, width, channels)
  image = rng.integers(0, 256, size=shape).astype(np.uint8)
  pillow = images.to_channels(image, channels, 'x')
  middle = images.center_crop(pillow, 6)
  top, left = (height - 6) // 2, (width - 6) // 2
  if (height - 6) % 2 == 0:
    expected = image[top : top + 6, left : left + 6]
    np.testing.assert_array_equal(middle, expected)
  assert middle.shape == (6, 6, channels)
  half = images.center_crop(pillow, 4, share=4 / 6)
  if (height - 4) % 2 == 0 and (width - 4) % 2 == 0:
    top, left = (height - 4) // 2, (width - 4) // 2
    expected = image[top : top + 4, left : left + 4]
    np.testing.assert_array_equal(half, expected)


def test_random_crops_show_their_boxes():
  # A ramp: the pixels tell their place.
  ramp = np.broadcast_to(np.arange(256, dtype=np.uint8), (256, 256))
  crops = images.random_crops(
    Image.fromarray(np.stack([ramp, ramp.T, ramp], axis=-1)),
    32,
    count=200,
    crop_area=(0.1, 0.5),
    crop_aspect=(1.0, 1.0),
    rng=np.random.default_rng(0),
  )
  assert crops.shape == (200, 32, 32, 3)
  span = crops[:, 0, -1, 0].astype(float) - crops[:, 0, 0, 0]
  vertical = crops[:, -1, 0, 1].astype(float) - crops[:, 0, 0, 1]
  np.testing.assert_allclose(vertical, span, atol=2)
  area = (span * 32 / 31 / 256) ** 2
  assert stats.kstest((area - 0.1) / 0.4, 'uniform').pvalue > 1e-3


@pytest.mark.parametrize(('height', 'width'), [(40, 60), (300, 20)])
def test_random_boxes_have_the_reference_distribution(height, width):
  area_range, aspect_range = (0.08, 1.0), (3 / 4, 4 / 3)
  rng = np.random.default_rng(0)
  boxes = np.array(
    [
      images._random_box(height, width, area_range, aspect_range, rng)
      for _ in range(3000)
    ]
  )
  top, left, box_height, box_width = boxes.T
  assert (boxes >= 0).all()
  assert (top + box_height <= height + 1e-9).all()
  assert (left + box_width <= width + 1e-9).all()
  reference = np.random.default_rng(1)
  expected = []
  while len(expected) < 3000:
    for _ in range(10):
      area = reference.uniform(*area_range) * height * width
      aspect = np.exp(reference.uniform(*np.log(aspect_range)))
      h, w = np.sqrt(area / aspect), np.sqrt(area * aspect)
      if h <= height and w <= width:
        expected.append((h * w, w / h))
        break
    else:
      aspect = min(max(width / height, aspect_range[0]), aspect_range[1])
      h = min(height, width / aspect)
      expected.append((h * h * aspect, aspect))
  areas, aspects = np.array(expected).T
  for ours, theirs in (
    (box_height * box_width, areas),
    (box_width / box_height, aspects),
  ):
    assert stats.ks_2samp(ours, theirs, method='asymp').pvalue > 1e-3
