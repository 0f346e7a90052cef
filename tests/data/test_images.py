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


@pytest.mark.parametrize('kind', ['PNG', 'BMP', 'TIFF', 'WEBP', 'GIF', 'JPEG'])
def test_every_format_that_pillow_reads_is_decoded(kind, tmp_path):
  image = picture()
  if kind == 'GIF':
    image = image.quantize()
  data = encoded(image, kind)
  decoded = images.decode(data, 'x')
  assert images.as_array(decoded).shape == (5, 6, 3)
  assert images.as_array(decoded).dtype == np.uint8
  with Image.open(io.BytesIO(data)) as again:
    np.testing.assert_array_equal(decoded, again.convert('RGB'))
  path = tmp_path / 'image'
  path.write_bytes(data)
  np.testing.assert_array_equal(images.decode(str(path), 'x'), decoded)


@pytest.mark.parametrize(
  ('mode', 'channels'),
  [('L', 1), ('1', 1), ('LA', 1), ('RGBA', 3), ('P', 3), ('RGB', 3)],
)
def test_modes_become_grey_or_rgb(mode, channels):
  image = picture(mode)
  decoded = images.as_array(images.decode(encoded(image), 'x'))
  expected = np.asarray(image.convert('L' if channels == 1 else 'RGB'))
  assert decoded.shape == (5, 6, channels)
  np.testing.assert_array_equal(decoded, expected.reshape(decoded.shape))


def test_cmyk_jpeg_becomes_rgb():
  decoded = images.decode(encoded(picture('CMYK'), 'JPEG'), 'x')
  assert images.as_array(decoded).shape == (5, 6, 3)


def test_sixteen_bits_become_eight():
  deep = np.array([[0, 255, 256, 65535]], np.uint16)
  decoded = images.decode(encoded(Image.fromarray(deep)), 'x')
  np.testing.assert_array_equal(decoded, [[0, 0, 1, 255]])


def test_sixteen_bits_of_a_pgm_become_eight():
  deep = np.array([[0, 255, 256, 65535]], '>u2')
  data = b'P5 4 1 65535\n' + deep.tobytes()
  np.testing.assert_array_equal(images.decode(data, 'x'), [[0, 0, 1, 255]])


@pytest.mark.parametrize('tagged', [False, True])
def test_twelve_bits_are_scaled_or_spoken_of(tagged, capsys):
  images._noted.clear()
  file = io.BytesIO()
  deep = Image.fromarray(np.array([[0, 16, 4095]], np.uint16))
  deep.save(file, 'TIFF', tiffinfo={281: 4095} if tagged else {})
  decoded = np.asarray(images.decode(file.getvalue(), 'x.tif'))
  assert decoded.tolist() == [[0, 1, 255] if tagged else [0, 0, 15]]
  note = capsys.readouterr().err
  assert note == '' if tagged else 'x.tif' in note and '4095' in note


def test_an_intact_image_that_is_too_large_is_not_corrupt(monkeypatch):
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10)
  with pytest.raises(images.LargeImageError, match=r'x\.png.*30 pixels'):
    images.decode(encoded(picture()), 'x.png')
  assert not issubclass(images.LargeImageError, images.CorruptImageError)


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
@pytest.mark.parametrize('mode', ['L', 'P', 'RGB', 'RGBA'])
def test_photographs_are_turned_as_their_exif_says(orientation, stored, mode):
  seen = picture(mode)
  expected = images.as_array(seen.convert('L' if mode == 'L' else 'RGB'))
  pixels = Image.fromarray(np.ascontiguousarray(stored(np.asarray(seen))))
  if mode == 'P':
    pixels = pixels.convert('P')
    pixels.putdata(np.ascontiguousarray(stored(np.asarray(seen))).ravel())
    pixels.putpalette(seen.getpalette())
  exif = Image.Exif()
  exif[ORIENTATION] = orientation
  file = io.BytesIO()
  pixels.save(file, format='PNG', exif=exif)
  decoded = images.as_array(images.decode(file.getvalue(), 'x'))
  np.testing.assert_array_equal(decoded, expected)
  # Where Pillow is lossy: the size and about the pixels.
  if mode == 'RGB':
    file = io.BytesIO()
    pixels.save(file, format='JPEG', exif=exif, quality=100, subsampling=0)
    decoded = images.as_array(images.decode(file.getvalue(), 'x'))
    assert decoded.shape == expected.shape
    assert np.abs(decoded.astype(int) - expected).max() < 12


def test_image_without_orientation_is_not_copied(monkeypatch):
  def copied(*_):
    raise AssertionError('copied')

  exif = Image.Exif()
  exif[0x0110] = 'a camera'
  for options in ({}, {'exif': exif}):
    file = io.BytesIO()
    picture().save(file, format='JPEG', **options)
    with monkeypatch.context() as patch:
      patch.setattr(Image.Image, 'copy', copied)
      decoded = images.decode(file.getvalue(), 'x')
    # What Pillow copies or converts has no format any more.
    assert decoded.format == 'JPEG'


@pytest.mark.parametrize('exif', [b'Exif\0\0no TIFF header', b'Exif\0\0II*\0'])
def test_damaged_exif_does_not_make_an_image_corrupt(exif):
  file = io.BytesIO()
  picture().save(file, format='JPEG', exif=exif)
  decoded = images.decode(file.getvalue(), 'x')
  np.testing.assert_array_equal(
    decoded, images.decode(encoded(picture(), 'JPEG'), 'x')
  )


@pytest.mark.parametrize(
  'data', [b'', b'no image', encoded(picture(), 'JPEG')[:100]]
)
def test_corrupt_image_is_named_with_the_way_out(data):
  message = (
    r'^train/cat/7.png cannot be decoded as an image \(.*\); repair or '
    r'remove it, or set config.data.skip_corrupt=True'
  )
  with pytest.raises(images.CorruptImageError, match=message):
    images.decode(data, 'train/cat/7.png')


