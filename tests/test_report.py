import base64
import csv
import html.parser
import io
import itertools
import json
import math
import pathlib

from matplotlib import figure as figure_lib
import numpy as np
from PIL import Image
import pytest

from clop_jax import figures
from clop_jax import report

K, DIM, POINTS = 4, 8, 40
RATE, WEIGHT = 'optimizer.learning_rate', 'loss.clop_weight'
GRID = {RATE: [0.01, 1.0], WEIGHT: [0.0, 1.0], 'seed': [0, 1]}
EVALUATION = {
  'versions': {'jax': '0.0.7'},
  'device': '3 x abacus',
  'time': '2001-02-03T04:05:06+00:00',
}
VOID = {'meta', 'img', 'br', 'link', 'hr'}


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch):
  monkeypatch.setattr(figures, '_DPI', 40)


def arrays(rng, *, points=POINTS, **changed):
  labels = np.arange(points, dtype=np.int32) % K
  z = rng.normal(size=(points, DIM)) + 3 * np.eye(K, DIM)[labels]
  z /= np.linalg.norm(z, axis=1, keepdims=True)
  means = np.stack([z[labels == k].mean(axis=0) for k in range(K)])
  means /= np.linalg.norm(means, axis=1, keepdims=True)
  return {
    'embeddings': z.astype(np.float16),
    'labels': labels,
    'spectrum': np.linalg.svd(z, compute_uv=False).astype(np.float32),
    'class_mean_cosines': (means @ means.T).astype(np.float32),
    'prototypes': np.eye(K, DIM, dtype=np.float32),
  } | changed


def make_study(folder, grid=GRID, *, num_classes=K, points=POINTS, changed=()):
  """Rows by cell name; `changed` maps such names to what differs in a row."""
  rng = np.random.default_rng(0)
  config = {'data': {'name': 'dice', 'num_classes': num_classes}, 'seed': 0}
  (folder / 'study.json').write_text(
    json.dumps({'config': config, 'grid': grid})
  )
  rows = {}
  for number, values in enumerate(itertools.product(*grid.values())):
    row = {'cell': f'c{number}', 'status': 'done', 'error': ''}
    row |= dict(zip(grid, values, strict=True))
    row |= {
      'linear_top1': rng.uniform(0.5, 1),
      'knn_top1': rng.uniform(0.5, 1),
      'effective_rank': rng.uniform(1, 8),
      'prototype_cosine': rng.uniform(-1, 1),
      'train_seconds': 1800,
      'evaluate_seconds': 60,
      'commit': 'f00ba4',
      'config': json.dumps(config),
    }
    row |= dict(changed).get(row['cell'], {})
    if row['status'] != 'done':
      for metric in ('linear_top1', 'knn_top1', 'effective_rank'):
        row[metric] = ''
      row['prototype_cosine'] = ''
    rows[row['cell']] = row
    cell = folder / 'cells' / row['cell']
    cell.mkdir(parents=True)
    if row['status'] == 'done':
      (cell / 'eval.json').write_text(json.dumps(EVALUATION))
      np.savez(cell / 'embeddings.npz', **arrays(rng, points=points))
      (cell / 'metrics.jsonl').write_text(
        ''.join(
          json.dumps(
            {'step': s, 'loss': 1 / s, 'clop_loss': None, 'effective_rank': s}
          )
          + '\n'
          for s in range(1, 5)
        )
      )
  write_rows(folder, rows.values())
  return rows


def write_rows(folder, rows):
  rows = list(rows)
  with open(folder / 'results.csv', 'w', newline='') as file:
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)


class Page(html.parser.HTMLParser):
  """Text, tables and images of a page; open tags must be closed in order."""

  def __init__(self, text):
    super().__init__()
    self.open, self.images, self.text = [], [], ''
    self.tables, self.attributes, self.tags = [], [], set()
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    self.attributes += [(tag, *pair) for pair in attrs]
    if tag == 'img':
      self.images.append(dict(attrs))
    if tag == 'table':
      self.tables.append([])
    if tag == 'tr':
      self.tables[-1].append([])
    if tag in ('td', 'th'):
      self.tables[-1][-1].append('')
    if tag not in VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if 'style' not in self.open:
      self.text += data
    if self.open and self.open[-1] in ('td', 'th'):
      self.tables[-1][-1][-1] += data

  def table(self, first):
    (found,) = [t for t in self.tables if t and t[0][0] == first]
    return found


