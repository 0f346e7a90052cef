"""Measurements of a run's checkpoint: its config, its data, the protocol."""

from collections.abc import Callable, Mapping
import dataclasses
import datetime
import importlib.metadata
from typing import Any

from jax.sharding import Mesh
import jax.numpy as jnp
import ml_collections
import numpy as np

from clop_jax import collapse
from clop_jax.data import sources
from clop_jax.evaluation import probe
from clop_jax.evaluation import protocol
from clop_jax.experiment import build
from clop_jax.experiment import inputs
from clop_jax.experiment import restored
from clop_jax.experiment import workdir as workdir_lib
from clop_jax.runtime import parallel

_LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
MODES = ('linear', 'knn', 'finetune')
COMPLETE = ('linear', 'knn')  # what eval.json has, with all labels


@dataclasses.dataclass(frozen=True)
class OtherData:
  """Another data set than the one that a run was trained on.

  Attributes:
    name: as `config.data.name`.
    data_dir: likewise.
    train_split: whose labels are learned from.
    test_split: that is measured.
  """

  name: str
  data_dir: str | None = None
  train_split: str = 'train'
  test_split: str = 'test'


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What was measured of a checkpoint; see `measure`.

  Attributes:
    step: of the checkpoint.
    measurements: one for each mode and fraction: the mode's figures, and what
      they were made of and with.
    complete: what `eval.json` gets; None unless the run's own data and
      settings, all labels and both modes of frozen features were asked for.
    arrays: for figures, see `evaluate`; likewise.
  """

  step: int
  measurements: list[dict]
  complete: Any = None
  arrays: Any = None


def evaluate(
  workdir: str,
  *,
  given: dict[str, sources.Source] | None = None,
  which: str = 'latest',
  devices=None,
) -> tuple[dict, dict]:
  """Restores a run and measures it by the protocol of `probe`.

  Features are the backbone's output without augmentation, batch normalization
  in evaluation mode; measures of embeddings take the test split's, normalized.

  Args:
    workdir: of a run.
    given: examples of your own as 'train' and 'test', instead of those that the
      run's config names.
    which: checkpoint: 'latest', 'best' (by `train.keep_best`) or a step.
    devices: default: all, of all processes.

  Returns:
    `(result, arrays)`: what `eval.json` gets, and for figures, of the test
    split: normalized `embeddings` `[n, dim]`, `labels` `[n]`, the singular
    values of the embeddings as `spectrum` `[min(n, dim)]`, and
    `class_mean_cosines` `[num_classes, num_classes]`; and the `prototypes`
    `[num_classes, dim]`.

  Raises:
    ValueError: if the workdir is missing or holds no run or no checkpoint.
    FloatingPointError: if the features are not finite: the training diverged.
    checkpoint.DamagedCheckpointError: if no checkpoint can be restored.
  """
  found = measure(workdir, given=given, which=which, devices=devices)
  return found.complete, found.arrays


def measure(
  workdir: str,
  *,
  modes: tuple[str, ...] = COMPLETE,
  fractions: tuple[float, ...] = (1.0,),
  data: OtherData | None = None,
  given: dict[str, sources.Source] | None = None,
  settings: Mapping[str, Any] | None = None,
  which: str = 'latest',
  devices=None,
  keep: Callable[[Evaluation], None] | None = None,
) -> Evaluation:
  """Restores a run and measures it in some modes, with some of the labels.

  Args:
    workdir: of a run.
    modes: of 'linear', 'knn' and 'finetune'.
    fractions: of the training labels, see `protocol.labelled`.
    data: another data set to learn from and to measure on; None: the run's own.
    given: as in `evaluate`.
    settings: other values of `config.eval` than the run's, see
      `protocol.with_settings`.
    which: as in `evaluate`.
    devices: as in `evaluate`.
    keep: called with each part of the result as soon as it is there: what a
      later one raises does not lose it.

  Returns:
    The figures; the weights of the checkpoint are the same before and after.

  Raises:
    ValueError: as `evaluate`; for an unknown mode, a fraction out of range,
      settings that there are not, or another data set that cannot be read.
    FloatingPointError: as `evaluate`; or if fine-tuning diverged.
    checkpoint.DamagedCheckpointError: as `evaluate`.
  """
  check_asked(modes, fractions)
  subject = _prepare(
    workdir, modes, fractions, data, given, settings, which, devices
  )
  fine_tune = None
  if 'finetune' in modes:
    fine_tune = _fine_tuning(subject)
  has_complete = subject.is_plain and 1 in fractions
  has_complete = has_complete and {*COMPLETE} <= {*modes}
  complete = arrays = None
  found, done = {}, {}
  # What takes long comes last.
  order = sorted(
    ((mode, fraction) for fraction in fractions for mode in modes),
    key=lambda pair: pair[0] == 'finetune',
  )
  for mode, fraction in order:
    found[mode, fraction] = _figures(subject, fine_tune, mode, fraction)
    made = _measurement(subject, mode, fraction, found[mode, fraction])
    done[mode, fraction] = made
    part = Evaluation(subject.run.step, [made])
    if has_complete and fraction == 1 and mode in COMPLETE:
      both = [done[x, 1] for x in COMPLETE if (x, 1) in done]
      if len(both) < len(COMPLETE):
        continue
      complete, arrays = _complete(subject, found)
      part = Evaluation(subject.run.step, both, complete, arrays)
    if keep is not None:
      keep(part)
  measurements = [done[mode, x] for x in fractions for mode in modes]
  return Evaluation(subject.run.step, measurements, complete, arrays)


@dataclasses.dataclass(frozen=True)
class _Subject:
  """A restored run, and the examples that it is measured with.

  Attributes:
    config: of the run, with the data and the settings that were asked for.
    run: see `restored`.
    fingerprint: of its frozen part.
    mesh: see `parallel.make_mesh`.
    examples: source and true labels of 'train' and 'test'.
    decoded: the numbers of those that can be decoded, of both splits.
    labels: theirs.
    features: theirs; empty unless a mode takes them.
    embeddings: likewise.
    chosen: the training examples of each fraction.
    facts: that each measurement holds.
    is_plain: the run's own data and settings.
  """

  config: ml_collections.ConfigDict
  run: restored.Restored
  fingerprint: str
  mesh: Mesh
  examples: dict[str, tuple[sources.Source, np.ndarray]]
  decoded: dict[str, np.ndarray]
  labels: dict[str, np.ndarray]
  features: dict[str, np.ndarray]
  embeddings: dict[str, np.ndarray]
  chosen: dict[float, np.ndarray]
  facts: dict[str, Any]
  is_plain: bool


def _prepare(workdir, modes, fractions, data, given, settings, which, devices):
  """Refuses what cannot be measured; then restores and reads."""
  config = workdir_lib.load_config(workdir)
  own = workdir_lib.to_json(config)['eval']
  config = protocol.with_settings(config, settings or {})
  used = workdir_lib.to_json(config)['eval']
  changed = {name: used[name] for name in used if used[name] != own[name]}
  mesh = parallel.make_mesh(devices)
  parallel.check_batch_size(config.eval.batch_size, mesh)
  is_own = data is None and given is None
  if data is not None:
    config, given = _on_other_data(config, data)
  examples = {
    split: inputs.labelled_source(config, split, (given or {}).get(split))
    for split in ('train', 'test')
  }
  chosen = {
    fraction: protocol.labelled(config, examples['train'][1], fraction)
    for fraction in fractions
  }
  # Before the long work: the file may be damaged.
  trained_num_labels = 0
  if config.loss.clop_weight or config.loss.contrastive == 'supcon':
    trained_num_labels = workdir_lib.num_labels(workdir)
  run = restored.load(workdir, which=which, devices=devices)
  fingerprint = probe.fingerprint(_frozen_part(run))
  features, embeddings, labels, decoded = {}, {}, {}, {}
  for split, (source, known) in examples.items():
    reader = protocol.reader(config, source, known)
    if {*modes} & {*COMPLETE}:
      features[split], embeddings[split], decoded[split] = (
        protocol.extract_numbered(config, reader, run.apply, mesh)
      )
    else:
      decoded[split] = protocol.readable(config, reader)
    labels[split] = known[decoded[split]]
  chosen = {
    fraction: _decoded(numbers, decoded['train'], fraction)
    for fraction, numbers in chosen.items()
  }
  if is_own:
    _warn_of_labels(workdir, trained_num_labels, chosen)
  return _Subject(
    config=config,
    run=run,
    fingerprint=fingerprint,
    mesh=mesh,
    examples=examples,
    decoded=decoded,
    labels=labels,
    features=features,
    embeddings=embeddings,
    chosen=chosen,
    facts={
      'other_data': data is not None,
      'trained_num_labels': trained_num_labels,
      'eval': used,
      'eval_changed': changed,
    },
    is_plain=data is None and not changed,
  )


def _fine_tuning(subject):
  run = subject.run
  variables = {name: part['backbone'] for name, part in run.variables.items()}
  return protocol.FineTuning(
    subject.config,
    run.experiment.backbone,
    variables,
    subject.examples,
    subject.mesh,
  )


def _figures(subject, fine_tune, mode, fraction):
  """What a mode measures; the weights are the same before and after."""
  run, numbers = subject.run, subject.chosen[fraction]
  try:
    if mode == 'finetune':
      found = fine_tune(numbers)
    else:
      measured = {'linear': protocol.linear, 'knn': protocol.knn}[mode]
      rows = np.searchsorted(subject.decoded['train'], numbers)
      found = measured(
        subject.config,
        subject.features | {'train': subject.features['train'][rows]},
        subject.labels | {'train': subject.labels['train'][rows]},
      )
  except FloatingPointError as error:
    raise FloatingPointError(f'{error} at step {run.step}') from error
  if subject.fingerprint != probe.fingerprint(_frozen_part(run)):
    raise RuntimeError('the frozen parameters changed during the evaluation')
  return found


def _measurement(subject, mode, fraction, found):
  """One of `Evaluation.measurements`."""
  data, labels = subject.config.data, subject.labels
  return {
    'mode': mode,
    'protocol_version': probe.PROTOCOL_VERSION,
    'step': subject.run.step,
    **found,
    'data': data.name,
    'data_dir': data.data_dir,
    'train_split': data.train_split,
    'test_split': data.test_split,
    'num_classes': data.num_classes,
    'label_fraction': fraction,
    'num_labels': len(subject.chosen[fraction]),
    'num_test': len(labels['test']),
    'num_corrupt': {
      split: len(known) - len(labels[split])
      for split, (_, known) in subject.examples.items()
    },
    **subject.facts,
    **_origin(subject),
  }


def _complete(subject, found):
  """What `eval.json` gets, and the arrays for figures."""
  config, labels = subject.config, subject.labels
  test_labels = jnp.asarray(labels['test'])
  test_features = jnp.asarray(subject.features['test'])
  embeddings = jnp.asarray(subject.embeddings['test'])
  unit = collapse.normalize(embeddings)
  prototypes = np.asarray(subject.run.prototypes)
  cosines = np.asarray(
    collapse.class_mean_cosines(unit, test_labels, len(prototypes))
  )
  result = {
    'protocol_version': probe.PROTOCOL_VERSION,
    'step': subject.run.step,
    **found['linear', 1],
    **found['knn', 1],
    **_collapse_measures(embeddings, test_labels, prototypes, cosines),
    'features_effective_rank': float(collapse.effective_rank(test_features)),
    'features_within_between_ratio': float(
      collapse.within_between_ratio(
        test_features, test_labels, config.data.num_classes
      )
    ),
    'num_train': len(labels['train']),
    'num_test': len(labels['test']),
    'config': workdir_lib.to_json(config),
    **_origin(subject),
  }
  arrays = {
    'embeddings': np.asarray(unit),
    'labels': labels['test'],
    'spectrum': np.asarray(collapse.singular_values(unit)),
    'class_mean_cosines': cosines,
    'prototypes': prototypes,
  }
  return result, arrays


def _origin(subject):
  """What a measurement was made of and with, and when."""
  mesh = subject.mesh
  return {
    'parameters_sha256': subject.fingerprint,
    'seed': subject.config.seed,
    'commit': build.commit(),
    'versions': {x: importlib.metadata.version(x) for x in _LIBRARIES},
    'device': f'{mesh.size} x {mesh.devices.flat[0].device_kind}',
    'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
  }


def check_asked(modes: tuple[str, ...], fractions: tuple[float, ...]) -> None:
  """Raises ValueError for modes or fractions that there cannot be."""
  unknown = [mode for mode in modes if mode not in MODES]
  if unknown or not modes:
    got = f'{unknown[0]!r}' if unknown else 'none'
    raise ValueError(f'--mode must be some of {", ".join(MODES)}; got {got}')
  if not fractions:
    raise ValueError('--label_fraction must hold at least one number, got none')
  for fraction in fractions:
    protocol.check_fraction(fraction)


def _on_other_data(config, data):
  """The config with that data set in it, and its examples."""
  config = inputs.on_other_data(config, **dataclasses.asdict(data))
  given = {}
  for split in ('train', 'test'):
    name = config.data[f'{split}_split']
    try:
      given[split] = inputs.fitted(config, inputs.source(config, name))
      if split == 'train':
        config = inputs.with_num_classes(config, given[split])
    except ValueError as error:
      reason = sources.in_flags(error, '--data')
      raise ValueError(
        f'--data={data.name} --{split}_split={name}: {reason}'
      ) from error
  return config, given


def _decoded(chosen, decoded, fraction):
  """The chosen examples but for those that cannot be decoded."""
  chosen = np.intersect1d(chosen, decoded)
  if not chosen.size:
    raise ValueError(
      f'--label_fraction={fraction:g} has no image that can be decoded; take '
      'a larger one, or repair the images'
    )
  return chosen


def _warn_of_labels(workdir, trained, chosen):
  fewer = [f'{x:g}' for x, few in chosen.items() if (trained or 0) > len(few)]
  if fewer:
    parallel.warn(
      f'{workdir}: its training knew {trained:,} labels, more than '
      f'--label_fraction={",".join(fewer)} gives; these are not figures of a '
      'network that saw so few'
    )


def _frozen_part(run):
  return run.variables['params'], run.variables['batch_stats']


def _collapse_measures(embeddings, labels, prototypes, cosines):
  """Measures of the normalized test embeddings, as plain numbers."""
  unit = collapse.normalize(embeddings)
  num_classes = len(prototypes)
  angles = collapse.principal_angles(unit, labels, num_classes)
  between = ~np.eye(num_classes, dtype=bool)
  measures = {
    'effective_rank': collapse.effective_rank(unit),
    'effective_rank_centered': collapse.effective_rank(unit, center=True),
    'embedding_variance': collapse.embedding_variance(unit),
    # These normalize by themselves, and lose less of a tiny spread.
    'embedding_std': collapse.embedding_std(embeddings),
    'prototype_cosine': collapse.prototype_cosine(unit, labels, prototypes),
    'prototype_energy_share': collapse.prototype_energy_share(
      unit, labels, prototypes
    ),
    'class_mean_cosine': np.nanmean(cosines[between]),
    'principal_angle_degrees': np.degrees(
      np.nanmean(np.asarray(angles)[between])
    ),
    'within_between_ratio': collapse.within_between_ratio(
      unit, labels, num_classes
    ),
    'uniformity': collapse.uniformity(embeddings),
  }
  return {name: float(value) for name, value in measures.items()}
