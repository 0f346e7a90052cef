r"""Evaluates checkpoints of one or more runs.

python -m clop_jax.evaluate --workdir=runs/digits
python -m clop_jax.evaluate --workdir=runs/a --workdir=runs/b --figure=ab.png
python -m clop_jax.evaluate --workdir=runs/digits --checkpoint=all
python -m clop_jax.evaluate --workdir='runs/*' --mode=linear,knn,finetune \
  --label_fraction=0.01,0.1,0.5,1 --table=few_labels.csv
python -m clop_jax.evaluate --workdir=runs/digits --data=folder \
  --data_dir=PHOTOS --mode=linear,finetune --config.eval.finetune_epochs=10

Prints one table. The evaluation of the run's own data with all labels is
written into each workdir as eval.json, embeddings.npz and
figures/embeddings.png. All other results are files in evaluations/. --out
selects another folder than the workdir. The config comes from the workdir, and
--config.eval.FIELD=VALUE changes it. See docs/evaluation.md.
"""

import collections
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
from clop_jax.evaluation import result as result_lib
from clop_jax.evaluation import protocol
from clop_jax.evaluation import tables
from clop_jax.experiment import checkpoint
from clop_jax.experiment import restored
from clop_jax.experiment import workdir as workdir_lib
from clop_jax.runtime import files
from clop_jax.runtime import parallel

# The interface for Python.
Request = measurement.Request
Result = result_lib.Result
OtherData = measurement.OtherData
evaluate = measurement.evaluate

_FIGURE = os.path.join('figures', 'embeddings.png')

# Errors of one checkpoint, after which the others are still evaluated. All
# processes raise the first ones together.
_IN_ALL_PROCESSES = (
  FloatingPointError,
  checkpoint.DamagedCheckpointError,
  checkpoint.UnreadableCheckpointError,
)
_OF_ONE_CHECKPOINT = (*_IN_ALL_PROCESSES, ValueError, OSError)


