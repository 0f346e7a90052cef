"""What makes the step fast, one change at a time: with it and without it."""

from collections.abc import Iterator
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from clop_jax.data import augment
from clop_jax.training import train_state
from tests.benchmarks import contest
from tests.benchmarks import steps


def contests(suite: str, small: bool) -> Iterator[contest.Contest]:
  """Each change against the step without it."""
  tiny = (steps.SMALL, 8 if small else 64)
  count = 2 if small else 20
  turns = 3 if suite == 'cpu' else 7
  large = {'cpu': (steps.RESNET18_32, 32), 'gpu': (steps.RESNET18_32, 1024)}
  network, batch = tiny if small else large[suite]
  step = functools.partial(steps.ours, network, batch, small=small)
  for case, size in (tiny, (network, batch))[: 1 if suite == 'cpu' else 2]:
    ours = functools.partial(steps.ours, case, size, small=small, steps=count)
    yield contest.Contest(
      'changes',
      f'{count} steps of {case}, batch {size}',
      {
        'one dispatch each': ours,
        'one dispatch (lax.scan)': functools.partial(ours, scanned=True),
      },
      images=count * size,
    )
  yield contest.Contest(
    'changes',
    f'precision, {network}, batch {batch}',
    {
      'float32': functools.partial(step, dtype=jnp.float32),
      'bfloat16': functools.partial(step, dtype=jnp.bfloat16),
    },
    images=batch,
    turns=turns,
  )
  yield contest.Contest(
    'changes',
    f'memory, {network}, batch {batch}',
    {
      'all activations kept': step,
      '4 micro-batches (train.num_micro_batches)': functools.partial(
        step, num_micro_batches=4
      ),
    },
    images=batch,
    turns=turns,
  )
  dtype = steps.default_dtype()
  gradient = functools.partial(_gradient, network, batch, dtype)
  yield contest.Contest(
    'changes',
    f'the network alone, forward and backward, {network}, batch {batch}',
    {
      'both views in one pass': gradient,
      'a pass for each view': functools.partial(gradient, passes=2),
      'one pass, blocks made again (nn.remat)': functools.partial(
        gradient, remat=True
      ),
      'one pass, channels first outside': functools.partial(
        gradient, channels_first=True
      ),
    },
    images=batch,
    turns=turns,
  )
  yield contest.Contest(
    'changes',
    f'the state of {network}',
    {
      'donated': functools.partial(_update, network, donate=True),
      'not donated': functools.partial(_update, network, donate=False),
    },
  )
  yield contest.Contest(
    'changes',
    f'the parts of a step, {network}, batch {batch}',
    {
      'the whole step': step,
      'augmentation, two views': functools.partial(
        _augmentation, network, batch, small
      ),
      'the network, forward and backward': gradient,
    },
    images=batch,
    turns=turns,
  )


def _gradient(
  network,
  batch,
  dtype,
  *,
  passes=1,
  remat=False,
  channels_first=False,
):
  """Of a sum of the embeddings by all parameters."""
  backbone, head = network.modules(dtype)
  if remat:
    backbone = backbone.clone(block=nn.remat(backbone.block))
  shape = (2 * batch, network.size, network.size, 3)
  views = jax.random.normal(jax.random.key(0), shape)
  if channels_first:
    views = views.transpose(0, 3, 1, 2)
  weights = jax.random.normal(jax.random.key(1), (2 * batch, network.dim))
  state = jax.jit(
    lambda: train_state.create(
      jax.random.key(0),
      backbone=backbone,
      projection_head=head,
      tx=optax.identity(),
      image_shape=(network.size, network.size, 3),
      prototypes=jnp.zeros((1, network.dim)),
    )
  )()

  def objective(params, batch_stats, views):
    if channels_first:
      views = views.transpose(0, 2, 3, 1)
    total = 0.0
    for part, weight in zip(
      jnp.split(views, passes), jnp.split(weights, passes), strict=True
    ):
      _, embeddings, batch_stats = train_state.apply_networks(
        backbone, head, params, batch_stats, part, train=True
      )
      total += jnp.sum(weight * embeddings)
    return total, batch_stats

  return contest.compiled(
    jax.value_and_grad(objective, has_aux=True),
    state.params,
    state.batch_stats,
    views,
  )


def _augmentation(network, batch, small):
  images, _ = steps.examples(network.size, small)
  index = np.arange(batch) % len(images)
  recipe = steps.recipe(network.size)

  def views(images, index):
    keys = augment.example_keys(jax.random.key(0), 0, index)
    return augment.two_views(keys, images, **recipe)

  return contest.compiled(views, jnp.asarray(images[index]), jnp.asarray(index))


def _update(network, *, donate):
  """A new state from the old one: what donating saves is its memory."""
  create_state, _ = steps.our_step(network, jnp.float32)
  state = jax.jit(create_state)()

  def shrink(state):
    return jax.tree.map(
      lambda x: x * 0.999 if jnp.issubdtype(x.dtype, jnp.floating) else x,
      state,
    )

  program = jax.jit(shrink, donate_argnums=0 if donate else ())
  compiled = program.lower(state).compile()
  analysis = compiled.memory_analysis()
  current = {'state': state}

  def run():
    current['state'] = jax.block_until_ready(compiled(current['state']))

  # What is written beside the arguments: results that take no argument's place.
  memory = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
  return contest.Program(run, memory)
