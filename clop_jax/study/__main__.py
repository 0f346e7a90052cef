"""Trains and evaluates every cell of a grid, and puts the results in one table.

python -m clop_jax.study --config=configs/digits.py --workdir=runs/study \
  --grid optimizer.learning_rate=0.001,0.01,0.1,1,10 \
  --grid loss.clop_weight=0,1 --grid seed=0,1,2

Each cell has its own workdir, `<workdir>/cells/<name>`, as of `train` and
`evaluate`. `<workdir>/results.csv` has a line for each cell that is done,
diverged or failed, and `report.html` shows them. The same command again (or
`--workdir` alone) resumes the study, and runs failed cells again. More values
of the same fields make the study larger.
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

# As `run.EXECUTORS`; `run` is imported later, since it needs an extra.
_EXECUTORS = ('local', 'slurm')


def define_flags() -> None:
  """Defines the command's flags; importing this module defines none."""
  config_flags.DEFINE_config_file('config', None, 'A file of configs/.')
  flags.DEFINE(cli.PATH, 'workdir', None, 'Folder of the study.')
  flags.DEFINE_multi_string(
    'grid', [], 'FIELD=VALUE,VALUE of the config; repeat it for more fields.'
  )
  flags.DEFINE_enum(
    'executor', 'local', _EXECUTORS, 'Where jobs run: here or on Slurm.'
  )
  flags.DEFINE_integer(
    'jobs',
    None,
    'Number of jobs at a time, each of which runs one cell after another; '
    'default: one per core on local CPUs, else one.',
    lower_bound=1,
  )
  flags.DEFINE_multi_string(
    'slurm',
    [],
    "KEY=VALUE of sbatch for each Slurm job, with submitit's names, such as "
    'partition=gpu, time=120 (minutes), gpus_per_node=1 or setup=COMMAND.',
  )
  flags.DEFINE_bool('report', True, 'Make report.html at the end.')


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
