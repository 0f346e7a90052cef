"""Whole training steps: augmentation, two views, forward, backward, update."""

from collections.abc import Iterator
import dataclasses
import functools
import itertools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from clop_jax import loss
from clop_jax import prototypes
from clop_jax.data import augment
from clop_jax.data import loader
from clop_jax.models import heads
from clop_jax.models import resnet
from clop_jax.runtime import parallel
from clop_jax.training import train_state
from clop_jax.training import train_step
from docs.benchmarks import contest
from docs.benchmarks import machine

NUM_CLASSES, DIM, TEMPERATURE, LEARNING_RATE = 100, 128, 0.5, 0.03
_BACKBONES = {8: resnet.ResNet8, 18: resnet.ResNet18, 50: resnet.ResNet50}
# Number of images that the batches are drawn from.
_EXAMPLES = {8: 4096, 32: 50_000, 64: 20_000}


@dataclasses.dataclass(frozen=True)
class Network:
  """A ResNet of some depth and stem for images of some size in pixels."""

  depth: int
  size: int
  stem: str = 'cifar'

  def __str__(self):
    return f'ResNet-{self.depth} at {self.size} px'

  def modules(self, dtype, axis_name=None):
    """Returns the backbone and the projection head."""
    backbone = _BACKBONES[self.depth](
      stem=self.stem, dtype=dtype, axis_name=axis_name
    )
    head = heads.ProjectionHead(
      dim=DIM, hidden_dim=DIM, dtype=dtype, axis_name=axis_name
    )
    return backbone, head


SMALL = Network(8, 8)
RESNET18_32 = Network(18, 32)

# Networks and batch sizes. A step on a CPU takes seconds.
BATCHES = {
  'cpu': ((RESNET18_32, 64), (Network(50, 32), 16), (Network(18, 64), 16)),
  'gpu': ((RESNET18_32, 512), (Network(50, 32), 256)),
  'small': ((SMALL, 8),),
}
# Steps in one call; several, to hide the time of the dispatch.
STEPS = {'cpu': 1, 'gpu': 10}
TURNS = {'cpu': 4, 'gpu': 7}


@functools.cache
def examples(size: int, small: bool) -> tuple[np.ndarray, np.ndarray]:
  """Returns random images and labels; a tenth is labelled."""
  count = 64 if small else _EXAMPLES[size]
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (count, size, size, 3), np.uint8)
  labels = rng.integers(0, NUM_CLASSES, count)
  return images, np.where(np.arange(count) % 10 == 0, labels, -1)


def our_step(
  network: Network,
  dtype,
  *,
  axis_name: str | None = parallel.DATA_AXIS,
):
  """Returns `(create_state, step)`: the library's step for one device."""
  backbone, head = network.modules(dtype, axis_name)
  schedule = optax.constant_schedule(LEARNING_RATE)
  tx = optax.chain(
    optax.add_decayed_weights(1e-4), optax.sgd(schedule, momentum=0.9)
  )
  made = prototypes.orthonormal_prototypes(jax.random.key(1), NUM_CLASSES, DIM)

  def create_state():
    return train_state.create(
      jax.random.key(0),
      backbone=backbone,
      projection_head=head,
      tx=tx,
      image_shape=(network.size, network.size, 3),
      prototypes=made,
    )

  def contrastive(embeddings, labels, axis_name):
    del labels
    return loss.nt_xent_loss(
      embeddings,
      temperature=TEMPERATURE,
      block_size=loss.choose_block_size(
        embeddings.shape[0] * embeddings.shape[1]
      ),
      axis_name=axis_name,
    )

  parts = {
    'backbone': backbone,
    'projection_head': head,
    'tx': tx,
    'schedule': schedule,
    'recipe': augment.Recipe(
      size=network.size, mean=(0.5,) * 3, std=(0.25,) * 3
    ),
    'contrastive': contrastive,
    'clop_weight': 1.0,
    'log_every': 50,
  }
  return create_state, functools.partial(
    train_step.train_step,
    parts=train_step.Parts(**parts),
    axis_name=axis_name,
  )


def default_dtype():
  """Returns the type of `model.dtype='auto'` on this platform."""
  return jnp.float32 if jax.default_backend() == 'cpu' else jnp.bfloat16


def constant_batch(network: Network, batch: int, small: bool) -> dict:
  """Returns the first examples, as the step takes them."""
  images, labels = examples(network.size, small)
  index = np.arange(batch) % len(images)
  return {
    'image': images[index],
    'label': labels[index].astype(np.int32),
    'index': index.astype(np.int32),
  }


