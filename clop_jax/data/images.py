"""One image at a time, on the host: decoding, channels, size, random crops.

Pillow and nothing else, so that every machine has the same pixels and a worker
process needs no accelerator.
"""

from collections.abc import Sequence
import contextlib
import io
import math
import numbers
import sys

import numpy as np
from PIL import Image
from PIL import ImageOps


_noted = set()  # not empty once this process has said it


class CorruptImageError(ValueError):
  """An image that cannot be decoded; the message names it."""


class LargeImageError(ValueError):
  """An intact image that is too large to be decoded; the message names it."""


def decode(data: bytes | str, name: str) -> Image.Image:
  """Decodes an image.

  Args:
    data: an encoded image, or the path of one; any format that Pillow reads.
    name: how an error calls it: a path, or a data set's split and number.

  Returns:
    The image in Pillow's mode 'L' (grey) or 'RGB', turned upright where its
    EXIF orientation says that it was stored otherwise. Transparency is dropped.
    Of 16 bits the upper 8 remain; a note says so once if the image leaves the
    uppermost ones unused, as 12-bit cameras do.

  Raises:
    CorruptImageError: if it cannot be decoded.
    LargeImageError: If it has more pixels than Pillow decodes.
  """
  try:
    file = data if isinstance(data, str) else io.BytesIO(data)
    with Image.open(file) as image:
      image.load()
      _turn_upright(image)
      return _grey_or_rgb(image, name)
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


def _turn_upright(image):
  # Damaged EXIF, on which Pillow raises almost anything, says nothing about the
  # pixels: they are taken as they are stored, as viewers do.
  with contextlib.suppress(Exception):
    # In place: an image that is upright, as nearly all are, costs no copy.
    ImageOps.exif_transpose(image, in_place=True)


def _grey_or_rgb(image, name):
  if image.mode in ('L', 'RGB'):
    return image
  # Pillow gives the 16 bits of a PGM mode 'I', before version 11 also of a PNG.
  if image.mode.startswith('I;16') or (
    image.mode == 'I' and image.format in ('PNG', 'PPM')
  ):
    values = np.asarray(image)
    highest = _highest_value(image) or 65535
    if highest == 65535 and 255 < values.max(initial=0) < 4096:
      _note_narrow(name, values.max())
    # As the upper 8 bits for 65535.
    scaled = values.astype(np.uint32) * 256 // (highest + 1)
    return Image.fromarray(np.minimum(scaled, 255).astype(np.uint8))
  if image.mode in ('I', 'F'):
    raise ValueError(f'pixels of mode {image.mode!r} have no known range')
  return image.convert('L' if is_grey(image) else 'RGB')


def _highest_value(image):
  """Returns the largest sample value that a TIFF declares, or None."""
  tags = getattr(image, 'tag_v2', {})
  value = tags.get(281)  # MaxSampleValue
  value = value[0] if isinstance(value, tuple) else value
  return value if isinstance(value, int) and 255 < value < 65535 else None


def _note_narrow(name, largest):
  if not _noted:
    _noted.add(name)
    print(
      f'note: {name} has 16 bits, but no value above {largest}: its grey '
      f'values become {largest // 256 + 1} of 256. If that holds for all '
      'images, as of a 12-bit camera, scale them to the range 0 to 65535',
      file=sys.stderr,
      flush=True,
    )


def is_grey(image: np.ndarray | Image.Image) -> bool:
  """Whether `to_channels` repeats it for a network of three channels."""
  if isinstance(image, Image.Image):
    return image.mode in ('1', 'L', 'LA', 'La') or image.mode.startswith('I;16')
  return image.shape[-1] == 1


def to_grey(image: np.ndarray | Image.Image) -> np.ndarray | Image.Image:
  """A colour image without its colour, by Pillow's luma; others as they are."""
  if is_grey(image):
    return image
  if isinstance(image, Image.Image):
    # What has no known range is refused later, by `to_channels`.
    return image if image.mode in ('I', 'F') else image.convert('L')
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
    return image
  return as_array(Image.fromarray(image).convert('L'))


def to_channels(
  image: np.ndarray | Image.Image, channels: int, name: str
) -> np.ndarray | Image.Image:
  """A grey image for a network of three channels; anything else as it is.

  Args:
    image: uint8 `[height, width, channels]`, or a Pillow image.
    channels: 1 or 3.
    name: how an error calls it.

  Returns:
    The image with so many channels, of the kind that was given.

  Raises:
    ValueError: if the image is of another dtype or shape, has no pixels, or is
      coloured and the network is grey.
  """
  if isinstance(image, Image.Image):
    try:
      image = pillow = _grey_or_rgb(image, name)
    except ValueError as error:
      raise ValueError(f"{name}: {error}; convert it to 'L' or 'RGB'") from None
    found = len(pillow.getbands())
  elif image.dtype != np.uint8 or image.ndim != 3:
    raise ValueError(
      f'{name}: images must be uint8 [height, width, channels] or Pillow '
      f'images, got {image.dtype} {image.shape}'
    )
  else:
    found = image.shape[-1]
  height, width = _height_and_width(image)
  if not height or not width:
    raise ValueError(
      f'{name}: the image must have at least one pixel, got height {height} '
      f'and width {width}; repair or remove it'
    )
  if found == channels:
    return image
  if found == 1:
    if isinstance(image, Image.Image):
      return image.convert('RGB')
    return np.repeat(image, channels, axis=-1)
  if found == 3:
    advice = (
      'set config.data.channels=3, with three numbers in config.augment.mean '
      'and std, or make the images grey'
    )
  elif not isinstance(image, Image.Image) and image.shape[0] in (1, 3):
    advice = (
      'the channels seem to come first; move them: np.moveaxis(image, 0, -1)'
    )
  elif found == 4:
    advice = 'leave the transparency out: image[..., :3]'
  else:
    advice = 'the last axis must have 1 or 3 channels'
  raise ValueError(
    f'{name}: the image has {found} channels (shape '
    f'{(height, width, found)}), expected config.data.channels={channels}; '
    f'{advice}'
  )


