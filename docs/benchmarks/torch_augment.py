"""Random views in batched PyTorch, on the images' device.

The CIFAR recipe of clop_jax/data/augment.py, one grid_sample for crop, resize
and flip of the whole batch. Two things are left out, which makes this peer
faster than what it stands for: the colour operations keep one order (Pillow's
and ours is random), and a crop larger than the view is not antialiased.
"""

import math

import torch
from torch.nn import functional

# Of CIFAR-100, in [0, 1].
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def views(
  images, size, mean, std, *, jitter_probability=0.8, grey_probability=0.2
):
  """One view of each image: `[n, 3, size, size]` float32, normalized.

  Images are `[n, 3, height, width]` uint8, mean and std from `channels`, on the
  images' device; the views are channels_last.
  """
  x = crop_and_flip(images.float() / 255, size)
  x = colour_jitter(x, jitter_probability)
  grey = uniform(x, len(x), 1, 1, 1) < grey_probability
  x = torch.where(grey, luma(x), x)
  x = (x - mean) / std
  return x.contiguous(memory_format=torch.channels_last)


def uniform(like, *shape, low=0.0, high=1.0):
  return low + (high - low) * torch.rand(shape, device=like.device)


def channels(values, device='cpu'):
  """One number per channel, to be made once: a GPU would be waited for."""
  return torch.tensor(values, device=device).view(3, 1, 1)


def random_boxes(images):
  """Centre x, centre y, width and height, `[n]` each, as shares of the image.

  Ten boxes are drawn, and the first that fits is taken; else the whole image.
  """
  n, _, height, width = images.shape
  area = uniform(images, n, 10, low=0.08)
  log_aspect = uniform(images, n, 10, low=math.log(3 / 4), high=math.log(4 / 3))
  aspect = log_aspect.exp() * (height / width)
  widths, heights = (area * aspect).sqrt(), (area / aspect).sqrt()
  fits = (widths <= 1) & (heights <= 1)
  first = fits.int().argmax(1, keepdim=True)
  fits = fits.any(1)
  width = torch.where(fits, widths.gather(1, first)[:, 0], 1.0)
  height = torch.where(fits, heights.gather(1, first)[:, 0], 1.0)
  x = width / 2 + (1 - width) * uniform(images, n)
  y = height / 2 + (1 - height) * uniform(images, n)
  return x, y, width, height


def crop_and_flip(images, size):
  n = len(images)
  x, y, width, height = random_boxes(images)
  width = torch.where(uniform(images, n) < 0.5, -width, width)
  # Centres of the view's pixels; grid_sample's image goes from -1 to 1.
  steps = (torch.arange(size, device=images.device) + 0.5) * (2 / size) - 1
  columns = (2 * x - 1)[:, None] + width[:, None] * steps
  rows = (2 * y - 1)[:, None] + height[:, None] * steps
  grid = torch.stack(
    [
      columns[:, None, :].expand(n, size, size),
      rows[:, :, None].expand(n, size, size),
    ],
    dim=-1,
  )
  return functional.grid_sample(
    images, grid, padding_mode='border', align_corners=False
  )


def luma(x):
  red, green, blue = x.split(1, dim=1)
  return 0.299 * red + 0.587 * green + 0.114 * blue  # Pillow's weights


def colour_jitter(x, probability):
  """Brightness, contrast, saturation, hue, of strengths drawn per image."""
  n = len(x)
  jittered = uniform(x, n, 1, 1, 1) < probability
  amounts = uniform(x, n, 4, 1, 1, low=-1.0) * jittered
  brightness, contrast, saturation = (1 + 0.4 * amounts[:, :3]).split(1, dim=1)
  x = (x * brightness).clamp(0, 1)
  mean = luma(x).mean((2, 3), keepdim=True)
  x = torch.lerp(mean, x, contrast).clamp(0, 1)
  x = torch.lerp(luma(x), x, saturation).clamp(0, 1)
  return turn_hue(x, 0.1 * amounts[:, 3:])


def turn_hue(x, turn):
  """Turns the colour circle of RGB images; `turn` is in whole turns."""
  high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
  spread = high - low
  red, green, blue = x.split(1, dim=1)
  # In sixths of the circle; a grey pixel has hue 0 and keeps it.
  scale = 1 / spread.clamp_min(1e-8)
  hue = torch.where(
    high == red,
    (green - blue) * scale,
    torch.where(
      high == green, 2 + (blue - red) * scale, 4 + (red - green) * scale
    ),
  )
  # Each channel is low over a third of the circle, in another place for each.
  places = (5 - 2 * torch.arange(3, device=x.device)).view(3, 1, 1)
  angle = (hue + 6 * turn + places) % 6
  share = torch.minimum(angle, 4 - angle).clamp(0, 1)
  return high - spread * share
