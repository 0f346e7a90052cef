import numpy as np
import pytest

from clop_jax.study import results
from tests import studies

K, RATE, WEIGHT = studies.K, studies.RATE, studies.WEIGHT
DIVERGED, FAILED = {'status': 'diverged'}, {'status': 'failed'}


def read(folder, *arguments, **keywords):
  rows = studies.make_study(folder, *arguments, **keywords)
  return rows, results.read_study(str(folder))


@pytest.mark.parametrize(
  ('file', 'data', 'match'),
  [
    (None, b'', r'has no study\.json'),
    *(
      ('study.json', text, r'study\.json')
      for text in (
        *(b'{', b'[]', b'{"config": {}}', b'{"config": {}, "grid": 1}'),
        *(b'{"config": 5, "grid": {"seed": [0]}}',),
      )
    ),
    *(
      ('results.csv', data, r'results\.csv is damaged')
      for data in (b'\xff', b'a,b\n1,2,3', b'cell,status\na,done', b'')
    ),
  ],
)
def test_a_damaged_study_is_named(tmp_path, file, data, match):
  if file == 'results.csv':
    studies.make_study(tmp_path)
  if file:
    (tmp_path / file).write_bytes(data)
  with pytest.raises(ValueError, match=match):
    results.read_study(str(tmp_path))


def test_an_unknown_status_or_a_missing_field_is_refused(tmp_path):
  rows = studies.make_study(tmp_path)
  rows['c3']['status'] = 'bored'
  studies.write_rows(tmp_path, rows.values())
  with pytest.raises(ValueError, match=r"status.*'bored'.*c3"):
    results.read_study(str(tmp_path))
  for row in rows.values():
    del row[WEIGHT]
  studies.write_rows(tmp_path, rows.values())
  with pytest.raises(ValueError, match=rf'lacks {WEIGHT}'):
    results.read_study(str(tmp_path))


@pytest.mark.parametrize(
  ('grid', 'num_classes', 'changed', 'expected'),
  [
    # Done cells know the number of classes of their data: c0 and c1 are dice,
    # c2 and c3 are cards.
    (
      {'data.name': ['dice', 'cards'], 'seed': [0, 1]},
      0,
      ('c1', 'c2', 'c3'),
      [1 / K, 0, 0],
    ),
    ({'data.num_classes': [3, 5]}, K, ('c0', 'c1'), [1 / 3, 1 / 5]),
    ({'seed': [0]}, 0, ('c0',), [0]),
  ],
)
def test_a_diverged_cell_counts_at_chance(
  tmp_path, grid, num_classes, changed, expected
):
  _, study = read(
    tmp_path,
    grid,
    num_classes=num_classes,
    changed=dict.fromkeys(changed, DIVERGED),
  )
  cells = study.counted[study.counted['status'] == 'diverged']
  for metric in ('linear_top1', 'knn_top1'):
    np.testing.assert_allclose(cells[metric], expected)
  assert (cells['effective_rank'] == 0).all()
  assert cells['prototype_cosine'].isna().all()


def test_the_number_of_classes_is_none_if_cells_differ(tmp_path):
  assert read(tmp_path / 'a', num_classes=0)[1].num_classes == K
  assert read(tmp_path / 'b')[1].num_classes == K
  _, study = read(tmp_path / 'c', {'data.num_classes': [3, 5]})
  assert study.num_classes is None


def test_cells_are_in_the_order_of_the_grid(tmp_path):
  rows, _ = read(tmp_path, {RATE: [10, 2], 'prototypes.kind': ['b', 'a']})
  studies.write_rows(tmp_path, reversed(rows.values()))
  study = results.read_study(str(tmp_path))
  assert list(study.cells['cell']) == ['c0', 'c1', 'c2', 'c3']


def test_means_and_deviations_are_those_of_numpy(tmp_path):
  rows, study = read(tmp_path, changed={'c5': DIVERGED, 'c7': FAILED})
  # By rate, weight and seed: c0 and c1 are done, c4 is, c6 is.
  done, half_diverged, half_failed = (
    results.means(study)[i] for i in (0, 2, 3)
  )
  linear = 100 * np.array([rows[c]['linear_top1'] for c in ('c0', 'c1')])
  assert list(done.values())[:3] == [
    '0.01',
    '0',
    f'{linear.mean():.1f} ± {linear.std(ddof=1):.1f}',
  ]
  knn = 100 * np.array([rows['c4']['knn_top1'], 1 / K])
  assert list(half_diverged.values())[3:] == [
    f'{knn.mean():.1f} ± {knn.std(ddof=1):.1f}',
    f'{rows["c4"]["effective_rank"] / 2:.1f} ± '
    f'{rows["c4"]["effective_rank"] / 2**0.5:.1f}',
    f'{rows["c4"]["prototype_cosine"]:.3f} ± –',  # noqa: RUF001
    '2',
    '1',
  ]
  top = f'{100 * rows["c6"]["linear_top1"]:.1f} ± –'  # noqa: RUF001
  values = list(half_failed.values())
  assert (values[2], *values[-2:]) == (top, '1 of 2', '0')


def test_every_cell_is_listed_and_those_not_done_come_first(tmp_path):
  error = {'error': 'out of luck'}
  changed = {'c2': DIVERGED, 'c5': FAILED | error}
  rows, study = read(tmp_path, changed=changed)
  cells = results.listed(study)
  assert len(cells) == 8
  assert [c['status'] for c in cells[:3]] == ['failed', 'diverged', 'done']
  assert (cells[0]['cell'], cells[0]['error']) == ('c5', 'out of luck')
  # What a diverged cell counts as is not shown as if it were measured.
  assert cells[1]['linear top-1, %'] == '–'  # noqa: RUF001
  assert cells[2]['linear top-1, %'] == f'{100 * rows["c0"]["linear_top1"]:.1f}'


@pytest.mark.parametrize(
  ('grid', 'changed', 'shown'),
  [
    # The first seed of the grid, and of the weights the first and the last.
    (
      {RATE: [1, 2, 3], WEIGHT: [0, 1, 5], 'seed': [3, 0]},
      {},
      ['c0', 'c4', 'c12', 'c16'],
    ),
    ({RATE: [1, 2, 3]}, {'c2': DIVERGED}, ['c0', 'c1']),
    ({'seed': [0, 1]}, {'c0': FAILED}, ['c1']),
    ({'seed': [0]}, {'c0': FAILED}, []),
  ],
)
def test_examples_are_done_cells_of_one_seed(tmp_path, grid, changed, shown):
  _, study = read(tmp_path, grid, changed=changed)
  assert list(study.examples()) == shown


def test_examples_are_named_by_what_differs(tmp_path):
  grid = {RATE: [1, 2], 'prototypes.kind': ['a'], WEIGHT: [0, 1]}
  _, study = read(tmp_path, grid)
  assert list(study.examples().values()) == [
    'without CLOP, base learning rate 1',
    'CLOP weight 1, base learning rate 1',
    'without CLOP, base learning rate 2',
    'CLOP weight 1, base learning rate 2',
  ]


def test_metrics_end_at_a_damaged_line_with_a_note(tmp_path):
  _, study = read(tmp_path)
  path = tmp_path / 'cells' / 'c1' / 'metrics.jsonl'
  path.write_text('{"step": 1, "loss": 2}\nnull\n{"step": 2, "loss": 1}\n')
  assert study.curves('c1')['loss'].tolist() == [2.0]
  assert 'metrics.jsonl of cell c1' in study.notes[0]
