"""Evaluation of a checkpoint: takes a `Request`, returns a `Result`."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import datetime
import importlib.metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clop_jax import collapse
from clop_jax.data import sources
from clop_jax.evaluation import finetune
from clop_jax.evaluation import probe
from clop_jax.evaluation import protocol
from clop_jax.evaluation import result as result_lib
from clop_jax.experiment import build
from clop_jax.experiment import components
from clop_jax.experiment import inputs
from clop_jax.experiment import restored
from clop_jax.experiment import workdir as workdir_lib
from clop_jax.runtime import parallel

MODES = ('linear', 'knn', 'finetune')
_LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


@dataclasses.dataclass(frozen=True)
class OtherData:
  """A data set other than the one that a run was trained on.

  Attributes:
    name: Name, as in `config.data.name`.
    data_dir: Folder or file, as in `config.data.data_dir`.
    train_split: Split that the probes are fitted on.
    test_split: Split that accuracies are measured on.
  """

  name: str
  data_dir: str | None = None
  train_split: str = 'train'
  test_split: str = 'test'


@dataclasses.dataclass(frozen=True)
class Request:
  """Arguments of `evaluate`.

  Attributes:
    workdir: Workdir of a run.
    which: Checkpoint: 'latest', 'best' (by `train.keep_best`) or a step.
    modes: Modes: 'linear', 'knn' and 'finetune'.
    fractions: Fractions of the training labels, each in (0, 1].
    data: Another data set to evaluate on. If None, the run's own data set.
    given: Sources named 'train' and 'test' that replace the data set.
    backbone: Backbone of the run, if it was passed to `train.train`.
    overrides: Values that replace those in the run's `config.eval`, by name, as
      in `{'eval.finetune_epochs': 5}`.
    devices: Devices. If None, all devices of all processes.

  Raises:
    ValueError: If a mode is unknown or a fraction is out of range.
  """

  workdir: str
  which: str = 'latest'
  modes: Sequence[str] = result_lib.COMPLETE
  fractions: Sequence[float] = (1.0,)
  data: OtherData | None = None
  given: Mapping[str, sources.Source] | None = None
  backbone: Any = None
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  devices: Sequence[jax.Device] | None = None

  def __post_init__(self):
    unknown = [repr(mode) for mode in self.modes if mode not in MODES]
    if unknown or not self.modes:
      raise ValueError(
        f'--mode must be some of {", ".join(MODES)}; got '
        f'{unknown[0] if unknown else "none"}'
      )
    wrong = [x for x in self.fractions if not 0 < x <= 1]
    if wrong or not self.fractions:
      raise ValueError(
        '--label_fraction must be in (0, 1], as 0.1 for 10 %, got '
        f'{wrong[0] if wrong else "none"}'
      )

  @property
  def is_plain(self) -> bool:
    """True if the result is `eval.json` and its arrays, nothing else."""
    return (
      {*self.modes} == {*result_lib.COMPLETE}
      and {*self.fractions} == {1.0}
      and self.data is None
      and not self.overrides
    )


def evaluate(
  request: Request,
  *,
  on_part: Callable[[result_lib.Result], None] | None = None,
) -> result_lib.Result:
  """Restores a checkpoint and measures its features and embeddings.

  Features are the backbone's output for images without augmentation, with batch
  normalization in evaluation mode. Collapse is measured on the normalized
  embeddings of the test split. The checkpoint does not change.

  Args:
    request: Workdir, checkpoint, modes and data.
    on_part: Function called with each part of the result as soon as it is
      measured, so that a later error does not lose it.

  Returns:
    The measurements of all modes and fractions.

  Raises:
    ValueError: If the workdir holds no run or no such checkpoint, a field of
      the config is wrong, or the data set cannot be read.
    FloatingPointError: If the features are not finite because training
      diverged, or if fine-tuning diverged.
    checkpoint.DamagedCheckpointError: If no checkpoint can be restored.

  Example::

    request = evaluate.Request('runs/digits', modes=('knn',))
    result = evaluate.evaluate(request)
    print(result.measurements[0]['knn_top1'])
  """
  subject = _Subject(request)
  parts = []
  frozen = [mode for mode in request.modes if mode in result_lib.COMPLETE]
  # Last, because it is the slowest.
  tuned = [mode for mode in request.modes if mode not in result_lib.COMPLETE]
  for modes in filter(None, (frozen, tuned)):
    for fraction in request.fractions:
      parts.append(subject.measure(fraction, modes))
      if on_part is not None:
        on_part(parts[-1])
  whole = next((x for x in parts if x.complete is not None), parts[0])
  return dataclasses.replace(
    whole, measurements=[x for part in parts for x in part.measurements]
  )


class _Subject:
  """A restored run and the examples to measure it on."""

  def __init__(self, request):
    workdir = request.workdir
    config = workdir_lib.load_config(workdir)
    own = workdir_lib.to_json(config)['eval']
    config = protocol.with_overrides(config, request.overrides)
    settings = workdir_lib.to_json(config)['eval']
    self._mesh = parallel.make_mesh(request.devices)
    parallel.check_batch_size(config.eval.batch_size, self._mesh)
    given = request.given
    if request.data is not None:
      config, given = _on_other_data(config, request.data)
    self._config = config
    self._readers = protocol.readers(config, given)
    train_labels = self._readers['train'].labels
    chosen = {
      fraction: protocol.labelled(config, train_labels, fraction)
      for fraction in request.fractions
    }
    # Read before the long work, because the file may be damaged.
    known = 0
    if components.uses_labels(config):
      known = workdir_lib.num_labels(workdir)
    self._facts = {
      'other_data': request.data is not None,
      'trained_num_labels': known,
      'eval': settings,
      'eval_changed': {k: v for k, v in settings.items() if v != own[k]},
    }
    self._run = restored.load(
      workdir,
      which=request.which,
      backbone=request.backbone,
      devices=request.devices,
    )
    self._fingerprint = self._hash()
    self._read(request.modes)
    # Rows of the features, without images that cannot be decoded.
    self._rows = {
      fraction: np.flatnonzero(np.isin(self._decoded['train'], positions))
      for fraction, positions in chosen.items()
    }
    if request.data is None and given is None:
      self._warn_of_labels(workdir)
    if 'finetune' in request.modes:
      self._fine_tune = finetune.FineTuning(
        config,
        self._run.experiment.backbone,
        {name: x['backbone'] for name, x in self._run.variables.items()},
        self._readers,
        self._mesh,
      )

  def _hash(self):
    variables = self._run.variables
    return probe.fingerprint((variables['params'], variables['batch_stats']))

  def _read(self, modes):
    """Extracts features if a mode needs them, else only decodes the images."""
    self._features, self._embeddings = {}, {}
    self._labels, self._decoded = {}, {}
    for split, reader in self._readers.items():
      if {*modes} & {*result_lib.COMPLETE}:
        self._features[split], self._embeddings[split], positions = (
          probe.extract(
            self._run.apply,
            protocol.batches(self._config, reader),
            batch_size=self._config.eval.batch_size,
            mesh=self._mesh,
          )
        )
      else:
        positions = protocol.readable(self._config, reader)
      self._decoded[split] = positions
      self._labels[split] = reader.labels[positions]

  def _warn_of_labels(self, workdir):
    known = self._facts['trained_num_labels'] or 0
    fewer = [f'{x:g}' for x, rows in self._rows.items() if known > len(rows)]
    if fewer:
      parallel.warn(
        f'{workdir}: the backbone was trained with {known:,} labels, more than '
        f'--label_fraction={",".join(fewer)} selects, so the accuracy does not '
        'show what training with few labels gives'
      )

  def measure(self, fraction: float, modes: Sequence[str]) -> result_lib.Result:
    """Returns the measurements with a fraction of the labels."""
    found = {mode: self._measure(fraction, mode) for mode in modes}
    complete = arrays = None
    is_own = not self._facts['other_data'] and not self._facts['eval_changed']
    if is_own and fraction == 1 and {*result_lib.COMPLETE} <= found.keys():
      complete, arrays = self._complete(found['linear'], found['knn'])
    return result_lib.Result(
      self._run.step, [*found.values()], complete, arrays
    )

  def _measure(self, fraction, mode):
    rows, data = self._rows[fraction], self._config.data
    try:
      if mode == 'finetune':
        accuracies = self._fine_tune(self._decoded['train'][rows])
      else:
        method = {'linear': protocol.linear, 'knn': protocol.knn}[mode]
        accuracies = method(
          self._config,
          self._features | {'train': self._features['train'][rows]},
          self._labels | {'train': self._labels['train'][rows]},
        )
    except FloatingPointError as error:
      raise FloatingPointError(f'{error} at step {self._run.step}') from error
    if self._hash() != self._fingerprint:
      raise RuntimeError('the parameters changed during the evaluation')
    return {
      'mode': mode,
      **accuracies,
      'data': data.name,
      'data_dir': data.data_dir,
      'train_split': data.train_split,
      'test_split': data.test_split,
      'num_classes': data.num_classes,
      'label_fraction': fraction,
      'num_labels': len(rows),
      'num_test': len(self._labels['test']),
      'num_corrupt': {
        split: len(reader) - len(self._labels[split])
        for split, reader in self._readers.items()
      },
      **self._facts,
      **self._origin(),
    }

  def _complete(self, linear, knn):
    """Returns `Result.complete` and `Result.arrays`."""
    config, labels = self._config, self._labels['test']
    features = jnp.asarray(self._features['test'])
    embeddings = jnp.asarray(self._embeddings['test'])
    unit = collapse.normalize(embeddings)
    prototypes = np.asarray(self._run.prototypes)
    num_classes = len(prototypes)
    between = ~np.eye(num_classes, dtype=bool)
    cosines, angles = (
      np.asarray(measure(unit, labels, num_classes))
      for measure in (collapse.class_mean_cosines, collapse.principal_angles)
    )
    measures = {
      'effective_rank': collapse.effective_rank(unit),
      'effective_rank_centered': collapse.effective_rank(unit, center=True),
      'embedding_variance': collapse.embedding_variance(unit),
      # It normalizes by itself, and keeps more of a tiny spread.
      'embedding_std': collapse.embedding_std(embeddings),
      'prototype_cosine': collapse.prototype_cosine(unit, labels, prototypes),
      'prototype_energy_share': collapse.prototype_energy_share(
        unit, labels, prototypes
      ),
      'class_mean_cosine': np.nanmean(cosines[between]),
      'principal_angle_degrees': np.degrees(np.nanmean(angles[between])),
      'within_between_ratio': collapse.within_between_ratio(
        unit, labels, num_classes
      ),
      'uniformity': collapse.uniformity(embeddings),
      'features_effective_rank': collapse.effective_rank(features),
      'features_within_between_ratio': collapse.within_between_ratio(
        features, labels, num_classes
      ),
    }
    result = {
      **{k: v for k, v in linear.items() if k.startswith('linear_')},
      **{k: v for k, v in knn.items() if k.startswith('knn')},
      **{name: float(value) for name, value in measures.items()},
      'num_train': len(self._labels['train']),
      'num_test': len(labels),
      'config': workdir_lib.to_json(config),
    }
    arrays = {
      'embeddings': np.asarray(unit),
      'labels': labels,
      'spectrum': np.asarray(collapse.singular_values(unit)),
      'class_mean_cosines': cosines,
      'prototypes': prototypes,
    }
    return self._origin() | result, arrays

  def _origin(self):
    kind = self._mesh.devices.flat[0].device_kind
    return {
      'protocol_version': probe.PROTOCOL_VERSION,
      'step': self._run.step,
      'parameters_sha256': self._fingerprint,
      'seed': self._config.seed,
      'commit': build.commit(),
      'versions': {x: importlib.metadata.version(x) for x in _LIBRARIES},
      'device': f'{self._mesh.size} x {kind}',
      'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    }


def _on_other_data(config, data):
  """Returns the config with another data set, and its sources."""
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
