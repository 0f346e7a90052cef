import pytest

from clop_jax import results
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


def test_the_prototypes_tell_the_number_of_classes_if_the_config_does_not(
  tmp_path,
):
  studies.make_study(tmp_path, num_classes=0)
  assert results.read_study(str(tmp_path)).num_classes == K


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
