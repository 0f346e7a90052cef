"""Event files, read by TensorBoard's own reader."""

import io

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing import event_accumulator


def read(workdir, **options):
  """Returns all events of a workdir."""
  reader = event_accumulator.EventAccumulator(
    str(workdir / 'tensorboard'),
    size_guidance={'images': 0, 'histograms': 0, 'scalars': 0, 'tensors': 0},
    **options,
  )
  return reader.Reload()


def picture(event):
  """Returns the picture of an event, uint8 `[height, width, 3]`."""
  image = Image.open(io.BytesIO(event.encoded_image_string))
  assert (image.width, image.height) == (event.width, event.height)
  return np.asarray(image.convert('RGB'))
