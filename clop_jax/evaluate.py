r"""Evaluates checkpoints of one or more workdirs.

python -m clop_jax.evaluate --workdir=runs/digits
python -m clop_jax.evaluate --workdir=runs/a --workdir=runs/b --figure=ab.png
python -m clop_jax.evaluate --workdir=runs/digits --checkpoint=all
python -m clop_jax.evaluate --workdir='runs/*' --mode=linear,knn,finetune \\
  --label_fraction=0.01,0.1,0.5,1 --table=few_labels.csv
python -m clop_jax.evaluate --workdir=runs/digits --data=folder \\
  --data_dir=PHOTOS --mode=linear,finetune --eval=finetune_epochs=10

Prints one table. The evaluation of the run's own data with all labels is
written into each workdir as `eval.json`, `embeddings.npz` and
`figures/embeddings.png`, anything else as a file of `evaluations/`; see
docs/evaluation.md. Nothing but the workdir is needed: the config is in it.
"""

import ast
import collections
import functools
import os
import sys

from absl import flags
import jax

from clop_jax import checkpoint
from clop_jax import command
from clop_jax import evaluation_files
from clop_jax import figures
from clop_jax import measurement
from clop_jax import parallel
from clop_jax import protocol
from clop_jax import report
from clop_jax import restored
from clop_jax import workdir as workdir_lib

# What scripts use of these modules, under the command's name.
Evaluation = measurement.Evaluation
OtherData = measurement.OtherData
evaluate = measurement.evaluate
measure = measurement.measure
write = evaluation_files.write
write_measurement = evaluation_files.write_measurement

# What one run can fail by while others can be measured: it diverged, its
# checkpoint is damaged, its data are gone.
_OF_ONE_RUN = (
  FloatingPointError,
  checkpoint.DamagedCheckpointError,
  ValueError,
  OSError,
)


def _is_everywhere(error):
  """Whether all processes have this error, and go on to the next run alike."""
  alike = (FloatingPointError, checkpoint.DamagedCheckpointError)
  return jax.process_count() == 1 or isinstance(error, alike)


def _keep(workdir, which, newest, told, found):
  """Writes a part of what was measured of a checkpoint into its workdir.

  And tells of it under the name `told`, unless that is None.
  """
  if not parallel.is_main():
    return
  complete = found.complete
  # 'latest' is the newest that is whole.
  if complete is not None and (which == 'latest' or found.step == newest):
    write(workdir, complete, found.arrays)
    path = os.path.join(workdir, 'figures', 'embeddings.png')
    _draw(path, [workdir], [complete], [found.arrays])
  elif complete is not None:
    evaluation_files.write_older(workdir, complete)
  else:
    for made in found.measurements:
      write_measurement(workdir, made)
  if told is not None:
    for made in found.measurements:
      mode, fraction = made['mode'], made['label_fraction']
      print(
        f'{told}, step {found.step}: {mode} with {fraction:.4g} of the labels: '
        f'top-1 {made[f"{mode}_top1"]:.4f}',
        file=sys.stderr,
        flush=True,
      )


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
  # One may be within another one.
  names = [os.path.relpath(place, shared) for place in workdirs]
  return [
    (_name(workdir) if name == '.' else name, workdir)
    for name, workdir in zip(names, workdirs.values(), strict=True)
  ]


def _is_trained(workdir):
  try:
    restored.steps(workdir)
  except ValueError as error:
    parallel.warn(f'{error}; it is left out')
    return False
  return True


def _rows(name, found):
  """The table's rows of a checkpoint, one for each fraction of the labels."""
  rows = collections.defaultdict(dict)
  for made in found.measurements:
    mode, fraction = made['mode'], made['label_fraction']
    row = rows[fraction]
    row |= {'run': name} | {
      key: made[key] for key in ('step', 'data', 'label_fraction', 'num_labels')
    }
    row[f'{mode}_top1'] = made[f'{mode}_top1']
    if fraction == 1 and found.complete is not None:
      row['effective_rank'] = found.complete['effective_rank']
      row['prototype_cosine'] = found.complete['prototype_cosine']
  return list(rows.values())


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
    list(measurement.COMPLETE),
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
  modes = tuple(mode for mode in measurement.MODES if mode in modes) + tuple(
    mode for mode in modes if mode not in measurement.MODES
  )
  try:
    fractions = tuple(dict.fromkeys(map(float, values.label_fraction)))
  except ValueError as error:
    raise ValueError(
      '--label_fraction must be numbers in (0, 1], as 0.01,0.1,1; got '
      f'{",".join(values.label_fraction)}'
    ) from error
  measurement.check_asked(modes, fractions)
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
  is_plain = (modes, fractions, data) == (measurement.COMPLETE, (1.0,), None)
  settings = _settings()
  is_plain = is_plain and which != 'all' and not settings
  if figure and not is_plain:
    raise ValueError(
      '--figure compares runs by their embeddings, one checkpoint each; leave '
      'out --mode, --label_fraction, --data, --eval and --checkpoint=all'
    )
  if figure:
    figures.check_path(figure, 'figure')
  if table:
    report.check_table(table)
  runs = _named(paths)
  jobs = []
  for name, workdir in runs:
    protocol.with_settings(workdir_lib.load_config(workdir), settings)
    steps = restored.check(workdir, which)
    for chosen in steps if which == 'all' else [which]:
      jobs.append((name, workdir, str(chosen), steps[-1]))

  # What takes long says how far it is; the plain one does by its figures.
  tells = not is_plain
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
          keep=functools.partial(
            _keep, workdir, checkpoint_name, newest, name if tells else None
          ),
        )
      except _OF_ONE_RUN as error:
        if len(jobs) == 1 or not _is_everywhere(error):
          raise
        parallel.warn(f'{name}: {error}; it is left out of the table')
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
    diverged = isinstance(failures[0], FloatingPointError)
    raise (FloatingPointError if diverged else ValueError)(
      f'{len(failures)} of {len(jobs)} checkpoints could not be evaluated, the '
      f'first because {failures[0]}'
    )


if __name__ == '__main__':
  command.run(main, define_flags)
