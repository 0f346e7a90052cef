import numpy as np
import pytest

from clop_jax.evaluation import figures
from clop_jax.study import figures as study_figures
from clop_jax.study import results
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
    # Not by the alphabet, by which these two would be first.
    (
      {
        'data.label_fraction': [0.1, 1],
        WEIGHT: [0, 1, 5],
        'train.batch_size': [8, 16],
        RATE: [1, 2],
      },
      [RATE, 'train.batch_size', 'data.label_fraction', WEIGHT],
    ),
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


def test_names_too_are_held_fixed_if_they_would_make_many_panels(tmp_path):
  losses = [f'l{i}' for i in range(5)]
  grid = {
    RATE: [1, 2],
    WEIGHT: [0, 1],
    'loss.contrastive': losses,
    'data.name': ['cards', 'dice', 'coins'],
    'prototypes.kind': ['a', 'b'],
  }
  studies.make_study(tmp_path, grid)
  study = results.read_study(str(tmp_path))
  names = ['loss.contrastive', 'data.name', 'prototypes.kind']
  panels, fixed = study_figures._panels(study, names)
  assert panels == [{'loss.contrastive': name} for name in losses]
  # The base config's where it has one of the grid's values.
  assert fixed == {'prototypes.kind': 'a', 'data.name': 'dice'}
  # No more than need be.
  panels, fixed = study_figures._panels(study, names[1:])
  assert (len(panels), fixed) == (6, {})
  caption = study_figures._sweep(study, RATE).caption
  assert 'Drawn at a, dice; the tables have the rest.' in caption


def test_the_caption_tells_of_runs_without_a_chance(tmp_path):
  diverged = {'c3': {'status': 'diverged'}}
  grid = {'data.name': ['dice', 'cards'], 'seed': [0, 1]}
  studies.make_study(tmp_path, grid, changed=diverged)
  study = results.read_study(str(tmp_path))
  caption = study_figures._sweep(study, 'data.name').caption
  assert 'in the means and bands.' in caption
  diverged = {f'c{i}': {'status': 'diverged'} for i in (2, 3)}
  studies.make_study(tmp_path / 'b', grid, num_classes=0, changed=diverged)
  study = results.read_study(str(tmp_path / 'b'))
  caption = study_figures._sweep(study, 'data.name').caption
  assert '(2 at accuracy 0, as the number of classes is not known)' in caption
  assert study_figures._band(
    study, 'linear_top1', 100, 'data.name', ['cards'], {}
  ).crosses == [(0, 0.0), (0, 0.0)]
