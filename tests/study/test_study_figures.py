"""Tests of the figures of a study."""

from matplotlib import figure as figure_lib
import numpy as np
from PIL import Image
import pytest

from clop_jax.evaluation import figures
from clop_jax.study import figures as study_figures
from clop_jax.study import results
from tests import studies

K, RATE, WEIGHT = studies.K, studies.RATE, studies.WEIGHT


@pytest.fixture
def swept(tmp_path, monkeypatch):
  """Returns a function that draws the sweeps of a study, not to files."""
  saved = []
  monkeypatch.setattr(
    figure_lib.Figure, 'savefig', lambda self, path, **_: saved.append(self)
  )

  def draw(grid, **keywords):
    studies.make_study(tmp_path, grid, **keywords)
    study = results.read_study(str(tmp_path))
    return list(zip(study_figures.sweep_figures(study), saved, strict=True))

  return draw


@pytest.mark.parametrize(
  ('grid', 'titles'),
  [
    ({'train.batch_size': [8, 16], RATE: [1, 2]}, ['batch size', 'base']),
    ({WEIGHT: [0, 1], RATE: [1, 2]}, ['base']),
    ({WEIGHT: [0, 1, 5], 'prototypes.kind': ['a', 'b']}, ['CLOP weight']),
    ({WEIGHT: [0, 1], 'prototypes.kind': ['a', 'b']}, ['prototype kind']),
    ({WEIGHT: [0, 1]}, ['CLOP weight']),
    ({'seed': [0, 1], 'train.batch_size': [8]}, []),
  ],
)
def test_numbers_are_swept_and_names_are_compared(swept, grid, titles):
  drawn = [figure.title for figure, _ in swept(grid)]
  assert len(drawn) == 2 * len(titles)
  for first, second, title in zip(drawn[::2], drawn[1::2], titles, strict=True):
    assert first.startswith(f'Linear top-1 accuracy against {title}')
    assert second.startswith(f'Effective rank against {title}')


def test_means_and_bands_count_diverged_but_not_failed_cells(tmp_path, swept):
  changed = {'c5': {'status': 'diverged'}, 'c7': {'status': 'failed'}}
  (info, figure), _ = swept(studies.GRID, changed=changed)
  rows = studies.make_study(tmp_path / 'again', changed=changed)
  (axis,) = figure.axes
  lines = {line.get_label(): line for line in axis.lines}
  alone = [100 * rows[c]['linear_top1'] for c in ('c0', 'c1', 'c4')]
  chance = 100 / K
  np.testing.assert_allclose(
    lines['without CLOP'].get_xydata(),
    [[0.01, np.mean(alone[:2])], [1, (alone[2] + chance) / 2]],
  )
  np.testing.assert_allclose(
    lines['a diverged run'].get_xydata(), [[1, chance]]
  )
  # A failed cell counts nothing.
  clop = lines['CLOP weight 1'].get_ydata()
  np.testing.assert_allclose(clop[1], 100 * rows['c6']['linear_top1'])
  band = axis.collections[0].get_paths()[0].vertices[:, 1]
  ends = [band.min(), band.max()]
  np.testing.assert_allclose(ends, [chance, max(alone)])
  assert 'cross is a diverged run' in info.caption


@pytest.mark.parametrize(
  ('values', 'scale'),
  [
    ([16, 32, 64], 'linear'),
    ([0.001, 0.1, 10], 'log'),
    ([0, 0.01, 0.5], 'symlog'),
    ([0, 0.1, 0.5], 'linear'),
  ],
)
def test_an_axis_over_decades_is_logarithmic_and_has_room_for_0(
  swept, values, scale
):
  (_, figure), _ = swept({RATE: values})
  (axis,) = figure.axes
  assert axis.get_xscale() == scale
  labels = [t.get_text() for t in axis.get_xticklabels()]
  assert labels == [f'{v:g}' for v in values]
  places = axis.transData.transform([(v, 1) for v in values])[:, 0]
  assert np.diff(places).min() > 0.1 * np.ptp(places)


def test_names_make_dots_side_by_side(swept):
  names = ['orthonormal', 'simplex_etf', 'None']
  (_, figure), _ = swept({'prototypes.kind': names, WEIGHT: [0, 1]})
  (axis,) = figure.axes
  assert [t.get_text() for t in axis.get_xticklabels()] == names
  first, second = (c.lines[0].get_xdata() for c in axis.containers)
  assert (np.abs(first - second) > 0.1).all()


def test_at_most_eight_settings_have_panels(swept):
  names = [f'l{i}' for i in range(5)]
  grid = {RATE: [1, 2], WEIGHT: [0, 1], 'loss.contrastive': names}
  (info, figure), _ = swept(grid | {'data.name': ['cards', 'dice']})
  assert len(figure.axes) == 8
  assert 'first 8 of 10 settings' in info.caption


@pytest.mark.parametrize(('low', 'seen'), [(0.5, True), (0.98, False)])
def test_the_line_of_chance_does_not_flatten_the_curves(swept, low, seen):
  changed = {'c0': {'linear_top1': low}, 'c1': {'linear_top1': 0.99}}
  (_, figure), _ = swept({RATE: [1, 2]}, changed=changed)
  (axis,) = figure.axes
  assert (axis.get_ylim()[0] < 100 / K) == seen
  labels = [line.get_label() for line in axis.lines]
  assert any('chance' in label for label in labels) == seen


def test_collapsed_and_odd_embeddings_are_drawn(tmp_path, monkeypatch):
  monkeypatch.setattr(figures, '_DPI', 40)
  studies.make_study(tmp_path, {RATE: [1, 2, 3]}, points=12)
  rng = np.random.default_rng(1)
  equal = np.full((40, 8), 8**-0.5, np.float16)
  one = rng.normal(size=(K, 8))
  for cell, changed in {
    'c0': {'embeddings': equal, 'spectrum': np.zeros(8, np.float32)},
    'c1': {'embeddings': np.full((40, 8), np.nan)},
    'c2': {'embeddings': one, 'labels': np.zeros(K, np.int32)},
  }.items():
    path = tmp_path / 'cells' / cell / 'embeddings.npz'
    np.savez(path, **studies.arrays(rng, **changed))
  study = results.read_study(str(tmp_path))
  curves, planes = study_figures.cell_figures(study)
  for drawn in (curves, planes):
    with Image.open(drawn.path) as image:
      assert image.format == 'PNG'
