"""The evaluation protocol of a config: its splits, features and probes.

`evaluate` applies it to a checkpoint, and the trainer to its current state. The
algorithms are those of `probe` and `finetune`.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
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
  """Returns the config of a run with other values in `config.eval`.

  Args:
    config: Config, see `defaults`.
    overrides: Values by name, as `{'eval.finetune_epochs': 5}`.

  Raises:
    ValueError: If a name is not a field of `config.eval`, or its value has
      another type or is out of range.
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


def reader(
  config: ml_collections.ConfigDict, source: sources.Source, labels: np.ndarray
) -> reader_lib.Reader:
  """Returns a reader for `batches`; see `inputs.evaluation_reader`."""
  return inputs.evaluation_reader(
    config, source, labels, instead='it is left out'
  )


def readers(
  config: ml_collections.ConfigDict,
  given: Mapping[str, sources.Source] | None = None,
  splits: Sequence[str] = ('train', 'test'),
) -> dict[str, reader_lib.Reader]:
  """Returns readers of the labelled examples, with their true labels.

  Args:
    config: Config, see `defaults`; `data.num_classes` is known.
    given: Examples as 'train' and 'test', instead of those of the config.
    splits: Splits to read, of 'train' and 'test'.

  Raises:
    ValueError: See `inputs.labelled_source` and `inputs.evaluation_reader`.
  """
  return {
    split: reader(
      config, *inputs.labelled_source(config, split, (given or {}).get(split))
    )
    for split in splits
  }


def batches(
  config: ml_collections.ConfigDict, reader: reader_lib.Reader
) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
  """Reads all images that can be decoded; see `loader.in_order`."""
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

  Images that cannot be decoded are left out if the config skips them.

  Args:
    config: Config, see `defaults`.
    reader: Reader, see `reader`.
    apply: Function of uint8 images, see `restored.Restored.apply`.
    mesh: Mesh of the devices, see `parallel.make_mesh`.
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
  """Returns the positions of the images that can be decoded, ascending.

  All images are read if the config skips those that cannot be decoded.
  """
  if not config.data.skip_corrupt:
    return np.arange(len(reader))
  return np.concatenate([positions for _, positions in batches(config, reader)])


def linear(
  config: ml_collections.ConfigDict,
  features: dict[str, np.ndarray],
  labels: dict[str, np.ndarray],
) -> dict[str, float | None]:
  """Measures features by the linear probe of the protocol.

  Args:
    config: Config, see `defaults`.
    features: Features `[n, feature_dim]` of 'train' and 'test'.
    labels: Labels `[n]` of 'train' and 'test'.

  Returns:
    `linear_top1`, `linear_top5`, `linear_l2` and `linear_held_out_top1`. If no
    class has two examples, nothing can be held out: the strength is the largest
    one and `linear_held_out_top1` is None.

  Raises:
    ValueError: See `probe.linear_probe`.
    FloatingPointError: See `probe.linear_probe`.
  """
  num_classes, known = config.data.num_classes, labels['train']
  known = known[(known >= 0) & (known < num_classes)]
  found = probe.linear_probe(
    *_examples(features, labels),
    num_classes=num_classes,
    l2_strengths=config.eval.probe_l2,
    max_iterations=config.eval.probe_iterations,
    # Without any valid label, the probe itself raises.
    hold_out=not known.size or bool(np.bincount(known).max() > 1),
    seed=config.seed,
  )
  return {f'linear_{name}': value for name, value in found.items()}


def knn(
  config: ml_collections.ConfigDict,
  features: dict[str, np.ndarray],
  labels: dict[str, np.ndarray],
) -> dict[str, float]:
  """Measures features by their nearest neighbours; see `linear`.

  Returns:
    `knn<k>_top1` for each `k`, and the first of them as `knn_top1`.
  """
  found = probe.knn(
    *_examples(features, labels),
    num_classes=config.data.num_classes,
    neighbours=config.eval.knn_neighbours,
    temperature=config.eval.knn_temperature,
  )
  return {
    'knn_top1': found[config.eval.knn_neighbours[0]],
    **{f'knn{k}_top1': value for k, value in found.items()},
  }


def _examples(features, labels):
  return features['train'], labels['train'], features['test'], labels['test']


def check_fraction(fraction: float) -> None:
  """Raises ValueError unless a fraction of the labels is in (0, 1]."""
  if not 0 < fraction <= 1:
    raise ValueError(
      f'--label_fraction must be in (0, 1], as 0.1 for 10 %, got {fraction}'
    )


def labelled(
  config: ml_collections.ConfigDict, labels: np.ndarray, fraction: float
) -> np.ndarray:
  """Returns the positions of the training examples of a fraction.

  A smaller fraction is part of a larger one. With the run's own training split
  and `data.label_fraction` as its only label policy, these are the examples
  whose labels the run was trained on.

  Args:
    config: Config, see `defaults`.
    labels: Labels `[n]` of the training split.
    fraction: Fraction of each class in (0, 1], at least one example.

  Returns:
    The positions, ascending.

  Raises:
    ValueError: If the fraction is out of range.
  """
  check_fraction(fraction)
  kept = label_policy.keep_fraction(labels, fraction, seed=config.seed)
  return np.flatnonzero(kept != label_policy.UNLABELLED)
