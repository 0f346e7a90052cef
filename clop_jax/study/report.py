"""The report of a study: one HTML page with its tables and figures."""

import base64
import math
import os
import pathlib
import re

from clop_jax.evaluation import tables
from clop_jax.runtime import extras


def check_installed() -> None:
  """Raises ValueError if a package that the report needs is missing."""
  packages = ('jinja2', 'matplotlib', 'pandas', 'sklearn', 'threadpoolctl')
  extras.check('the report of a study', 'report', *packages)


def study_report(workdir: str) -> str:
  """Writes `report.html`, `figures/` and `table.md`; returns the page's path.

  Args:
    workdir: Folder of a study, finished or not.

  Raises:
    ValueError: If the folder holds no study, its files are damaged, or a
      package is missing.
  """
  check_installed()
  # Only here, so that a study runs without pandas, matplotlib and Jinja2.
  import jinja2

  from clop_jax.study import figures
  from clop_jax.study import results

  study = results.read_study(workdir)
  statuses = study.cells['status'].value_counts()
  means, caption = results.means(study), _caption(statuses)
  grid = {field: ', '.join(values) for field, values in study.grid.items()}
  text, drawn = 'Nothing to show: no cell is done or diverged.', []
  if set(statuses.index) - {'failed'}:
    drawn = [*figures.sweep_figures(study), *figures.cell_figures(study)]
    line = '; '.join(f'{field}: {values}' for field, values in grid.items())
    rows = [list(row.values()) for row in means]
    table = tables.markdown(list(means[0]), rows)
    text = (
      f'Mean and standard deviation\n\nGrid: {line}\n\n{table}\n\n{caption}'
    )
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader('clop_jax.study', ''), autoescape=True
  )
  environment.filters['base64'] = _base64
  environment.tests['numeric'] = re.compile(rf'[+-]?\d|{tables.NONE}$').match
  page = environment.get_template('report.html.jinja').render(
    study=study,
    facts=_facts(study, statuses),
    grid=grid,
    message='' if drawn else text,
    figures=drawn,
    means=means,
    caption=caption,
    listed=results.listed(study),
  )
  tables.write(os.path.join(workdir, 'table.md'), text + '\n')
  path = os.path.join(workdir, 'report.html')
  tables.write(path, page)
  return path


def _caption(statuses):
  return (
    'Mean ± standard deviation over the seeds (n - 1 in the denominator; '
    f'{tables.NONE} with one seed). {statuses.get("diverged", 0)} diverged: '
    'these count as the accuracy of chance, 1 / number of classes (0 if that '
    'is unknown), and effective rank 0, but not in the prototype cosine. '
    f'{statuses.get("failed", 0)} failed: these are left out.'
  )


def _facts(study, statuses):
  def distinct(column):
    return ', '.join(sorted(set(study.cells[column]) - {''}))

  counts = ', '.join(f'{n} {status}' for status, n in statuses.items())
  size = math.prod(map(len, study.grid.values()))
  seconds = study.cells[['train_seconds', 'evaluate_seconds']].sum().sum()
  times = study.cells['time'][study.cells['time'] != '']
  return {
    'cells': f'{counts or "none"} of {size}',
    'commit': distinct('commit'),
    'jax': distinct('versions.jax'),
    'device': distinct('device'),
    'evaluated': f'{times.min()} to {times.max()}' if len(times) else '',
    'computing time': f'{seconds / 3600:.2f} hours, summed over the cells',
  }


def _base64(path):
  return base64.b64encode(pathlib.Path(path).read_bytes()).decode()
