import json

import numpy as np
import pytest

from clop_jax.study import results
from clop_jax.study import run as study
from tests import studies

K, RATE, WEIGHT = studies.K, studies.RATE, studies.WEIGHT


def test_a_damaged_archive_is_a_note(tmp_path):
  studies.make_study(tmp_path)
  path = tmp_path / 'cells' / 'c0' / 'embeddings.npz'
  path.write_bytes(path.read_bytes()[:100])
  study = results.read_study(str(tmp_path))
  assert study.arrays(study.cells[0]) is None
  assert 'cell c0: cannot be read' in study.notes[0]


def test_a_folder_that_is_no_study_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r'holds no study\.json.*make one'):
    results.read_study(str(tmp_path))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('text', ['{', '[]', '{"config": {}}', '{"grid": 1}'])
def test_a_damaged_study_is_refused(tmp_path, text):
  (tmp_path / 'study.json').write_text(text)
  with pytest.raises(ValueError, match=r'study\.json must hold "config" and'):
    results.read_study(str(tmp_path))


@pytest.mark.parametrize('data', [b'\xff', b'only one', b'a' * 200_000])
def test_damaged_results_are_named(tmp_path, data):
  studies.make_study(tmp_path)
  path = tmp_path / 'results.csv'
  path.write_bytes(path.read_bytes() + data)
  with pytest.raises(ValueError, match=r'results\.csv is damaged'):
    results.read_study(str(tmp_path))


@pytest.mark.parametrize('text', ['{"train": 5}', '5', 'null'])
@pytest.mark.parametrize('field', ['config', 'grid'])
def test_a_study_does_not_resume_from_a_damaged_file(tmp_path, field, text):
  content = {'config': '{}', 'grid': '{"seed": [0]}'} | {field: text}
  fields = ', '.join(f'"{name}": {value}' for name, value in content.items())
  (tmp_path / 'study.json').write_text(f'{{{fields}}}')
  with pytest.raises(ValueError, match=rf'study\.json: .*{field[:5]}|train'):
    study.study(str(tmp_path))
  assert len(list(tmp_path.iterdir())) == 1


def test_results_of_another_grid_or_status_are_refused(tmp_path):
  rows = studies.make_study(tmp_path)
  rows['c3']['status'] = 'bored'
  studies.write_rows(tmp_path, rows.values())
  with pytest.raises(ValueError, match=r"got 'bored' for cell 'c3'"):
    results.read_study(str(tmp_path))
  for row in rows.values():
    del row[WEIGHT]
  studies.write_rows(tmp_path, rows.values())
  with pytest.raises(ValueError, match=rf'it lacks {WEIGHT}'):
    results.read_study(str(tmp_path))


def test_a_done_cell_tells_the_number_of_classes_if_the_config_does_not(
  tmp_path,
):
  # In grid order c0 and c1 are of dice, c2 and c3 of cards.
  grid = {'data.name': ['dice', 'cards'], 'seed': [0, 1]}
  diverged = {c: {'status': 'diverged'} for c in ('c1', 'c2', 'c3')}
  rows = studies.make_study(tmp_path, grid, num_classes=0, changed=diverged)
  study = results.read_study(str(tmp_path))
  top = rows['c0']['linear_top1']
  assert study.values(study.cells, 'linear_top1') == [top, 1 / K, 0.0, 0.0]
  assert study.values(study.cells, 'effective_rank')[1:] == [0.0, 0.0, 0.0]
  assert study.without_chance == 2
  assert study.num_classes is None
  studies.make_study(tmp_path / 'all', num_classes=0)
  assert results.read_study(str(tmp_path / 'all')).num_classes == K


def test_a_diverged_cell_is_at_the_chance_of_its_own_data(tmp_path):
  grid = {'data.name': ['dice', 'cards'], 'seed': [0]}
  rows = studies.make_study(
    tmp_path, grid, changed={f'c{i}': {'status': 'diverged'} for i in range(2)}
  )
  config = {'data': {'name': 'cards', 'num_classes': 52}}
  rows['c1']['config'] = json.dumps(config)
  studies.write_rows(tmp_path, rows.values())
  study = results.read_study(str(tmp_path))
  assert study.values(study.cells, 'knn_top1') == [1 / K, 1 / 52]
  assert (study.without_chance, study.num_classes) == (0, None)
  assert np.isnan(study.mean('prototype_cosine', {}))


