"""CLOP in a Flax NNX model.

python docs/examples/nnx_model.py

A small network embeds handwritten digits. The two views of a digit differ in
noise. At this learning rate the embeddings of NT-Xent alone collapse to fewer
directions than there are classes. CLOP with half of the labels prevents it.
(With a tenth of the labels that depends on the seed. At a learning rate of 3
nothing collapses.) Output on a CPU (jax 0.10.2, flax 0.12.8), for the test
digits:

NT-Xent: effective rank 7.6, kNN 0.869
NT-Xent + CLOP: effective rank 12.7, kNN 0.922
"""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets
from sklearn import model_selection
from sklearn import neighbors

from clop_jax import collapse
from clop_jax import loss
from clop_jax import prototypes


class Encoder(nnx.Module):
  """An MLP for 64 pixels. The last layer is linear."""

  def __init__(self, dim, *, rngs):  # noqa: D107
    self.hidden = nnx.Linear(64, 128, rngs=rngs)
    self.out = nnx.Linear(128, dim, rngs=rngs)

  def __call__(self, x):
    return self.out(nnx.relu(self.hidden(x)))


@nnx.jit
def train_step(model, optimizer, x, labels, c, clop_weight, key):
  """Updates the model in place; label -1 is unlabelled."""
  views = x + 0.3 * jax.random.normal(key, (2, *x.shape))

  def total(model):
    z = model(views)  # [2, batch, dim]
    return loss.nt_xent_loss(z) + clop_weight * loss.clop_loss(z, labels, c)

  gradients = nnx.grad(total)(model)
  optimizer.update(model, gradients)


def main():
  """Trains without and with CLOP and evaluates both."""
  x, y = datasets.load_digits(return_X_y=True)
  x = (x / 16).astype(np.float32)
  x, test_x, y, test_y = model_selection.train_test_split(
    x, y, test_size=0.2, random_state=0, stratify=y
  )
  rng = np.random.default_rng(0)
  labels = np.where(rng.random(len(y)) < 0.5, y, -1)
  c = prototypes.orthonormal_prototypes(jax.random.key(1), 10, dim=64)
  for name, clop_weight in (('NT-Xent', 0.0), ('NT-Xent + CLOP', 1.0)):
    model = Encoder(64, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(30.0, 0.9), wrt=nnx.Param)
    key, rng = jax.random.key(0), np.random.default_rng(0)
    for step in range(200):
      batch = rng.choice(len(x), 128, replace=False)
      train_step(
        model,
        optimizer,
        x[batch],
        labels[batch],
        c,
        clop_weight,
        jax.random.fold_in(key, step),
      )
    bank = collapse.normalize(model(jnp.asarray(x)))
    z = collapse.normalize(model(jnp.asarray(test_x)))
    knn = neighbors.KNeighborsClassifier(20).fit(bank, y).score(z, test_y)
    rank = collapse.effective_rank(z)
    print(f'{name}: effective rank {rank:.1f}, kNN {knn:.3f}')


if __name__ == '__main__':
  main()
