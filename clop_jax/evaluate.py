"""Evaluates the last checkpoint of one or more workdirs.

python -m clop_jax.evaluate --workdir=runs/digits
python -m clop_jax.evaluate --workdir=runs/a --workdir=runs/b --figure=ab.png

Writes `eval.json`, `embeddings.npz` and `figures/embeddings.png` into each
workdir and prints a table. Nothing but the workdir is needed: the config is in
it.
"""

import datetime
import importlib.metadata
import io
import json
import os

from absl import flags
import numpy as np

from clop_jax import collapse
from clop_jax import command
from clop_jax import experiment
from clop_jax import figures
from clop_jax import parallel
from clop_jax import probe
from clop_jax import protocol
from clop_jax import report
from clop_jax import restored
from clop_jax import workdir as workdir_lib
from clop_jax.data import sources

_MAX_ROWS = 2000  # of the embeddings that are kept for figures
_LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


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
  config = workdir_lib.load_config(workdir)
  mesh = parallel.make_mesh(devices)
  parallel.check_batch_size(config.eval.batch_size, mesh)
  readers = protocol.readers(config, given)
  run = restored.load(workdir, which=which, devices=devices)
  before = probe.fingerprint(_frozen_part(run))
  features, embeddings, labels = {}, {}, {}
  for split, reader in readers.items():
    features[split], embeddings[split], labels[split] = protocol.extract(
      config, reader, run.apply, mesh
    )
  try:
    linear = protocol.linear(config, features, labels)
    neighbours = protocol.knn(config, features, labels)
  except FloatingPointError as error:
    raise FloatingPointError(f'{error} at step {run.step}') from error
  if before != probe.fingerprint(_frozen_part(run)):
    raise RuntimeError('the frozen parameters changed during the evaluation')

  unit = collapse.normalize(embeddings['test'])
  prototypes = np.asarray(run.prototypes)
  cosines = np.asarray(
    collapse.class_mean_cosines(unit, labels['test'], len(prototypes))
  )
  result = {
    'protocol_version': probe.PROTOCOL_VERSION,
    'step': run.step,
    **linear,
    **neighbours,
    **_collapse_measures(unit, labels['test'], prototypes, cosines),
    'features_effective_rank': float(collapse.effective_rank(features['test'])),
    'features_within_between_ratio': float(
      collapse.within_between_ratio(
        features['test'], labels['test'], config.data.num_classes
      )
    ),
    'parameters_sha256': before,
    'num_train': len(labels['train']),
    'num_test': len(labels['test']),
    'seed': config.seed,
    'config': workdir_lib.to_json(config),
    'commit': experiment.commit(),
    'versions': {x: importlib.metadata.version(x) for x in _LIBRARIES},
    'device': f'{mesh.size} x {mesh.devices.flat[0].device_kind}',
    'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
  }
  arrays = {
    'embeddings': np.asarray(unit),
    'labels': labels['test'],
    'spectrum': np.asarray(collapse.singular_values(unit)),
    'class_mean_cosines': cosines,
    'prototypes': prototypes,
  }
  return result, arrays


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


def _name(workdir):
  return os.path.basename(os.path.abspath(workdir))


def define_flags() -> None:
  """Defines the command's flags; importing this module defines none."""
  flags.DEFINE_multi_string(
    'workdir', None, 'Workdir of a run; repeat it to compare runs.'
  )
  flags.DEFINE_string(
    'figure', None, 'PNG that compares the runs (several workdirs).'
  )
  flags.DEFINE_string(
    'checkpoint', 'latest', 'latest, best (by train.keep_best) or a step.'
  )


def main() -> None:
  """The command."""
  workdirs, figure = flags.FLAGS.workdir or [], flags.FLAGS.figure
  if not workdirs:
    raise ValueError('--workdir must name the folder of a run, got none')
  for workdir in workdirs:
    workdir_lib.load_config(workdir)  # complain before the first long work
  results, arrays = [], []
  for workdir in workdirs:
    result, run_arrays = evaluate(workdir, which=flags.FLAGS.checkpoint)
    results.append(result)
    arrays.append(run_arrays)
    if not parallel.is_main():
      continue
    write(workdir, result, run_arrays)
    path = os.path.join(workdir, 'figures', 'embeddings.png')
    _draw(path, [workdir], [result], [run_arrays])
  if not parallel.is_main():
    return
  print(report.table([_name(workdir) for workdir in workdirs], results))
  if figure:
    if any(len(a['labels']) != len(arrays[0]['labels']) for a in arrays):
      raise ValueError('--figure compares runs on one data set only')
    _draw(figure, workdirs, results, arrays)


if __name__ == '__main__':
  command.run(main, define_flags)
