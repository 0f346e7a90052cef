"""The CLOP loss and other contrastive losses, as pure functions.

Conventions of all losses:

* `embeddings` are `[views, batch, dim]` floats of any precision. All arithmetic
  is float32, and the result is a float32 scalar.
* `labels` are `[batch]` integers, one for all views of an example. A negative
  label means unlabelled.
* `axis_name` is the mapped axis over which the batch is split, or None. With it
  the arrays are this device's part of the batch. The result is always the mean
  over the *global* batch, the same on every device.
* Under `jax.shard_map(..., check_vma=True)` the gradient for replicated
  parameters is already global: do not average it again. Under `jax.pmap`,
  average the gradients with `jax.lax.pmean`.
* A NaN in the embeddings gives a NaN loss. A zero embedding has cosine 0 with
  everything, and gradient 0.
* An invalid shape, dtype, label or hyper-parameter raises a `ValueError` while
  tracing.
"""

from clop_jax.loss.classification import cross_entropy_loss
from clop_jax.loss.clop import DISTANCES
from clop_jax.loss.clop import clop_loss
from clop_jax.loss.clop import prototype_distances
from clop_jax.loss.contrastive import choose_block_size
from clop_jax.loss.contrastive import dcl_loss
from clop_jax.loss.contrastive import nt_xent_loss
from clop_jax.loss.contrastive import supcon_loss
from clop_jax.loss.redundancy import barlow_twins_loss
from clop_jax.loss.redundancy import vicreg_loss
from clop_jax.loss.redundancy import w_mse_loss
from clop_jax.loss.views import alignment_uniformity_loss
from clop_jax.loss.views import invariance_loss
from clop_jax.loss.views import sigmoid_loss
from clop_jax.loss.views import spectral_contrastive_loss

__all__ = [
  'DISTANCES',
  'alignment_uniformity_loss',
  'barlow_twins_loss',
  'choose_block_size',
  'clop_loss',
  'cross_entropy_loss',
  'dcl_loss',
  'invariance_loss',
  'nt_xent_loss',
  'prototype_distances',
  'sigmoid_loss',
  'spectral_contrastive_loss',
  'supcon_loss',
  'vicreg_loss',
  'w_mse_loss',
]
