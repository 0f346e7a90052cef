r"""Evaluates checkpoints of one or more workdirs.

python -m clop_jax.evaluate --workdir=runs/digits
python -m clop_jax.evaluate --workdir=runs/a --workdir=runs/b --figure=ab.png
python -m clop_jax.evaluate --workdir=runs/digits --checkpoint=all
python -m clop_jax.evaluate --workdir='runs/*' --mode=linear,knn,finetune \\
  --label_fraction=0.01,0.1,0.5,1 --table=few_labels.csv
python -m clop_jax.evaluate --workdir=runs/digits --data=folder \\
  --data_dir=PHOTOS --mode=linear,finetune --config.eval.finetune_epochs=10

Prints one table. The evaluation of the run's own data with all labels is
written into each workdir as `eval.json`, `embeddings.npz` and
`figures/embeddings.png`, everything else as a file in `evaluations/`; --out
names another folder for them. Nothing but the workdir is needed, because it
holds the config; --config.eval.FIELD=VALUE changes it. See docs/evaluation.md.
"""

import collections
from collections.abc import Callable
import dataclasses
import os
import re
import sys

from absl import flags
import jax
from ml_collections import config_flags

from clop_jax import cli
from clop_jax import defaults
from clop_jax.evaluation import figures
from clop_jax.evaluation import measurement
from clop_jax.evaluation import protocol
from clop_jax.evaluation import tables
from clop_jax.experiment import checkpoint
from clop_jax.experiment import restored
from clop_jax.experiment import workdir as workdir_lib
from clop_jax.runtime import files
from clop_jax.runtime import parallel

# For scripts, under the command's name.
Request = measurement.Request
Result = measurement.Result
OtherData = measurement.OtherData
evaluate = measurement.evaluate

_FIGURE = os.path.join('figures', 'embeddings.png')

# Errors of one run that leave the others measurable: it diverged, its
# checkpoint is damaged, its data are gone.
_OF_ONE_RUN = (
  FloatingPointError,
  checkpoint.DamagedCheckpointError,
  ValueError,
  OSError,
)


def _is_everywhere(error):
  """Returns True if all processes have this error and skip the same run."""
  shared = (
    FloatingPointError,
    checkpoint.DamagedCheckpointError,
    checkpoint.UnreadableCheckpointError,
  )
  return jax.process_count() == 1 or isinstance(error, shared)


@dataclasses.dataclass
class _Job:
  """The evaluation of one checkpoint.

  Attributes:
    name: Name of the run in the table.
    request: Request.
    folder: Folder for the results.
    newest: Newest step of the run.
    failures: Errors of the results that could not be written. They do not end
      the command, so that the table still has the figures.
  """

  name: str
  request: Request
  folder: str
  newest: int
  failures: list[OSError] = dataclasses.field(default_factory=list)

  def check_writable(self):
    """Raises OSError if a result could not be written."""
    flag = f'--out={self.folder}'
    if self.folder == self.request.workdir:
      flag = f'--workdir={self.folder} (--out=FOLDER takes another one)'
    names = [os.path.join(measurement.FOLDER, 'x.json')]
    if self.request.is_plain:
      names = ['eval.json', 'embeddings.npz', _FIGURE]
    for name in names:
      files.check_writable(os.path.join(self.folder, name), flag)

  def keep(self, part: Result):
    """Writes a part of the result, and reports it if more will follow."""
    if not parallel.is_main():
      return
    # 'latest' is the newest that is not damaged.
    newest = self.request.which == 'latest' or part.step == self.newest
    try:
      part.write(self.folder, newest=newest)
      if part.complete is not None and newest:
        path = os.path.join(self.folder, _FIGURE)
        _draw(path, [_name(self.request.workdir)], [part])
    except OSError as error:
      parallel.warn(f'{self.folder}: {error}')
      self.failures.append(error)
    if self.request.is_plain and flags.FLAGS.checkpoint != 'all':
      return
    for made in part.measurements:
      mode, fraction = made['mode'], made['label_fraction']
      print(
        f'{self.name}, step {part.step}: {mode} with {fraction:.4g} of the '
        f'labels: top-1 {made[f"{mode}_top1"]:.4f}',
        file=sys.stderr,
        flush=True,
      )


def _draw(path, names, results):
  arrays = [result.arrays for result in results]
  drawn = figures.embedding_figure(
    path,
    names,
    [a['embeddings'] for a in arrays],
    arrays[0]['labels'],
    [a['spectrum'] for a in arrays],
    [result.complete['effective_rank'] for result in results],
  )
  if drawn:
    print(f'figure: {path}')


def _name(path):
  return files.as_text(os.path.basename(os.path.abspath(path)))


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