@pytest.mark.parametrize('config', ['', '{', '[1]'])
def test_without_a_config_of_its_own_a_cell_has_that_of_the_study(
  tmp_path, config
):
  diverged = {'status': 'diverged', 'config': config}
  grid = {'data.num_classes': [3, 5]}
  studies.make_study(tmp_path, grid, changed={'c0': diverged, 'c1': diverged})
  study = results.read_study(str(tmp_path))
  assert study.values(study.cells, 'linear_top1') == [1 / 3, 1 / 5]
  assert len(study.notes) == (2 if config else 0)


def test_none_is_shown_as_the_command_takes_it():
  assert [results.show(v) for v in (None, True, 0.10, 'a', [1])] == [
    'None',
    'true',
    '0.1',
    'a',
    '[1]',
  ]


def test_values_of_the_csv_are_found_in_the_grid_however_written():
  assert results._grid_value('1e-05', [1, 0.00001]) == 0.00001
  assert results._grid_value('10', [1.0, 10.0]) == 10.0
  assert results._grid_value('null', [None, 'x']) is None
  assert results._grid_value('True', [False, True]) is True
  assert results._grid_value('[1, 2]', [[1, 2], [3]]) == [1, 2]
  assert results._grid_value('x', [1.0, 'x']) == 'x'


@pytest.mark.parametrize(
  ('widest', 'shown'),
  [('c10', ['c4', 'c6', 'c8', 'c10']), ('c6', ['c4', 'c6'])],
)
def test_shown_cells_are_the_mildest_setting_and_the_one_clop_changes_most(
  widest, shown, tmp_path
):
  grid = {RATE: [0.1, 1.0, 10.0], WEIGHT: [0, 1], 'seed': [3, 0]}
  # Of seed 3, alone: c0, c4, c8; with CLOP: c2, c6, c10.
  ranks = {'c0': 4, 'c2': 6, 'c4': 5, 'c6': 5.5, 'c8': 3, 'c10': 4, widest: 8}
  changed = {c: {'effective_rank': r} for c, r in ranks.items()}
  studies.make_study(tmp_path, grid, changed=changed)
  cells, rule = results.telling_cells(results.read_study(str(tmp_path)))
  assert [c.name for c in cells] == shown
  assert 'seed 3' in rule


def test_without_weights_the_best_and_worst_cells_are_shown(tmp_path):
  grid = {RATE: [0.1, 1.0, 10.0]}
  tops = {'c0': 0.7, 'c1': 0.9, 'c2': 0.6}
  studies.make_study(
    tmp_path, grid, changed={c: {'linear_top1': t} for c, t in tops.items()}
  )
  cells, rule = results.telling_cells(results.read_study(str(tmp_path)))
  assert [c.name for c in cells] == ['c1', 'c2']
  assert 'highest and the lowest' in rule


def test_settings_at_which_one_side_alone_diverged_are_named(tmp_path):
  grid = {RATE: [0.1, 1.0, 10.0], WEIGHT: [0, 1], 'seed': [0, 1]}
  # Rate 0.1: c0 to c3, alone first; 1: c4 to c7; 10: c8 to c11. Both sides of
  # c1 and c3 diverge, and c10 has failed.
  changed = {
    c: {'status': 'diverged'} for c in ('c1', 'c3', 'c4', 'c5', 'c11', 'c8')
  }
  changed['c10'] = {'status': 'failed'}
  studies.make_study(tmp_path, grid, changed=changed)
  study = results.read_study(str(tmp_path))
  assert results.lone_divergences(study) == [
    'Diverged alone and not with CLOP (weight 1): base learning rate 1 (seeds '
    '0, 1).',
    'Diverged with CLOP (weight 1) and not alone: base learning rate 10 (seed '
    '1).',
  ]
  studies.make_study(
    tmp_path / 'bare',
    {WEIGHT: [0, 1], 'seed': [0]},
    changed={'c0': {'status': 'diverged'}},
  )
  study = results.read_study(str(tmp_path / 'bare'))
  assert results.lone_divergences(study) == [
    'Diverged alone and not with CLOP (weight 1): seed 0.'
  ]
  studies.make_study(
    tmp_path / 'other',
    {RATE: [0.1, 1.0]},
    changed={'c0': {'status': 'diverged'}},
  )
  study = results.read_study(str(tmp_path / 'other'))
  assert results.lone_divergences(study) == []
