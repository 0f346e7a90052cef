"""The report of a study: one HTML page with its tables and figures."""

import base64
import math
import os
import pathlib
import re

from clop_jax.evaluation import figures as figures_lib
from clop_jax.evaluation import tables


def check_installed() -> None:
  """Raises ValueError if a package that the report needs is missing."""
  packages = ('jinja2', 'matplotlib', 'pandas', 'sklearn')
  figures_lib.check_installed('the report of a study', *packages)


def study_report(workdir: str) -> str:
  """Writes the page, the figures and the table of a study.

  `report.html` has all figures inside and needs no network. `figures/*.png` are
  the same figures, `table.md` has the means for documents. A diverged cell
  counts as chance accuracy and effective rank 0 in every mean; a failed cell is
  listed and left out. The page says so.

  Args:
    workdir: Folder of a study, finished or not.

  Returns:
    The path of `report.html`.

  Raises:
    ValueError: If the folder holds no study, its files are damaged, or a
      package is missing.
  """
  check_installed()
  # Only here, so that a study runs without these packages.
  import jinja2

  from clop_jax.study import figures
  from clop_jax.study import results

  study = results.read_study(workdir)
  statuses = dict(study.cells['status'].value_counts())
  means, caption = results.means(study), _caption(statuses)
  grid = {field: ', '.join(values) for field, values in study.grid.items()}
  if set(statuses) - {'failed'}:
    message = ''
    drawn = [*figures.sweep_figures(study), *figures.cell_figures(study)]
    line = '; '.join(f'{field}: {values}' for field, values in grid.items())
    rows = [list(row.values()) for row in means]
    text = tables.markdown(list(means[0]), rows)
    text = f'Mean and standard deviation\n\nGrid: {line}\n\n{text}\n\n{caption}'
  else:
    drawn = []
    text = message = (
      f'Nothing to show: all {len(study.cells)} cells that ran have failed.'
      if statuses
      else 'Nothing to show: no cell has a result yet.'
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
    message=message,
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
  caption = (
    'Mean ± standard deviation over the seeds (n - 1 in the denominator; '
    f'{tables.NONE} with one seed).'
  )
  if 'diverged' in statuses:
    caption += (
      f' Diverged runs ({statuses["diverged"]}) count at the accuracy of '
      'chance, 1 / number of classes (0 if that is unknown), and effective '
      'rank 0, and not in the prototype cosine.'
    )
  if 'failed' in statuses:
    caption += f' Failed runs ({statuses["failed"]}) are left out.'
  return caption


def _facts(study, statuses):
  cells = study.cells
  size = math.prod(map(len, study.grid.values()))
  counts = ', '.join(f'{n} {status}' for status, n in statuses.items())
  seconds = cells[['train_seconds', 'evaluate_seconds']].sum().sum()

  def distinct(column):
    return sorted(set(cells[column]) - {''})

  times = distinct('time')
  return {
    'cells': f'{counts or "none"} of {size}',
    'commit': ', '.join(distinct('commit')),
    'jax': ', '.join(distinct('versions.jax')),
    'device': ', '.join(distinct('device')),
    'evaluated': ' to '.join(dict.fromkeys([*times[:1], *times[-1:]])),
    'computing time': f'{seconds / 3600:.2f} hours of training and evaluating, '
    'summed over the cells',
  }


def _base64(path):
  return base64.b64encode(pathlib.Path(path).read_bytes()).decode()
