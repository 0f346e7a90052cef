"""Fixtures for tests of tracking."""

import jax
import pytest

from clop_jax import train
from clop_jax.experiment import metrics_log


@pytest.fixture(scope='session')
def run():
  """Trains on one device."""

  def run(config, workdir, **arguments):
    with config.unlocked():
      config.model.name = 'tests.small:Dense'
    devices = jax.devices()[:1]
    train.train(config, str(workdir), devices=devices, **arguments)

  return run


@pytest.fixture
def collapse(monkeypatch):
  """Makes every training report an effective rank of 2."""
  floats = metrics_log.to_floats
  monkeypatch.setattr(
    metrics_log, 'to_floats', lambda x: floats(x) | {'effective_rank': 2.0}
  )
