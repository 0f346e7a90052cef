"""The evaluation protocol of a config: its splits, features and probes.

`evaluate` applies it to a checkpoint, the online probe to the training state.
"""

from collections.abc import Callable, Generator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np

from clop_jax import defaults
from clop_jax.data import labels as label_policy
from clop_jax.data import loader
from clop_jax.data import reader as reader_lib
from clop_jax.data import sources
from clop_jax.evaluation import probe
from clop_jax.experiment import inputs


def with_overrides(
  config: ml_collections.ConfigDict, overrides: Mapping[str, Any]
) -> ml_collections.ConfigDict:
  """Returns a config with other values in `config.eval`.

  Args:
    config: Config of a run.
    overrides: Values by name, as in `{'eval.finetune_epochs': 5}`.

  Raises:
    ValueError: If a name is not a field of `config.eval`, or its value has the
      wrong type or is out of range.
  """
  changed = config.to_dict()
  for name, value in overrides.items():
    field = defaults.FIELDS.get(name)
    if field is None or not name.startswith('eval.'):
      raise ValueError(
        f'config.{name} cannot be changed in an evaluation; these fields can: '
        f'{", ".join(x for x in defaults.FIELDS if x.startswith("eval."))}'
      )
    if not field.accepts(value):
      raise ValueError(
        f'config.{name} must be {field.expected()}, got {value!r}'
      )
    value = list(value) if isinstance(value, tuple) else value
    changed['eval'][name.removeprefix('eval.')] = value
  return ml_collections.ConfigDict(changed).lock()


def readers(
  config: ml_collections.ConfigDict,
  given: Mapping[str, sources.Source] | None = None,
) -> dict[str, reader_lib.Reader]:
  """Returns readers of the labelled examples in 'train' and 'test'.

  Args:
    config: Config with a known `data.num_classes`.
    given: Sources named 'train' and 'test' that replace those of the config.
  """
  return {
    split: inputs.evaluation_reader(
      config,
      *inputs.labelled_source(config, split, (given or {}).get(split)),
      instead='it is left out',
    )
    for split in ('train', 'test')
  }


def batches(
  config: ml_collections.ConfigDict, reader: reader_lib.Reader
) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
  """Yields `(images, positions)` of all images, see `loader.in_order`."""
  return loader.in_order(
    reader,
    batch_size=config.eval.batch_size,
    num_workers=inputs.num_workers(config, reader),
  )


def extract(
  config: ml_collections.ConfigDict,
  reader: reader_lib.Reader,
  apply: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
  mesh: Mesh,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns features, embeddings and labels of all images, in order.

  If the config skips corrupt images, their rows are missing.
  """
  features, embeddings, positions = probe.extract(
    apply,
    batches(config, reader),
    batch_size=config.eval.batch_size,
    mesh=mesh,
  )
  return features, embeddings, reader.labels[positions]


def readable(
  config: ml_collections.ConfigDict, reader: reader_lib.Reader
) -> np.ndarray:
  """Returns the positions of the images that can be decoded, ascending."""
  if not config.data.skip_corrupt:  # a corrupt image is an error
    return np.arange(len(reader))
  return np.concatenate([positions for _, positions in batches(config, reader)])


def linear(
  config: ml_collections.ConfigDict,
  features: dict[str, np.ndarray],
  labels: dict[str, np.ndarray],
) -> dict[str, float | None]:
  """Returns the results of `probe.linear_probe`, names prefixed by `linear_`.

  Args:
    config: Config with a known `data.num_classes`.
    features: Features `[n, feature_dim]` of 'train' and 'test'.
    labels: Labels `[n]` of 'train' and 'test'.
  """
  results = probe.linear_probe(
    *_examples(features, labels),
    num_classes=config.data.num_classes,
    l2_strengths=config.eval.probe_l2,
    max_iterations=config.eval.probe_iterations,
    seed=config.seed,
  )
  return {f'linear_{name}': value for name, value in results.items()}


def knn(
  config: ml_collections.ConfigDict,
  features: dict[str, np.ndarray],
  labels: dict[str, np.ndarray],
) -> dict[str, float]:
  """Returns `knn<k>_top1` for each `k`, and the first one as `knn_top1`.

  The arguments are those of `linear`.
  """
  accuracies = probe.knn(
    *_examples(features, labels),
    num_classes=config.data.num_classes,
    neighbours=config.eval.knn_neighbours,
    temperature=config.eval.knn_temperature,
  )
  return {
    'knn_top1': accuracies[config.eval.knn_neighbours[0]],
    **{f'knn{k}_top1': value for k, value in accuracies.items()},
  }


def _examples(features, labels):
  return features['train'], labels['train'], features['test'], labels['test']


def labelled(
  config: ml_collections.ConfigDict, labels: np.ndarray, fraction: float
) -> np.ndarray:
  """Returns the positions of the training examples that keep their labels.

  Each class keeps the fraction, at least one example. A smaller fraction is
  part of a larger one. For the run's own `data.label_fraction` these are the
  examples whose labels the training used, if it had no other label policy.
  """
  kept = label_policy.keep_fraction(labels, fraction, seed=config.seed)
  return np.flatnonzero(kept != label_policy.UNLABELLED)
