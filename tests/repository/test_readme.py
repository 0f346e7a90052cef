"""The code of the README runs and is correct."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clop_jax import loss
from clop_jax import prototypes
from clop_jax import train
from tests import small

README = (small.ROOT / 'README.md').read_text()


def python_block(containing):
  blocks = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
  (code,) = [block for block in blocks if containing in block]
  return code


def problem():
  rng = np.random.default_rng(0)
  w = jnp.asarray(rng.normal(size=(20, 128)), jnp.float32)
  x = jnp.asarray(rng.normal(size=(2, 16, 20)), jnp.float32)
  labels = rng.integers(0, 10, size=16)
  labels[[0, 1, 2, 3, 8]] = -1
  return w, x, jnp.asarray(labels)


def expected(w, x, labels):
  c = prototypes.orthonormal_prototypes(jax.random.key(0), 10, 128)

  def total(w):
    return loss.nt_xent_loss(x @ w) + loss.clop_loss(x @ w, labels, c)

  value, gradient = jax.value_and_grad(total)(w)
  return w - 0.1 * gradient, value


def test_jitted_step_trains():
  w, x, labels = problem()
  namespace = {}
  exec(python_block('@jax.jit'), namespace)
  step = namespace['step']
  new_w, value = step(w, x, labels)
  right_w, right_value = expected(w, x, labels)
  np.testing.assert_allclose(new_w, right_w, atol=1e-6)
  assert value == pytest.approx(float(right_value), rel=1e-6)
  for _ in range(20):
    new_w, last = step(new_w, x, labels)
  assert last < value


def test_own_source_trains(tmp_path, monkeypatch):
  code = python_block('class Birds')
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(small.ROOT))
  recorded = Recorded(train.train)
  monkeypatch.setattr(train, 'train', recorded)
  rng = np.random.default_rng(0)
  shape = (20, 24, 3)
  photographs = rng.integers(0, 256, size=(24, *shape)).astype(np.uint8)
  species = np.arange(24) % 4 - 1
  exec(code, {'photographs': photographs, 'species': species.tolist()})
  labels = np.load(tmp_path / 'runs/birds/labels.npz')['labels']
  np.testing.assert_array_equal(labels, species)
  assert (tmp_path / 'runs/birds/checkpoints/1').is_dir()
  assert recorded.calls == 1


class Recorded:
  """Trains on 8x8 images in batches of 24, a second instead of a minute."""

  def __init__(self, function):
    self.function, self.calls = function, 0

  def __call__(self, config, workdir, **arguments):
    self.calls += 1
    config = config.copy_and_resolve_references().unlock()
    config.model.name, config.train.batch_size = 'resnet8', 24
    config.train.num_epochs = 1
    config.augment.size = config.data.image_size = 8
    self.function(config.lock(), workdir, **arguments)
