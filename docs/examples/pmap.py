"""CLOP under `jax.pmap` equals CLOP on one device.

python docs/examples/pmap.py

Eight virtual CPU devices, or all accelerators, share each batch. With
`axis_name`, the losses return the loss of the global batch. Under `pmap` the
gradients must be averaged. The devices have different numbers of labels, so the
mean of their local losses differs. Output on a CPU (jax 0.10.2):

labels of each device: [14, 13, 7, 4, 4, 5, 2, 0]
loss on 8 devices 6.092193, on one 6.092193
mean of the devices' own losses 3.883612
largest difference of a weight after 20 steps: 4.5e-08
"""

import os

# Set before jax is imported. Programs on GPUs or TPUs do not need it.
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')

import functools

import jax
import numpy as np
from sklearn import datasets

from clop_jax import loss
from clop_jax import prototypes


def total(w, views, labels, c, axis_name=None):
  """Returns NT-Xent plus CLOP of the local batch."""
  z = views @ w  # your network: [2, local batch, dim]
  return loss.nt_xent_loss(z, axis_name=axis_name) + loss.clop_loss(
    z, labels, c, axis_name=axis_name
  )


@functools.partial(
  jax.pmap,
  axis_name='data',
  in_axes=(None, 0, 0, None),
  out_axes=None,
)
def step(w, views, labels, c):
  """Makes one update; `w`, `c` and the result are replicated."""
  value, gradient = jax.value_and_grad(total)(w, views, labels, c, 'data')
  return w - 0.1 * jax.lax.pmean(gradient, 'data'), value


@jax.jit
def one_device_step(w, views, labels, c):
  """Makes the same update on one device."""
  value, gradient = jax.value_and_grad(total)(w, views, labels, c)
  return w - 0.1 * gradient, value


def main():
  """Trains on all devices and on one, and compares."""
  devices = jax.device_count()
  images, y = datasets.load_digits(return_X_y=True)
  rng = np.random.default_rng(0)
  x = (images[: 16 * devices] / 16).astype(np.float32)
  views = x + 0.1 * rng.normal(size=(2, *x.shape)).astype(np.float32)
  # Later devices have fewer labels.
  known = np.arange(len(x)) < rng.integers(0, len(x), len(x))
  labels = np.where(known, y[: len(x)], -1)
  local_labels = labels.reshape(devices, 16)
  # pmap maps the first axis: [devices, views, local batch, dim].
  local_views = views.reshape(2, devices, 16, -1).swapaxes(0, 1)

  c = prototypes.orthonormal_prototypes(jax.random.key(1), 10, dim=32)
  w = one_w = 0.1 * jax.random.normal(jax.random.key(0), (64, 32))
  share = jax.jit(total)
  means = [
    share(w, *local, c) for local in zip(local_views, local_labels, strict=True)
  ]
  for number in range(20):
    w, value = step(w, local_views, local_labels, c)
    one_w, one_value = one_device_step(one_w, views, labels, c)
    if number == 0:
      print(f'labels of each device: {(local_labels >= 0).sum(1).tolist()}')
      print(f'loss on {devices} devices {value:.6f}, on one {one_value:.6f}')
      print(f"mean of the devices' own losses {np.mean(means):.6f}")
  difference = np.abs(np.asarray(w) - np.asarray(one_w)).max()
  print(f'largest difference of a weight after 20 steps: {difference:.1e}')


if __name__ == '__main__':
  main()