@dataclasses.dataclass
class _Job:
  """The evaluation of one checkpoint; `newest` is the last step of the run."""

  name: str
  request: Request
  folder: str
  newest: int
  failures: list[OSError] = dataclasses.field(default_factory=list)

  def check_writable(self):
    flag = f'--out={self.folder}'
    if self.folder == self.request.workdir:
      flag = f'--workdir={self.folder} (or choose --out=FOLDER)'
    names = [os.path.join(result_lib.FOLDER, 'x.json')]
    if self.request.is_plain:
      names = ['eval.json', 'embeddings.npz', _FIGURE]
    for name in names:
      files.check_writable(os.path.join(self.folder, name), flag)

  def save(self, part: Result):
    """Writes a part of the result, and reports it if more parts follow."""
    if not parallel.is_main():
      return
    # 'latest' may be an older step, if the newest checkpoint is damaged.
    newest = self.request.which == 'latest' or part.step == self.newest
    try:
      part.write(self.folder, newest=newest)
      if part.complete is not None and newest:
        name = self.name.rpartition('/')[2]
        _draw(os.path.join(self.folder, _FIGURE), [name], [part])
    except OSError as error:
      # Not raised, so that the table still has the results.
      parallel.warn(f'{self.folder}: {error}')
      self.failures.append(error)
    if self.request.is_plain and flags.FLAGS.checkpoint != 'all':
      return
    for x in part.measurements:
      print(
        f'{self.name}, step {part.step}: {x["mode"]} with '
        f'{x["label_fraction"]:.4g} of the labels: top-1 '
        f'{x[x["mode"] + "_top1"]:.4f}',
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


def _workdirs(paths):
  """Returns the workdirs of all runs at the paths by name, each once."""
  workdirs = {}
  for path in paths:
    trained = workdir_lib.find(path)
    if len(trained) == 1:
      workdir_lib.load_config(trained[0])  # an error is better than a warning
    else:
      trained = [workdir for workdir in trained if _is_trained(workdir)]
    if not trained:
      raise ValueError(f'--workdir={path} holds no run with a checkpoint')
    for workdir in trained:
      place = workdir if '://' in workdir else os.path.abspath(workdir)
      workdirs.setdefault(place.rstrip('/'), workdir)
  try:
    shared = os.path.commonpath(map(os.path.dirname, workdirs))
    names = [os.path.relpath(place, shared) for place in workdirs]
  except ValueError:  # remote and local paths
    names = list(workdirs)
  return dict(zip(map(files.as_text, names), workdirs.values(), strict=True))


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
  for measured in result.measurements:
    fraction, top1 = measured['label_fraction'], f'{measured["mode"]}_top1'
    keys = ('step', 'data', 'label_fraction', 'num_labels', top1)
    row = rows[fraction]
    row |= {'run': name, **{key: measured[key] for key in keys}}
    if fraction == 1 and result.complete is not None:
      for key in ('effective_rank', 'prototype_cosine'):
        row[key] = result.complete[key]
  return list(rows.values())


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_multi(
    cli.PATH,
    flags.ArgumentSerializer(),
    'workdir',
    None,
    'Workdir of a run, a folder that contains workdirs, or a pattern such as '
    "'runs/*'. Repeat it to compare runs.",
  )
  flags.DEFINE(
    cli.PATH, 'figure', None, 'PNG file to write that compares the runs.'
  )
  flags.DEFINE_string(
    'checkpoint', 'latest', 'latest, best (by train.keep_best), a step, or all.'
  )
  flags.DEFINE_multi_string(
    'mode',
    list(result_lib.COMPLETE),
    'Modes, separated by commas: linear, knn, finetune.',
  )
  flags.DEFINE_list(
    'label_fraction',
    ['1'],
    'Fractions of the training labels, such as 0.01,0.1,0.5,1.',
  )
  flags.DEFINE_string(
    'data', None, "Name of another data set than the run's own."
  )
  flags.DEFINE(
    cli.PATH, 'data_dir', None, 'Folder or file of --data, if it needs one.'
  )
  flags.DEFINE_string('train_split', None, 'Split of --data; default: train.')
  flags.DEFINE_string('test_split', None, 'Split of --data; default: test.')
  # cli.py rejects unknown fields.
  config_flags.DEFINE_config_dict(
    'config',
    defaults.get_config(),
    "--config.eval.FIELD=VALUE replaces a value in the run's config.",
    lock_config=False,
    accept_new_attributes=True,
    # Fields outside of config.eval are unknown flags.
    sys_argv=[x for x in sys.argv if re.match(r'--?(no)?config\.eval\.', x)],
  )
  flags.FLAGS['config'].default_as_str = "the run's config"
  flags.DEFINE_string('eval', None, 'Replaced by --config.eval.FIELD=VALUE.')
  flags.register_validator(
    'eval', lambda x: x is None, 'use --config.eval.FIELD=VALUE instead'
  )
  flags.DEFINE(
    cli.PATH, 'table', None, 'File to write the table to: *.csv or *.md.'
  )
  flags.DEFINE(
    cli.PATH,
    'out',
    None,
    'Folder for the results instead of the workdir. Several runs get one '
    'folder each in it.',
  )


def _request():
  """Returns the request of the flags, without a workdir."""
  values = flags.FLAGS
  modes = [x.strip() for text in values.mode for x in text.split(',')]
  try:
    fractions = [float(x) for x in values.label_fraction]
  except ValueError as error:
    raise ValueError(
      '--label_fraction must be numbers in (0, 1], such as 0.01,0.1,1; got '
      f'{",".join(values.label_fraction)}'
    ) from error
  place = {
    name: values[name].value
    for name in ('data_dir', 'train_split', 'test_split')
    if values[name].value is not None
  }
  if not values.data and place:
    raise ValueError(
      f'--{next(iter(place))} needs --data=NAME, got no --data; without it the '
      "config determines the run's own data"
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


def _jobs(request):
  """Returns the jobs of all runs; each must have the requested step."""
  jobs = []
  workdirs = _workdirs(flags.FLAGS.workdir)
  for name, workdir in workdirs.items():
    folder = flags.FLAGS.out or workdir
    if flags.FLAGS.out and len(workdirs) > 1:
      folder = os.path.join(folder, name.replace('://', '/'))
    steps = restored.check(workdir, request.which)
    for which in steps if request.which == 'all' else [request.which]:
      own = dataclasses.replace(request, workdir=workdir, which=str(which))
      jobs.append(_Job(name, own, folder, steps[-1]))
  return jobs


def _check_outputs(jobs):
  for job in jobs:
    job.check_writable()
  for flag in ('figure', 'table'):
    if path := flags.FLAGS[flag].value:
      files.check_writable(path, f'--{flag}={path}')


def _run(jobs, results):
  """Appends each job and its result; returns the errors of failed jobs."""
  failures = []
  for job in jobs:
    try:
      results.append((job, evaluate(job.request, on_part=job.save)))
    except _OF_ONE_CHECKPOINT as error:
      everywhere = jax.process_count() == 1 or isinstance(
        error, _IN_ALL_PROCESSES
      )
      if len(jobs) == 1 or not everywhere:
        raise
      parallel.warn(f'{job.name}: {error}; it is left out of the table')
      failures.append(error)
  return failures


def _print_table(is_plain, results):
  rows = [row for job, result in results for row in _rows(job.name, result)]
  if is_plain:
    names = [job.name for job, _ in results]
    text = tables.table(names, [result.complete for _, result in results])
  else:
    text = tables.evaluation_table(rows)
  print(text)
  if flags.FLAGS.table:
    tables.write_table(flags.FLAGS.table, text, rows)


def _compare(path, results):
  if len({len(result.arrays['labels']) for _, result in results}) > 1:
    raise ValueError(
      f'--figure={path} needs runs on one data set, got test splits of '
      'different sizes'
    )
  names = [job.name for job, _ in results]
  _draw(path, names, [result for _, result in results])


def _check_saved(jobs):
  failed = [error for job in jobs for error in job.failures]
  if failed:
    failure = OSError(
      f'{len(failed)} results could not be written, the first because of '
      f'{failed[0]}; the table above is complete'
    )
    failure.errno = failed[0].errno
    raise failure


def main() -> None:
  """Runs the command."""
  values = flags.FLAGS
  if not values.workdir:
    raise ValueError('--workdir must name the folder of a run, got none')
  request = _request()
  is_plain = request.is_plain and request.which != 'all'
  if values.figure and not is_plain:
    raise ValueError(
      '--figure compares runs by their embeddings, one checkpoint each; remove '
      '--mode, --label_fraction, --data, --config.eval and --checkpoint=all'
    )
  if values.figure:
    figures.check_path(values.figure, 'figure')
  if values.table:
    tables.check_table(values.table)
  jobs = _jobs(request)
  parallel.by_main(lambda: _check_outputs(jobs))
  results = []
  try:
    failures = _run(jobs, results)
  finally:
    # An error does not lose the results before it.
    if parallel.is_main() and results:
      _print_table(is_plain, results)
  if parallel.is_main() and values.figure and results:
    _compare(values.figure, results)
  parallel.by_main(lambda: _check_saved(jobs))
  if failures:
    diverged = isinstance(failures[0], FloatingPointError)
    raise (FloatingPointError if diverged else ValueError)(
      f'{len(failures)} of {len(jobs)} checkpoints could not be evaluated, the '
      f'first because {failures[0]}'
    )


if __name__ == '__main__':
  cli.run(main, define_flags)
