"""One image at a time, on the host: decoding, channels, size, random crops.

Everything is done with Pillow, so that every machine computes the same pixels
and worker processes need no accelerator.
"""

from collections.abc import Sequence
import contextlib
import functools
import io
import math
import sys
from typing import TextIO

import numpy as np
from PIL import Image
from PIL import ImageOps

from clop_jax import arguments

_FILTERS = {
  'bilinear': Image.Resampling.BILINEAR,
  'bicubic': Image.Resampling.BICUBIC,
}
INTERPOLATIONS = tuple(_FILTERS)


def print_once(text: str, file: TextIO | None = None) -> None:
  """Prints a note or warning, once per process; on stderr by default."""
  _print_once(text, file or sys.stderr)


@functools.cache
def _print_once(text, file):
  print(text, file=file, flush=True)


class CorruptImageError(ValueError):
  """An image that cannot be decoded; the message names it."""


_noted: set[str] = set()  # the note is printed once


class LargeImageError(ValueError):
  """An intact image that is too large to decode; the message names it."""


def decode(data: bytes | str, name: str) -> Image.Image:
  """Decodes an image.

  Args:
    data: Encoded image, or the path of one, in any format that Pillow reads.
    name: Name of the image, for errors.

  Returns:
    Pillow image of mode 'L' (grey) or 'RGB', rotated according to its EXIF
    orientation. Transparency and the lower 8 of 16 bits are dropped. A note is
    printed once if an image does not use the upper bits, as of 12-bit cameras.

  Raises:
    CorruptImageError: If the image cannot be decoded.
    LargeImageError: If it has more pixels than Pillow decodes.
  """
  try:
    file = data if isinstance(data, str) else io.BytesIO(data)
    with Image.open(file) as image:
      image.load()
      # Damaged EXIF, on which Pillow raises almost anything, does not affect
      # the pixels. In place, because upright images then need no copy.
      with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
      return _grey_or_rgb(image)
  except FileNotFoundError:
    raise
  except Image.DecompressionBombError as error:
    raise LargeImageError(
      f'{name} is too large ({error}); make it smaller, or raise '
      'PIL.Image.MAX_IMAGE_PIXELS where training is called from Python'
    ) from error
  # Pillow's plugins raise almost anything on a damaged file.
  except Exception as error:
    raise CorruptImageError(
      f'{name} cannot be decoded as an image ({error}); repair or remove it, '
      'or set config.data.skip_corrupt=True to train without it'
    ) from error


def _grey_or_rgb(image):
  if image.mode in ('L', 'RGB'):
    return image
  # Pillow reads a 16-bit PGM as mode 'I', before version 11 also a PNG.
  if image.mode.startswith('I;16') or (
    image.mode == 'I' and image.format in ('PNG', 'PPM')
  ):
    values, highest = np.asarray(image, np.uint32), _max_value(image)
    if highest == 65535 and 255 < values.max(initial=0) < 4096:
      print_once(
        'note: there are 16-bit images without a value above 4095, so at most '
        '16 of 256 grey levels remain; if they are from a 12-bit camera, scale '
        'them to the range 0 to 65535'
      )
    scaled = values * 256 // (highest + 1)
    return Image.fromarray(np.minimum(scaled, 255).astype(np.uint8))
  if image.mode in ('I', 'F'):
    raise ValueError(f'pixels of mode {image.mode!r} have no known range')
  return image.convert('L' if is_grey(image) else 'RGB')


def _max_value(image):
  """Returns the MaxSampleValue of a TIFF, as of 12-bit cameras, or 65535."""
  value = getattr(image, 'tag_v2', {}).get(281)
  value = value[0] if isinstance(value, tuple) else value
  return value if isinstance(value, int) and 255 < value < 65535 else 65535


def is_grey(image: np.ndarray | Image.Image) -> bool:
  """Returns True if an image has a single channel besides transparency."""
  if not isinstance(image, Image.Image):
    return np.shape(image)[-1] == 1
  return image.mode in ('1', 'L', 'LA', 'La') or image.mode.startswith('I;16')


def to_grey(image: np.ndarray | Image.Image) -> np.ndarray | Image.Image:
  """Converts a colour image to grey by Pillow's luma; others do not change."""
  if isinstance(image, np.ndarray):
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
      return image
    image = Image.fromarray(image)
  if is_grey(image) or image.mode in ('I', 'F'):
    return image
  return image.convert('L')


