import math

from matplotlib import collections
from matplotlib import figure as figure_lib
import numpy as np
from PIL import Image
import pytest

from clop_jax.evaluation import figures

DIM = 8


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch):
  monkeypatch.setattr(figures, '_DPI', 40)


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


def test_the_colour_bar_of_classes_has_the_colours_of_the_points():
  classes = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 50, 1000])
  figure = figure_lib.Figure()
  axis = figure.subplots()
  figures._class_legend(figure, [axis], classes)
  bar = figure.axes[-1]
  (colours,) = [
    c for c in bar.collections if isinstance(c, collections.QuadMesh)
  ]
  shown = [t.get_text() for t in bar.get_yticklabels()]
  assert {'0', '50'} <= set(shown)
  for place, label in zip(bar.get_yticks(), shown, strict=True):
    (position,) = np.flatnonzero(classes == int(label))
    np.testing.assert_allclose(
      colours.to_rgba(place), figures._class_colour(position, classes.size)
    )
