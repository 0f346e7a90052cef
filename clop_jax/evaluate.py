r"""Evaluates checkpoints of one or more workdirs.

python -m clop_jax.evaluate --workdir=runs/digits
python -m clop_jax.evaluate --workdir=runs/a --workdir=runs/b --figure=ab.png
python -m clop_jax.evaluate --workdir=runs/digits --checkpoint=all
python -m clop_jax.evaluate --workdir='runs/*' --mode=linear,knn,finetune \\
  --label_fraction=0.01,0.1,0.5,1 --table=few_labels.csv
python -m clop_jax.evaluate --workdir=runs/digits --data=folder \\
  --data_dir=PHOTOS --mode=linear,finetune

Prints one table. The evaluation of the run's own data with all labels is
written into each workdir as `eval.json`, `embeddings.npz` and
`figures/embeddings.png`, anything else as a file of `evaluations/`; see
docs/evaluation.md. Nothing but the workdir is needed: the config is in it.
"""

import ast
import collections
from collections.abc import Callable, Mapping
import dataclasses
import datetime
import functools
import importlib.metadata
import io
import json
import os
import re
import sys
from typing import Any

from absl import flags
from etils import epath
import jax.numpy as jnp
import numpy as np

from clop_jax import checkpoint
from clop_jax import collapse
from clop_jax import command
from clop_jax import experiment
from clop_jax import figures
from clop_jax import inputs
from clop_jax import parallel
from clop_jax import probe
from clop_jax import protocol
from clop_jax import report
from clop_jax import restored
from clop_jax import workdir as workdir_lib
from clop_jax.data import sources

_MAX_ROWS = 2000  # of the embeddings that are kept for figures
_LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
MODES = ('linear', 'knn', 'finetune')
_COMPLETE = ('linear', 'knn')  # what eval.json has, with all labels
FOLDER = 'evaluations'  # of a workdir


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
  modes: tuple[str, ...] = _COMPLETE,
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
  _check_modes(modes, fractions)
  config = workdir_lib.load_config(workdir)
  own = workdir_lib.to_json(config)['eval']
  config = protocol.with_settings(config, settings or {})
  used = workdir_lib.to_json(config)['eval']
  changed = {name: used[name] for name in used if used[name] != own[name]}
  mesh = parallel.make_mesh(devices)
  parallel.check_batch_size(config.eval.batch_size, mesh)
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
  run = restored.load(workdir, which=which, devices=devices)
  before = probe.fingerprint(_frozen_part(run))
  features, embeddings, labels, decoded = {}, {}, {}, {}
  for split, (source, known) in examples.items():
    reader = protocol.reader(config, source, known)
    if {*modes} & {*_COMPLETE}:
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
  trained_num_labels = 0
  if config.loss.clop_weight or config.loss.contrastive == 'supcon':
    trained_num_labels = workdir_lib.num_labels(workdir)
  if data is None and given is None:
    _warn_of_labels(workdir, trained_num_labels, chosen)
  fine_tune: Any = None
  if 'finetune' in modes:
    variables = {name: part['backbone'] for name, part in run.variables.items()}
    fine_tune = protocol.FineTuning(
      config, run.experiment.backbone, variables, examples, mesh
    )
  origin = {
    'commit': experiment.commit(),
    'versions': {x: importlib.metadata.version(x) for x in _LIBRARIES},
    'device': f'{mesh.size} x {mesh.devices.flat[0].device_kind}',
  }

  def figures_of(mode, fraction):
    """Measures and checks; the mode's figures."""
    numbers = chosen[fraction]
    try:
      if mode == 'finetune':
        found = fine_tune(numbers)
      else:
        measured = {'linear': protocol.linear, 'knn': protocol.knn}[mode]
        rows = np.searchsorted(decoded['train'], numbers)
        found = measured(config, *_some(features, labels, rows))
    except FloatingPointError as error:
      raise FloatingPointError(f'{error} at step {run.step}') from error
    if before != probe.fingerprint(_frozen_part(run)):
      raise RuntimeError('the frozen parameters changed during the evaluation')
    return found

  def measurement(mode, fraction, found):
    return {
      'mode': mode,
      'protocol_version': probe.PROTOCOL_VERSION,
      'step': run.step,
      **found,
      'data': config.data.name,
      'data_dir': config.data.data_dir,
      'train_split': config.data.train_split,
      'test_split': config.data.test_split,
      'other_data': data is not None,
      'num_classes': config.data.num_classes,
      'label_fraction': fraction,
      'num_labels': len(chosen[fraction]),
      'trained_num_labels': trained_num_labels,
      'num_test': len(labels['test']),
      'num_corrupt': {
        split: len(known) - len(decoded[split])
        for split, (_, known) in examples.items()
      },
      'parameters_sha256': before,
      'seed': config.seed,
      'eval': used,
      'eval_changed': changed,
      **origin,
      'time': _now(),
    }

  has_complete = {*_COMPLETE} <= {*modes} and 1 in fractions
  has_complete = has_complete and data is None and not changed
  complete = arrays = None
  found, waiting, done = {}, [], {}
  # What takes long comes last.
  order = sorted(
    ((mode, fraction) for fraction in fractions for mode in modes),
    key=lambda pair: pair[0] == 'finetune',
  )
  for mode, fraction in order:
    found[mode, fraction] = figures_of(mode, fraction)
    made = measurement(mode, fraction, found[mode, fraction])
    done[mode, fraction] = made
    part = Evaluation(run.step, [made])
    if has_complete and fraction == 1 and mode in _COMPLETE:
      waiting.append(made)
      if len(waiting) < len(_COMPLETE):
        continue
      complete, arrays = _complete(
        config, run, features['test'], embeddings['test'], labels, found
      )
      complete |= {'parameters_sha256': before, **origin, 'time': _now()}
      part = Evaluation(run.step, waiting, complete, arrays)
    if keep is not None:
      keep(part)
  measurements = [done[mode, x] for x in fractions for mode in modes]
  return Evaluation(run.step, measurements, complete, arrays)


