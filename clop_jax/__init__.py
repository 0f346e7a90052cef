"""CLOP: contrastive learning with orthonormal prototypes, in JAX.

Imports nothing, so that `import clop_jax.loss` loads only jax.
"""

__version__ = '0.1.0'


def load(workdir: str, *, which: str = 'latest', backbone=None, devices=None):
  """Returns a trained run as functions of images, see `restored.load`."""
  from clop_jax.experiment import restored

  return restored.load(workdir, which=which, backbone=backbone, devices=devices)
