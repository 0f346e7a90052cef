import importlib.util
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


def draw(path):
  return figures.embedding_figure(
    str(path),
    ['a'],
    [np.ones((30, 1), np.float32)],
    np.arange(30),
    [np.zeros(1, np.float32)],
    [0.0],
  )


def test_collapsed_embeddings_look_collapsed(tmp_path):
  # Float noise around one point must not fill the figure.
  noise = 1e-7 * np.random.default_rng(0).normal(size=(30, DIM))
  planes = [figures.principal_plane(np.ones((30, DIM)) + noise)]
  assert np.abs(planes[0]).max() < 1e-3 * figures.extent_of(planes)
  assert draw(tmp_path / 'new' / 'a.png')
  with Image.open(tmp_path / 'new' / 'a.png') as image:
    assert image.format == 'PNG'


def test_missing_matplotlib_gives_a_warning(tmp_path, monkeypatch, capsys):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    'find_spec',
    lambda name: None if name == 'matplotlib' else find(name),
  )
  assert not draw(tmp_path / 'a.png')
  assert not (tmp_path / 'a.png').exists()
  assert 'clop-jax[report]' in capsys.readouterr().err
  with pytest.raises(ValueError, match=r'--figure needs matplotlib.*report'):
    figures.check_path('a.png', 'figure')


def test_principal_plane_has_the_largest_variance():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(50, 5)) * [1, 5, 0.1, 3, 0.1] + 7
  plane = figures.principal_plane(x)
  values = np.linalg.eigvalsh(np.cov(x.T))[::-1]
  np.testing.assert_allclose(plane.var(axis=0, ddof=1), values[:2], rtol=1e-4)
  assert math.isclose(plane.mean(), 0, abs_tol=1e-5)


def test_colour_bar_has_the_colours_of_the_points():
  classes = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 50, 1000])
  figure = figure_lib.Figure()
  axis = figure.subplots()
  figures.class_legend(figure, [axis], classes)
  bar = figure.axes[-1]
  (colours,) = [
    c for c in bar.collections if isinstance(c, collections.QuadMesh)
  ]
  shown = [t.get_text() for t in bar.get_yticklabels()]
  assert {'0', '1000'} <= set(shown)
  for place, label in zip(bar.get_yticks(), shown, strict=True):
    (position,) = np.flatnonzero(classes == int(label))
    np.testing.assert_allclose(
      colours.to_rgba(place), figures.colour(position, classes.size)
    )


@pytest.mark.parametrize('count', [2, 10])
def test_few_classes_have_a_legend(count):
  figure = figure_lib.Figure()
  labels = np.arange(30) % count
  for axis in figure.subplots(1, 2):
    figures.scatter(axis, np.ones((30, 2)), labels, np.arange(count), 1.0)
  figures.class_legend(figure, figure.axes, np.arange(count))
  texts = [t.get_text() for t in figure.legends[0].get_texts()]
  assert texts == [str(k) for k in range(count)]