def _now():
  return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')


def _complete(config, run, features, embeddings, labels, found):
  """What `eval.json` gets but for its origin, and the arrays for figures."""
  test_labels = jnp.asarray(labels['test'])
  test_features = jnp.asarray(features)
  unit = collapse.normalize(jnp.asarray(embeddings))
  prototypes = np.asarray(run.prototypes)
  cosines = np.asarray(
    collapse.class_mean_cosines(unit, test_labels, len(prototypes))
  )
  result = {
    'protocol_version': probe.PROTOCOL_VERSION,
    'step': run.step,
    **found['linear', 1],
    **found['knn', 1],
    **_collapse_measures(unit, test_labels, prototypes, cosines),
    'features_effective_rank': float(collapse.effective_rank(test_features)),
    'features_within_between_ratio': float(
      collapse.within_between_ratio(
        test_features, test_labels, config.data.num_classes
      )
    ),
    'num_train': len(labels['train']),
    'num_test': len(labels['test']),
    'seed': config.seed,
    'config': workdir_lib.to_json(config),
  }
  arrays = {
    'embeddings': np.asarray(unit),
    'labels': labels['test'],
    'spectrum': np.asarray(collapse.singular_values(unit)),
    'class_mean_cosines': cosines,
    'prototypes': prototypes,
  }
  return result, arrays


