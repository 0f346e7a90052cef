"""Fixtures for tests of tracking."""

from typing import Any

import flax.linen as nn
import jax
import pytest

from clop_jax import train
from clop_jax.experiment import build
from clop_jax.experiment import metrics_log


class Dense(nn.Module):
  """A backbone that compiles fast, with the arguments of a ResNet."""

  stem: str
  width_multiplier: float
  zero_init_last_bn: bool
  bn_scope: str
  axis_name: str
  dtype: Any

  @nn.compact
  def __call__(self, images, train):
    x = images.reshape(len(images), -1).astype(self.dtype)
    return nn.relu(nn.Dense(32, dtype=self.dtype)(x)).astype('float32')


@pytest.fixture(autouse=True, scope='module')
def small_backbone():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(build._BACKBONES, 8, Dense)
    yield


@pytest.fixture(scope='session')
def run():
  """Trains on one device."""

  def run(config, workdir, **arguments):
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
