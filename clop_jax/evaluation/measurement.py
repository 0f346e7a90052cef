"""Evaluation of a checkpoint: one request in, one result out."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import datetime
import importlib.metadata
import io
import itertools
import json
import os
import re
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from clop_jax import collapse
from clop_jax.data import sources
from clop_jax.evaluation import finetune
from clop_jax.evaluation import probe
from clop_jax.evaluation import protocol
from clop_jax.experiment import build
from clop_jax.experiment import inputs
from clop_jax.experiment import restored
from clop_jax.experiment import workdir as workdir_lib
from clop_jax.runtime import files
from clop_jax.runtime import parallel

_LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
_MAX_ROWS = 2000  # of the embeddings that are kept for figures
MODES = ('linear', 'knn', 'finetune')
COMPLETE = ('linear', 'knn')  # in eval.json, with all labels
FOLDER = 'evaluations'  # of a workdir


@dataclasses.dataclass(frozen=True)
class OtherData:
  """Another data set than the one that a run was trained on.

  Attributes:
    name: Name, as in `config.data.name`.
    data_dir: Folder or file, as in `config.data.data_dir`.
    train_split: Split to learn from.
    test_split: Split to measure.
  """

  name: str
  data_dir: str | None = None
  train_split: str = 'train'
  test_split: str = 'test'


@dataclasses.dataclass(frozen=True)
class Request:
  """An evaluation to make.

  Attributes:
    workdir: Workdir of a run.
    which: Checkpoint: 'latest', 'best' (by `train.keep_best`) or a step.
    modes: Modes, of 'linear', 'knn' and 'finetune'.
    fractions: Fractions of the training labels, see `protocol.labelled`.
    data: Another data set to learn from and to measure; None is the run's own.
    given: Examples as 'train' and 'test' that take the place of a data set.
    overrides: Other values of `config.eval` than the run's, by name, as
      `{'eval.finetune_epochs': 5}`.
    devices: Devices, by default all of all processes.
  """

  workdir: str
  which: str = 'latest'
  modes: Sequence[str] = COMPLETE
  fractions: Sequence[float] = (1.0,)
  data: OtherData | None = None
  given: Mapping[str, sources.Source] | None = None
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  devices: Sequence[jax.Device] | None = None

  def __post_init__(self):
    unknown = [mode for mode in self.modes if mode not in MODES]
    if unknown or not self.modes:
      got = f'{unknown[0]!r}' if unknown else 'none'
      raise ValueError(f'--mode must be some of {", ".join(MODES)}; got {got}')
    if not self.fractions:
      raise ValueError('--label_fraction must hold a number, got none')
    for fraction in self.fractions:
      protocol.check_fraction(fraction)

  @property
  def is_plain(self) -> bool:
    """True if the request is for what `eval.json` holds and nothing else."""
    return (
      {*self.modes} == {*COMPLETE}
      and {*self.fractions} == {1.0}
      and self.data is None
      and not self.overrides
    )


@dataclasses.dataclass(frozen=True)
class Result:
  """Measurements of a checkpoint.

  Attributes:
    step: Step of the checkpoint.
    measurements: Measurements, one for each mode and fraction: the figures of
      the mode, the data and the settings.
    complete: Content of `eval.json`; None unless the request had the run's own
      data and settings, all labels and both modes of frozen features.
    arrays: Arrays of the test split for figures; None if `complete` is.
      Normalized `embeddings` `[n, dim]`, `labels` `[n]`, singular values
      `spectrum` `[min(n, dim)]`, `class_mean_cosines` `[num_classes,
      num_classes]`, and the `prototypes` `[num_classes, dim]`.
  """

  step: int
  measurements: list[dict]
  complete: Any = None
  arrays: Any = None

  def write(self, folder: str, *, newest: bool = True) -> None:
    """Writes the result into the workdir or another folder.

    `complete` becomes `eval.json` and `embeddings.npz` (at most 2,000
    embeddings, evenly spaced), everything else a file in `evaluations/`.

    Args:
      folder: Folder, which is made if it is missing.
      newest: False for an older checkpoint, whose `complete` goes into
        `evaluations/` as well.

    Raises:
      OSError: If a file cannot be written.
    """
    others = self.measurements
    if self.complete is not None:
      others = [
        x
        for x in others
        if x['mode'] not in COMPLETE or x['label_fraction'] != 1
      ]
    for measurement in others:
      _write_json(folder, f'{FOLDER}/{_file_name(measurement)}', measurement)
    if self.complete is not None and newest:
      path = os.path.join(folder, 'embeddings.npz')
      epath.Path(folder).mkdir(parents=True, exist_ok=True)
      files.write_whole(path, _packed(self.arrays))
      # Last, so that the other files exist wherever this one does.
      _write_json(folder, 'eval.json', self.complete)
    elif self.complete is not None:
      name = f'{FOLDER}/step{self.step}.json'
      _write_json(folder, name, self.complete)


def evaluate(
  request: Request, *, on_part: Callable[[Result], None] | None = None
) -> Result:
  """Restores a run and measures it.

  Features are the backbone's output without augmentation, with batch
  normalization in evaluation mode. Measures of embeddings are those of the
  normalized embeddings of the test split.

  Args:
    request: Request.
    on_part: Function that receives each part of the result as soon as it is
      measured, so that a later error does not lose it.

  Returns:
    The result. The weights of the checkpoint are the same before and after.

  Raises:
    ValueError: If the workdir is missing or holds no run or no such checkpoint,
      a field of the config is wrong, or another data set cannot be read.
    FloatingPointError: If the features are not finite because the training
      diverged, or if fine-tuning diverged.
    checkpoint.DamagedCheckpointError: If no checkpoint can be restored.
  """
  subject = _Subject(request)
  has_complete = subject.is_plain and {*COMPLETE} <= {*request.modes}
  complete = arrays = None
  done = {}
  pairs = [*itertools.product(request.fractions, request.modes)]
  # Fine-tuning is the slowest and comes last.
  for fraction, mode in sorted(pairs, key=lambda pair: pair[1] == 'finetune'):
    done[fraction, mode] = subject.measure(fraction, mode)
    part = Result(subject.run.step, [done[fraction, mode]])
    if has_complete and fraction == 1 and mode in COMPLETE:
      if any((fraction, x) not in done for x in COMPLETE):
        continue
      both = [done[fraction, x] for x in COMPLETE]
      complete, arrays = subject.complete(*both)
      part = Result(subject.run.step, both, complete, arrays)
    if on_part is not None:
      on_part(part)
  measurements = [done[pair] for pair in pairs]
  return Result(subject.run.step, measurements, complete, arrays)


class _Subject:
  """A restored run with the examples to measure it on.

  Attributes:
    run: Run, see `restored.load`.
    is_plain: True for the run's own data and settings.
  """

  def __init__(self, request: Request):
    """Refuses what cannot be measured, then restores and reads."""
    workdir = request.workdir
    config = workdir_lib.load_config(workdir)
    own = workdir_lib.to_json(config)['eval']
    config = protocol.with_overrides(config, request.overrides)
    used = workdir_lib.to_json(config)['eval']
    changed = {name: used[name] for name in used if used[name] != own[name]}
    self._mesh = parallel.make_mesh(request.devices)
    parallel.check_batch_size(config.eval.batch_size, self._mesh)
    given = request.given
    if request.data is not None:
      config, given = _on_other_data(config, request.data)
    self._config = config
    self._readers = protocol.readers(config, given)
    chosen = {
      fraction: protocol.labelled(
        config, self._readers['train'].labels, fraction
      )
      for fraction in request.fractions
    }
    # Before the long work, because the file may be damaged.
    known: int | None = 0
    if config.loss.clop_weight or config.loss.contrastive == 'supcon':
      known = workdir_lib.num_labels(workdir)
    self.run = restored.load(
      workdir, which=request.which, devices=request.devices
    )
    self._frozen = probe.fingerprint(self._variables())
    self._read(request.modes)
    self._chosen = {
      fraction: _decoded(positions, self._decoded['train'], fraction)
      for fraction, positions in chosen.items()
    }
    if request.data is None and request.given is None:
      _warn_of_labels(workdir, known, self._chosen)
    if 'finetune' in request.modes:
      self._fine_tune = self._fine_tuning()
    self.is_plain = request.data is None and not changed
    self._facts = {
      'other_data': request.data is not None,
      'trained_num_labels': known,
      'eval': used,
      'eval_changed': changed,
    }

  def _variables(self):
    return self.run.variables['params'], self.run.variables['batch_stats']

  def _read(self, modes):
    """Reads the images, and extracts what the modes need."""
    config = self._config
    self._features, self._embeddings = {}, {}
    self._labels, self._decoded = {}, {}
    for split, reader in self._readers.items():
      if {*modes} & {*COMPLETE}:
        self._features[split], self._embeddings[split], positions = (
          probe.extract(
            self.run.apply,
            protocol.batches(config, reader),
            batch_size=config.eval.batch_size,
            mesh=self._mesh,
          )
        )
      else:
        positions = protocol.readable(config, reader)
      self._decoded[split] = positions
      self._labels[split] = reader.labels[positions]

  def _fine_tuning(self):
    return finetune.FineTuning(
      self._config,
      self.run.experiment.backbone,
      {name: part['backbone'] for name, part in self.run.variables.items()},
      self._readers,
      self._mesh,
    )

  def measure(self, fraction: float, mode: str) -> dict[str, Any]:
    """Returns one of `Result.measurements`."""
    positions = self._chosen[fraction]
    try:
      if mode == 'finetune':
        figures = self._fine_tune(positions)
      else:
        method = {'linear': protocol.linear, 'knn': protocol.knn}[mode]
        rows = np.searchsorted(self._decoded['train'], positions)
        figures = method(
          self._config,
          self._features | {'train': self._features['train'][rows]},
          self._labels | {'train': self._labels['train'][rows]},
        )
    except FloatingPointError as error:
      raise FloatingPointError(f'{error} at step {self.run.step}') from error
    if self._frozen != probe.fingerprint(self._variables()):
      raise RuntimeError('the frozen parameters changed during the evaluation')
    data = self._config.data
    return {
      'mode': mode,
      'protocol_version': probe.PROTOCOL_VERSION,
      'step': self.run.step,
      **figures,
      'data': data.name,
      'data_dir': data.data_dir,
      'train_split': data.train_split,
      'test_split': data.test_split,
      'num_classes': data.num_classes,
      'label_fraction': fraction,
      'num_labels': len(positions),
      'num_test': len(self._labels['test']),
      'num_corrupt': {
        split: len(reader) - len(self._labels[split])
        for split, reader in self._readers.items()
      },
      **self._facts,
      **self._origin(),
    }

  def complete(self, linear: dict, knn: dict) -> tuple[dict, dict]:
    """Returns `Result.complete` and `Result.arrays`."""
    config, labels = self._config, jnp.asarray(self._labels['test'])
    features = jnp.asarray(self._features['test'])
    embeddings = jnp.asarray(self._embeddings['test'])
    unit = collapse.normalize(embeddings)
    prototypes = np.asarray(self.run.prototypes)
    cosines = np.asarray(
      collapse.class_mean_cosines(unit, labels, len(prototypes))
    )
    result = {
      'protocol_version': probe.PROTOCOL_VERSION,
      'step': self.run.step,
      **{k: v for k, v in linear.items() if k.startswith('linear_')},
      **{k: v for k, v in knn.items() if k.startswith('knn')},
      **_collapse_measures(embeddings, labels, prototypes, cosines),
      'features_effective_rank': float(collapse.effective_rank(features)),
      'features_within_between_ratio': float(
        collapse.within_between_ratio(features, labels, config.data.num_classes)
      ),
      'num_train': len(self._labels['train']),
      'num_test': len(labels),
      'config': workdir_lib.to_json(config),
      **self._origin(),
    }
    arrays = {
      'embeddings': np.asarray(unit),
      'labels': self._labels['test'],
      'spectrum': np.asarray(collapse.singular_values(unit)),
      'class_mean_cosines': cosines,
      'prototypes': prototypes,
    }
    return result, arrays

  def _origin(self):
    kind = self._mesh.devices.flat[0].device_kind
    return {
      'parameters_sha256': self._frozen,
      'seed': self._config.seed,
      'commit': build.commit(),
      'versions': {x: importlib.metadata.version(x) for x in _LIBRARIES},
      'device': f'{self._mesh.size} x {kind}',
      'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    }


def _on_other_data(config, data):
  """Returns the config with another data set, and its examples."""
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
  """Returns the chosen positions without those that cannot be decoded."""
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
      f'{workdir}: training used {trained:,} labels, more than '
      f'--label_fraction={",".join(fewer)} gives; these are not figures of a '
      'network that saw so few'
    )


def _collapse_measures(embeddings, labels, prototypes, cosines):
  """Returns measures of the normalized test embeddings as plain numbers."""
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


def _file_name(measurement):
  """Returns the name of a measurement's file: what was measured, and how."""
  place = [measurement['data']]
  if measurement['other_data']:
    if measurement['data'] in sources.WITHOUT_PREPARING:
      path = measurement['data_dir'] or ''
      place.append(path and os.path.basename(os.path.abspath(path)))
    place += [measurement['train_split'], measurement['test_split']]
  parts = [
    '-'.join(filter(None, place)),
    measurement['mode'],
    f'{measurement["label_fraction"]:g}',
    *(f'{k}={v}'.strip('[]') for k, v in measurement['eval_changed'].items()),
  ]
  # Neither a part of a split, as train[:10%], nor a list belongs in a name.
  parts = [re.sub(r'[^\w.+-]+', '-', part) for part in parts]
  return f'step{measurement["step"]}_{"_".join(parts)}.json'


def _packed(arrays):
  count = len(arrays['labels'])
  shown = np.linspace(0, count - 1, min(count, _MAX_ROWS)).round().astype(int)
  packed = io.BytesIO()
  np.savez_compressed(
    packed,
    embeddings=arrays['embeddings'][shown].astype(np.float16),
    labels=arrays['labels'][shown].astype(np.int32),
    spectrum=arrays['spectrum'].astype(np.float32),
    class_mean_cosines=arrays['class_mean_cosines'].astype(np.float32),
    prototypes=arrays['prototypes'].astype(np.float32),
  )
  return packed.getvalue()


def _write_json(folder, name, content):
  path = os.path.join(folder, name)
  epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps(content, indent=2) + '\n'
  files.write_whole(path, text.encode())