def _height_and_width(image):
  if isinstance(image, Image.Image):
    return image.height, image.width
  return image.shape[:2]


def as_array(image: np.ndarray | Image.Image) -> np.ndarray:
  """`[height, width, channels]` uint8 of an array or a Pillow image."""
  pixels = np.asarray(image)
  return pixels[..., None] if pixels.ndim == 2 else pixels


def center_crop(
  image: np.ndarray | Image.Image,
  size: int,
  *,
  share: float = 1.0,
  interpolation: str = 'bilinear',
) -> np.ndarray:
  """The middle square, `share` of the shorter side wide, at `size` x `size`.

  Antialiased. `interpolation` is 'bilinear' or 'bicubic'.

  Returns:
    `[size, size, channels]` uint8.
  """
  picture = _as_picture(image)
  side = share * min(picture.size)
  if picture.size == (size, size) and share == 1:
    return as_array(image)
  top, left = (picture.height - side) / 2, (picture.width - side) / 2
  return _resize(picture, size, (top, left, side, side), interpolation)


def check_crops(
  *,
  size: int,
  crop_area: Sequence[float],
  crop_aspect: Sequence[float],
  interpolation: str = 'bilinear',
) -> None:
  """Checks what `random_crops` and `augment.view` crop by.

  Raises:
    ValueError: if there can be no such crops; the field of the config is named.
  """
  check_size('config.augment.size', size)
  check_range('config.augment.crop_area', crop_area, highest=1)
  check_range('config.augment.crop_aspect', crop_aspect)
  if interpolation not in INTERPOLATIONS:
    raise ValueError(
      f'config.augment.interpolation must be one of {list(INTERPOLATIONS)}, '
      f'got {interpolation!r}'
    )


def check_size(name: str, size: int) -> None:
  """Raises ValueError if no image can be so many pixels high and wide."""
  if not isinstance(size, numbers.Integral) or size < 1:
    raise ValueError(
      f'{name} must be a whole number of pixels >= 1, got {size!r}'
    )


def check_range(
  name: str, values: Sequence[float], *, highest: float | None = None
) -> None:
  """Raises ValueError if it is no pair of positive numbers, in order."""
  try:
    low, high = values
    fits = 0 < low <= high <= (math.inf if highest is None else highest)
    fits = fits and math.isfinite(high)
  except (TypeError, ValueError):  # one number, three, or none
    fits = False
  if not fits:
    limit = '' if highest is None else f' <= {highest}'
    raise ValueError(
      f'{name} must be two numbers 0 < low <= high{limit}, got {values!r}; '
      'for one value give it twice'
    )


def random_crops(
  image: np.ndarray | Image.Image,
  size: int,
  *,
  count: int,
  crop_area: Sequence[float],
  crop_aspect: Sequence[float],
  rng: np.random.Generator,
  interpolation: str = 'bilinear',
) -> np.ndarray:
  """Random resized crops, as `augment.view` makes them on the device.

  For images that are too large, or too different in size, to be kept whole.

  Args:
    image: uint8 `[height, width, channels]`, or a Pillow image.
    size: of the crops, pixels.
    count: number of crops.
    crop_area: range of the share of the area.
    crop_aspect: range of width over height, drawn log-uniformly.
    rng: source of randomness.
    interpolation: 'bilinear' or 'bicubic', antialiased.

  Returns:
    `[count, size, size, channels]` uint8.
  """
  picture = _as_picture(image)
  boxes = [
    _random_box(picture.height, picture.width, crop_area, crop_aspect, rng)
    for _ in range(count)
  ]
  cuts = [_cut_out(picture, box) for box in boxes]
  return np.stack([_resize(cut, size, box, interpolation) for cut, box in cuts])


def _random_box(height, width, area_range, aspect_range, rng):
  """Top, left, height, width in pixels (float); see `augment._random_box`."""
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


def _as_picture(image):
  if isinstance(image, Image.Image):
    return image
  return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


_FILTERS = {
  'bilinear': Image.Resampling.BILINEAR,
  'bicubic': Image.Resampling.BICUBIC,
}
INTERPOLATIONS = tuple(_FILTERS)


def _resize(picture, size, box, interpolation):
  top, left, height, width = box
  # Rounding must not put the box a hair outside, which Pillow refuses.
  resized = picture.resize(
    (size, size),
    _FILTERS[interpolation],
    box=(
      max(left, 0.0),
      max(top, 0.0),
      min(left + width, picture.width),
      min(top + height, picture.height),
    ),
  )
  return as_array(resized)


def _cut_out(picture, box):
  """The pixels that a box touches, and the box in their coordinates.

  Pillow's filter is wider than a pixel: it would mix in what is beside the box.
  """
  top, left, height, width = box
  first_x, first_y = max(math.floor(left), 0), max(math.floor(top), 0)
  last_x = min(math.ceil(left + width), picture.width)
  last_y = min(math.ceil(top + height), picture.height)
  cut = picture.crop((first_x, first_y, last_x, last_y))
  return cut, (top - first_y, left - first_x, height, width)
