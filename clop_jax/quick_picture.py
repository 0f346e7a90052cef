"""A picture of embeddings in milliseconds, for a training to draw as it goes.

`figures` draws better ones and takes half a second for each, after a second for
matplotlib; that is some percent of a small training.
"""

import io

import numpy as np
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFont

_SIDE = 420  # of a panel, pixels
_EDGE = 30  # around it
_DARK = (60, 60, 60)
# Okabe and Ito's, without the yellow. Points are their class's number, so that
# colours need not be told apart.
_COLOURS = (
  (0, 114, 178),
  (213, 94, 0),
  (0, 158, 115),
  (204, 121, 167),
  (230, 159, 0),
  (86, 180, 233),
  (0, 0, 0),
)
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
  height = _SIDE + 3 * _EDGE
  image = Image.new('RGB', (2 * _SIDE + 3 * _EDGE, height), 'white')
  draw, font = ImageDraw.Draw(image), ImageFont.load_default()
  draw.text((_EDGE, 8), title, _DARK, font)
  boxes = [(_EDGE, 2 * _EDGE), (_SIDE + 2 * _EDGE, 2 * _EDGE)]
  # Unit embeddings: what is smaller than this is a heap, and shall look it.
  extent = 1.05 * max(0.01, np.abs(plane).max())
  names = (
    f'first two principal components, within {extent:.2g} of the mean',
    f'singular values / the largest, from 1 to {_LOWEST:g}',
  )
  for (left, top), name in zip(boxes, names, strict=True):
    draw.rectangle([left, top, left + _SIDE, top + _SIDE], outline=_DARK)
    draw.text((left, top - 16), name, _DARK, font)

  left, top = boxes[0]
  places = (plane * [1, -1] / extent + 1) / 2 * _SIDE + [left, top]
  for place, label in zip(places.tolist(), labels.tolist(), strict=True):
    colour = _COLOURS[label % len(_COLOURS)] if label >= 0 else _DARK
    text = str(label) if label >= 0 else '.'
    draw.text(tuple(place), text, colour, font, anchor='mm')

  left, top = boxes[1]
  shares = spectrum / max(spectrum.max(), np.finfo(np.float32).tiny)
  down = np.log(np.maximum(shares, _LOWEST)) / np.log(_LOWEST)
  down = np.clip(down, 0, 1)
  width = _SIDE / len(spectrum)
  for index, depth in enumerate(down.tolist()):
    bar = [left + index * width, top + depth * _SIDE]
    draw.rectangle(
      [*bar, left + (index + 0.8) * width, top + _SIDE], fill=_COLOURS[0]
    )
  file = io.BytesIO()
  image.save(file, format='PNG')
  return file.getvalue()
