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
`figures/embeddings.png`, anything else as a file of `evaluations/`; --out names
another folder for them. See docs/evaluation.md. Nothing but the workdir is
needed: the config is in it.
"""

import ast
import collections
import functools
import os
import sys

from absl import flags
import jax

from clop_jax import cli
from clop_jax.evaluation import figures
from clop_jax.evaluation import files as evaluation_files
from clop_jax.evaluation import measurement
from clop_jax.evaluation import protocol
from clop_jax.evaluation import tables
from clop_jax.experiment import checkpoint
from clop_jax.experiment import restored
from clop_jax.experiment import workdir as workdir_lib
from clop_jax.runtime import files
from clop_jax.runtime import parallel

# What scripts use of these modules, under the command's name.
Evaluation = measurement.Evaluation
OtherData = measurement.OtherData
evaluate = measurement.evaluate
measure = measurement.measure
write = evaluation_files.write
write_measurement = evaluation_files.write_measurement

_FIGURE = os.path.join('figures', 'embeddings.png')

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
  alike = (
    FloatingPointError,
    checkpoint.DamagedCheckpointError,
    checkpoint.UnreadableCheckpointError,
  )
  return jax.process_count() == 1 or isinstance(error, alike)


class _Results:
  """Writes the results of one run into a folder.

  What cannot be written is kept in `failures`: it must not end the work, whose
  figures the table still has.
  """

  def __init__(self, folder, workdir):
    self._folder, self._workdir = folder, workdir
    self.failures = []

  def check(self, is_plain):
    """Raises OSError if a file of the results could not be written."""
    flag = f'--out={self._folder}'
    if self._folder == self._workdir:
      flag = f'--workdir={self._folder} (--out=FOLDER takes another one)'
    names = [os.path.join(evaluation_files.FOLDER, 'x.json')]
    if is_plain:
      names = ['eval.json', 'embeddings.npz', _FIGURE]
    for name in names:
      files.check_writable(os.path.join(self._folder, name), flag)

  def keep(self, which, newest, name, found):
    """Writes a part of what was measured of a checkpoint.

    Args:
      which: Checkpoint that was asked for.
      newest: Newest step of the run.
      name: Name of the run in a line of progress, or None for no such line.
      found: Part of the result.
    """
    if not parallel.is_main():
      return
    try:
      self._write(which, newest, found)
    except OSError as error:
      parallel.warn(f'{self._folder}: {error}')
      self.failures.append(error)
    if name is not None:
      for made in found.measurements:
        mode, fraction = made['mode'], made['label_fraction']
        print(
          f'{name}, step {found.step}: {mode} with {fraction:.4g} of the '
          f'labels: top-1 {made[f"{mode}_top1"]:.4f}',
          file=sys.stderr,
          flush=True,
        )

  def _write(self, which, newest, found):
    complete = found.complete
    # 'latest' is the newest that is whole.
    if complete is not None and (which == 'latest' or found.step == newest):
      write(self._folder, complete, found.arrays)
      path = os.path.join(self._folder, _FIGURE)
      _draw(path, [self._workdir], [complete], [found.arrays])
    elif complete is not None:
      evaluation_files.write_older(self._folder, complete)
    else:
      for made in found.measurements:
        write_measurement(self._folder, made)


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
  name = os.path.basename(os.path.abspath(path)) if path else ''
  return files.as_text(name)


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
    return [(files.as_text(x), x) for x in workdirs.values()]
  # One may be within another one.
  names = [os.path.relpath(place, shared) for place in workdirs]
  return [
    (_name(workdir) if name == '.' else files.as_text(name), workdir)
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
  flags.DEFINE_multi(
    cli.PATH,
    flags.ArgumentSerializer(),
    'workdir',
    None,
    'Workdir of a run, a folder of workdirs (of a study, for example) or a '
    "pattern ('runs/*'); repeat it to compare runs.",
  )
  flags.DEFINE(
    cli.PATH,
    'figure',
    None,
    'PNG that compares the runs (several workdirs).',
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
  flags.DEFINE(
    cli.PATH, 'data_dir', None, 'Of --data, as config.data.data_dir.'
  )
  flags.DEFINE_string('train_split', None, 'Of --data; default: train.')
  flags.DEFINE_string('test_split', None, 'Of --data; default: test.')
  flags.DEFINE_multi_string(
    'eval',
    [],
    "Another value than the run's of a field of config.eval, as "
    'finetune_epochs=5 or finetune_learning_rates=0.01,0.1; may be repeated.',
  )
  flags.DEFINE(
    cli.PATH, 'table', None, 'The table as a file, too: .csv or .md.'
  )
  flags.DEFINE(
    cli.PATH,
    'out',
    None,
    'Folder for eval.json, figures and the other results instead of the '
    'workdir; of several runs each has a folder of its name in it.',
  )


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
    tables.check_table(table)
  runs = _named(paths)
  jobs, outputs = [], []
  for name, workdir in runs:
    protocol.with_settings(workdir_lib.load_config(workdir), settings)
    steps = restored.check(workdir, which)
    outputs.append(
      _Results(_folder(flags.FLAGS.out, name, runs, workdir), workdir)
    )
    for chosen in steps if which == 'all' else [which]:
      keep = functools.partial(
        outputs[-1].keep, str(chosen), steps[-1], None if is_plain else name
      )
      jobs.append((name, workdir, str(chosen), keep))
  parallel.by_main(lambda: _check_outputs(outputs, is_plain, figure, table))

  names, done, rows, failures = [], [], [], []
  try:
    for name, workdir, checkpoint_name, keep in jobs:
      try:
        found = measure(
          workdir,
          modes=modes,
          fractions=fractions,
          data=data,
          settings=settings,
          which=checkpoint_name,
          keep=keep,
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
        text = tables.table(names, [found.complete for found in done])
      else:
        text = tables.evaluation_table(rows)
      print(text)
      if table:
        tables.write_table(table, text, rows)
  if parallel.is_main() and figure and done:
    arrays = [found.arrays for found in done]
    if any(len(a['labels']) != len(arrays[0]['labels']) for a in arrays):
      raise ValueError('--figure compares runs on one data set only')
    # The runs' folders by name, as the table has them.
    _draw(figure, names, [found.complete for found in done], arrays)
  parallel.by_main(lambda: _raise_first(outputs))
  if failures:
    diverged = isinstance(failures[0], FloatingPointError)
    raise (FloatingPointError if diverged else ValueError)(
      f'{len(failures)} of {len(jobs)} checkpoints could not be evaluated, the '
      f'first because {failures[0]}'
    )


def _folder(out, name, runs, workdir):
  """The folder that gets the results of a run."""
  if out is None:
    return workdir
  return out if len(runs) == 1 else os.path.join(out, name.replace('://', '/'))


def _check_outputs(outputs, is_plain, figure, table):
  """Raises OSError for a result that could not be written after the work."""
  for output in outputs:
    output.check(is_plain)
  for flag, path in (('figure', figure), ('table', table)):
    if path:
      files.check_writable(path, f'--{flag}={path}')


def _raise_first(outputs):
  """Raises OSError if results could not be written."""
  failed = [error for output in outputs for error in output.failures]
  if failed:
    failure = OSError(
      f'{len(failed)} results could not be written, the first because of '
      f'{failed[0]}; the table above is complete'
    )
    failure.errno = failed[0].errno
    raise failure


if __name__ == '__main__':
  cli.run(main, define_flags)