def to_channels(
  image: np.ndarray | Image.Image, channels: int, name: str
) -> Image.Image:
  """Returns an image with 1 or 3 channels; grey images are repeated over 3.

  Args:
    image: uint8 image `[height, width, channels]`, or a Pillow image.
    channels: Number of channels.
    name: Name of the image, for errors.

  Raises:
    ValueError: If the image has a wrong dtype or shape, no pixels, or colours
      although `channels` is 1.
  """
  if isinstance(image, Image.Image):
    pillow = image
  else:
    image = np.asarray(image)
    shape = image.shape
    if image.dtype != np.uint8 or len(shape) != 3 or shape[-1] not in (1, 3):
      advice = 'convert it'
      if len(shape) == 3 and shape[0] in (1, 3):
        advice = 'move the channels last, np.moveaxis(image, 0, -1)'
      elif len(shape) == 3 and shape[-1] == 4:
        advice = 'drop the transparency, image[..., :3]'
      raise ValueError(
        f'{name}: images must be uint8 [height, width, channels] with 1 or 3 '
        f'channels, or Pillow images, got {image.dtype} {shape}; {advice}'
      )
    image = image[..., 0] if shape[-1] == 1 else image
    pillow = Image.fromarray(image) if image.size else Image.new('L', (0, 0))
  if not pillow.width or not pillow.height:
    raise ValueError(
      f'{name}: the image must have at least one pixel; repair or remove it'
    )
  try:
    pillow = _grey_or_rgb(pillow)
  except ValueError as error:
    raise ValueError(f"{name}: {error}; convert it to 'L' or 'RGB'") from None
  if channels == 3:
    return pillow.convert('RGB') if pillow.mode == 'L' else pillow
  if pillow.mode == 'RGB':
    raise ValueError(
      f'{name}: the image has 3 channels, expected config.data.channels=1; set '
      'config.data.channels=3, with three numbers in config.augment.mean and '
      'std, or make the images grey'
    )
  return pillow


def as_array(image: Image.Image) -> np.ndarray:
  """Returns a Pillow image as `[height, width, channels]` uint8."""
  pixels = np.asarray(image)
  return pixels[..., None] if pixels.ndim == 2 else pixels


def center_crop(
  image: Image.Image,
  size: int,
  *,
  share: float = 1.0,
  interpolation: str = 'bilinear',
) -> np.ndarray:
  """Returns the middle square, resized to `[size, size, channels]` uint8.

  The square is `share` of the shorter side wide. Resizing is antialiased.
  """
  side = share * min(image.size)
  if image.size == (size, size) and share == 1:
    return as_array(image)
  top, left = (image.height - side) / 2, (image.width - side) / 2
  return _resize(image, size, (top, left, side, side), interpolation)


def check_crops(
  *,
  size: int,
  crop_area: Sequence[float],
  crop_aspect: Sequence[float],
  interpolation: str = 'bilinear',
) -> None:
  """Raises ValueError if a field of the config allows no random crops."""
  check_size('config.augment.size', size)
  check_range('config.augment.crop_area', crop_area, highest=1)
  check_range('config.augment.crop_aspect', crop_aspect)
  if interpolation not in INTERPOLATIONS:
    raise ValueError(
      f'config.augment.interpolation must be one of {list(INTERPOLATIONS)}, '
      f'got {interpolation!r}'
    )


def check_size(name: str, size: int) -> None:
  """Raises ValueError if an image cannot be `size` pixels high and wide."""
  arguments.count(name, size)


def check_range(
  name: str, values: Sequence[float], *, highest: float = math.inf
) -> None:
  """Raises ValueError if values are not two positive numbers in order."""
  try:
    low, high = values
    fits = 0 < low <= high <= highest and math.isfinite(high)
  except (TypeError, ValueError):  # one number, three, or text
    fits = False
  if not fits:
    limit = f' <= {highest}' if math.isfinite(highest) else ''
    raise ValueError(
      f'{name} must be two numbers 0 < low <= high{limit}, got {values!r}; '
      'for a fixed value repeat it'
    )


def random_crops(
  image: Image.Image,
  size: int,
  *,
  count: int,
  crop_area: Sequence[float],
  crop_aspect: Sequence[float],
  rng: np.random.Generator,
  interpolation: str = 'bilinear',
) -> np.ndarray:
  """Returns random crops `[count, size, size, channels]` uint8.

  They have the distribution of the crops of `augment.view`, for images that are
  too large, or too different in size, to be kept whole.
  """
  crops = []
  for _ in range(count):
    box = _random_box(image.height, image.width, crop_area, crop_aspect, rng)
    top, left, height, width = box
    # Only the pixels that the box touches, because Pillow's filter would mix in
    # their neighbours.
    y, x = max(math.floor(top), 0), max(math.floor(left), 0)
    bottom = min(math.ceil(top + height), image.height)
    right = min(math.ceil(left + width), image.width)
    touched = image.crop((x, y, right, bottom))
    box = (top - y, left - x, height, width)
    crops.append(_resize(touched, size, box, interpolation))
  return np.stack(crops)


def _random_box(height, width, area_range, aspect_range, rng):
  """Returns top, left, height, width in pixels; see `augment._random_box`."""
  area = rng.uniform(*area_range, size=10) * height * width
  aspect = np.exp(rng.uniform(*np.log(aspect_range), size=10))
  heights = np.sqrt(area / aspect)
  widths = heights * aspect
  fits = np.flatnonzero((heights <= height) & (widths <= width))
  place = rng.uniform(size=2)
  if fits.size:
    box_height, box_width = heights[fits[0]], widths[fits[0]]
  else:
    fallback = min(max(width / height, aspect_range[0]), aspect_range[1])
    box_height = min(height, width / fallback)
    box_width = box_height * fallback
    place = np.full(2, 0.5)
  top = place[0] * (height - box_height)
  left = place[1] * (width - box_width)
  return top, left, box_height, box_width


def _resize(image, size, box, interpolation):
  top, left, height, width = box
  # Rounding may put the box slightly outside, which Pillow rejects.
  resized = image.resize(
    (size, size),
    _FILTERS[interpolation],
    box=(
      max(left, 0.0),
      max(top, 0.0),
      min(left + width, image.width),
      min(top + height, image.height),
    ),
  )
  return as_array(resized)
