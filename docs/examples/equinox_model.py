"""CLOP in an Equinox model.

python docs/examples/equinox_model.py

As nnx_model.py, with DCL as the contrastive loss. Output on a CPU (jax 0.10.2,
equinox 0.13.8), for the test digits:

DCL: effective rank 7.7, kNN 0.894
DCL + CLOP: effective rank 11.0, kNN 0.914
"""

import equinox as eqx
import jax
import numpy as np
import optax
from sklearn import datasets
from sklearn import model_selection
from sklearn import neighbors

from clop_jax import collapse
from clop_jax import loss
from clop_jax import prototypes

tx = optax.sgd(30.0, momentum=0.9)


@eqx.filter_jit
def train_step(model, opt_state, x, labels, c, clop_weight, key):
  """Makes one update; label -1 is unlabelled."""
  views = x + 0.3 * jax.random.normal(key, (2, *x.shape))

  def total(model):
    z = jax.vmap(jax.vmap(model))(views)  # [2, batch, dim]
    contrastive = loss.dcl_loss(z, temperature=0.5)
    return contrastive + clop_weight * loss.clop_loss(z, labels, c)

  gradients = eqx.filter_grad(total)(model)
  updates, opt_state = tx.update(gradients, opt_state)
  return eqx.apply_updates(model, updates), opt_state


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
  for name, clop_weight in (('DCL', 0.0), ('DCL + CLOP', 1.0)):
    model = eqx.nn.MLP(64, 64, width_size=128, depth=1, key=jax.random.key(0))
    opt_state = tx.init(eqx.filter(model, eqx.is_array))
    key, rng = jax.random.key(0), np.random.default_rng(0)
    for step in range(300):
      batch = rng.choice(len(x), 128, replace=False)
      model, opt_state = train_step(
        model,
        opt_state,
        x[batch],
        labels[batch],
        c,
        clop_weight,
        jax.random.fold_in(key, step),
      )
    bank = collapse.normalize(jax.vmap(model)(x))
    z = collapse.normalize(jax.vmap(model)(test_x))
    knn = neighbors.KNeighborsClassifier(20).fit(bank, y).score(z, test_y)
    rank = collapse.effective_rank(z)
    print(f'{name}: effective rank {rank:.1f}, kNN {knn:.3f}')


if __name__ == '__main__':
  main()
