"""Tests of the report of a study."""

import base64
import html.parser
import importlib.util
import io
import pathlib

from PIL import Image
import pytest

from clop_jax.evaluation import figures
from clop_jax.study import report
from clop_jax.study import results
from tests import studies

RATE, WEIGHT, GRID = studies.RATE, studies.WEIGHT, studies.GRID
ERROR = 'boom </td><script>alert(1)</script>'
VOID = {'meta', 'img', 'br', 'link', 'hr'}


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch):
  monkeypatch.setattr(figures, '_DPI', 40)


class Page(html.parser.HTMLParser):
  """The text, tables and images of a page whose tags are well nested."""

  def __init__(self, text):
    super().__init__()
    self.open, self.images, self.text = [], [], ''
    self.tables, self.attributes, self.tags = [], [], []
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
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
    if not {'style', 'script'} & set(self.open):
      self.text += data
    if self.open and self.open[-1] in ('td', 'th'):
      self.tables[-1][-1][-1] += data


def page_of(folder):
  path = report.study_report(str(folder))
  assert pathlib.Path(path) == folder / 'report.html'
  return Page((folder / 'report.html').read_text())


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A study with a diverged and a failed cell: its folder, rows and page."""
  folder = tmp_path_factory.mktemp('study')
  changed = {
    'c5': {'status': 'diverged', 'error': 'loss is nan at step 3'},
    'c7': {'status': 'failed', 'error': ERROR},
  }
  rows = studies.make_study(folder, changed=changed)
  return folder, rows, page_of(folder)


def test_the_page_is_one_file_that_needs_no_network(whole):
  _, _, page = whole
  assert ('html', 'lang', 'en') in page.attributes
  assert {'title', 'meta'} <= set(page.tags)
  assert page.tags.count('script') == 1
  assert not set(page.tags) & {'link', 'iframe', 'object'}
  for _, name, value in page.attributes:
    if name in ('src', 'href'):
      assert value.startswith('data:image/png;base64,')
    assert not name.startswith('on')


def test_every_image_is_a_picture_with_a_description(whole):
  folder, _, page = whole
  kept = {path.read_bytes() for path in (folder / 'figures').glob('*.png')}
  # Accuracy, rank, curves with spectra, planes.
  assert len(page.images) == len(kept) == 4
  for attributes in page.images:
    assert attributes['alt']
    data = base64.b64decode(attributes['src'].split(',')[1], validate=True)
    assert data in kept
    image = Image.open(io.BytesIO(data))
    assert image.format == 'PNG'
    assert len(image.convert('RGB').getcolors(1 << 20)) > 1


def test_the_header_describes_the_study(whole):
  _, _, page = whole
  hours = f'{8 * (1800 + 60) / 3600:.2f} hours'
  for fact in ('6 done', '1 diverged', '1 failed', 'of 8', 'dice', 'f00ba4'):
    assert fact in page.text
  for fact in ('0.0.7', '3 x abacus', '2001-02-03', RATE, hours):
    assert fact in page.text


def test_the_tables_have_all_means_and_cells(whole):
  folder, _, page = whole
  study = results.read_study(str(folder))
  means, cells = results.means(study), results.listed(study)
  for rows in (means, cells):
    assert [list(rows[0]), *(list(r.values()) for r in rows)] in page.tables
  # Errors are shown and cannot become markup.
  assert ERROR in {row['error'] for row in cells}
  assert '1 diverged: ' in page.text and '1 failed: ' in page.text
  numbers = [a for a in page.attributes if a == ('td', 'class', 'number')]
  assert len(numbers) >= 4 * (len(means) + len(cells))


def test_table_md_has_the_grid_and_the_means(whole):
  folder, _, page = whole
  text = (folder / 'table.md').read_text()
  line = f'Grid: {RATE}: 0.01, 1; {WEIGHT}: 0, 1; seed: 0, 1'
  assert text.count(f'\n\n{line}\n\n| ') == 1
  rows = [
    [cell.strip() for cell in row.strip('|').split('|')]
    for row in text.splitlines()
    if row.startswith('| ')
  ]
  assert rows in page.tables
  assert '1 diverged' in text


def test_missing_and_damaged_files_of_cells_are_noted(tmp_path):
  studies.make_study(tmp_path, GRID | {'seed': [0]}, points=12)
  cells = tmp_path / 'cells'
  for name, text in {
    'c0/metrics.jsonl': '{"step": 1, "lo',
    'c1/eval.json': '[1, 2]',
    'c2/eval.json': '{"versions": 3}',
    'c3/metrics.jsonl': '{"step": 1, "loss": 2}\nnull\n',
  }.items():
    (cells / name).write_text(text)
  (cells / 'c0' / 'embeddings.npz').unlink()
  (cells / 'c1' / 'embeddings.npz').write_bytes(b'PK')
  page = page_of(tmp_path)
  assert len(page.images) == 4
  notes = page.text.split('Left out')[1]
  for note in (
    'embeddings.npz of cell c0: does not exist',
    'embeddings.npz of cell c1: cannot be read',
    'eval.json of cell c1: cannot be read',
    'metrics.jsonl of cell c3: cannot be read',
  ):
    assert note in notes


def test_texts_are_escaped(tmp_path):
  grid = {'prototypes.kind': ['<b>', 'a & b'], 'seed': [0]}
  studies.make_study(tmp_path, grid, changed={'c0': {'status': 'diverged'}})
  (tmp_path / 'cells' / 'c1' / 'metrics.jsonl').write_text('<i>')
  page = page_of(tmp_path)
  assert not {'b', 'i'} & set(page.tags)
  assert {'<b>', 'a & b'} <= {
    t for table in page.tables for r in table for t in r
  }


@pytest.mark.parametrize(
  ('status', 'message'),
  [(None, 'none of 8'), ('failed', '8 failed of 8')],
)
def test_a_study_without_results_has_a_page(tmp_path, status, message):
  failed = {'status': status, 'error': 'no luck'}
  studies.make_study(tmp_path, changed={f'c{i}': failed for i in range(8)})
  if status is None:
    (tmp_path / 'results.csv').unlink()
  page = page_of(tmp_path)
  assert message in page.text
  for text in (page.text, (tmp_path / 'table.md').read_text()):
    assert 'Nothing to show' in text
  assert ('no luck' in page.text) == bool(status)
  assert not page.images


@pytest.mark.parametrize(
  ('grid', 'status', 'images'),
  [
    (GRID, 'diverged', 2),  # no embeddings to draw
    ({'seed': [0]}, 'done', 2),  # no sweep to draw
  ],
)
def test_a_study_without_cells_or_sweeps_to_draw_has_a_page(
  tmp_path, grid, status, images
):
  changed = {f'c{i}': {'status': status} for i in range(8)}
  studies.make_study(tmp_path, grid, num_classes=1, changed=changed)
  assert len(page_of(tmp_path).images) == images


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
  studies.make_study(tmp_path)
  before = sorted(tmp_path.iterdir())
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=r'pandas.*clop-jax\[report\]'):
    report.study_report(str(tmp_path))
  assert sorted(tmp_path.iterdir()) == before


def test_none_is_written_as_for_the_command(tmp_path):
  grid = {'data.labels_per_class': [None, 4], 'seed': [0]}
  studies.make_study(tmp_path, grid)
  page = page_of(tmp_path)
  assert 'null' not in page.text
  assert ['data.labels_per_class', 'None, 4'] in page.tables[1]
  assert [row[0] for row in page.tables[2][1:]] == ['None', '4']
