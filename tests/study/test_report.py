import base64
import html.parser
import io
import json
import pathlib
import re

import numpy as np
from PIL import Image
import pytest

from clop_jax.evaluation import figures
from clop_jax.study import report
from clop_jax.study import results
from tests import studies

K, DIM, POINTS = studies.K, studies.DIM, studies.POINTS
RATE, WEIGHT, GRID = studies.RATE, studies.WEIGHT, studies.GRID
VOID = {'meta', 'img', 'br', 'link', 'hr'}


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch):
  monkeypatch.setattr(figures, '_DPI', 40)


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
  rows = studies.make_study(folder, changed=changed)
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
  studies.make_study(tmp_path, grid, changed=changed)
  study = results.read_study(str(tmp_path))
  (batches, ranks) = report._settling_tables(study)
  assert batches[2] == [['89.5', '90.0', '-0.5']]
  assert ranks[2] == [['2', '1', '1']]


def test_spread_takes_only_rates_that_all_weights_have(tmp_path):
  grid = {RATE: [0.1, 1.0, 10.0], WEIGHT: [0, 1], 'seed': [0]}
  rows = studies.make_study(tmp_path, grid)
  studies.write_rows(tmp_path, [r for c, r in rows.items() if c != 'c5'])
  ((_, _, table, _), _) = report._settling_tables(
    results.read_study(str(tmp_path))
  )
  alone, clop = (
    100 * abs(rows[a]['linear_top1'] - rows[b]['linear_top1'])
    for a, b in (('c0', 'c2'), ('c1', 'c3'))
  )
  assert table[0][:2] == [f'{alone:.1f}', f'{clop:.1f}']
  assert table[0][-1] == '2 of 3'


def test_missing_and_odd_files_of_cells_do_not_stop_the_page(tmp_path):
  grid = GRID | {'seed': [0]}
  studies.make_study(tmp_path, grid, points=12)
  rng = np.random.default_rng(1)
  cells = tmp_path / 'cells'
  (cells / 'c0' / 'embeddings.npz').unlink()
  (cells / 'c0' / 'metrics.jsonl').write_text('{"step": 1, "lo')
  equal = np.full((POINTS, DIM), DIM**-0.5, np.float16)
  np.savez(
    cells / 'c1' / 'embeddings.npz',
    **studies.arrays(rng, embeddings=equal, spectrum=np.zeros(DIM, np.float32)),
  )
  nothing = np.full((K, K), np.nan, np.float32)
  np.savez(
    cells / 'c2' / 'embeddings.npz',
    **studies.arrays(
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


def test_json_that_is_no_object_is_left_out_and_said(tmp_path):
  studies.make_study(tmp_path, GRID | {'seed': [0]})
  (tmp_path / 'cells' / 'c0' / 'eval.json').write_text('[1, 2]')
  (tmp_path / 'cells' / 'c1' / 'eval.json').write_text('{"versions": 3}')
  for cell in (tmp_path / 'cells').iterdir():
    (cell / 'metrics.jsonl').write_text('{"step": 1, "loss": 2}\nnull\n')
  page = page_of(tmp_path)
  assert len(page.images) == 5
  left_out = page.text.split('Left out')[1]
  assert re.search(r'eval\.json of cell c0: .*JSON object.*\[1, 2\]', left_out)
  assert re.search(r'metrics\.jsonl of cell.*line 2.*None', left_out)
  # What comes before such a line is kept.
  study = results.read_study(str(tmp_path))
  assert study.curves(study.cells[1], ['loss'])['loss'].tolist() == [2.0]


def test_what_has_no_embeddings_or_no_chance_is_said(tmp_path):
  grid = {'data.name': ['dice', 'cards'], WEIGHT: [0, 1], 'seed': [0]}
  changed = {'c0': {'status': 'diverged'}, 'c2': {'status': 'diverged'}}
  changed['c3'] = {'status': 'failed'}
  studies.make_study(tmp_path, grid, num_classes=0, changed=changed)
  page = page_of(tmp_path)
  assert 'Diverged alone and not with CLOP (weight 1): dice (seed 0).' in (
    page.text
  )
  told = (
    'effective rank 0 (1 at accuracy 0, as the number of classes is not '
    'known), and not'
  )
  assert told in page.text
  (cards,) = [r for t in page.tables for r in t if r[:2] == ['cards', '0']]
  assert cards[2] == '0.0 ± –'  # noqa: RUF001


def test_the_page_has_the_word_of_the_command_for_none(tmp_path):
  grid = {'data.labels_per_class': [None, 4], WEIGHT: [0, 1]}
  studies.make_study(tmp_path, grid)
  content = json.loads((tmp_path / 'study.json').read_text())
  content['config']['data']['image_size'] = None
  (tmp_path / 'study.json').write_text(json.dumps(content))
  page = page_of(tmp_path)
  assert 'null' not in page.text
  assert 'data.image_size: None' in page.text
  rows = [row for table in page.tables for row in table]
  assert ['data.labels_per_class', 'None, 4'] in rows


def test_a_pasted_table_says_of_which_grid_it_is(whole):
  folder, _, _ = whole
  text = (folder / 'table.md').read_text()
  line = f'Grid: {RATE}: 0.01, 1; {WEIGHT}: 0, 1; seed: 0, 1'
  # Above each table: one may be pasted alone.
  assert text.count(f'\n\n{line}\n\n| ') == text.count('\n|--') == 3


def test_a_study_without_results_has_a_page_that_says_so(tmp_path):
  studies.make_study(tmp_path)
  (tmp_path / 'results.csv').unlink()
  page = page_of(tmp_path)
  assert 'no cell has a result yet' in page.text
  assert '8 not yet run' in page.text
  assert 'no cell has a result yet' in (tmp_path / 'table.md').read_text()


def test_a_study_of_failures_has_a_page_that_says_so(tmp_path):
  failed = {'status': 'failed', 'error': 'no luck'}
  studies.make_study(tmp_path, changed={f'c{i}': failed for i in range(8)})
  page = page_of(tmp_path)
  assert 'all 8 cells that ran have failed' in page.text
  assert 'no luck' in page.text
  assert not page.images


def test_a_study_of_divergences_is_drawn_at_chance(tmp_path):
  changed = {f'c{i}': {'status': 'diverged'} for i in range(8)}
  studies.make_study(tmp_path, changed=changed)
  page = page_of(tmp_path)
  assert row_of(page, '1', '0')[2:5] == [
    f'{100 / K:.1f} ± 0.0',
    f'{100 / K:.1f} ± 0.0',
    '0.0 ± 0.0',
  ]
  assert 'no embeddings to draw' in page.text
  assert len(page.images) == 1


def test_a_single_class_and_a_grid_of_seeds_have_a_page(tmp_path):
  studies.make_study(tmp_path, {'seed': [0]}, num_classes=1)
  np.savez(
    tmp_path / 'cells' / 'c0' / 'embeddings.npz',
    **studies.arrays(
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
