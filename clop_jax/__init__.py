"""CLOP: contrastive learning with orthonormal prototypes, in JAX.

Nothing is imported here, so that `import clop_jax.loss` loads jax alone.
"""

__version__ = '0.1.0'


def load(workdir: str, *, which: str = 'latest', devices=None):
  """Returns a trained run as functions of images; see `restored.load`."""
  from clop_jax.experiment import restored

  return restored.load(workdir, which=which, devices=devices)
