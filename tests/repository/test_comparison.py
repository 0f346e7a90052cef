"""The comparison of methods in docs/comparison.md."""

import itertools

import ml_collections
import pytest

from clop_jax import defaults
from clop_jax.experiment import build
from clop_jax.experiment import workdir
from clop_jax.study import grid
from configs import cifar100
from configs import npz
from docs.comparison import studies
from docs.comparison import tables
from tests import small


def test_the_page_has_the_tables_of_the_script(capsys):
  for name, cells in tables.read().items():
    # Each method with and without CLOP, at each rate, with each seed.
    settings = cells[['method', tables.RATE, tables.WEIGHT, 'seed']]
    combinations = itertools.product(
      tables.TITLES, studies.RATES, (0, 1), studies.SEEDS
    )
    assert {*settings.itertuples(index=False, name=None)} == {*combinations}
    tables.print_tables(name, cells)
  page = (small.ROOT / 'docs' / 'comparison.md').read_text()
  for line in capsys.readouterr().out.splitlines():
    assert line in page


@pytest.mark.parametrize(
  'config',
  [
    studies.small_digits(),
    studies.small_glyphs('glyphs.npz'),
    studies.full_size(npz.get_config()),
    studies.full_size(cifar100.get_config()),
  ],
)
def test_every_method_builds(config):
  cells = 0
  for _, changed, axes in studies.studies('out', config):
    for values in grid.cells(axes).values():
      cell = grid.applied(workdir.to_json(changed), values)
      cell = ml_collections.ConfigDict(cell)
      defaults.check(cell)
      cells += 1
    cell.data.num_classes = cell.data.num_classes or 100
    build.build(cell, total_steps=100, steps_per_epoch=10)
  assert cells == len(tables.TITLES) * 2 * len(studies.RATES) * 3