def test_missing_file_is_not_called_corrupt(tmp_path):
  with pytest.raises(FileNotFoundError):
    images.decode(str(tmp_path / 'none.png'), 'none.png')


def test_grey_is_repeated_and_colour_is_kept():
  grey = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
  three = images.to_channels(grey, 3, 'x')
  for channel in range(3):
    np.testing.assert_array_equal(three[..., channel], grey[..., 0])
  assert images.to_channels(grey, 1, 'x') is grey
  assert images.to_channels(three, 3, 'x') is three


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK'])
@pytest.mark.parametrize('channels', [1, 3])
def test_pillow_images_are_taken_as_arrays_are(mode, channels):
  image = picture(mode)
  grey = mode in ('1', 'L', 'LA')
  assert images.is_grey(image) == grey
  pixels = images.as_array(image.convert('L' if grey else 'RGB'))
  if channels == 1 and not grey:
    with pytest.raises(ValueError, match='x: the image has 3 channels'):
      images.to_channels(image, channels, 'x')
    return
  expected = images.to_channels(pixels, channels, 'x')
  taken = images.to_channels(image, channels, 'x')
  np.testing.assert_array_equal(images.as_array(taken), expected)
  np.testing.assert_array_equal(
    images.center_crop(taken, 4), images.center_crop(expected, 4)
  )
  first, second = (
    images.random_crops(
      kind,
      3,
      count=2,
      crop_area=(0.2, 1.0),
      crop_aspect=(0.75, 1.33),
      rng=np.random.default_rng(0),
    )
    for kind in (taken, expected)
  )
  np.testing.assert_array_equal(first, second)


def test_pillow_image_of_no_known_range_is_named():
  deep = Image.fromarray(np.zeros((2, 2), np.float32))
  with pytest.raises(ValueError, match=r'^x: pixels of mode .F. .* convert it'):
    images.to_channels(deep, 1, 'x')


@pytest.mark.parametrize(
  ('image', 'channels', 'message'),
  [
    (
      np.zeros((2, 2, 3), np.uint8),
      1,
      r'x: the image has 3 channels.*channels=3',
    ),
    (
      np.zeros((2, 2, 4), np.uint8),
      3,
      r'has 4 channels.*channels=3; .*\.\.\., :3',
    ),
    (np.zeros((3, 8, 8), np.uint8), 3, r'first.*moveaxis\(image, 0, -1\)'),
    (np.zeros((8, 8, 5), np.uint8), 3, '5 channels.*1 or 3 channels'),
    (np.zeros((2, 2, 3), np.float32), 3, r'x: images must be uint8 \[height'),
    (np.zeros((2, 2), np.uint8), 1, r'got uint8 \(2, 2\)'),
    (np.zeros((0, 5, 3), np.uint8), 3, 'one pixel, got height 0 and width 5;'),
    (np.zeros((5, 0, 1), np.uint8), 3, 'x: .* got height 5 and width 0;'),
    (Image.new('RGB', (5, 0)), 3, 'one pixel, got height 0 and width 5;'),
  ],
)
def test_wrong_image_is_named(image, channels, message):
  with pytest.raises(ValueError, match=message):
    images.to_channels(image, channels, 'x')


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize(('height', 'width'), [(6, 10), (9, 6)])
def test_center_crop_without_resizing_is_the_middle(height, width, channels):
  rng = np.random.default_rng(1)
  shape = (height, width, channels)
  image = rng.integers(0, 256, size=shape).astype(np.uint8)
  middle = images.center_crop(image, 6)
  top, left = (height - 6) // 2, (width - 6) // 2
  if (height - 6) % 2 == 0:
    expected = image[top : top + 6, left : left + 6]
    np.testing.assert_array_equal(middle, expected)
  assert middle.shape == (6, 6, channels)
  half = images.center_crop(image, 4, share=4 / 6)
  if (height - 4) % 2 == 0 and (width - 4) % 2 == 0:
    top, left = (height - 4) // 2, (width - 4) // 2
    expected = image[top : top + 4, left : left + 4]
    np.testing.assert_array_equal(half, expected)


def test_random_crops_show_the_boxes_of_the_image():
  # A ramp: the pixels tell where they come from.
  ramp = np.broadcast_to(np.arange(256, dtype=np.uint8), (256, 256))
  image = np.stack([ramp, ramp.T, ramp], axis=-1)
  crops = images.random_crops(
    image,
    32,
    count=200,
    crop_area=(0.1, 0.5),
    crop_aspect=(1.0, 1.0),
    rng=np.random.default_rng(0),
  )
  assert crops.shape == (200, 32, 32, 3)
  span = crops[:, 0, -1, 0].astype(float) - crops[:, 0, 0, 0]
  side = span * 32 / 31
  area = (side / 256) ** 2
  assert area.min() > 0.09
  assert area.max() < 0.52
  # Square boxes: the vertical ramp spans as much.
  vertical = crops[:, -1, 0, 1].astype(float) - crops[:, 0, 0, 1]
  np.testing.assert_allclose(vertical, span, atol=2)
  assert stats.kstest((area - 0.1) / 0.4, 'uniform').pvalue > 1e-3


@pytest.mark.parametrize(('height', 'width'), [(40, 60), (300, 20)])
def test_boxes_have_the_reference_distribution(height, width):
  """Ten tries, else the largest that the aspect allows, in the middle."""
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
  assert (
    stats.ks_2samp(box_height * box_width, areas, method='asymp').pvalue > 1e-3
  )
  assert (
    stats.ks_2samp(box_width / box_height, aspects, method='asymp').pvalue
    > 1e-3
  )
