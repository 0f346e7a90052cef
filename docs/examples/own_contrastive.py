"""Your own contrastive loss in the trainer.

python docs/examples/own_contrastive.py

The loss pulls the two views together and pushes the embeddings of the whole
batch apart by the log-determinant of their correlations. Printed on a CPU (jax
0.10.2), for the test digits:

linear 0.87, kNN 0.90
"""

import sys
import tempfile

import jax
import jax.numpy as jnp

from clop_jax import collapse
from clop_jax import defaults
from clop_jax import evaluate
from clop_jax import train


def coding_rate(embeddings, labels, *, axis_name, weight=1.0):
  """Loss of this device's embeddings `[2, batch, dim]`; labels are unused."""
  del labels
  z = collapse.normalize(embeddings)
  similarity = jnp.sum(z[0] * z[1])
  gram = jnp.einsum('vni,vnj->ij', z, z)
  count = jnp.float32(z.shape[1])
  if axis_name is not None:
    # The loss of the global batch: sums over all devices, then the mean.
    similarity, gram, count = jax.lax.psum((similarity, gram, count), axis_name)
  dim = z.shape[-1]
  identity = jnp.eye(dim)
  _, rate = jnp.linalg.slogdet(identity + 4 * dim * gram / (2 * count))
  return -similarity / count - weight * rate / dim


def main(workdir):
  """Trains on digits and evaluates the checkpoint."""
  config = defaults.get_config()
  config.loss.contrastive = 'own_contrastive:coding_rate'
  config.loss.options.weight = 2.0
  config.model.width_multiplier = 0.5
  config.train.num_epochs = 3
  train.train(config, workdir)
  linear, knn = evaluate.evaluate(evaluate.Request(workdir)).measurements
  print(f'linear {linear["linear_top1"]:.2f}, kNN {knn["knn_top1"]:.2f}')


if __name__ == '__main__':
  main(sys.argv[1] if sys.argv[1:] else tempfile.mkdtemp())