def page_of(folder):
  path = report.study_report(str(folder))
  assert pathlib.Path(path) == folder / 'report.html'
  return Page((folder / 'report.html').read_text())


def row_of(page, *settings):
  (row,) = [
    r for r in page.table('base learning rate') if r[:2] == list(settings)
  ]
  return row


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A study with a diverged and a failed cell: its folder, rows and page."""
  folder = tmp_path_factory.mktemp('study')
  changed = {
    'c5': {'status': 'diverged', 'error': 'loss is nan at step 3'},
    'c7': {'status': 'failed', 'error': 'boom </td><script>alert(1)</script>'},
  }
  rows = make_study(folder, changed=changed)
  return folder, rows, page_of(folder)


def test_the_page_needs_no_network_and_no_script(whole):
  _, _, page = whole
  assert ('html', 'lang', 'en') in page.attributes
  assert {'title', 'meta'} <= page.tags
  assert not page.tags & {'script', 'link', 'iframe', 'object'}
  for _, name, value in page.attributes:
    if name in ('src', 'href'):
      assert value.startswith('data:image/png;base64,')
    assert not name.startswith('on')


def test_every_image_is_a_picture_with_a_description(whole):
  folder, _, page = whole
  kept = {path.read_bytes() for path in (folder / 'figures').glob('*.png')}
  # Accuracy and rank, spectra, cosines, planes, curves.
  assert len(page.images) == len(kept) == 5
  for attributes in page.images:
    assert attributes['alt']
    data = base64.b64decode(attributes['src'].split(',')[1], validate=True)
    assert data in kept
    image = Image.open(io.BytesIO(data))
    assert image.format == 'PNG'
    assert len(image.convert('RGB').getcolors(1 << 20)) > 1


def test_the_header_says_what_was_run(whole):
  _, _, page = whole
  assert '6 done, 1 diverged, 1 failed, 0 not yet run' in page.text
  for told in ('dice', 'f00ba4', '0.0.7', '3 x abacus', '2001-02-03', RATE):
    assert told in page.text
  hours = 8 * (1800 + 60) / 3600
  assert f'{hours:.2f} hours' in page.text


def test_errors_are_shown_and_cannot_become_markup(whole):
  _, _, page = whole
  assert [['cell', 'error'], ['c5', 'loss is nan at step 3']] in page.tables
  error = 'boom </td><script>alert(1)</script>'
  assert [['cell', 'error'], ['c7', error]] in page.tables


def test_means_and_deviations_are_those_of_numpy(whole):
  folder, rows, page = whole
  linear = 100 * np.array([rows[c]['linear_top1'] for c in ('c2', 'c3')])
  cosine = np.array([rows[c]['prototype_cosine'] for c in ('c2', 'c3')])
  row = row_of(page, '0.01', '1')
  assert row[2] == f'{linear.mean():.1f} ± {linear.std(ddof=1):.1f}'
  assert row[5] == f'{cosine.mean():.3f} ± {cosine.std(ddof=1):.3f}'
  assert row[6:] == ['2', '0']
  lines = (folder / 'table.md').read_text().splitlines()
  cells = [[c.strip() for c in line.strip('|').split('|')] for line in lines]
  assert row in cells


def test_a_diverged_cell_counts_as_collapsed(whole):
  _, rows, page = whole
  knn = 100 * np.array([rows['c4']['knn_top1'], 1 / K])
  rank = np.array([rows['c4']['effective_rank'], 0.0])
  row = row_of(page, '1', '0')
  assert row[3] == f'{knn.mean():.1f} ± {knn.std(ddof=1):.1f}'
  assert row[4] == f'{rank.mean():.1f} ± {rank.std(ddof=1):.1f}'
  assert row[5] == f'{rows["c4"]["prototype_cosine"]:.3f} ± –'  # noqa: RUF001
  assert row[6:] == ['2', '1']
  assert '1 diverged run is counted at chance accuracy' in page.text


def test_a_failed_cell_is_left_out_and_one_seed_has_no_deviation(whole):
  _, rows, page = whole
  row = row_of(page, '1', '1')
  assert row[2] == f'{100 * rows["c6"]["linear_top1"]:.1f} ± –'  # noqa: RUF001
  assert row[6:] == ['1 of 2', '0']
  assert '1 failed run is left out' in page.text


def test_the_drawn_bands_have_the_diverged_cell_in_them(whole):
  folder, rows, _ = whole
  study = report._read(str(folder))
  band = report._band(
    study, 'linear_top1', 100, RATE, GRID[RATE], {WEIGHT: 0.0}
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


def test_spread_over_learning_rates_is_that_of_the_means(whole):
  _, rows, page = whole

  def mean(*cells):
    return np.mean([100 * float(rows[c]['linear_top1']) for c in cells])

  alone = abs(
    mean('c0', 'c1') - (100 * rows['c4']['linear_top1'] + 100 / K) / 2
  )
  clop = abs(mean('c2', 'c3') - mean('c6'))
  assert page.table('alone')[1] == [
    f'{alone:.1f}',
    f'{clop:.1f}',
    f'{clop / alone:.2f}',
    '2 of 2',
  ]


def test_batches_and_ranks_are_compared_as_the_bars_ask(tmp_path):
  grid = {'train.batch_size': [32, 8], WEIGHT: [0, 1, 5], 'seed': [0]}
  # c0 to c2: batch 32; c3 to c5: batch 8.
  changed = {
    'c0': {'linear_top1': 0.9, 'effective_rank': K - 0.1},
    'c1': {'linear_top1': 0.1, 'effective_rank': K},
    'c3': {'linear_top1': 0.2, 'effective_rank': K + 0.1},
    'c4': {'linear_top1': 0.895, 'effective_rank': 1},
  }
  make_study(tmp_path, grid, changed=changed)
  study = report._read(str(tmp_path))
  (batches, ranks) = report._settling_tables(study)
  assert batches[2] == [['89.5', '90.0', '-0.5']]
  assert ranks[2] == [['2', '1', '1']]


def test_spread_takes_only_rates_that_all_weights_have(tmp_path):
  grid = {RATE: [0.1, 1.0, 10.0], WEIGHT: [0, 1], 'seed': [0]}
  rows = make_study(tmp_path, grid)
  write_rows(tmp_path, [r for c, r in rows.items() if c != 'c5'])
  ((_, _, table, _), _) = report._settling_tables(report._read(str(tmp_path)))
  alone, clop = (
    100 * abs(rows[a]['linear_top1'] - rows[b]['linear_top1'])
    for a, b in (('c0', 'c2'), ('c1', 'c3'))
  )
  assert table[0][:2] == [f'{alone:.1f}', f'{clop:.1f}']
  assert table[0][-1] == '2 of 3'


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
  make_study(tmp_path, grid, changed=changed)
  cells, rule = report._telling_cells(report._read(str(tmp_path)))
  assert [c.name for c in cells] == shown
  assert 'seed 3' in rule


def test_without_weights_the_best_and_worst_cells_are_shown(tmp_path):
  grid = {RATE: [0.1, 1.0, 10.0]}
  tops = {'c0': 0.7, 'c1': 0.9, 'c2': 0.6}
  make_study(
    tmp_path, grid, changed={c: {'linear_top1': t} for c, t in tops.items()}
  )
  cells, rule = report._telling_cells(report._read(str(tmp_path)))
  assert [c.name for c in cells] == ['c1', 'c2']
  assert 'highest and the lowest' in rule


def test_missing_and_odd_files_of_cells_do_not_stop_the_page(tmp_path):
  grid = GRID | {'seed': [0]}
  make_study(tmp_path, grid, points=12)
  rng = np.random.default_rng(1)
  cells = tmp_path / 'cells'
  (cells / 'c0' / 'embeddings.npz').unlink()
  (cells / 'c0' / 'metrics.jsonl').write_text('{"step": 1, "lo')
  equal = np.full((POINTS, DIM), DIM**-0.5, np.float16)
  np.savez(
    cells / 'c1' / 'embeddings.npz',
    **arrays(rng, embeddings=equal, spectrum=np.zeros(DIM, np.float32)),
  )
  nothing = np.full((K, K), np.nan, np.float32)
  np.savez(
    cells / 'c2' / 'embeddings.npz',
    **arrays(
      rng,
      class_mean_cosines=nothing,
      labels=np.zeros(POINTS, np.int32),
      embeddings=np.full((POINTS, DIM), np.nan),
    ),
  )
  (cells / 'c2' / 'eval.json').unlink()
  page = page_of(tmp_path)
  assert len(page.images) == 5
  assert 'embeddings.npz of cell c0: there is none' in page.text
  assert 'metrics.jsonl of cell c0: cannot be read' in page.text
  assert 'c1: needs at least 20 different embeddings, got 1' in page.text
  assert 'cell c2: none of them is finite' in page.text
  assert 'eval.json of cell c2: there is none' in page.text
  assert 'c3: needs at least 20 different embeddings, got 12' in page.text


def test_a_damaged_archive_is_a_note(tmp_path):
  make_study(tmp_path)
  path = tmp_path / 'cells' / 'c0' / 'embeddings.npz'
  path.write_bytes(path.read_bytes()[:100])
  study = report._read(str(tmp_path))
  assert report._arrays(study, study.cells[0]) is None
  assert 'cell c0: cannot be read' in study.notes[0]


def test_a_folder_that_is_no_study_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r'holds no study\.json.*make one'):
    report.study_report(str(tmp_path))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('text', ['{', '[]', '{"config": {}}', '{"grid": 1}'])
def test_a_damaged_study_is_refused(tmp_path, text):
  (tmp_path / 'study.json').write_text(text)
  with pytest.raises(ValueError, match=r'study\.json must hold "config" and'):
    report.study_report(str(tmp_path))


def test_results_of_another_grid_or_status_are_refused(tmp_path):
  rows = make_study(tmp_path)
  rows['c3']['status'] = 'bored'
  write_rows(tmp_path, rows.values())
  with pytest.raises(ValueError, match=r"got 'bored' for cell 'c3'"):
    report.study_report(str(tmp_path))
  for row in rows.values():
    del row[WEIGHT]
  write_rows(tmp_path, rows.values())
  with pytest.raises(ValueError, match=rf'it lacks {WEIGHT}'):
    report.study_report(str(tmp_path))


def test_a_study_without_results_has_a_page_that_says_so(tmp_path):
  make_study(tmp_path)
  (tmp_path / 'results.csv').unlink()
  page = page_of(tmp_path)
  assert 'no cell has a result yet' in page.text
  assert '8 not yet run' in page.text
  assert 'no cell has a result yet' in (tmp_path / 'table.md').read_text()


def test_a_study_of_failures_has_a_page_that_says_so(tmp_path):
  failed = {'status': 'failed', 'error': 'no luck'}
  make_study(tmp_path, changed={f'c{i}': failed for i in range(8)})
  page = page_of(tmp_path)
  assert 'all 8 cells that ran have failed' in page.text
  assert 'no luck' in page.text
  assert not page.images


def test_a_study_of_divergences_is_drawn_at_chance(tmp_path):
  changed = {f'c{i}': {'status': 'diverged'} for i in range(8)}
  make_study(tmp_path, changed=changed)
  page = page_of(tmp_path)
  assert row_of(page, '1', '0')[2:5] == [
    f'{100 / K:.1f} ± 0.0',
    f'{100 / K:.1f} ± 0.0',
    '0.0 ± 0.0',
  ]
  assert 'no embeddings to draw' in page.text
  assert len(page.images) == 1


def test_a_single_class_and_a_grid_of_seeds_have_a_page(tmp_path):
  make_study(tmp_path, {'seed': [0]}, num_classes=1)
  np.savez(
    tmp_path / 'cells' / 'c0' / 'embeddings.npz',
    **arrays(
      np.random.default_rng(0),
      points=K,
      labels=np.zeros(K, np.int32),
      class_mean_cosines=np.ones((1, 1), np.float32),
      prototypes=np.eye(1, DIM),
    ),
  )
  page = page_of(tmp_path)
  assert 'varies nothing but the seed' in page.text
  assert page.table('linear top-1, %')[1][-2:] == ['1', '0']


def test_the_prototypes_tell_the_number_of_classes_if_the_config_does_not(
  tmp_path,
):
  make_study(tmp_path, num_classes=0)
  assert report._read(str(tmp_path)).num_classes == K


def test_values_of_the_csv_are_found_in_the_grid_however_written():
  assert report._grid_value('1e-05', [1, 0.00001]) == 0.00001
  assert report._grid_value('10', [1.0, 10.0]) == 10.0
  assert report._grid_value('null', [None, 'x']) is None
  assert report._grid_value('True', [False, True]) is True
  assert report._grid_value('[1, 2]', [[1, 2], [3]]) == [1, 2]
  assert report._grid_value('x', [1.0, 'x']) == 'x'


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
  make_study(tmp_path, grid)
  assert report._swept(report._read(str(tmp_path))) == swept


def test_names_make_dots_and_many_settings_fewer_panels(tmp_path):
  grid = {
    'prototypes.kind': ['orthonormal', 'simplex_etf', None],
    WEIGHT: [0, 1],
  }
  make_study(tmp_path, grid)
  study = report._read(str(tmp_path))
  (title, figure) = report._sweep(study, 'prototypes.kind')
  assert 'prototype kind' in title
  assert 'Dots' in figure
  grid = {RATE: [1, 2, 3], 'train.num_epochs': [1, 2, 3], 'a': ['x', 'y', 'z']}
  (tmp_path / 'many').mkdir()
  make_study(tmp_path / 'many', grid)
  study = report._read(str(tmp_path / 'many'))
  panels, fixed = report._panels(study, [RATE, 'train.num_epochs', 'a'])
  assert panels == [{'a': 'x'}, {'a': 'y'}, {'a': 'z'}]
  assert fixed == {RATE: 2, 'train.num_epochs': 2}


@pytest.mark.parametrize(
  ('values', 'scale'),
  [
    ([16, 32, 64], 'linear'),
    ([0.001, 0.1, 10], 'log'),
    ([0, 0.01, 0.5], 'symlog'),
    ([0, 0.1, 0.5], 'linear'),
  ],
)
def test_an_axis_over_decades_is_logarithmic_and_has_room_for_0(values, scale):
  axis = figure_lib.Figure().subplots()
  axis.plot(values, values)
  figures._number_axis(axis, values, 4.0)
  assert axis.get_xscale() == scale
  places = axis.transData.transform([(v, 0) for v in values])[:, 0]
  # Every value keeps clear of its neighbours.
  assert np.diff(places).min() > 0.1 * np.ptp(places)
  assert [t.get_text() for t in axis.get_xticklabels()] == [
    f'{v:g}' for v in values
  ]


@pytest.mark.parametrize(
  ('low', 'high', 'seen'), [(20.0, 90.0, True), (90.0, 99.0, False)]
)
def test_the_line_of_chance_does_not_flatten_the_curves(low, high, seen):
  ends = np.array([low, high])
  bottom, top = figures._limits(
    [figures.Band(ends, ends, ends)], ('chance', 10.0)
  )
  assert (bottom < 10.0) == seen
  assert bottom < low < high < top


def test_a_collapsed_run_is_drawn_as_a_heap(tmp_path):
  # Float noise about one point must not be blown up to fill the picture.
  noise = 1e-7 * np.random.default_rng(0).normal(size=(30, DIM))
  planes = [figures.principal_plane(np.ones((30, DIM)) + noise)]
  assert np.abs(planes[0]).max() < 1e-3 * figures._extent(planes)
  figures.embedding_figure(
    str(tmp_path / 'new' / 'a.png'),
    ['a'],
    [np.ones((30, 1), np.float32)],
    np.arange(30),
    [np.zeros(1, np.float32)],
    [0.0],
  )
  with Image.open(tmp_path / 'new' / 'a.png') as image:
    assert image.format == 'PNG'


def test_the_principal_plane_is_the_one_of_greatest_variance():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(50, 5)) * [1, 5, 0.1, 3, 0.1] + 7
  plane = figures.principal_plane(x)
  values = np.linalg.eigvalsh(np.cov(x.T))[::-1]
  np.testing.assert_allclose(plane.var(axis=0, ddof=1), values[:2], rtol=1e-4)
  assert math.isclose(plane.mean(), 0, abs_tol=1e-5)
