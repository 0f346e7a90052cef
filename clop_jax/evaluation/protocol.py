"""The evaluation protocol of a config: its splits, features and measures.

`evaluate` applies it to a checkpoint, and the trainer, now and then, to the
state it is at. The measures themselves are those of `probe`, `finetune` and
`collapse`.
"""

from collections.abc import Callable, Mapping, Sequence
import copy
from typing import Any

from flax import linen as nn
import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np

from clop_jax import defaults
from clop_jax.data import labels as label_policy
from clop_jax.data import loader
from clop_jax.data import reader as reader_lib
from clop_jax.data import sources
from clop_jax.evaluation import finetune
from clop_jax.evaluation import probe
from clop_jax.experiment import inputs
from clop_jax.runtime import parallel


def with_settings(
  config: ml_collections.ConfigDict, settings: Mapping[str, Any]
) -> ml_collections.ConfigDict:
  """A run's config with other fields of `config.eval`.

  Args:
    config: see `defaults`.
    settings: values by the field's name, as `{'finetune_epochs': 5}`. One
      number does for a field that holds several.

  Raises:
    ValueError: If a field is unknown, or its value has another type or is out
      of range.
  """
  changed = config.to_dict()
  for name, value in settings.items():
    field = defaults.FIELDS.get(f'eval.{name}')
    if field is None:
      raise ValueError(
        f'--eval={name}=... is not a field of config.eval; there are '
        f'{", ".join(sorted(changed["eval"]))}'
      )
    if field.lengths and not isinstance(value, list | tuple):
      value = [value]
    if not field.accepts(value):
      raise ValueError(
        f'--eval={name}=... must be {field.expected()}, got {value!r}'
      )
    if field.lengths:
      value = [field.kind(one) for one in value]
    changed['eval'][name] = value if field.lengths else field.kind(value)
  return ml_collections.ConfigDict(changed).lock()


def reader(
  config: ml_collections.ConfigDict, source: sources.Source, labels: np.ndarray
) -> reader_lib.Reader:
  """What reads for `extract`; see `inputs.evaluation_reader`."""
  return inputs.evaluation_reader(
    config, source, labels, instead='it is left out'
  )


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
    found[split] = reader(config, source, known)
  return found


