"""Kernels, memory traffic and collectives in the text of a compiled program."""

from collections.abc import Iterator, Sequence
import dataclasses
import math
import re
from typing import NamedTuple

# Instructions that run nothing and move nothing.
_FREE = {
  'parameter',
  'get-tuple-element',
  'tuple',
  'constant',
  'bitcast',
  'after-all',
  'partition-id',
  'replica-id',
}
_ARRAY = re.compile(r'\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?')
_LINE = re.compile(r'\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)')
_CALLEES = re.compile(
  r'(?:calls|to_apply|body|branch_computations|true_computation|'
  r'false_computation)=(?:\{([^}]*)\}|%([\w.-]+))'
)

# Parts by the innermost `jax.named_scope` of an operation, see `train_step`.
_SCOPES = {
  'augmentation': 'augmentation',
  'networks': 'networks forward',
  'gradients': 'networks backward',
  'losses': 'losses',
  'optimizer': 'optimizer',
  'prototypes': 'prototypes',
  'diagnostics': 'diagnostics',
}
OTHER = 'other'
# Parts of a training step, in its order.
PARTS = (
  OTHER,
  'augmentation',
  'networks forward',
  'losses',
  'networks backward',
  'optimizer',
  'prototypes',
  'diagnostics',
)

# Bytes that a device sends in a ring of n, as a multiple of the payload.
_RING = {
  'all-gather': lambda n: (n - 1) / n,
  'reduce-scatter': lambda n: (n - 1) / n,
  'all-reduce': lambda n: 2 * (n - 1) / n,
  'all-to-all': lambda n: (n - 1) / n,
  'collective-permute': lambda n: 1.0,
}


@dataclasses.dataclass(frozen=True)
class Kernel:
  """An instruction that the device runs.

  Attributes:
    name: Name of the instruction.
    scope: Path of `jax.named_scope` names and operations that it came from.
    moved: Bytes of its operands and results, each counted once.
    times: Number of executions in one run of the program.
    conditional: True in a branch that a run may skip.
  """

  name: str
  scope: str
  moved: int
  times: int
  conditional: bool


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective instruction of a compiled program.

  Attributes:
    kind: HLO opcode.
    payload: Bytes of the whole array: the gathered one, the reduced one, or the
      one before scattering.
    devices: Number of participants.
    times: Number of executions in one run of the program.
    conditional: True in a branch that a run may skip.
  """

  kind: str
  payload: int
  devices: int
  times: int
  conditional: bool

  @property
  def sent(self) -> float:
    """Bytes that a device sends in one run by the ring algorithm."""
    return self.times * self.payload * _RING[self.kind](self.devices)


class _Instruction(NamedTuple):
  name: str
  type: str
  kind: str
  operands: str
  line: str

  def callees(self):
    return [
      callee
      for several, one in _CALLEES.findall(self.line)
      for callee in re.findall(r'[\w.-]+', several) or [one]
    ]

  def trips(self):
    """Returns the rounds of a loop, or None if the compiler does not know."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', self.line)
    return int(known[1]) if known else None


def _parse(text):
  """Returns the instructions of each computation, and the entry's name."""
  bodies, entry, instructions = {}, '', []
  for line in text.splitlines():
    if header := re.match(r'(ENTRY )?%?([\w.-]+) \(.*\{$', line):
      instructions = bodies[header[2]] = []
      entry = header[2] if header[1] else entry
    elif match := _LINE.match(line):
      instructions.append(_Instruction(*match.groups(), line))
  return bodies, entry


def kernels(text: str) -> list[Kernel]:
  """Returns the kernels of a program, the text of `compiled.as_text()`.

  Those in a loop count as often as it runs (once if the compiler does not
  know). Of a conditional, only the branch that moves the most counts. Arrays in
  the vector memory of a TPU move nothing.
  """
  bodies, entry = _parse(text)

  def walk(body, times, conditional) -> Iterator[Kernel]:
    instructions = bodies.get(body, ())
    types = {x.name: x.type for x in instructions}
    for x in instructions:
      # An asynchronous operation counts where it ends: its type is the result.
      if x.kind in _FREE or x.kind.endswith(('-start', '-update')):
        continue
      if x.kind in ('while', 'call'):
        times_inside = times * (x.trips() or 1 if x.kind == 'while' else 1)
        for callee in x.callees():
          yield from walk(callee, times_inside, conditional)
      elif x.kind == 'conditional':
        branches = [[*walk(callee, times, True)] for callee in x.callees()]
        yield from max(branches, key=traffic)
      else:
        operands = re.findall(r'%([\w.\-]+)', x.operands.split('), ')[0])
        read = sum(_in_memory(types.get(name, '')) for name in operands)
        moved = _in_memory(x.type) + read
        if x.kind.endswith('-done'):
          # The operand's type has both operands and results of the operation.
          moved = max(read, 2 * _in_memory(x.type))
        scope = re.search(r'op_name="([^"]*)"', x.line)
        yield Kernel(
          x.name, scope[1] if scope else '', moved, times, conditional
        )

  return [*walk(entry, 1, False)]