def ours(
  network: Network,
  batch: int,
  *,
  small: bool,
  resident: bool = True,
  steps: int = 1,
  scanned: bool = False,
) -> contest.Program:
  """Returns the library's step as a contestant.

  Args:
    network: Network to train.
    batch: Batch size.
    small: If true, the data set has few images.
    resident: If true, batches are gathered from the resident data set, else all
      steps use one constant batch.
    steps: Number of steps in a call.
    scanned: If true, the steps of a call are one dispatch.
  """
  mesh = parallel.make_mesh(jax.devices()[:1])
  create_state, step = our_step(network, default_dtype())
  key = parallel.replicate(mesh, jax.random.key(2))
  count = steps if scanned else 1
  if resident:
    images, labels = examples(network.size, small)
    data = loader.ResidentLoader(
      images, labels, batch_size=batch, seed=0, mesh=mesh
    )
    kept = data.resident
    chunks = (range(i, i + count) for i in itertools.count(0, count))
    batches = data.batches(chunks)
  else:
    # One device holds the whole batch; the row of zeros only counts the steps.
    kept = parallel.replicate(mesh, constant_batch(network, batch, small))
    row = parallel.shard(mesh, np.zeros((count, batch), np.int32), axis=1)
    batches = itertools.repeat({'index': row})

  def steps_of(state, kept, batches, key):
    def one(state, batch):
      return step(state, loader.unpack(kept, batch) if resident else kept, key)

    if scanned:
      return lax.scan(one, state, batches)
    return one(state, jax.tree.map(lambda x: x[0], batches))

  program = parallel.map_step(steps_of, mesh, batch_axes=(None, None, 1, None))
  state = jax.jit(create_state, out_shardings=parallel.replicated(mesh))()

  compiled = program.lower(state, kept, next(batches), key).compile()
  memory = compiled.memory_analysis().temp_size_in_bytes
  machine.check_fits(memory)
  current = {'state': state}

  def run():
    for _ in range(steps // count):
      current['state'], metrics = compiled(
        current['state'], kept, next(batches), key
      )
    jax.block_until_ready((current['state'], metrics))

  return contest.Program(run, memory)


def flop_per_image(network: Network) -> float:
  """Returns the operations of a step: two views, forward and backward.

  Counts only the products of convolutions and dense layers: one forward and two
  backward (by the input and by the kernel).
  """
  backbone, head = network.modules(jnp.float32)
  image = jax.ShapeDtypeStruct((1, network.size, network.size, 3), jnp.float32)

  def forward(key, image):
    features, _ = backbone.init_with_output(key, image, train=True)
    return head.init_with_output(key, features, train=True)[0]

  jaxpr = jax.make_jaxpr(forward)(jax.random.key(0), image)
  return 2 * 3 * sum(_flop(e) for e in _equations(jaxpr.jaxpr))


def _equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from _equations(inner)


def _flop(equation):
  outputs = 2 * equation.outvars[0].aval.size
  if equation.primitive.name == 'conv_general_dilated':
    kernel = equation.invars[1].aval.shape
    layout = equation.params['dimension_numbers'].rhs_spec
    return outputs * np.prod(kernel) / kernel[layout[0]]
  if equation.primitive.name == 'dot_general':
    (contracted, _), _ = equation.params['dimension_numbers']
    shape = equation.invars[0].aval.shape
    return outputs * np.prod([shape[axis] for axis in contracted])
  return 0


def contests(suite: str, small: bool) -> Iterator[contest.Contest]:
  """Yields our step against both forms of the PyTorch step."""
  steps = 2 if small else STEPS[suite]
  dtype = jnp.dtype(default_dtype()).name
  for network, batch in BATCHES['small' if small else suite]:
    step = functools.partial(ours, network, batch, small=small, steps=steps)
    peer = functools.partial(_torch, network, batch, small, steps)
    contestants = {f'ours, {dtype}': step}
    if steps > 1:
      # As training runs on accelerators when the data are resident.
      contestants[f'ours, {dtype}, {steps} steps in one dispatch'] = (
        functools.partial(step, scanned=True)
      )
    contestants["PyTorch, authors' form"] = functools.partial(peer, 'authors')
    contestants['PyTorch, expert form'] = functools.partial(peer, 'expert')
    yield contest.Contest(
      'steps',
      f'{network}, batch {batch:,}',
      contestants,
      images=steps * batch,
      flop=steps * batch * flop_per_image(network),
      dtype=dtype,
      turns=TURNS[suite],
    )


def input_contests(suite: str, small: bool) -> Iterator[contest.Contest]:
  """Yields our step with and without its input."""
  network, batch = BATCHES['small' if small else suite][0]
  steps = 1 if small else 3 * STEPS[suite]
  step = functools.partial(ours, network, batch, small=small, steps=steps)
  yield contest.Contest(
    'input',
    f'{network}, batch {batch:,}: order, transfer and gather',
    {
      'batches from the resident set': step,
      'a constant batch': functools.partial(step, resident=False),
    },
    images=steps * batch,
    turns=TURNS[suite],
  )


def _torch(network, batch, small, steps, form):
  torch = machine.import_torch()
  from docs.benchmarks import torch_steps

  images, labels = examples(network.size, small)
  make = {'authors': torch_steps.authors, 'expert': torch_steps.expert}[form]
  step = make(
    torch_steps.Work(
      depth=network.depth,
      stem=network.stem,
      size=network.size,
      batch=batch,
      device=machine.torch_device(),
      images=images,
      labels=labels,
      num_classes=NUM_CLASSES,
      dim=DIM,
      temperature=TEMPERATURE,
    )
  )

  def run():
    for _ in range(steps):
      step()
    machine.synchronize(torch)

  return contest.Program(run, close=step.close)
