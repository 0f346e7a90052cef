r"""Trains and evaluates every cell of a grid, and writes a table and a report.

python -m clop_jax.study --config=configs/digits.py --workdir=runs/study \
  --grid optimizer.learning_rate=0.001,0.01,0.1,1,10 \
  --grid loss.clop_weight=0,1 --grid seed=0,1,2

`<workdir>/results.csv` has a row for each cell, `<workdir>/report.html` shows
them, and `<workdir>/cells/<name>` is the workdir of a cell. Run the same
command (or `--workdir` alone) again to resume the study and retry failed cells.
More values of the same fields make the study larger.
"""

import os
import sys

from absl import flags
import ml_collections
from ml_collections import config_flags

from clop_jax import cli
from clop_jax.runtime import extras
from clop_jax.study import grid
from clop_jax.study import plan
from clop_jax.study import report

# As `run.EXECUTORS`; `run` needs an extra, so it is imported later.
_EXECUTORS = ('local', 'slurm')


def define_flags() -> None:
  """Defines the command's flags; importing this module defines none."""
  config_flags.DEFINE_config_file('config', None, 'A file of configs/.')
  flags.DEFINE(cli.PATH, 'workdir', None, 'Folder of the study.')
  flags.DEFINE_multi_string(
    'grid', [], 'FIELD=VALUE,VALUE of the config; repeat it for more fields.'
  )
  flags.DEFINE_enum(
    'executor',
    'local',
    _EXECUTORS,
    'Where jobs run: on this machine or on Slurm.',
  )
  flags.DEFINE_integer(
    'jobs',
    None,
    'Number of jobs at a time, each of which runs cell after cell; '
    'default: one per core on local CPUs, else one.',
    lower_bound=1,
  )
  flags.DEFINE_multi_string(
    'slurm',
    [],
    'KEY=VALUE of sbatch for each Slurm job, by names of submitit, such as '
    'partition=gpu, time=120 (minutes), gpus_per_node=1 or setup=COMMAND.',
  )
  flags.DEFINE_bool('report', True, 'Write report.html at the end.')


def main() -> None:
  """The command."""
  values = flags.FLAGS
  if not values.workdir:
    raise ValueError('--workdir must name a folder for the study, got none')
  fields = None
  if values.grid:
    base = values.config
    if base is None and (saved := plan.load(values.workdir)):
      base = ml_collections.ConfigDict(saved['config'])
    if base is None:
      raise ValueError('--config must name a file of configs/, got none')
    fields = grid.parse(values.grid, base)
  extras.check('a study', 'report', 'submitit')
  if values.report:
    report.check_installed()
  from clop_jax.study import run

  rows = run.study(
    values.workdir,
    values.config,
    fields,
    jobs=values.jobs,
    executor=values.executor,
    slurm=run.slurm_parameters(values.slurm),
  )
  print(f'results: {os.path.join(values.workdir, plan.RESULTS)}', flush=True)
  if values.report and rows:
    print(f'report: {report.study_report(values.workdir)}', flush=True)
  for status in ('diverged', 'failed'):
    for row in rows:
      if row['status'] == status:
        line = f'{status}: {row["cell"]}: {row["error"]}'
        print(line, file=sys.stderr, flush=True)
  if any(row['status'] == 'failed' for row in rows):
    sys.exit(1)


if __name__ == '__main__':
  cli.run(main, define_flags)
