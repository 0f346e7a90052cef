"""A picture of embeddings in milliseconds, for a training to draw as it goes.

`figures` draws better ones and takes half a second for each, after a second for
matplotlib; that is some percent of a small training.
"""

import io

import numpy as np
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFont

from clop_jax.evaluation import colours

_SIDE = 420  # of a panel, pixels
_EDGE = 46  # around it, with the numbers of its axes
_TITLE = 14  # height of the line above, beside the edge
_TICK = 5  # length of an axis' marks
_FONT = 13
_GREY = '#3c3c3c'
_LOWEST = 1e-6  # share of the largest singular value that is still drawn


def embedding_picture(
  plane: np.ndarray, labels: np.ndarray, spectrum: np.ndarray, title: str
) -> bytes:
  """Draws embeddings in two dimensions, and their spectrum.

  Args:
    plane: `[n, 2]`, the first two principal components of unit embeddings.
    labels: `[n]`: each point is the number of its class, or a dot for -1.
    spectrum: singular values, largest first.
    title: a line above.

  Returns:
    A PNG.
  """
  height = _SIDE + 2 * _EDGE + _TITLE
  image = Image.new('RGB', (2 * _SIDE + 3 * _EDGE, height), 'white')
  draw, font = ImageDraw.Draw(image), ImageFont.load_default(_FONT)
  draw.text((_EDGE, 14), title, _GREY, font)
  boxes = [(left, _EDGE + _TITLE) for left in (_EDGE, _SIDE + 2 * _EDGE)]
  # Unit embeddings: what is smaller than this is a heap, and shall look it.
  extent = 1.05 * max(0.01, np.abs(plane).max())
  names = (
    'first two principal components, by class',
    'singular values / the largest',
  )
  for (left, top), name in zip(boxes, names, strict=True):
    draw.rectangle([left, top, left + _SIDE, top + _SIDE], outline=_GREY)
    draw.text((left, top - 20), name, _GREY, font)

  def mark(left, top, share, text, *, upright):
    """Puts a number at a share of an axis of the box whose corner that is."""
    if upright:
      at, anchor = (left - _TICK, top + share * _SIDE), 'rm'
      line = [at, (left, at[1])]
      beside = (at[0] - 3, at[1])
    else:
      at, anchor = (left + share * _SIDE, top + _SIDE + _TICK), 'mt'
      line = [(at[0], top + _SIDE), at]
      beside = (at[0], at[1] + 3)
    draw.line(line, fill=_GREY)
    draw.text(beside, text, _GREY, font, anchor=anchor)

  left, top = boxes[0]
  for share in (0.0, 0.5, 1.0):
    number = f'{(2 * share - 1) * extent:.2g}'
    mark(left, top, share, number, upright=False)
    mark(left, top, 1 - share, number, upright=True)
  places = (plane * [1, -1] / extent + 1) / 2 * _SIDE + [left, top]
  for place, label in zip(places.tolist(), labels.tolist(), strict=True):
    colour, text = _GREY, '.'
    if label >= 0:
      colour = colours.OF_CLASSES[label % len(colours.OF_CLASSES)]
      text = str(label)
    draw.text(tuple(place), text, colour, font, anchor='mm')

  left, top = boxes[1]
  shares = spectrum / max(spectrum.max(), np.finfo(np.float32).tiny)
  down = np.log(np.maximum(shares, _LOWEST)) / np.log(_LOWEST)
  down = np.clip(down, 0, 1)
  width = _SIDE / len(spectrum)
  for index, depth in enumerate(down.tolist()):
    # Whole pixels, so that the gaps are alike.
    start, end = (int(left + x * width) for x in (index, index + 1))
    bar = [start, top + depth * _SIDE, max(start, end - 2), top + _SIDE]
    draw.rectangle(bar, fill=colours.OF_RUNS[0])
  powers = round(-np.log10(_LOWEST))
  for power in range(powers + 1):
    number = f'1e-{power}' if power else '1'
    mark(left, top, power / powers, number, upright=True)
  for index in {0, len(spectrum) - 1}:
    share = (index + 0.4) / len(spectrum)
    mark(left, top, share, str(index + 1), upright=False)
  file = io.BytesIO()
  image.save(file, format='PNG')
  return file.getvalue()
