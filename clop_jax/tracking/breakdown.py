"""Where the time of recorded steps went, from a trace and the program.

Every operation of the trace is looked up in the compiled program: what kind it
is, and by `jax.named_scope` to which part of the step it belongs.
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import re

import jax

from clop_jax.runtime import hlo

_OTHER, _LOOPS, _IDLE = hlo.OTHER, 'loops', 'host, idle'
_ELEMENTWISE, _COPY = 'elementwise, batch norm', 'copy, transpose, layout'
# The first that is found in what an operation does, or, where the program does
# not know it, in the name of the kernel.
_KINDS = (
  ('convolution', r'conv(?!ert)|fprop|dgrad|wgrad'),
  ('matrix product', r'(?<![a-z])dot(?![a-z])|gemm|matmul|cutlass'),
  (
    'collectives',
    'all-(reduce|gather|to-all)|reduce-scatter|collective|nccl',
  ),
  ('decompositions', 'lapack|solver|svd|eigh|cholesky'),
  ('random numbers, sort', r'\brng|sort|threefry|random_bits'),
  ('gather, scatter', r'\b(gather|scatter)\b'),
  ('reduction', 'reduce(?!-precision)'),
)
_KINDS_OF_NAMES = (
  *_KINDS,
  (_COPY, 'copy|transpose|memcpy|memset'),
  (_ELEMENTWISE, 'fusion'),
)
# Operations that compute nothing.
_MOVING = {
  'bitcast',
  'bitcast-convert',
  'broadcast',
  'concatenate',
  'constant',
  'copy',
  'copy-done',
  'copy-start',
  'dynamic-slice',
  'dynamic-update-slice',
  'get-tuple-element',
  'iota',
  'pad',
  'parameter',
  'reshape',
  'reverse',
  'slice',
  'transpose',
  'tuple',
}
_CONTROL = ('while', 'conditional', 'call')


@dataclasses.dataclass
class Event:
  """A run of an operation; times in nanoseconds.

  Attributes:
    start: when it began.
    end: when it had ended.
    op: the operation's name in the program, or the kernel's.
    module: the program's name; None: not told.
    program: the program's number; None: not told.
    encloses: whether other events are its parts.
  """

  start: float
  end: float
  op: str
  module: str | None = None
  program: int | None = None
  encloses: bool = False


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program.

  Attributes:
    module: its name.
    ops: part and kind of each operation, by name.
  """

  module: str
  ops: Mapping[str, tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Breakdown:
  """Where the time of a step went; milliseconds, the mean over the devices.

  Attributes:
    parts: by part of the step, with what was idle.
    kinds: by kind of operation, likewise. Both add up to `wall`.
    busy: of all operations, each counted in full.
    wall: by the clock.
  """

  parts: Mapping[str, float]
  kinds: Mapping[str, float]
  busy: float
  wall: float


def read_program(text: str) -> Program:
  """Part and kind of each operation of a compiled program.

  A fusion belongs to the part that its own name tells, the last operation's in
  it; its kind is that of the heaviest one in it. Some operations lose their
  name when the compiler rewrites them; they belong where the last of their
  operands does.

  Args:
    text: `compiled.as_text()`.

  Returns:
    The program.

  Example:
    >>> from clop_jax.tracking import breakdown
    >>> program = breakdown.read_program('''HloModule jit_step, x=y
    ... ENTRY %main (p: f32[2]) -> f32[2] {
    ...   %dot.1 = f32[2] dot(%p), metadata={op_name="jit(step)/losses/dot"}
    ... }''')
    >>> program.module, program.ops['dot.1']
    ('jit_step', ('losses', 'matrix product'))
  """
  instructions = {}
  computations, computation = {}, []
  for line in text.splitlines():
    if line.endswith('{') and (name := re.match(r'(?:ENTRY )?%?([^ ]+)', line)):
      computation = computations.setdefault(name[1], [])
      continue
    # After a type, which may be a tuple, the operation and its operands.
    found = re.match(
      r'\s+(?:ROOT )?%?(?P<op>[\w.\-]+) = .*? (?P<code>[a-z][\w\-]*)\(', line
    )
    if found:
      computation.append(found['op'])
      instructions[found['op']] = _Instruction(
        found['code'],
        _attribute(r'op_name="((?:\\.|[^"\\])*)"', line),
        _attribute(r'custom_call_target="([^"]*)"', line),
        _attribute(r'calls=%?([\w.\-]+)', line),
        re.findall(r'%([\w.\-]+)', line[found.end() :].partition('), ')[0]),
      )

  def inside(instruction):
    for op in computations.get(instruction.calls, ()):
      yield instructions[op]
      yield from inside(instructions[op])

  ops = {}
  for op, instruction in instructions.items():
    within = list(inside(instruction))
    names = [x.name for x in [instruction, *reversed(within)]]
    part = next((p for p in map(hlo.part_of, names) if p != _OTHER), _OTHER)
    if part == _OTHER and '/' not in instruction.name:
      known = [ops[x][0] for x in instruction.operands if x in ops]
      part = max(known, key=hlo.PARTS.index, default=_OTHER)
    ops[op] = part, _kind(instruction, within)
  for op in list(ops):
    # So GPU kernels are called, where a trace does not tell the operation.
    ops.setdefault(re.sub('[.-]', '_', op), ops[op])
  module = re.match(r'HloModule ([^,\s]+)', text)
  return Program(module[1] if module else '', ops)


@dataclasses.dataclass(frozen=True)
class _Instruction:
  code: str
  name: str
  target: str
  calls: str
  operands: Sequence[str]


def _attribute(pattern, line):
  found = re.search(pattern, line)
  return found[1] if found else ''


def _kind(instruction, within):
  if instruction.code in _CONTROL:
    return _LOOPS
  done = [instruction, *within]
  codes = {x.code for x in done} - {'fusion'}
  if any(x.code == 'convolution' and 'dot_general' in x.name for x in done):
    # TPUs have no other operation for it.
    codes = codes - {'convolution'} | {'dot'}
  words = ' '.join(sorted(codes) + [x.target for x in done])
  kind = _first_kind(_KINDS, f'{words} {_random(instruction.name)}')
  if kind:
    return kind
  if 'custom-call' in codes:
    return _OTHER
  return _COPY if codes <= _MOVING else _ELEMENTWISE


def _random(name):
  """The part of a name that tells of a random number generator."""
  found = re.search('threefry|random_bits', name)
  return found[0] if found else ''


def _first_kind(kinds, words):
  for kind, pattern in kinds:
    if re.search(pattern, words, re.IGNORECASE):
      return kind
  return None


def read_events(data: jax.profiler.ProfileData) -> dict[str, list[Event]]:
  """The operations that a trace holds, by device.

  Args:
    data: the trace.

  Returns:
    For each device of this process its events in the order of their start. On
    CPUs, where the operations are those of several threads, an event ends when
    the operation has ended, and not when it was only handed to other threads.
  """
  devices = collections.defaultdict(list)
  for plane in data.planes:
    if not re.fullmatch(r'/device:(GPU|TPU):\d+', plane.name):
      continue
    lines = {line.name: line for line in plane.lines}
    if 'XLA Ops' in lines:
      lines = {'XLA Ops': lines['XLA Ops']}
    else:
      lines = {k: v for k, v in lines.items() if k.startswith('Stream')}
    for line in lines.values():
      events = [_event(event, dict(event.stats)) for event in line.events]
      _find_enclosing(events)
      devices[plane.name] += events
  host = data.find_plane_with_name('/host:CPU')
  if not devices and host is not None:
    devices = _read_cpu(host)
  return {
    device: sorted(events, key=lambda x: x.start)
    for device, events in sorted(devices.items())
  }


def _read_cpu(plane):
  devices = collections.defaultdict(list)
  started, ended = {}, {}
  for line in plane.lines:
    events = []
    for event in line.events:
      if event.name.startswith('end: '):
        stats = dict(event.stats)
        ended[stats.get('_c')] = event.start_ns + event.duration_ns
        continue
      if '::' in event.name:  # of the thread pool, of which there are many
        continue
      stats = dict(event.stats)
      if 'hlo_op' not in stats:
        continue
      events.append(_event(event, stats))
      devices[f'CPU:{stats.get("device_ordinal", 0)}'].append(events[-1])
      started[stats.get('_p')] = events[-1]
    _find_enclosing(events)
  for number, event in started.items():
    event.end = max(event.end, ended.get(number, 0))
  return devices


def _event(event, stats):
  # TPUs name an event by the whole instruction.
  name = re.match(r'%?([^\s=]+)', event.name)
  return Event(
    event.start_ns,
    event.start_ns + event.duration_ns,
    str(stats.get('hlo_op') or (name[1] if name else '')),
    stats.get('hlo_module'),
    stats.get('program_id'),
  )


def _find_enclosing(events):
  """Marks the events of one line that others lie in."""
  open_events = []
  for event in sorted(events, key=lambda x: (x.start, -x.end)):
    while open_events and open_events[-1].end <= event.start:
      open_events.pop()
    if open_events:
      open_events[-1].encloses = True
    open_events.append(event)


def break_down(
  devices: Mapping[str, Sequence[Event]],
  programs: Sequence[Program],
  *,
  wall_ns: float,
  num_steps: int,
) -> Breakdown:
  """Divides the time of the steps among the operations.

  Each moment counts once. Operations that run at the same time, in several
  threads or streams, share it; one that waits for its parts, as a loop does,
  gets what none of them takes; and where nothing runs the device is idle.

  Args:
    devices: see `read_events`.
    programs: those that ran, in the order in which they first did.
    wall_ns: the time of all steps by the clock, nanoseconds.
    num_steps: how many there were.

  Returns:
    The breakdown.
  """
  # What is not known shows, also when it is nothing.
  parts = collections.Counter({_OTHER: 0.0})
  kinds = collections.Counter({_OTHER: 0.0})
  busy = 0.0
  for events in devices.values():
    numbers, attributed = {}, []
    for event in events:
      part, kind = _attributed(event, programs, numbers)
      waits = event.encloses or kind == _LOOPS
      attributed.append((event, part, kind, waits))
      busy += 0.0 if waits else event.end - event.start
    for index, duration in _shared(attributed).items():
      _, part, kind, _ = attributed[index]
      parts[part] += duration
      kinds[kind] += duration
  per_step = 1e6 * num_steps * max(1, len(devices))
  wall = wall_ns / 1e6 / num_steps
  idle = {_IDLE: max(0.0, wall - sum(parts.values()) / per_step)}
  return Breakdown(
    {k: v / per_step for k, v in parts.items()} | idle,
    {k: v / per_step for k, v in kinds.items()} | idle,
    busy / per_step,
    wall,
  )


def _attributed(event, programs, numbers):
  """Part and kind of an event; `numbers` are those of the programs so far."""
  own = [p for p in programs if event.module in (None, p.module)]
  if own and event.program is not None:
    number = numbers.setdefault(event.program, len(numbers))
    own = own[number : number + 1]
  for program in own:
    if event.op in program.ops:
      return program.ops[event.op]
  return _OTHER, _first_kind(_KINDS_OF_NAMES, event.op) or _OTHER


def _shared(attributed):
  """How long each event is what its device does."""
  times = []
  for i, (event, *_) in enumerate(attributed):
    if event.end > event.start:
      times += [(event.start, 1, i), (event.end, -1, i)]
  durations = collections.Counter()
  running, waiting, before = set(), set(), 0.0
  for now, change, i in sorted(times):
    if running:
      for j in running:
        durations[j] += (now - before) / len(running)
    elif waiting:
      # The one that began last is the innermost.
      durations[max(waiting)] += now - before
    active = waiting if attributed[i][3] else running
    if change > 0:
      active.add(i)
    else:
      active.discard(i)
    before = now
  return durations


def to_text(breakdown: Breakdown) -> str:
  """The breakdown as two tables, largest first."""
  busy = breakdown.busy / breakdown.wall
  lines = [
    f'{breakdown.wall:.2f} ms a step by the clock; device time (the sum of all '
    f'operations) is {breakdown.busy:.2f} ms, {busy:.0%} of that',
  ]
  for title, rows in (
    ('part of the step', breakdown.parts),
    ('kind of operation', breakdown.kinds),
  ):
    lines += ['', f'{title:26}{"ms a step":>10}{"share":>8}']
    for name, value in sorted(rows.items(), key=lambda x: -x[1]):
      share = value / breakdown.wall
      lines.append(f'{name:26}{value:10.3f}{share:8.1%}')
  return '\n'.join([*lines, ''])
