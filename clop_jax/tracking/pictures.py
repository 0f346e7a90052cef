"""Pictures of a running training: its embeddings and its views."""

from collections.abc import Callable, Sequence
from concurrent import futures
import functools
import os
import tempfile
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from clop_jax import collapse
from clop_jax.data import loader
from clop_jax.data import sources
from clop_jax.evaluation import probe
from clop_jax.experiment import build
from clop_jax.experiment import inputs
from clop_jax.experiment import setup as setup_lib
from clop_jax.runtime import parallel
from clop_jax.tracking import contact_sheet

_SAMPLE = 256  # images whose embeddings are drawn
_SHOWN = 16  # images whose views are drawn


class Pictures:
  """Draws the embeddings of a fixed sample, and the views of the last step."""

  def __init__(self, setup: setup_lib.Setup, frozen: Callable):
    """Reads the sample.

    Args:
      setup: Run, see `setup.prepare`.
      frozen: Function `(variables, images) -> (features, embeddings)`, see
        `restored.frozen`.
    """
    self._setup, self._frozen = setup, frozen
    self._sample, self._batch_size = _sample(setup)
    self._sheets = contact_sheet.Sheets(
      build.recipe(setup.config),
      build.training_key(setup.config),
      setup.examples.reader,
      inputs.evaluation_reader(
        setup.config, setup.examples.source, setup.examples.true_labels
      ),
      host_crops=setup.config.data.host_crops,
    )
    # The training does not wait for matplotlib.
    self._thread = futures.ThreadPoolExecutor(1)
    self._drawings: list[tuple[int, futures.Future]] = []

  def draw(self, step: int, variables: Any, sinks: Sequence) -> bool:
    """Draws pictures after a step; every process must call it.

    Args:
      step: Number of steps made.
      variables: Variables of the networks, not changed and not kept.
      sinks: Logs of the main process, see `tensorboard.TensorBoard`.

    Returns:
      True if the embeddings are finite, so that they could be drawn.
    """
    _, embeddings, labels = probe.extract(
      functools.partial(self._frozen, variables),
      self._sample,
      batch_size=self._batch_size,
      mesh=self._setup.mesh,
    )
    finite = bool(np.isfinite(embeddings).all())
    if not parallel.is_main():
      return finite
    index = self._setup.data.indices(step - 1)[:_SHOWN]
    views = self._sheets.draw(step - 1, index)
    self.deliver(sinks)
    if finite:
      unit = np.asarray(collapse.normalize(jnp.asarray(embeddings)))
      spectrum = np.linalg.svd(unit, compute_uv=False)
      rank = float(collapse.effective_rank_of_spectrum(jnp.asarray(spectrum)))
      drawing = self._thread.submit(
        embedding_picture, unit, labels, spectrum, rank, f'step {step}'
      )
      self._drawings.append((step, drawing))
      # The mean square of unit embeddings is 1. These squares are the shares
      # that the directions have of it.
      values = spectrum / np.sqrt(len(unit))
      for sink in sinks:
        sink.scalars(step, {'embeddings/effective_rank': rank})
        sink.histogram(step, 'embeddings/singular_values', values)
    for sink in sinks:
      sink.picture(step, 'pictures/views', views)
    return finite

  def deliver(self, sinks: Sequence) -> None:
    """Waits for the pictures of embeddings, and logs them."""
    while self._drawings:
      step, drawing = self._drawings.pop(0)
      for sink in sinks:
        sink.picture(step, 'pictures/embeddings', drawing.result())


def _sample(setup):
  """Reads training images from all over the set, labelled ones if any.

  Returns:
    Batches `(images, labels)` and their size. It is at most that of a
    micro-batch of the training, so that the devices have room for it.
  """
  known = np.flatnonzero(setup.examples.true_labels >= 0)
  known = known if known.size else np.arange(len(setup.examples.true_labels))
  count = min(_SAMPLE, known.size)
  chosen = known[np.linspace(0, known.size - 1, count).round().astype(int)]
  reader = inputs.evaluation_reader(
    setup.config,
    sources.Subset(setup.examples.source, chosen),
    setup.examples.true_labels[chosen],
  )
  images, labels = loader.read_all(reader)
  train = setup.config.train
  size = -(-count // setup.mesh.size) * setup.mesh.size
  size = min(size, train.batch_size // train.num_micro_batches)
  batches = [
    (images[i : i + size], labels[i : i + size]) for i in range(0, count, size)
  ]
  return batches, size


def embedding_picture(
  embeddings: np.ndarray,
  labels: np.ndarray,
  spectrum: np.ndarray,
  rank: float,
  title: str,
) -> np.ndarray:
  """Draws the figure of `evaluate` as a picture `[height, width, 3]`, uint8.

  See `figures.embedding_figure` for the arguments.
  """
  # Only here: it imports matplotlib, which takes a second.
  from clop_jax.evaluation import figures

  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, 'picture.png')
    figures.embedding_figure(
      path, [title], [embeddings], labels, [spectrum], [rank]
    )
    with Image.open(path) as image:
      return np.asarray(image.convert('RGB'))
