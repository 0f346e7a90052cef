"""Pictures of a training while it goes on: its embeddings and its views."""

from collections.abc import Callable, Sequence
from concurrent import futures
import functools
import io
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from PIL import Image

from clop_jax import collapse
from clop_jax import linalg
from clop_jax.data import loader
from clop_jax.data import reader as reader_lib
from clop_jax.data import sources
from clop_jax.evaluation import probe
from clop_jax.experiment import build
from clop_jax.experiment import inputs
from clop_jax.runtime import parallel
from clop_jax.tracking import contact_sheet
from clop_jax.tracking import quick_picture

_SAMPLE = 256  # images whose embeddings are drawn
_SHOWN = 16  # images whose views are drawn


class Pictures:
  """Draws a fixed sample's embeddings, and the views of the last step."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    *,
    frozen: Callable,
    variables: Any,
    dim: int,
    source: sources.Source,
    true_labels: np.ndarray,
    reader: reader_lib.Reader,
    data: loader.Loader,
    mesh: jax.sharding.Mesh,
  ):
    """Reads the sample; compiles nothing yet.

    Args:
      config: see `defaults`.
      frozen: `(variables, images) -> (features, embeddings)`, see
        `restored.frozen`.
      variables: shapes of what it takes.
      dim: of the embeddings.
      source: training examples.
      true_labels: `[n]` of the source, -1 where nobody knows.
      reader: what training reads.
      data: the loader of the run.
      mesh: see `parallel.make_mesh`.
    """
    self._config, self._mesh, self._data = config, mesh, data
    self._frozen, self._variables, self._dim = frozen, variables, dim
    self._read_sample(source, true_labels)
    plain = inputs.evaluation_reader(config, source, true_labels)
    self._sheets = contact_sheet.Sheets(
      build.recipe(config),
      build.training_key(config),
      reader,
      plain,
      host_crops=config.data.host_crops,
    )

  def prepare(self) -> None:
    """Begins to compile what draws."""
    self._compiled = _ahead(self._compile)

  def failure(self) -> Exception | None:
    """What the compiling failed by, once it has ended."""
    try:
      self._compiled()
    except Exception as error:  # whatever it is: it shall not end a training
      return error
    return None

  def draw(self, step: int, variables, sinks: Sequence) -> bool:
    """Draws what there is to see after a step; every process has to.

    Args:
      step: the one that was made last.
      variables: of the networks, then; not changed and not kept.
      sinks: what gets it on the main process, see `tensorboard.EventFile`.

    Returns:
      Whether the embeddings could be drawn: they are finite, then.
    """
    embed, measure = self._compiled()
    _, embeddings, labels = probe.extract(
      functools.partial(embed, variables),
      self._sample,
      batch_size=self._sample_batch,
      mesh=self._mesh,
    )
    finite = bool(np.isfinite(embeddings).all())
    if not parallel.is_main():
      return finite
    if finite:
      measures = jax.device_get(measure(embeddings))
      _draw_embeddings(step, measures, labels, sinks)
    index = self._data.indices(step - 1)[:_SHOWN]
    sheet = io.BytesIO()
    Image.fromarray(self._sheets.draw(step - 1, index)).save(
      sheet, format='PNG'
    )
    for sink in sinks:
      sink.picture(step, 'pictures/views', sheet.getvalue())
    return finite

  def _compile(self):
    """What draws; the sample's embeddings by the state's variables."""
    images, _ = self._sample[0]
    batch = jax.ShapeDtypeStruct(
      (self._sample_batch, *images.shape[1:]),
      np.uint8,
      sharding=parallel.split(self._mesh),
    )
    embed = self._frozen.lower(self._variables, batch).compile()
    count = sum(len(images) for images, _ in self._sample)
    embeddings = jax.ShapeDtypeStruct((count, self._dim), np.float32)
    measure = _measures.lower(embeddings).compile()
    self._sheets.compile(min(_SHOWN, self._config.train.batch_size))
    return embed, measure

  def _read_sample(self, source, true_labels):
    """Training images from all over the set, with labels where there are any.

    The first devices' share of a training batch is what they have room for.
    """
    known = np.flatnonzero(true_labels >= 0)
    known = known if known.size else np.arange(len(true_labels))
    count = min(_SAMPLE, known.size)
    chosen = known[np.linspace(0, known.size - 1, count).round().astype(int)]
    reader = inputs.evaluation_reader(
      self._config, sources.Subset(source, chosen), true_labels[chosen]
    )
    images, labels = loader.read_all(reader)
    train = self._config.train
    # A multiple of the devices, and at most what a micro-batch has room for.
    size = -(-count // self._mesh.size) * self._mesh.size
    size = min(size, train.batch_size // train.num_micro_batches)
    self._sample_batch = size
    self._sample = [
      (images[i : i + size], labels[i : i + size])
      for i in range(0, count, size)
    ]


def _draw_embeddings(step, measures, labels, sinks):
  plane, spectrum, rank = measures
  picture = quick_picture.embedding_picture(
    plane, labels, spectrum, f'step {step}, effective rank {rank:.1f}'
  )
  # Of the embeddings' mean square, which is 1, each direction has the square.
  values = spectrum / np.sqrt(len(plane))
  for sink in sinks:
    sink.scalars(step, {'embeddings/effective_rank': float(rank)})
    sink.histogram(step, 'embeddings/singular_values', values)
    sink.picture(step, 'pictures/embeddings', picture)


def _ahead(work):
  """Gives what `work` returns when asked, which may have been made meanwhile.

  While the training step compiles there is time for it. Not so with several
  processes, whose compilers may wait for one another, program by program.
  """
  if jax.process_count() > 1:
    return functools.cache(work)
  pool = futures.ThreadPoolExecutor(1)
  result = pool.submit(work)
  pool.shutdown(wait=False)
  return result.result


@jax.jit
def _measures(embeddings):
  """Two principal components, singular values and effective rank.

  All of unit embeddings; the components `[n, 2]` are of the centred ones.
  """
  unit = collapse.normalize(embeddings)
  spectrum = collapse.singular_values(unit)
  centred = unit - jnp.mean(unit, axis=0)
  _, _, vt = linalg.svd(centred)
  plane = jnp.matmul(centred, vt[:2].T, precision=jax.lax.Precision.HIGHEST)
  plane = jnp.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))
  return plane, spectrum, collapse.effective_rank_of_spectrum(spectrum)
