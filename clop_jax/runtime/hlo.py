"""Kernels, memory traffic and collectives of a compiled program's text."""

from collections.abc import Iterator, Sequence
import dataclasses
import math
import re

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
# An asynchronous operation is counted where it ends: there its type is the
# result alone.
_STARTS = re.compile(r'-(start|update)$')
_ARRAY = re.compile(r'\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?')
_LINE = re.compile(r'\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)')
_CALLEES = re.compile(
  r'(?:calls|to_apply|body|branch_computations|true_computation|'
  r'false_computation)=(?:\{([^}]*)\}|%([\w.-]+))'
)

# By the innermost scope of an operation's name; see `train_step`.
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

# What a device sends in a ring of n, as a multiple of the payload, which is the
# whole array: the gathered one, the reduced one, the one before scattering.
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
    kind: HLO opcode; with the target of a custom call or the kind of a fusion.
    scope: Path of `jax.named_scope` names and operations that it came from.
    moved: Bytes of its operands and results, each counted once.
    times: How often one run of the program executes it.
    conditional: True in a branch that a run may skip.
  """

  name: str
  kind: str
  scope: str
  moved: int
  times: int
  conditional: bool


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective instruction of a compiled program.

  Attributes:
    kind: HLO opcode.
    payload: Bytes of the whole array, once.
    devices: Number of participants.
    times: How often one run of the program executes it.
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


def kernels(text: str) -> list[Kernel]:
  """Returns the kernels of a program, in and below its entry.

  A loop counts its body as often as it runs (once where the compiler does not
  know). Of a conditional, the branch that moves the most counts, and is marked.
  Arrays that a TPU keeps in its vector memory move nothing.

  Args:
    text: `compiled.as_text()`.

  Returns:
    One entry for each instruction that the device runs.
  """
  bodies, entry = _computations(text)
  types: dict[tuple[str, str], str] = {}
  for body, lines in bodies.items():
    for line in lines:
      if match := _LINE.match(line):
        types[body, match[1]] = match[2]

  def walk(body, times, conditional) -> Iterator[Kernel]:
    for line in bodies.get(body, ()):
      match = _LINE.match(line)
      if not match or match[3] in _FREE or _STARTS.search(match[3]):
        continue
      name, result, kind, rest = match.groups()
      if kind == 'while':
        (loop,) = re.findall(r'body=%?([\w.\-]+)', line)
        yield from walk(loop, times * (_trips(line) or 1), conditional)
      elif kind == 'call':
        (callee,) = re.findall(r'to_apply=%?([\w.\-]+)', line)
        yield from walk(callee, times, conditional)
      elif kind == 'conditional':
        branches = [[*walk(x, times, True)] for x in _callees(line)]
        yield from max(branches, key=traffic)
      else:
        operands = re.findall(r'%([\w.\-]+)', rest.split('), ')[0])
        read = sum(_in_memory(types.get((body, x), '')) for x in operands)
        moved = _in_memory(result) + read
        if kind.endswith('-done'):
          # The type of what it started has operands and results.
          moved = max(read, 2 * _in_memory(result))
        scoped = re.search(r'op_name="([^"]*)"', line)
        detail = re.search(r'custom_call_target="([^"]*)"', line) or (
          re.search(r'kind=(\w+)', line) if kind == 'fusion' else None
        )
        kind += f':{detail[1]}' if detail else ''
        scope = scoped[1] if scoped else ''
        yield Kernel(name, kind, scope, moved, times, conditional)

  return [*walk(entry, 1, False)]


def part_of(scope: str) -> str:
  """Returns the part of the training step that an operation belongs to.

  Args:
    scope: The operation's name: a path of scopes.

  Returns:
    One of `PARTS`.
  """
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


def launches(found: Sequence[Kernel]) -> int:
  """Returns the number of kernels that one run launches."""
  return sum(kernel.times for kernel in found)


def collectives(text: str) -> list[Collective]:
  """Returns the collectives of a compiled program, in and below its entry.

  Args:
    text: `compiled.as_text()`.

  Returns:
    One entry for each instruction.

  Raises:
    ValueError: If a loop of unknown length contains a collective.
  """
  bodies, entry = _computations(text)

  def walk(name, times, conditional):
    found = []
    for line in bodies.get(name, ()):
      match = _LINE.match(line)
      if not match:
        continue
      kind = match[3].removesuffix('-start')
      if kind in _RING:
        result = match[2]
        if match[3].endswith('-start'):
          result = _started(kind, result)
        payload = sum(size for _, size in array_sizes(result))
        devices = _group_size(line)
        if kind == 'reduce-scatter':
          payload *= devices
        found.append(Collective(kind, payload, devices, times, conditional))
      trips = _trips(line) if match[3] == 'while' else 1
      for callee in _callees(line):
        inner = walk(
          callee,
          times * (trips or 1),
          conditional or match[3] == 'conditional',
        )
        if inner and trips is None:
          raise ValueError(f'a collective in a loop of unknown length: {line}')
        found += inner
    return found

  return walk(entry, 1, False)


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
  sizes = []
  for dtype, shape, _ in _ARRAY.findall(hlo_type):
    elements = math.prod(int(n) for n in shape.split(',') if n)
    sizes.append((elements, elements * _bits(dtype) // 8))
  return sizes


def reduced_types(stablehlo: str) -> dict[str, int]:
  """Returns the bytes that a lowered program all-reduces, by element type.

  Args:
    stablehlo: `lowered.as_text()`.

  Returns:
    Bytes by the name of the element type, as `{'f32': 4}`.
  """
  found = re.findall(
    r'"stablehlo\.all_reduce".*?\}\) : \(tensor<([^>]*)>', stablehlo, re.DOTALL
  )
  total: dict[str, int] = {}
  for tensor in found:
    *shape, dtype = tensor.split('x')
    size = _bits(dtype) * math.prod(int(n) for n in shape) // 8
    total[dtype] = total.get(dtype, 0) + size
  return total


def _bits(dtype):
  if dtype == 'pred':
    return 8
  return int(re.search(r'\d+', dtype)[0])


def _in_memory(hlo_type):
  """Bytes of the arrays of a type that lie in the device's main memory.

  Scalars do not count: they are the handles of asynchronous operations, too.
  """
  return sum(
    math.prod(int(n) for n in shape.split(',') if n) * _bits(dtype) // 8
    for dtype, shape, layout in _ARRAY.findall(hlo_type)
    if shape and 'S(1)' not in layout
  )


def _started(kind, hlo_type):
  """Result's type of an asynchronous collective.

  Its own type has the operands before it, except for an all-reduce.
  """
  if kind == 'all-reduce':
    return hlo_type
  sizes = [f'{d}[{s}]' for d, s, _ in _ARRAY.findall(hlo_type)]
  if kind == 'collective-permute':
    return sizes[0]
  return ' '.join(sizes[len(sizes) // 2 :])


def _computations(text):
  """Lines of each computation by name, and the entry's name."""
  bodies, entry, lines = {}, None, []
  for line in text.splitlines():
    header = re.match(r'(ENTRY )?%?([\w.-]+) \(.*\{$', line)
    if header:
      lines = bodies[header[2]] = []
      entry = header[2] if header[1] else entry
    else:
      lines.append(line)
  return bodies, entry


def _callees(line):
  return [
    callee
    for several, one in _CALLEES.findall(line)
    for callee in re.findall(r'[\w.-]+', several) or [one]
  ]


def _trips(line):
  """Rounds of a loop, or None where the compiler does not know."""
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
  return int(known[1]) if known else None


def _group_size(line):
  listed = re.search(r'replica_groups=\{\{([\d,]+)\}', line)
  if listed:
    return listed[1].count(',') + 1
  # From JAX 0.11 on: as mesh['data'=8] {'data'}, over all of its devices.
  mesh = re.search(r"replica_groups=mesh\['data'=(\d+)\] \{'data'\}", line)
  if mesh:
    return int(mesh[1])
  several = re.search(r'replica_groups=\[\d+,(\d+)\]', line)
  if several:
    return int(several[1])
  pairs = re.search(r'source_target_pairs=\{(\{.*?\})\}', line)
  return pairs[1].count('{') if pairs else 1