def _rows(name, result):
  """Returns rows of the table, one for each fraction of the labels."""
  rows = collections.defaultdict(dict)
  for made in result.measurements:
    mode, fraction = made['mode'], made['label_fraction']
    row = rows[fraction]
    row |= {'run': name} | {
      key: made[key] for key in ('step', 'data', 'label_fraction', 'num_labels')
    }
    row[f'{mode}_top1'] = made[f'{mode}_top1']
    if fraction == 1 and result.complete is not None:
      row['effective_rank'] = result.complete['effective_rank']
      row['prototype_cosine'] = result.complete['prototype_cosine']
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
  # An unknown field is refused where all flags are checked, as in training.
  config_flags.DEFINE_config_dict(
    'config',
    defaults.get_config(),
    "--config.eval.FIELD=VALUE replaces a value of the run's config.",
    lock_config=False,
    accept_new_attributes=True,
    # Other groups of the config are unknown flags.
    sys_argv=[x for x in sys.argv if re.match(r'--?(no)?config\.eval\.', x)],
  )
  flags.FLAGS['config'].default_as_str = "the run's config"
  flags.DEFINE_string('eval', None, 'Replaced by --config.eval.FIELD=VALUE.')
  flags.register_validator(
    'eval', lambda x: x is None, 'use --config.eval.FIELD=VALUE instead'
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


def _request():
  """Returns the request of the flags, whose workdir is still to be set."""
  values = flags.FLAGS
  modes = [x.strip() for text in values.mode for x in text.split(',')]
  try:
    fractions = [float(x) for x in values.label_fraction]
  except ValueError as error:
    raise ValueError(
      '--label_fraction must be numbers in (0, 1], as 0.01,0.1,1; got '
      f'{",".join(values.label_fraction)}'
    ) from error
  place = {
    name: values[name].value
    for name in ('data_dir', 'train_split', 'test_split')
    if values[name].value is not None
  }
  if not values.data and place:
    raise ValueError(
      f'--{next(iter(place))} goes with --data=NAME, got no --data; the '
      "run's own data are what its config says"
    )
  overrides = config_flags.get_override_values(values['config'])
  protocol.with_overrides(values.config, overrides)
  return Request(
    workdir='',
    which=values.checkpoint,
    modes=tuple(dict.fromkeys(modes)),
    fractions=tuple(dict.fromkeys(fractions)),
    data=OtherData(values.data, **place) if values.data else None,
    overrides=overrides,
  )


def _jobs(request, paths):
  """Returns the jobs of all runs; refuses a step that one of them lacks."""
  jobs = []
  runs = _named(paths)
  for name, workdir in runs:
    folder = workdir
    if flags.FLAGS.out is not None:
      folder = flags.FLAGS.out
      if len(runs) > 1:
        folder = os.path.join(folder, name.replace('://', '/'))
    steps = restored.check(workdir, request.which)
    for which in steps if request.which == 'all' else [request.which]:
      own = dataclasses.replace(request, workdir=workdir, which=str(which))
      jobs.append(_Job(name, own, folder, steps[-1]))
  return jobs


def _run(jobs, done: Callable[[_Job, Result], None]):
  """Evaluates all jobs, and returns the errors of those that failed."""
  failures = []
  for job in jobs:
    try:
      done(job, evaluate(job.request, on_part=job.keep))
    except _OF_ONE_RUN as error:
      if len(jobs) == 1 or not _is_everywhere(error):
        raise
      parallel.warn(f'{job.name}: {error}; it is left out of the table')
      failures.append(error)
  return failures


def _print_table(is_plain, names, results):
  rows = [
    row for pair in zip(names, results, strict=True) for row in _rows(*pair)
  ]
  if is_plain:
    text = tables.table(names, [result.complete for result in results])
  else:
    text = tables.evaluation_table(rows)
  print(text)
  if flags.FLAGS.table:
    tables.write_table(flags.FLAGS.table, text, rows)


def main() -> None:
  """Runs the command."""
  values = flags.FLAGS
  if not values.workdir:
    raise ValueError('--workdir must name the folder of a run, got none')
  request = _request()
  is_plain = request.is_plain and request.which != 'all'
  if values.figure and not is_plain:
    raise ValueError(
      '--figure compares runs by their embeddings, one checkpoint each; leave '
      'out --mode, --label_fraction, --data, --config.eval and --checkpoint=all'
    )
  if values.figure:
    figures.check_path(values.figure, 'figure')
  if values.table:
    tables.check_table(values.table)
  jobs = _jobs(request, values.workdir)
  parallel.by_main(lambda: _check_outputs(jobs))

  names, results = [], []

  def done(job, result):
    names.append(job.name)
    results.append(result)

  try:
    failures = _run(jobs, done)
  finally:
    # After an error, too.
    if parallel.is_main() and results:
      _print_table(is_plain, names, results)
  if parallel.is_main() and values.figure and results:
    if len({len(result.arrays['labels']) for result in results}) > 1:
      raise ValueError('--figure compares runs on one data set only')
    _draw(values.figure, names, results)
  parallel.by_main(lambda: _raise_unwritten(jobs))
  if failures:
    diverged = isinstance(failures[0], FloatingPointError)
    raise (FloatingPointError if diverged else ValueError)(
      f'{len(failures)} of {len(jobs)} checkpoints could not be evaluated, the '
      f'first because {failures[0]}'
    )


def _check_outputs(jobs):
  """Raises OSError if a result could not be written after the work."""
  for job in jobs:
    job.check_writable()
  for flag in ('figure', 'table'):
    path = flags.FLAGS[flag].value
    if path:
      files.check_writable(path, f'--{flag}={path}')


def _raise_unwritten(jobs):
  """Raises OSError if results could not be written."""
  failed = [error for job in jobs for error in job.failures]
  if failed:
    failure = OSError(
      f'{len(failed)} results could not be written, the first because of '
      f'{failed[0]}; the table above is complete'
    )
    failure.errno = failed[0].errno
    raise failure


if __name__ == '__main__':
  cli.run(main, define_flags)
