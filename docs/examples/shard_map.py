"""CLOP under `jax.shard_map` equals CLOP on one device.

python docs/examples/shard_map.py

As pmap.py, with one important difference: with `check_vma=True` the gradient
for replicated parameters is already global and must not be averaged. Output on
a CPU (jax 0.10.2):

labels of each device: [14, 13, 7, 4, 4, 5, 2, 0]
loss on 8 devices 6.092193, on one 6.092193
mean of the devices' own losses 3.883612
largest difference of a weight after 20 steps: 4.5e-08
"""

import os

# Set before jax is imported. Programs on GPUs or TPUs do not need it.
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')

import jax
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
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


def step(w, views, labels, c, axis_name=None):
  """Makes one update, with the local or (no axis) the whole batch."""
  value, gradient = jax.value_and_grad(total)(w, views, labels, c, axis_name)
  return w - 0.1 * gradient, value  # no pmean


def main():
  """Trains on all devices and on one, and compares."""
  devices = jax.device_count()
  mesh = jax.make_mesh((devices,), ('data',), axis_types=(AxisType.Auto,))
  everywhere = PartitionSpec()
  of_views, of_labels = PartitionSpec(None, 'data'), PartitionSpec('data')
  sharded_step = jax.jit(
    jax.shard_map(
      lambda *arguments: step(*arguments, axis_name='data'),
      mesh=mesh,
      in_specs=(everywhere, of_views, of_labels, everywhere),
      out_specs=(everywhere, everywhere),
      check_vma=True,
    )
  )
  one_device_step = jax.jit(step)

  images, y = datasets.load_digits(return_X_y=True)
  rng = np.random.default_rng(0)
  x = (images[: 16 * devices] / 16).astype(np.float32)
  views = x + 0.1 * rng.normal(size=(2, *x.shape)).astype(np.float32)
  # Later devices have fewer labels.
  known = np.arange(len(x)) < rng.integers(0, len(x), len(x))
  labels = np.where(known, y[: len(x)], -1)
  sharded_views = jax.device_put(views, NamedSharding(mesh, of_views))
  sharded_labels = jax.device_put(labels, NamedSharding(mesh, of_labels))

  c = prototypes.orthonormal_prototypes(jax.random.key(1), 10, dim=32)
  w = one_w = 0.1 * jax.random.normal(jax.random.key(0), (64, 32))
  share = jax.jit(total)
  means = [
    share(w, part, of_part, c)
    for part, of_part in zip(
      np.split(views, devices, axis=1),
      np.split(labels, devices),
      strict=True,
    )
  ]
  for number in range(20):
    w, value = sharded_step(w, sharded_views, sharded_labels, c)
    one_w, one_value = one_device_step(one_w, views, labels, c)
    if number == 0:
      counts = [int((part >= 0).sum()) for part in np.split(labels, devices)]
      print(f'labels of each device: {counts}')
      print(f'loss on {devices} devices {value:.6f}, on one {one_value:.6f}')
      print(f"mean of the devices' own losses {np.mean(means):.6f}")
  difference = np.abs(np.asarray(w) - np.asarray(one_w)).max()
  print(f'largest difference of a weight after 20 steps: {difference:.1e}')


if __name__ == '__main__':
  main()
