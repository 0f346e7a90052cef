"""The README's code, as it stands there, runs and is right."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clop_jax import loss
from clop_jax import prototypes
from tests import small

README = (small.ROOT / 'README.md').read_text()


def python_block(containing):
  blocks = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
  (code,) = [block for block in blocks if containing in block]
  namespace = {}
  exec(code, namespace)
  return namespace['step']


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


def test_the_jitted_step_trains():
  w, x, labels = problem()
  step = python_block('@jax.jit')
  new_w, value = step(w, x, labels)
  right_w, right_value = expected(w, x, labels)
  np.testing.assert_allclose(new_w, right_w, atol=1e-6)
  assert value == pytest.approx(float(right_value), rel=1e-6)
  for _ in range(20):
    new_w, last = step(new_w, x, labels)
  assert last < value


def test_the_pmapped_step_is_the_single_device_step():
  w, x, labels = problem()
  sharded = x.reshape(2, 8, 2, 20).swapaxes(0, 1)
  new_w, value = python_block('jax.pmap,')(w, sharded, labels.reshape(8, 2))
  right_w, right_value = expected(w, x, labels)
  for device in range(8):
    np.testing.assert_allclose(new_w[device], right_w, atol=1e-6)
    assert value[device] == pytest.approx(float(right_value), rel=1e-5)


def test_the_commands_of_the_readme_exist():
  for command in re.findall(r'python -m (clop_jax\.\w+)', README):
    path = small.ROOT / (command.replace('.', '/') + '.py')
    assert "if __name__ == '__main__':" in path.read_text()
  for path in re.findall(r'bash ([\w/]+\.sh)', README):
    assert (small.ROOT / path).exists()
  for path in re.findall(r'\]\(([\w/.]+)\)', README):
    assert (small.ROOT / path).exists()
