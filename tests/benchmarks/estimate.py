"""A worked estimate for 256 devices, in the last tables of docs/scaling.md.

python -m tests.benchmarks.estimate

Nothing here is timed. Bytes are those that tests/benchmarks/scaling.py reads
from the compiler, or the formula that its tables bear out; times are bytes or
FLOP over the vendors' published peak figures.
"""

import dataclasses

from clop_jax import experiment
from configs import imagenet2012
from tests.benchmarks import scaling

DEVICES = 256
BATCHES = 4096, 16384, 65536
# Share of the peak that the network reaches: in the range of what is published
# for both networks (airbench 25-36 %, ResNet-50 at 224 px 16-27 %).
SHARE = 0.25
VIEWS = scaling.VIEWS


@dataclasses.dataclass(frozen=True)
class Accelerator:
  """Published figures of one chip.

  Attributes:
    name: of the product.
    bfloat16: peak FLOP/s of dense matrix products.
    float32: the same for the losses, whose products are float32 throughout.
    hbm: bytes/s.
    links: for each level of the network, innermost first, its devices and the
      bytes/s that each can send.
  """

  name: str
  bfloat16: float
  float32: float
  hbm: float
  links: tuple[tuple[int, float], ...]

  def all_reduce(self, payload: float) -> float:
    """Seconds; also of an all-gather and a reduce-scatter of that payload."""
    seconds = 0.0
    for devices, bandwidth in self.links:
      seconds += 2 * (devices - 1) / devices * payload / bandwidth
      payload /= devices  # each device goes on with its part
    return seconds


# A TPU makes a float32 product of six in bfloat16. Its links are counted one
# way, half of the bidirectional figure, and all of a torus's are busy.
ACCELERATORS = (
  Accelerator('TPU v5p', 459e12, 459e12 / 6, 2765e9, ((256, 600e9),)),
  Accelerator('TPU v5e', 197e12, 197e12 / 6, 819e9, ((256, 200e9),)),
  # NVLink in a node of 8, then one 400 Gbit/s adapter for each GPU.
  Accelerator('H100', 989e12, 67e12, 3350e9, ((8, 450e9), (32, 50e9))),
)


@dataclasses.dataclass(frozen=True)
class Network:
  name: str
  flop: float  # of an image's step: two views, forward and backward
  dim: int
  reduced: float  # bytes of gradients and BatchNorm statistics


def networks():
  cifar = scaling.step_config(18, 256, 'bfloat16')
  imagenet = imagenet2012.get_config()
  imagenet.model.dtype = 'bfloat16'
  imagenet.optimizer.warmup_epochs = 0.0  # of a run that is not made
  imagenet.train.batch_size = 8
  result = []
  for name, flop, config in (
    ('ResNet-18 at 32 px', 6.67e9, cifar),
    ('ResNet-50 at 224 px', 49e9, imagenet),
  ):
    lowered, _ = scaling.lower_step(8, config)
    reduced = sum(scaling.reduced_types(lowered.as_text()).values())
    result.append(Network(name, flop, config.model.embedding_dim, reduced))
  return result


def logits_passes():
  """How often the dense loss reads or writes its matrix, by the compiler."""
  batch, devices = 16384, 8
  cost = scaling.compile_loss(devices, batch).cost_analysis()
  matrix = (VIEWS * batch) ** 2 / devices * 4
  return cost['bytes accessed'] / matrix


def loss_seconds(chip, global_batch, devices, dim, passes):
  """Three products, and the matrix's way through memory."""
  entries = (VIEWS * global_batch) ** 2 / devices
  products = 3 * 2 * dim * entries / chip.float32
  return products + passes * 4 * entries / chip.hbm


def step_rows(network, passes):
  for chip in ACCELERATORS:
    for batch in BATCHES:
      local = batch // DEVICES
      compute = local * network.flop / (SHARE * chip.bfloat16)
      loss = loss_seconds(chip, batch, DEVICES, network.dim, passes)
      embeddings = VIEWS * batch * network.dim * 4
      reduce = chip.all_reduce(network.reduced)
      gather = chip.all_reduce(embeddings)
      total = compute + loss + reduce + gather
      yield [
        chip.name,
        f'{batch:,}',
        local,
        f'{scaling.mega(embeddings)}',
        *(f'{1e3 * x:.2f}' for x in (compute, loss, reduce, gather)),
        f'{100 * (reduce + gather) / total:.0f} %',
        f'{100 * loss / total:.0f} %',
      ]


def limit_rows(network, passes, local=256):
  """Devices at which what grows with the global batch is half the step."""
  for chip in ACCELERATORS:
    compute = local * network.flop / (SHARE * chip.bfloat16)
    # Both are proportional to the devices at a fixed local batch.
    loss = loss_seconds(chip, local * DEVICES, DEVICES, network.dim, passes)
    gather = chip.all_reduce(VIEWS * local * DEVICES * network.dim * 4)
    devices = DEVICES * compute / (loss + gather)
    yield [
      network.name,
      chip.name,
      f'{devices:,.0f}',
      f'{devices * local:,.0f}',
    ]


def block_rows(passes, batch=65536, dim=scaling.DIM):
  columns = VIEWS * batch
  rows = columns // DEVICES
  for block_size in (512, 2048, 8192, DEVICES * dim, None):
    at_once = rows if block_size is None else block_size // DEVICES
    blocks = -(-rows // at_once)
    # Two products read the columns; their gradient is written, read, and added
    # to a sum that is read and written. The dense loss has no sum.
    gathered = (3 if block_size is None else 6) * 4 * columns * dim * blocks
    matrix = passes * 4 * rows * columns
    yield [
      'None' if block_size is None else f'{block_size:,}',
      at_once,
      blocks,
      scaling.mega(4 * at_once * columns),
      f'{gathered / 1e9:.1f}',
      f'{matrix / 1e9:.1f}',
      *(f'{1e3 * (gathered + matrix) / c.hbm:.1f}' for c in ACCELERATORS),
    ]


def main():
  passes = logits_passes()
  print(f'commit {experiment.commit()}; passes over the logits: {passes:.1f}')
  both = networks()
  for network in both:
    print(
      f'\n{network.name}, dim {network.dim}: '
      f'{scaling.mega(network.reduced)} MB of gradients and statistics'
    )
    scaling.table(
      [
        'chip',
        'global batch',
        'images a device',
        'embeddings, MB',
        'network, ms',
        'loss, ms',
        'all-reduce, ms',
        'embeddings, ms',
        'communication',
        'loss',
      ],
      step_rows(network, passes),
    )
  scaling.table(
    ['network', 'chip', 'devices', 'global batch'],
    [row for network in both for row in limit_rows(network, passes)],
  )
  scaling.table(
    [
      'block_size',
      'rows at one time',
      'blocks',
      'a block, MB',
      'gathered arrays, GB',
      'logits, GB',
      *(f'{c.name}, ms' for c in ACCELERATORS),
    ],
    block_rows(passes),
  )


if __name__ == '__main__':
  main()
