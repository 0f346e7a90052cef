"""The evaluation protocol of a config: its splits, features and measures.

`evaluate` applies it to a checkpoint, and the trainer, now and then, to the
state it is at. The measures themselves are those of `probe` and `collapse`.
"""

from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np

from clop_jax import inputs
from clop_jax import probe
from clop_jax.data import loader
from clop_jax.data import reader as reader_lib
from clop_jax.data import sources


def readers(
  config: ml_collections.ConfigDict,
  given: dict[str, sources.Source] | None = None,
  splits: Sequence[str] = ('train', 'test'),
) -> dict[str, reader_lib.Reader]:
  """What reads the labelled examples of each split, with their true labels.

  Args:
    config: see `defaults`; `data.num_classes` is known.
    given: examples of your own as 'train' and 'test', instead of those that
      the config names.
    splits: of 'train' and 'test'.

  Raises:
    ValueError: see `inputs.labelled_source` and `inputs.evaluation_reader`.
  """
  found = {}
  for split in splits:
    source, known = inputs.labelled_source(
      config, split, (given or {}).get(split)
    )
    found[split] = inputs.evaluation_reader(config, source, known)
  return found


def extract(
  config: ml_collections.ConfigDict,
  reader: reader_lib.Reader,
  apply: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
  mesh: Mesh,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Features, embeddings and labels of all that a reader reads, in order.

  Args:
    config: see `defaults`.
    reader: see `readers`.
    apply: uint8 images to (features, embeddings), see `restored.Restored`.
    mesh: see `parallel.make_mesh`.

  Returns:
    As `probe.extract`.
  """
  batches = loader.in_order(
    reader,
    batch_size=config.eval.batch_size,
    num_workers=inputs.num_workers(config, reader),
  )
  return probe.extract(
    apply, batches, batch_size=config.eval.batch_size, mesh=mesh
  )


def linear(
  config: ml_collections.ConfigDict,
  features: dict[str, np.ndarray],
  labels: dict[str, np.ndarray],
) -> dict[str, float]:
  """The linear probe of the protocol.

  Args:
    config: see `defaults`.
    features: `[n, feature_dim]` of 'train' and 'test'.
    labels: `[n]` of 'train' and 'test'.

  Returns:
    `linear_top1`, `linear_top5`, `linear_l2` and `linear_held_out_top1`.

  Raises:
    ValueError: see `probe.linear_probe`.
    FloatingPointError: likewise.
  """
  found = probe.linear_probe(
    features['train'],
    labels['train'],
    features['test'],
    labels['test'],
    num_classes=config.data.num_classes,
    l2_strengths=config.eval.probe_l2,
    max_iterations=config.eval.probe_iterations,
    seed=config.seed,
  )
  return {f'linear_{name}': value for name, value in found.items()}


def knn(
  config: ml_collections.ConfigDict,
  features: dict[str, np.ndarray],
  labels: dict[str, np.ndarray],
) -> dict[str, float]:
  """Nearest neighbours by the protocol; arguments and errors as of `linear`.

  Returns:
    `knn<k>_top1` for each `k`, and the first of them as `knn_top1`.
  """
  found = probe.knn(
    features['train'],
    labels['train'],
    features['test'],
    labels['test'],
    num_classes=config.data.num_classes,
    neighbours=config.eval.knn_neighbours,
    temperature=config.eval.knn_temperature,
  )
  return {
    'knn_top1': found[config.eval.knn_neighbours[0]],
    **{f'knn{k}_top1': value for k, value in found.items()},
  }
