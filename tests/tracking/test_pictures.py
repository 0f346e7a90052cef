"""Tests of the drawn pictures."""

import sys

import numpy as np
import pytest

from clop_jax.tracking import pictures


@pytest.mark.parametrize(
  ('classes', 'scale'), [(3, 1.0), (200, 1.0), (0, 1.0), (3, 0.0)]
)
def test_any_embeddings_are_drawn_without_a_display(
  classes, scale, monkeypatch
):
  monkeypatch.setenv('MPLBACKEND', 'TkAgg')  # would need a display
  monkeypatch.delitem(sys.modules, 'matplotlib.pyplot', raising=False)
  rng = np.random.default_rng(0)
  labels = np.arange(64) % classes if classes else np.full(64, -1)
  spectrum = np.r_[1.0, np.full(15, scale)]
  embeddings = scale * rng.normal(size=(64, 16))
  picture = pictures.embedding_picture(
    embeddings, labels, spectrum, 3.0, 'step 3'
  )
  height, width, channels = picture.shape
  assert width > height > 300 and channels == 3 and picture.dtype == np.uint8
  # Ink in both panels.
  for half in np.array_split(picture[100:-150], 2, axis=1):
    assert half.min() < 200
  assert 'matplotlib.pyplot' not in sys.modules
