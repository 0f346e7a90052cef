"""Fixtures for tests of tracking."""

import pytest

from clop_jax.experiment import metrics_log


@pytest.fixture
def collapse(monkeypatch):
  """Makes every training report an effective rank of 2."""
  floats = metrics_log.to_floats
  monkeypatch.setattr(
    metrics_log, 'to_floats', lambda x: floats(x) | {'effective_rank': 2.0}
  )
