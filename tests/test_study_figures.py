import numpy as np
import pytest

from clop_jax import figures
from clop_jax import results
from clop_jax import study_figures
from tests import studies

K, RATE, WEIGHT = studies.K, studies.RATE, studies.WEIGHT


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch):
  monkeypatch.setattr(figures, '_DPI', 40)


def test_the_drawn_bands_have_the_diverged_cell_in_them(tmp_path):
  changed = {'c5': {'status': 'diverged'}, 'c7': {'status': 'failed'}}
  rows = studies.make_study(tmp_path, changed=changed)
  study = results.read_study(str(tmp_path))
  band = study_figures._band(
    study, 'linear_top1', 100, RATE, studies.GRID[RATE], {WEIGHT: 0.0}
  )
  chance = 100 / K
  good = [100 * rows[c]['linear_top1'] for c in ('c0', 'c1')]
  half_good = 100 * rows['c4']['linear_top1']
  np.testing.assert_allclose(
    band.mean, [np.mean(good), (half_good + chance) / 2]
  )
  np.testing.assert_allclose(band.low, [min(good), chance])
  np.testing.assert_allclose(band.high, [max(good), half_good])
  assert band.crosses == [(1, chance)]


@pytest.mark.parametrize(
  ('grid', 'swept'),
  [
    ({'train.batch_size': [8, 16], RATE: [1, 2]}, [RATE, 'train.batch_size']),
    ({WEIGHT: [0, 1], RATE: [1, 2]}, [RATE]),
    ({WEIGHT: [0, 1, 5], 'prototypes.kind': ['a', 'b']}, [WEIGHT]),
    ({WEIGHT: [0, 1], 'prototypes.kind': ['a', 'b']}, ['prototypes.kind']),
    ({WEIGHT: [0, 1]}, [WEIGHT]),
    ({'seed': [0, 1], 'train.batch_size': [8]}, []),
  ],
)
def test_numbers_are_swept_and_names_are_compared(tmp_path, grid, swept):
  studies.make_study(tmp_path, grid)
  assert study_figures._swept(results.read_study(str(tmp_path))) == swept


def test_names_make_dots_and_many_settings_fewer_panels(tmp_path):
  grid = {
    'prototypes.kind': ['orthonormal', 'simplex_etf', None],
    WEIGHT: [0, 1],
  }
  studies.make_study(tmp_path, grid)
  study = results.read_study(str(tmp_path))
  figure = study_figures._sweep(study, 'prototypes.kind')
  assert 'prototype kind' in figure.title
  assert 'Dots' in figure.caption
  grid = {RATE: [1, 2, 3], 'train.num_epochs': [1, 2, 3], 'a': ['x', 'y', 'z']}
  (tmp_path / 'many').mkdir()
  studies.make_study(tmp_path / 'many', grid)
  study = results.read_study(str(tmp_path / 'many'))
  panels, fixed = study_figures._panels(study, [RATE, 'train.num_epochs', 'a'])
  assert panels == [{'a': 'x'}, {'a': 'y'}, {'a': 'z'}]
  assert fixed == {RATE: 2, 'train.num_epochs': 2}
