"""Pictures of a running training: its embeddings and its views."""

from collections.abc import Callable, Sequence
from concurrent import futures
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clop_jax import collapse
from clop_jax import linalg
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
_LOWEST = 1e-6  # singular values below this share of the largest are cut off


class Pictures:
  """Draws the embeddings of a fixed sample, and the views of the last step."""

  def __init__(self, setup: setup_lib.Setup, frozen: Callable):
    """Reads the sample; compiles nothing yet.

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
    self._compiled: Callable = self._compile
    self._pool = futures.ThreadPoolExecutor(1)
    self._drawings: list[tuple[int, futures.Future]] = []

  def prepare(self) -> None:
    """Starts to compile, beside the training step if possible.

    With several processes the compilers may wait for one another, program by
    program. So these compile when the first pictures are due.
    """
    if jax.process_count() > 1:
      self._compiled = functools.cache(self._compile)
    else:
      self._compiled = self._pool.submit(self._compile).result

  def failure(self) -> Exception | None:
    """Waits for the compiler and returns its error, if any."""
    try:
      self._compiled()
    except Exception as error:  # no error of pictures should end a training
      return error
    return None

  def draw(self, step: int, variables: Any, sinks: Sequence) -> bool:
    """Draws pictures after a step; every process must call it.

    Args:
      step: Number of steps made.
      variables: Variables of the networks, not changed and not kept.
      sinks: Logs of the main process, see `tensorboard.TensorBoard`.

    Returns:
      True if the embeddings are finite, so that they could be drawn.
    """
    embed, measure = self._compiled()
    _, embeddings, labels = probe.extract(
      functools.partial(embed, variables),
      self._sample,
      batch_size=self._batch_size,
      mesh=self._setup.mesh,
    )
    finite = bool(np.isfinite(embeddings).all())
    if not parallel.is_main():
      return finite
    if finite:
      plane, spectrum, rank = jax.device_get(measure(embeddings))
      # The mean square of the embeddings is 1; these squares are the shares
      # that the directions have of it.
      values = spectrum / np.sqrt(len(plane))
      for sink in sinks:
        sink.scalars(step, {'embeddings/effective_rank': float(rank)})
        sink.histogram(step, 'embeddings/singular_values', values)
      title = f'step {step}, effective rank {rank:.1f}'
      drawing = self._pool.submit(
        embedding_picture, plane, labels, spectrum, title
      )
      self._drawings.append((step, drawing))
    index = self._setup.data.indices(step - 1)[:_SHOWN]
    sheet = self._sheets.draw(step - 1, index)
    for sink in sinks:
      sink.picture(step, 'pictures/views', sheet)
    return finite

  def deliver(self, sinks: Sequence) -> None:
    """Waits for the pictures that the thread still draws, and logs them."""
    for step, drawing in self._drawings:
      for sink in sinks:
        sink.picture(step, 'pictures/embeddings', drawing.result())
    self._drawings.clear()

  def close(self) -> None:
    """Ends the thread."""
    self._pool.shutdown()

  def _compile(self):
    """Returns `embed` and `measure`, and compiles the views."""
    setup = self._setup
    images, _ = self._sample[0]
    batch = jax.ShapeDtypeStruct(
      (self._batch_size, *images.shape[1:]),
      np.uint8,
      sharding=parallel.split(setup.mesh),
    )
    embed = self._frozen.lower(setup.state.variables, batch).compile()
    count = sum(len(images) for images, _ in self._sample)
    dim = setup.state.prototypes.shape[-1]
    embeddings = jax.ShapeDtypeStruct((count, dim), np.float32)
    measure = _measures.lower(embeddings).compile()
    self._sheets.compile(min(_SHOWN, setup.config.train.batch_size))
    return embed, measure


def _sample(setup):
  """Reads training images from all over the set, labelled ones if any.

  Returns:
    Batches `(images, labels)` and their size, which is no larger than that of a
    micro-batch of the training: the devices have room for it.
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


@jax.jit
def _measures(embeddings):
  """Returns principal components, singular values and effective rank.

  All are of the unit embeddings. The two components `[n, 2]` are of the centred
  ones.
  """
  unit = collapse.normalize(embeddings)
  spectrum = collapse.singular_values(unit)
  centred = unit - jnp.mean(unit, axis=0)
  _, _, vt = linalg.svd(centred)
  plane = jnp.matmul(centred, vt[:2].T, precision=jax.lax.Precision.HIGHEST)
  plane = jnp.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))
  return plane, spectrum, collapse.effective_rank_of_spectrum(spectrum)


def embedding_picture(
  plane: np.ndarray, labels: np.ndarray, spectrum: np.ndarray, title: str
) -> np.ndarray:
  """Draws embeddings in two dimensions beside their singular values.

  Args:
    plane: First two principal components `[n, 2]` of unit embeddings.
    labels: Classes `[n]`, -1 if unknown.
    spectrum: Singular values, largest first.
    title: Title of the picture.

  Returns:
    Picture `[height, width, 3]`, uint8.
  """
  # This import takes a second, which only those who watch should pay.
  import matplotlib
  from matplotlib import figure as figure_lib
  from matplotlib.backends import backend_agg

  figure = figure_lib.Figure(figsize=(10, 5))
  canvas = backend_agg.FigureCanvasAgg(figure)
  figure.suptitle(title)
  points, bars = figure.subplots(1, 2)
  colours = matplotlib.color_sequences['petroff10']
  for place, label in zip(plane.tolist(), labels.tolist(), strict=True):
    points.text(
      *place,
      str(label) if label >= 0 else '.',
      color=colours[label % len(colours)] if label >= 0 else '0.3',
      size=8,
      ha='center',
      va='center',
    )
  # Unit embeddings this close together have collapsed, and should look so.
  extent = 1.05 * max(0.01, np.abs(plane).max())
  limits = (-extent, extent)
  points.set(
    title='first two principal components, by class',
    xlim=limits,
    ylim=limits,
    aspect='equal',
  )
  largest = max(spectrum.max(), np.finfo(np.float32).tiny)
  bars.bar(np.arange(len(spectrum)) + 1, spectrum / largest)
  bars.set(
    title='singular values / the largest', yscale='log', ylim=(_LOWEST, 1.5)
  )
  canvas.draw()
  return np.array(canvas.buffer_rgba())[..., :3]
