"""Tests of pasted images; `test_watch` and `test_preview` test the sheets."""

import numpy as np

from clop_jax.tracking import contact_sheet


def test_paste_shows_every_image_where_it_belongs():
  rows = [
    [np.full((2, 2, 1), 10, np.uint8), np.full((4, 4, 3), 20, np.uint8)],
    [np.full((4, 4, 3), 30, np.uint8), np.full((4, 2, 3), 40, np.uint8)],
  ]
  sheet = contact_sheet.paste(rows, scale=2, group=2)
  assert sheet.shape == (2 * 10 + 2, 2 * 10 + 2, 3)
  for value, count in ((10, 16), (20, 64), (30, 64), (40, 32)):
    assert (sheet[..., 0] == value).sum() == count
  assert (sheet[2:10, 12:20] == 20).all()
