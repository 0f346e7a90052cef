"""CLOP: contrastive learning with orthonormal prototypes, in JAX.

Nothing is imported here, so that `import clop_jax.loss` loads jax alone.
"""

__version__ = '0.1.0'
