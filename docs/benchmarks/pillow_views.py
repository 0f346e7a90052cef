"""A random view of an image with Pillow: the peer of clop_jax/data/augment.py.

The CIFAR recipe of the defaults there, with the operations of torchvision's PIL
backend: boxes of whole pixels, factors as `ImageEnhance` takes them, the hue
turned in Pillow's 8-bit HSV. Numbers are drawn from a generator of Python's
`random`, as NumPy's and PyTorch's are slow for one number at a time.
"""

import math

import numpy as np
from PIL import Image
from PIL import ImageEnhance

ENHANCERS = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color


def random_box(rng, width, height):
  """Left, top, right and bottom of a box inside the image, in pixels."""
  low, high = 3 / 4, 4 / 3
  for _ in range(10):
    area = rng.uniform(0.08, 1.0) * width * height
    aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
    box_width = round(math.sqrt(area * aspect))
    box_height = round(math.sqrt(area / aspect))
    if 0 < box_width <= width and 0 < box_height <= height:
      left = rng.randint(0, width - box_width)
      top = rng.randint(0, height - box_height)
      return left, top, left + box_width, top + box_height
  # None fits: the largest centred one within the range of aspects.
  box_width = min(width, round(height * high))
  box_height = min(height, round(width / low))
  left, top = (width - box_width) // 2, (height - box_height) // 2
  return left, top, left + box_width, top + box_height


def turn_hue(picture, turn):
  hue, saturation, value = picture.convert('HSV').split()
  turned = np.asarray(hue) + np.uint8(round(turn * 256) % 256)
  hue = Image.fromarray(turned)
  return Image.merge('HSV', (hue, saturation, value)).convert('RGB')


def view(picture, size, rng):
  """A PIL image to one of `size` x `size`, cropped, flipped and recoloured."""
  box = random_box(rng, *picture.size)
  picture = picture.crop(box).resize((size, size), Image.Resampling.BILINEAR)
  if rng.random() < 0.5:
    picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  if rng.random() < 0.8:
    for which in rng.sample(range(4), 4):
      if which == 3:
        picture = turn_hue(picture, rng.uniform(-0.1, 0.1))
      else:
        factor = rng.uniform(0.6, 1.4)
        picture = ENHANCERS[which](picture).enhance(factor)
  if rng.random() < 0.2:
    picture = picture.convert('L').convert('RGB')
  return picture