def extract(
  config: ml_collections.ConfigDict,
  reader: reader_lib.Reader,
  apply: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
  mesh: Mesh,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Features, embeddings and labels of all that a reader reads, in order.

  An image that cannot be decoded is left out, where the config skips those.

  Args:
    config: see `defaults`.
    reader: see `readers`.
    apply: uint8 images to (features, embeddings), see `restored.Restored`.
    mesh: see `parallel.make_mesh`.

  Returns:
    As `probe.extract`.
  """
  features, embeddings, numbers = extract_numbered(config, reader, apply, mesh)
  return features, embeddings, reader.labels[numbers]


def extract_numbered(
  config: ml_collections.ConfigDict,
  reader: reader_lib.Reader,
  apply: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
  mesh: Mesh,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """As `extract`, with the examples' numbers in the place of their labels."""
  features, embeddings, numbers = probe.extract(
    apply,
    _numbered_batches(config, reader),
    batch_size=config.eval.batch_size,
    mesh=mesh,
  )
  own = numbers == np.arange(len(numbers))
  return features[own], embeddings[own], numbers[own]


def readable(
  config: ml_collections.ConfigDict, reader: reader_lib.Reader
) -> np.ndarray:
  """The numbers of the examples that can be decoded, ascending.

  Reads all of them, if the config skips those that cannot be.
  """
  every = np.arange(len(reader))
  if not config.data.skip_corrupt:
    return every
  batches = _numbered_batches(config, reader)
  return every[np.concatenate([numbers for _, numbers in batches]) == every]


def _numbered_batches(config, reader):
  """Images and whose they are: in the place of a corrupt one comes another."""
  numbered = copy.copy(reader)
  numbered.labels = np.arange(len(reader), dtype=np.int32)
  return loader.in_order(
    numbered,
    batch_size=config.eval.batch_size,
    num_workers=inputs.num_workers(config, reader),
  )


def linear(
  config: ml_collections.ConfigDict,
  features: dict[str, np.ndarray],
  labels: dict[str, np.ndarray],
) -> dict[str, float | None]:
  """The linear probe of the protocol.

  Args:
    config: see `defaults`.
    features: `[n, feature_dim]` of 'train' and 'test'.
    labels: `[n]` of 'train' and 'test'.

  Returns:
    `linear_top1`, `linear_top5`, `linear_l2` and `linear_held_out_top1`. Where
    no class has two examples there is nothing to choose the strength by: it is
    the largest one, and the last of the four None.

  Raises:
    ValueError: see `probe.linear_probe`.
    FloatingPointError: likewise.
  """
  found = probe.linear_probe(
    *_examples(features, labels),
    num_classes=config.data.num_classes,
    l2_strengths=config.eval.probe_l2,
    max_iterations=config.eval.probe_iterations,
    hold_out=_can_hold_out(labels['train'], config.data.num_classes),
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
  """What a measure of `probe` learns from, and what it is measured on."""
  return (
    features['train'],
    labels['train'],
    features['test'],
    labels['test'],
  )


def _can_hold_out(labels, num_classes):
  """Whether a class has two examples, one of them to choose by."""
  in_range = labels[(labels >= 0) & (labels < num_classes)]
  # No label that could be used at all is the probe's own to refuse.
  return not in_range.size or bool(np.bincount(in_range).max() > 1)


def check_fraction(fraction: float) -> None:
  """Raises ValueError unless a fraction of the labels is in (0, 1]."""
  if not 0 < fraction <= 1:
    raise ValueError(
      f'--label_fraction must be in (0, 1], as 0.1 for 10 %, got {fraction}'
    )


def labelled(
  config: ml_collections.ConfigDict, labels: np.ndarray, fraction: float
) -> np.ndarray:
  """The training examples whose labels a measure may use.

  Those of a smaller fraction are among those of a larger one; with a run's own
  training split and `data.label_fraction`, and no other label policy, they are
  those whose labels the run was trained on.

  Args:
    config: see `defaults`.
    labels: `[n]` of the training split.
    fraction: in (0, 1], of each class, at least one example.

  Returns:
    Their numbers, ascending.

  Raises:
    ValueError: if the fraction is out of range.
  """
  check_fraction(fraction)
  kept = label_policy.keep_fraction(labels, fraction, seed=config.seed)
  return np.flatnonzero(kept != label_policy.UNLABELLED)


class FineTuning:
  """Fine-tuning by the protocol; several fractions share what is compiled."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    backbone: nn.Module,
    variables: Any,
    examples: dict[str, tuple[sources.Source, np.ndarray]],
    mesh: Mesh,
  ):
    """Reads the training split, if it is to be resident.

    Args:
      config: see `defaults`; `data.num_classes` is known.
      backbone: images to features.
      variables: of the backbone; they stay as they are.
      examples: source and true labels of 'train' and 'test'.
      mesh: see `parallel.make_mesh`.

    Raises:
      ValueError: for a wrong field of `config.eval`.
    """
    fields, augment = config.eval, config.augment
    for name in ('finetune_epochs', 'finetune_min_steps'):
      if fields[name] < 1:
        raise ValueError(
          f'config.eval.{name} must be at least 1, got {fields[name]}'
        )
    try:
      parallel.check_batch_size(fields.finetune_batch_size, mesh)
    except ValueError as error:
      raise ValueError(f'config.eval.finetune_batch_size: {error}') from error
    self._config, self._examples, self._mesh = config, examples, mesh
    readers_ = {
      split: reader(config, *examples[split]) for split in ('train', 'test')
    }
    self._test = readers_['test']
    shape = (1, augment.size, augment.size, config.data.channels)
    features = jax.eval_shape(
      lambda x: backbone.apply(variables, x, train=False),
      jax.ShapeDtypeStruct(shape, np.float32),
    )
    self._trainer = finetune.Trainer(
      backbone,
      variables,
      num_classes=config.data.num_classes,
      feature_dim=features.shape[-1],
      recipe=finetune.recipe(
        size=augment.size,
        mean=augment.mean,
        std=augment.std,
        crop_area=augment.crop_area,
        crop_aspect=augment.crop_aspect,
        flip_probability=augment.flip_probability,
        interpolation=augment.interpolation,
        random=fields.finetune_augment,
      ),
      bn_scope=config.model.bn_scope,
      mesh=mesh,
      seed=config.seed,
    )
    # Each fit has batches of its own.
    shared: Any = {'batch_size': None, 'seed': config.seed, 'mesh': mesh}
    self._data: loader.ResidentLoader | loader.StreamLoader
    if inputs.is_resident(config, readers_['train']):
      self._data = loader.ResidentLoader(
        *loader.read_all(readers_['train']), **shared
      )
    else:
      self._data = loader.StreamLoader(
        readers_['train'],
        num_workers=inputs.num_workers(config, readers_['train']),
        prefetch=config.data.prefetch,
        **shared,
      )

  def __call__(self, chosen: np.ndarray) -> dict[str, float | int | None]:
    """Fine-tunes on some of the training examples.

    The learning rate is the one with the best top-1 on a held-out, stratified
    tenth of them; the network is then fine-tuned on all of them.

    Args:
      chosen: their numbers, see `labelled`; all can be decoded.

    Returns:
      `finetune_top1`, `finetune_top5` (on the test split), and what they were
      made with: `finetune_learning_rate`, `finetune_held_out_top1` (None where
      there was nothing to choose, or nothing to choose by; then the rate is the
      middle one), `finetune_steps` and `finetune_protocol_version`.

    Raises:
      ValueError: if the candidates for the learning rate make no sense.
      FloatingPointError: if the fit diverged.
    """
    config, rates = self._config, self._config.eval.finetune_learning_rates
    source, labels = self._examples['train']
    held_out = probe.stratified_tenth(labels[chosen], config.seed)
    fitting, asked = chosen[~held_out], chosen[held_out]

    def accuracy_at(rate):
      state, loss = self._fit(fitting, rate)
      if not np.isfinite(loss):
        return -1.0
      held_out_reader = reader(
        config, sources.Subset(source, asked), labels[asked]
      )
      return self._accuracy(state, held_out_reader, (1,))[0]

    if not held_out.any():
      # Between one that does nothing and one that may be too much.
      rates = sorted(rates)[(len(rates) - 1) // 2 :][:1]
    rate, held_out_top1 = finetune.choose(rates, accuracy_at)
    state, loss = self._fit(chosen, rate)
    if not np.isfinite(loss):
      raise FloatingPointError(
        f'fine-tuning diverged (its loss is {loss}) at the learning rate '
        f'{rate}, the best of config.eval.finetune_learning_rates='
        f'{tuple(rates)}; lower ones are needed'
      )
    ks = (1, min(5, config.data.num_classes))
    top1, top5 = self._accuracy(state, self._test, ks)
    return {
      'finetune_top1': top1,
      'finetune_top5': top5,
      'finetune_learning_rate': float(rate),
      'finetune_held_out_top1': held_out_top1,
      'finetune_steps': int(state['step']),
      'finetune_protocol_version': finetune.PROTOCOL_VERSION,
    }

  def _fit(self, chosen, rate):
    config, size = self._config, self._config.eval.finetune_batch_size
    if len(chosen) < size:
      # Few labels: one batch of all of them, some twice where the devices could
      # not share it evenly otherwise.
      size = -(-len(chosen) // self._mesh.size) * self._mesh.size
      chosen = np.resize(chosen, size)
    data = self._data.among(chosen, batch_size=size, seed=config.seed)
    steps = config.eval.finetune_epochs * data.steps_per_epoch
    return self._trainer.fit(
      data,
      learning_rate=rate,
      total_steps=max(steps, config.eval.finetune_min_steps),
    )

  def _accuracy(self, state, asked, ks):
    _, logits, labels = extract(
      self._config, asked, self._trainer.apply(state), self._mesh
    )
    return probe.top_k(logits, labels, ks)
