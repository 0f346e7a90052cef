"""Bytes between devices and memory per device, read from compiled programs.

python -m tests.benchmarks.scaling

Compiles the losses and the training step for 1, 2, 4 and 8 virtual devices,
runs nothing, and prints the first tables of docs/scaling.md.
"""

import dataclasses
import functools
import math
import os
import re

# Read when jax is imported. The tests, which import this, have set their own.
if 'XLA_FLAGS' not in os.environ:
  os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'
  os.environ['JAX_PLATFORMS'] = 'cpu'

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from clop_jax import experiment
from clop_jax import loss
from clop_jax import parallel
from configs import cifar10

AXIS = parallel.DATA_AXIS
DEVICES = 1, 2, 4, 8
BATCHES = 256, 1024, 4096, 16384, 65536
VIEWS, DIM, BLOCK_SIZE = 2, 128, 1024

# What a device sends in a ring of n, as a multiple of the payload, which is the
# whole array: the gathered one, the reduced one, the one before scattering.
_RING = {
  'all-gather': lambda n: (n - 1) / n,
  'reduce-scatter': lambda n: (n - 1) / n,
  'all-reduce': lambda n: 2 * (n - 1) / n,
  'all-to-all': lambda n: (n - 1) / n,
  'collective-permute': lambda n: 1.0,
}
_CALLEES = re.compile(
  r'(?:calls|to_apply|body|branch_computations|true_computation|'
  r'false_computation)=(?:\{([^}]*)\}|%([\w.-]+))'
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective instruction of a compiled program.

  Attributes:
    kind: as HLO names it.
    payload: bytes of the whole array, once.
    devices: how many take part.
    times: how often a run of the program executes it (trips of its loops).
    conditional: it stands in a branch that a run may not take.
  """

  kind: str
  payload: int
  devices: int
  times: int
  conditional: bool

  @property
  def sent(self) -> float:
    """Bytes a device sends in one run, by the ring algorithm."""
    return self.times * self.payload * _RING[self.kind](self.devices)


def array_sizes(hlo_type: str) -> list[tuple[int, int]]:
  """Elements and bytes of each array in an HLO type, or in a whole program."""
  sizes = []
  for dtype, shape in re.findall(r'\b(pred|[a-z]+\d+)\[([\d,]*)\]', hlo_type):
    elements = math.prod(int(n) for n in shape.split(',') if n)
    sizes.append((elements, elements * _width(dtype)))
  return sizes


def _width(dtype):
  return 1 if dtype == 'pred' else int(re.search(r'\d+$', dtype)[0]) // 8


def collectives(hlo: str) -> list[Collective]:
  """The collectives of a compiled program's text, in and below its entry."""
  bodies, entry = _computations(hlo)

  def walk(name, times, conditional):
    found = []
    for line in bodies.get(name, ()):
      match = re.search(r' = (\(.*?\)|\S+) ([a-z-]+)\(', line)
      if not match:
        continue
      kind = match[2]
      if kind.removesuffix('-start') in _RING:
        if kind not in _RING:
          raise ValueError(f'asynchronous collectives are not counted: {line}')
        payload = sum(size for _, size in array_sizes(match[1]))
        devices = _group_size(line)
        if kind == 'reduce-scatter':
          payload *= devices
        found.append(Collective(kind, payload, devices, times, conditional))
      trips = 1
      if kind == 'while':
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
        trips = int(known[1]) if known else None
      for several, one in _CALLEES.findall(line):
        for callee in re.findall(r'[\w.-]+', several) or [one]:
          inner = walk(
            callee, times * (trips or 1), conditional or kind == 'conditional'
          )
          if inner and trips is None:
            raise ValueError(
              f'a collective in a loop of unknown length: {line}'
            )
          found += inner
    return found

  return walk(entry, 1, False)


def _computations(hlo):
  """Lines of each computation by name, and the entry's name."""
  bodies, entry, lines = {}, None, []
  for line in hlo.splitlines():
    header = re.match(r'(ENTRY )?%?([\w.-]+) \(.*\{$', line)
    if header:
      lines = bodies[header[2]] = []
      entry = header[2] if header[1] else entry
    else:
      lines.append(line)
  return bodies, entry


def _group_size(line):
  listed = re.search(r'replica_groups=\{\{([\d,]+)\}', line)
  if listed:
    return listed[1].count(',') + 1
  # From JAX 0.11 on: as mesh['data'=8] {'data'}, over all of its devices.
  mesh = re.search(r"replica_groups=mesh\['data'=(\d+)\] \{'data'\}", line)
  if mesh:
    return int(mesh[1])
  return int(re.search(r'replica_groups=\[\d+,(\d+)\]', line)[1])


def payload(found: list[Collective], kind: str, conditional=False) -> int:
  """Bytes of all executions of a kind between two devices or more."""
  return sum(
    c.times * c.payload
    for c in found
    if c.kind == kind and c.conditional == conditional and c.devices > 1
  )


def compile_loss(devices, batch, block_size=None, *, labelled=False, dim=DIM):
  """Value and gradient of NT-Xent or SupCon, for arrays that do not exist."""

  def function(z, y):
    keywords = {'block_size': block_size, 'axis_name': AXIS}
    if labelled:
      return loss.supcon_loss(z, y, **keywords)
    return loss.nt_xent_loss(z, **keywords)

  mapped = jax.shard_map(
    jax.value_and_grad(function),
    mesh=parallel.make_mesh(jax.devices()[:devices]),
    in_specs=(P(None, AXIS), P(AXIS)),
    out_specs=(P(), P(None, AXIS)),
    check_vma=True,
  )
  z = jax.ShapeDtypeStruct((VIEWS, batch, dim), jnp.float32)
  y = jax.ShapeDtypeStruct((batch,), jnp.int32)
  return jax.jit(mapped).lower(z, y).compile()


def step_config(depth, batch_size, dtype='float32'):
  """configs/cifar10.py with another network and batch."""
  config = cifar10.get_config()
  config.model.depth = depth
  config.model.dtype = dtype
  config.train.batch_size = batch_size
  return config


def lower_step(devices, config):
  """The training step of a config, lowered, and the shapes of its state."""
  mesh = parallel.make_mesh(jax.devices()[:devices])
  built = experiment.build(config, total_steps=100, steps_per_epoch=10)
  state = experiment.abstract_state(built, mesh)
  split = functools.partial(jax.ShapeDtypeStruct, sharding=parallel.split(mesh))
  size, number = config.augment.size, config.train.batch_size
  crops = (VIEWS,) if config.data.host_crops else ()
  batch = {
    'image': split((number, *crops, size, size, 3), jnp.uint8),
    'label': split((number,), jnp.int32),
    'index': split((number,), jnp.int32),
  }
  key = jax.eval_shape(lambda: experiment.training_key(config))
  step = parallel.map_step(built.step, mesh, batch_axes=(None, 0, None))
  return step.lower(state, batch, key), state


def reduced_types(stablehlo: str) -> dict[str, int]:
  """Bytes that a lowered program all-reduces, by element type."""
  found = re.findall(
    r'"stablehlo\.all_reduce".*?\}\) : \(tensor<([^>]*)>', stablehlo, re.DOTALL
  )
  total = {}
  for tensor in found:
    *shape, dtype = tensor.split('x')
    size = _width(dtype) * math.prod(int(n) for n in shape)
    total[dtype] = total.get(dtype, 0) + size
  return total


def table(header, rows):
  print(f'\n| {" | ".join(header)} |')
  print('|---' * len(header) + '|')
  for row in rows:
    print(f'| {" | ".join(str(cell) for cell in row)} |', flush=True)


def mega(size):
  """Bytes as MB (10^6)."""
  return f'{size / 1e6:,.{3 if size < 1e6 else 1}f}'


def loss_table():
  rows = []
  for batch in BATCHES:
    for devices in DEVICES:
      dense = compile_loss(devices, batch)
      blocked = compile_loss(devices, batch, BLOCK_SIZE)
      found = collectives(blocked.as_text())
      # The promise of the blocked form: the gather stands before its loop.
      assert all(c.times == 1 and not c.conditional for c in found)
      assert sorted(found, key=repr) == sorted(
        collectives(dense.as_text()), key=repr
      )
      rows.append(
        [
          f'{batch:,}',
          devices,
          mega(payload(found, 'all-gather')),
          mega(payload(found, 'reduce-scatter')),
          f'{payload(found, "all-reduce")} B',
          mega(sum(c.sent for c in found)),
          mega(VIEWS * batch * DIM * 4),
          mega(blocked.memory_analysis().temp_size_in_bytes),
          mega(dense.memory_analysis().temp_size_in_bytes),
        ]
      )
  table(
    [
      'global batch',
      'devices',
      'all-gather',
      'reduce-scatter',
      'all-reduce',
      'sent (ring)',
      'gathered embeddings',
      f'temporaries, block {BLOCK_SIZE:,}',
      'temporaries, dense',
    ],
    rows,
  )


def step_table():
  rows = []
  for depth, batch, devices in (
    *((18, 256, devices) for devices in DEVICES),
    (18, 4096, 8),
    (50, 256, 8),
  ):
    lowered, state = lower_step(devices, step_config(depth, batch))
    compiled = lowered.compile()
    found = collectives(compiled.as_text())
    parameters = 4 * sum(x.size for x in jax.tree.leaves(state.params))
    reduced = payload(found, 'all-reduce')
    memory = compiled.memory_analysis()
    rows.append(
      [
        depth,
        f'{batch:,}',
        devices,
        mega(parameters) if reduced else 0,
        mega(reduced - parameters) if reduced else 0,
        mega(payload(found, 'all-gather')),
        mega(payload(found, 'reduce-scatter')),
        mega(payload(found, 'all-gather', conditional=True)),
        mega(sum(c.sent for c in found if not c.conditional)),
        len([c for c in found if not c.conditional]),
        mega(memory.argument_size_in_bytes),
        mega(memory.temp_size_in_bytes),
      ]
    )
  table(
    [
      'ResNet',
      'global batch',
      'devices',
      'all-reduce: gradients',
      'all-reduce: the rest',
      'all-gather',
      'reduce-scatter',
      'all-gather on logged steps',
      'sent (ring)',
      'collectives',
      'arguments',
      'temporaries',
    ],
    rows,
  )
  rows = []
  for depth in (18, 50):
    for dtype in ('float32', 'bfloat16'):
      lowered, _ = lower_step(8, step_config(depth, 256, dtype))
      sizes = reduced_types(lowered.as_text())
      rows.append([depth, dtype, *(mega(sizes.get(t, 0)) for t in _REDUCED)])
  table(['ResNet', 'model.dtype', *(f'reduced as {t}' for t in _REDUCED)], rows)


_REDUCED = 'f32', 'bf16'


def main():
  print(f'jax {jax.__version__}, commit {experiment.commit()}')
  loss_table()
  step_table()


if __name__ == '__main__':
  main()