def _check_modes(modes, fractions):
  unknown = [mode for mode in modes if mode not in MODES]
  if unknown or not modes:
    got = f'{unknown[0]!r}' if unknown else 'none'
    raise ValueError(f'--mode must be some of {", ".join(MODES)}; got {got}')
  if not fractions:
    raise ValueError('--label_fraction must hold at least one number, got none')


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
      raise ValueError(
        f'--data={data.name} --{split}_split={name}: {error}'
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


def _some(features, labels, rows):
  """Features and labels, of the training split some rows."""
  if 'train' not in features or len(rows) == len(labels['train']):
    return features, labels
  return tuple(
    both | {'train': both['train'][rows]} for both in (features, labels)
  )


def _warn_of_labels(workdir, trained, chosen):
  fewer = [f'{x:g}' for x, few in chosen.items() if (trained or 0) > len(few)]
  if fewer:
    _warn(
      f'{workdir}: its training knew {trained:,} labels, more than '
      f'--label_fraction={",".join(fewer)} gives; these are not figures of a '
      'network that saw so few'
    )


def _frozen_part(run):
  return run.variables['params'], run.variables['batch_stats']


def _collapse_measures(unit, labels, prototypes, cosines):
  """Measures of the normalized test embeddings, as plain numbers."""
  num_classes = len(prototypes)
  angles = collapse.principal_angles(unit, labels, num_classes)
  between = ~np.eye(num_classes, dtype=bool)
  measures = {
    'effective_rank': collapse.effective_rank(unit),
    'effective_rank_centered': collapse.effective_rank(unit, center=True),
    'embedding_variance': collapse.embedding_variance(unit),
    'embedding_std': collapse.embedding_std(unit),
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
    'uniformity': collapse.uniformity(unit),
  }
  return {name: float(value) for name, value in measures.items()}


def write(workdir: str, result: dict, arrays: dict) -> None:
  """Writes what `evaluate` returned: `eval.json` and `embeddings.npz`.

  Args:
    workdir: of the run.
    result: for `eval.json`.
    arrays: for `embeddings.npz`: all as they are, but of the `embeddings`
      (as float16) and `labels` at most 2,000 rows, evenly spaced.
  """
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
  workdir_lib.write_whole(
    os.path.join(workdir, 'embeddings.npz'), packed.getvalue()
  )
  # Last: where it is, the rest is as well.
  text = json.dumps(result, indent=2) + '\n'
  workdir_lib.write_whole(os.path.join(workdir, 'eval.json'), text.encode())


def write_measurement(workdir: str, measurement: dict) -> None:
  """Writes one of `Evaluation.measurements` into the folder `evaluations`."""
  place = measurement['data']
  if measurement['other_data']:
    place = [measurement[x] for x in ('data', 'train_split', 'test_split')]
    if measurement['data'] in sources.WITHOUT_PREPARING:
      place.insert(1, _name(measurement['data_dir'] or ''))
    place = '-'.join(filter(None, place))
  name = '_'.join(
    [
      f'step{measurement["step"]}',
      # A part of a split, as train[:10%], is no name for a file.
      re.sub(r'[^\w.+-]+', '-', place),
      measurement['mode'],
      f'{measurement["label_fraction"]:g}',
      *(
        re.sub(r'[^\w.+-]+', '-', f'{field}={value}').strip('-')
        for field, value in measurement['eval_changed'].items()
      ),
    ]
  )
  _write_json(os.path.join(workdir, FOLDER, f'{name}.json'), measurement)


def _write_json(path, content):
  epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps(content, indent=2) + '\n'
  workdir_lib.write_whole(path, text.encode())


def _keep(workdir, which, newest, found):
  """Writes a part of what was measured of a checkpoint into its workdir."""
  if not parallel.is_main():
    return
  complete = found.complete
  # 'latest' is the newest that is whole.
  if complete is not None and (which == 'latest' or found.step == newest):
    write(workdir, complete, found.arrays)
    path = os.path.join(workdir, 'figures', 'embeddings.png')
    _draw(path, [workdir], [complete], [found.arrays])
  elif complete is not None:
    path = os.path.join(workdir, FOLDER, f'step{found.step}.json')
    _write_json(path, complete)
  else:
    for measurement in found.measurements:
      write_measurement(workdir, measurement)


def _draw(path, workdirs, results, arrays):
  figures.embedding_figure(
    path,
    [_name(workdir) for workdir in workdirs],
    [a['embeddings'] for a in arrays],
    arrays[0]['labels'],
    [a['spectrum'] for a in arrays],
    [result['effective_rank'] for result in results],
  )
  print(f'figure: {path}')


def _name(path):
  return os.path.basename(os.path.abspath(path)) if path else ''


def _named(paths):
  """`(name, workdir)` of all runs that the flags name, each once."""
  workdirs = {}
  for path in paths:
    found = workdir_lib.find(path)
    if len(found) == 1:
      workdir_lib.load_config(found[0])  # complain before the first long work
      trained = found
    else:
      trained = [workdir for workdir in found if _is_trained(workdir)]
    if not trained:
      raise ValueError(f'--workdir={path} holds no run with a checkpoint')
    for workdir in trained:
      remote = '://' in workdir
      workdirs.setdefault(
        workdir if remote else os.path.abspath(workdir), workdir
      )
  if len(workdirs) == 1:
    return [(_name(workdir), workdir) for workdir in workdirs.values()]
  try:
    shared = os.path.commonpath(workdirs)
  except ValueError:  # some are remote and some are not
    return [(workdir, workdir) for workdir in workdirs.values()]
  return [
    (place[len(shared) :].lstrip('/'), workdir)
    for place, workdir in workdirs.items()
  ]


def _is_trained(workdir):
  try:
    restored.steps(workdir)
  except ValueError as error:
    _warn(f'{error}; it is left out')
    return False
  return True


def _rows(name, found):
  """The table's rows of a checkpoint, one for each fraction of the labels."""
  rows = collections.defaultdict(dict)
  for measurement in found.measurements:
    mode, fraction = measurement['mode'], measurement['label_fraction']
    row = rows[fraction]
    row |= {'run': name} | {
      key: measurement[key]
      for key in ('step', 'data', 'label_fraction', 'num_labels')
    }
    row[f'{mode}_top1'] = measurement[f'{mode}_top1']
    if fraction == 1 and found.complete is not None:
      row['effective_rank'] = found.complete['effective_rank']
      row['prototype_cosine'] = found.complete['prototype_cosine']
  return list(rows.values())


def _warn(message):
  if parallel.is_main():
    print(f'warning: {message}', file=sys.stderr, flush=True)


def define_flags() -> None:
  """Defines the command's flags; importing this module defines none."""
  flags.DEFINE_multi_string(
    'workdir',
    None,
    'Workdir of a run, a folder of workdirs (of a study, for example) or a '
    "pattern ('runs/*'); repeat it to compare runs.",
  )
  flags.DEFINE_string(
    'figure', None, 'PNG that compares the runs (several workdirs).'
  )
  flags.DEFINE_string(
    'checkpoint',
    'latest',
    'latest, best (by train.keep_best), a step, or all there are.',
  )
  flags.DEFINE_multi_string(
    'mode',
    list(_COMPLETE),
    'linear, knn, finetune: some of them, with commas or repeated.',
  )
  flags.DEFINE_list(
    'label_fraction', ['1'], 'Of the training labels, as 0.01,0.1,0.5,1.'
  )
  flags.DEFINE_string(
    'data', None, 'Another data set than the one of the training, by name.'
  )
  flags.DEFINE_string('data_dir', None, 'Of --data, as config.data.data_dir.')
  flags.DEFINE_string('train_split', None, 'Of --data; default: train.')
  flags.DEFINE_string('test_split', None, 'Of --data; default: test.')
  flags.DEFINE_multi_string(
    'eval',
    [],
    "Another value than the run's of a field of config.eval, as "
    'finetune_epochs=5 or finetune_learning_rates=0.01,0.1; may be repeated.',
  )
  flags.DEFINE_string('table', None, 'The table as a file, too: .csv or .md.')


def _asked():
  """Modes, fractions and data of the flags, checked."""
  values = flags.FLAGS
  modes = [x.strip() for text in values.mode for x in text.split(',')]
  modes = tuple(mode for mode in MODES if mode in modes) + tuple(
    mode for mode in modes if mode not in MODES
  )
  try:
    fractions = tuple(dict.fromkeys(map(float, values.label_fraction)))
  except ValueError as error:
    raise ValueError(
      '--label_fraction must be numbers in (0, 1], as 0.01,0.1,1; got '
      f'{",".join(values.label_fraction)}'
    ) from error
  _check_modes(modes, fractions)
  wrong = [fraction for fraction in fractions if not 0 < fraction <= 1]
  if wrong:
    raise ValueError(
      f'--label_fraction must be in (0, 1], as 0.1 for 10 %, got {wrong[0]}'
    )
  of_data = {
    name: values[name].value
    for name in ('data_dir', 'train_split', 'test_split')
    if values[name].value is not None
  }
  if not values.data and of_data:
    raise ValueError(
      f'--{next(iter(of_data))} goes with --data=NAME, got no --data; the '
      "run's own data are what its config says"
    )
  data = OtherData(values.data, **of_data) if values.data else None
  return modes, fractions, data


def _settings():
  """The values of --eval by field."""
  found = {}
  for text in flags.FLAGS.eval:
    name, _, value = text.partition('=')
    try:
      found[name] = ast.literal_eval(
        value.title() if value in ('true', 'false') else value
      )
    except (ValueError, SyntaxError) as error:
      raise ValueError(
        f'--eval={text} must be FIELD=VALUE, as finetune_epochs=5'
      ) from error
  return found


def main() -> None:
  """The command."""
  paths, figure = flags.FLAGS.workdir or [], flags.FLAGS.figure
  table, which = flags.FLAGS.table, flags.FLAGS.checkpoint
  if not paths:
    raise ValueError('--workdir must name the folder of a run, got none')
  modes, fractions, data = _asked()
  is_plain = (modes, fractions, data) == (_COMPLETE, (1.0,), None)
  settings = _settings()
  is_plain = is_plain and which != 'all' and not settings
  if figure and not is_plain:
    raise ValueError(
      '--figure compares runs by their embeddings, one checkpoint each; leave '
      'out --mode, --label_fraction, --data, --eval and --checkpoint=all'
    )
  if table:
    report.check_table(table)
  runs = _named(paths)
  jobs = []
  for name, workdir in runs:
    protocol.with_settings(workdir_lib.load_config(workdir), settings)
    steps = restored.check(workdir, which)
    for chosen in steps if which == 'all' else [which]:
      jobs.append((name, workdir, str(chosen), steps[-1]))

  names, done, rows, failures = [], [], [], []
  try:
    for name, workdir, checkpoint_name, newest in jobs:
      try:
        found = measure(
          workdir,
          modes=modes,
          fractions=fractions,
          data=data,
          settings=settings,
          which=checkpoint_name,
          keep=functools.partial(_keep, workdir, checkpoint_name, newest),
        )
      except (FloatingPointError, checkpoint.DamagedCheckpointError) as error:
        if len(jobs) == 1:
          raise
        _warn(f'{name}: {error}; it is left out of the table')
        failures.append(error)
        continue
      names.append(name)
      done.append(found)
      rows += _rows(name, found)
  finally:
    # Also when the next one could not be measured.
    if parallel.is_main() and done:
      if is_plain:
        text = report.table(names, [found.complete for found in done])
      else:
        text = report.evaluation_table(rows)
      print(text)
      if table:
        report.write_table(table, text, rows)
  if parallel.is_main() and figure and done:
    arrays = [found.arrays for found in done]
    if any(len(a['labels']) != len(arrays[0]['labels']) for a in arrays):
      raise ValueError('--figure compares runs on one data set only')
    # The runs' folders by name, as the table has them.
    _draw(figure, names, [found.complete for found in done], arrays)
  if failures:
    raise FloatingPointError(
      f'{len(failures)} of {len(jobs)} checkpoints could not be evaluated, the '
      f'first because {failures[0]}'
    )


if __name__ == '__main__':
  command.run(main, define_flags)