def part_of(scope: str) -> str:
  """Returns the part of the training step, one of `PARTS`, of a scope."""
  for name in reversed(scope.split('/')):
    part = _SCOPES.get(name.rpartition('(')[2].rstrip(')'))
    if part == 'networks forward' and 'transpose(' in name:
      return 'networks backward'
    if part:
      return part
  return OTHER


def traffic(found: Sequence[Kernel]) -> int:
  """Returns the bytes that kernels move in one run."""
  return sum(kernel.moved * kernel.times for kernel in found)


def collectives(text: str) -> list[Collective]:
  """Returns the collectives of a program, the text of `compiled.as_text()`.

  Raises:
    ValueError: If a loop of unknown length contains a collective.
  """
  bodies, entry = _parse(text)

  def walk(body, times, conditional) -> Iterator[Collective]:
    for x in bodies.get(body, ()):
      kind = x.kind.removesuffix('-start')
      if kind in _RING:
        started = x.kind != kind
        result = _started(kind, x.type) if started else x.type
        payload = sum(size for _, size in array_sizes(result))
        devices = _group_size(x.line)
        if kind == 'reduce-scatter':
          payload *= devices
        yield Collective(kind, payload, devices, times, conditional)
      trips = x.trips() if x.kind == 'while' else 1
      for callee in x.callees():
        inner = [
          *walk(
            callee, times * (trips or 1), conditional or x.kind == 'conditional'
          )
        ]
        if inner and trips is None:
          raise ValueError(
            f'a collective in a loop of unknown length: {x.line}'
          )
        yield from inner

  return [*walk(entry, 1, False)]


def payload(
  found: Sequence[Collective], kind: str, *, conditional: bool = False
) -> int:
  """Returns the bytes of all executions of a kind between several devices."""
  return sum(
    c.times * c.payload
    for c in found
    if c.kind == kind and c.conditional == conditional and c.devices > 1
  )


def array_sizes(hlo_type: str) -> list[tuple[int, int]]:
  """Returns the elements and bytes of each array in an HLO type."""
  return [
    (_elements(shape), _bytes(dtype, shape))
    for dtype, shape, _ in _ARRAY.findall(hlo_type)
  ]


def _elements(shape):
  return math.prod(int(n) for n in shape.split(',') if n)


def _bytes(dtype, shape):
  bits = 8 if dtype == 'pred' else int(re.findall(r'\d+', dtype)[0])
  return _elements(shape) * bits // 8


def _in_memory(hlo_type):
  """Returns the bytes of a type's arrays in the device's main memory."""
  return sum(
    _bytes(dtype, shape)
    for dtype, shape, layout in _ARRAY.findall(hlo_type)
    # Scalars may be handles of asynchronous operations.
    if shape and 'S(1)' not in layout
  )


def _started(kind, hlo_type):
  """Returns the type of the result of an asynchronous collective.

  Its own type has the operands before it, except for an all-reduce.
  """
  if kind == 'all-reduce':
    return hlo_type
  arrays = [f'{dtype}[{shape}]' for dtype, shape, _ in _ARRAY.findall(hlo_type)]
  if kind == 'collective-permute':
    return arrays[0]
  return ' '.join(arrays[len(arrays) // 2 :])


def _group_size(line):
  if listed := re.search(r'replica_groups=\{\{([\d,]+)\}', line):
    return listed[1].count(',') + 1
  # JAX 0.11 and later name the mesh, as mesh['data'=8] {'data'}.
  sizes = r"replica_groups=(?:mesh\['data'=(\d+)\] \{'data'\}|\[\d+,(\d+)\])"
  if match := re.search(sizes, line):
    return int(match[1] or match[2])
  pairs = re.search(r'source_target_pairs=\{(\{.*?\})\}', line)
  return pairs[1].count('{') if pairs else 1
