"""Tests of the drawn pictures."""

import sys

import numpy as np
import pytest

from clop_jax.tracking import pictures


@pytest.mark.parametrize(
  ('classes', 'scale'), [(3, 1.0), (200, 1.0), (0, 1.0), (3, 0.0)]
)
def test_a_picture_shows_any_embeddings_without_a_display(
  classes, scale, monkeypatch
):
  monkeypatch.setenv('MPLBACKEND', 'TkAgg')  # would need a display
  monkeypatch.delitem(sys.modules, 'matplotlib.pyplot', raising=False)
  rng = np.random.default_rng(0)
  labels = np.arange(256) % classes if classes else np.full(256, -1)
  spectrum = np.r_[1.0, np.full(15, scale)]
  picture = pictures.embedding_picture(
    scale * rng.normal(size=(256, 2)), labels, spectrum, 'step 3'
  )
  assert picture.shape == (500, 1000, 3) and picture.dtype == np.uint8
  # Ink in both panels.
  for half in (picture[100:400, 100:450], picture[100:400, 600:950]):
    assert half.min() < 200
  assert 'matplotlib.pyplot' not in sys.modules
