"""What the CLOP term adds to a training step: time and memory.

python -m tests.benchmarks.clop_cost

The step with the term and the same step without it (not with weight 0, which
would still compute it), in turns A B A B; and the term by itself, value and
gradient. The difference of two long steps drowns in a machine's noise, so the
term by itself is the figure to go by.
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import optax

from clop_jax import loss
from clop_jax import prototypes
from clop_jax.data import augment
from clop_jax.models import heads
from clop_jax.models import resnet
from clop_jax.training import train_state

NUM_CLASSES, DIM, TURNS = 100, 128, 7
# Name, backbone, side of an image in pixels, channels, batch.
NETWORKS = (
  ('ResNet-8 at 8 px', resnet.ResNet8(), 8, 1, 128),
  ('ResNet-18 at 32 px', resnet.ResNet18(), 32, 3, 64),
)


def step(state, images, labels, key, *, backbone, head, tx, recipe, with_clop):
  """One training step on one device; the term is there or it is not."""
  keys = augment.example_keys(key, state.step, jnp.arange(len(images)))
  views = augment.two_views(keys, images, **recipe)

  def loss_of(params):
    _, embeddings, batch_stats = train_state.apply_networks(
      backbone,
      head,
      params,
      state.batch_stats,
      views.reshape(-1, *views.shape[2:]),
      train=True,
    )
    embeddings = embeddings.reshape(2, len(images), DIM)
    total = loss.nt_xent_loss(embeddings)
    if with_clop:
      total += loss.clop_loss(embeddings, labels, state.prototypes)
    return total, batch_stats

  (total, batch_stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(
    state.params
  )
  updates, opt_state = tx.update(gradients, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  state = state.replace(
    step=state.step + 1,
    params=params,
    opt_state=opt_state,
    batch_stats=batch_stats,
  )
  return state, total


def milliseconds(program, arguments):
  began = time.perf_counter()
  jax.block_until_ready(program(*arguments))
  return 1e3 * (time.perf_counter() - began)


def measure(name, backbone, size, channels, batch):
  head = heads.ProjectionHead(dim=DIM, hidden_dim=DIM)
  tx = optax.sgd(0.1, momentum=0.9)
  c = prototypes.orthonormal_prototypes(jax.random.key(1), NUM_CLASSES, DIM)
  state = train_state.create(
    jax.random.key(0),
    backbone=backbone,
    projection_head=head,
    tx=tx,
    image_shape=(size, size, channels),
    prototypes=c,
  )
  mean = (0.5,) * channels
  recipe = {'size': size, 'mean': mean, 'std': mean}
  images = jnp.zeros((batch, size, size, channels), jnp.uint8)
  labels = jnp.where(jnp.arange(batch) % 10 == 0, jnp.arange(batch) % 7, -1)
  arguments = (state, images, labels, jax.random.key(2))
  bound = functools.partial(
    step, backbone=backbone, head=head, tx=tx, recipe=recipe
  )
  programs = {
    with_clop: jax.jit(functools.partial(bound, with_clop=with_clop))
    .lower(*arguments)
    .compile()
    for with_clop in (True, False)
  }
  embeddings = jax.random.normal(jax.random.key(3), (2, batch, DIM))
  term = jax.jit(jax.value_and_grad(loss.clop_loss))
  times = {with_clop: [] for with_clop in programs}
  for _ in range(TURNS + 1):
    for with_clop, program in programs.items():
      times[with_clop].append(milliseconds(program, arguments))
  alone = [milliseconds(term, (embeddings, labels, c)) for _ in range(50)]
  # The first turn pays for cold caches.
  medians = {k: statistics.median(v[1:]) for k, v in times.items()}
  alone = statistics.median(alone[1:])
  memory = {
    k: p.memory_analysis().temp_size_in_bytes for k, p in programs.items()
  }
  spread = max(times[False][1:]) / min(times[False][1:])
  print(
    f'{name}, batch {batch}: step {medians[False]:.1f} ms without the term '
    f'(max/min {spread:.2f}), {medians[True]:.1f} ms with it; the term alone '
    f'{alone:.3f} ms, {100 * alone / medians[False]:.2f} % of the step; '
    f'temporaries {memory[False] / 1e6:.1f} and {memory[True] / 1e6:.1f} MB',
    flush=True,
  )


def main():
  device = jax.devices()[0].device_kind
  print(f'CLOP term, {NUM_CLASSES} classes, dim {DIM}; {device}')
  for network in NETWORKS:
    measure(*network)


if __name__ == '__main__':
  main()
