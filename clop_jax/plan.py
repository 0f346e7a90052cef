"""Reports what a training run will need, before any hardware is rented.

python -m clop_jax.plan --config=configs/cifar100.py --topology=h100:8

Compiles the training step ahead of time for devices that are not attached and
reads memory, work and traffic from the compiled program. Without --topology it
plans for the devices at hand. The estimate of speed is a roofline: no run can
be faster, and most are slower.
"""

from collections.abc import Sequence
import dataclasses
import json
import math
import os
import re
import time

from absl import flags
import jax
import ml_collections
from ml_collections import config_flags
import numpy as np

from clop_jax import cli
from clop_jax import defaults
from clop_jax.experiment import build
from clop_jax.experiment import inputs
from clop_jax.experiment import memory as memory_lib
from clop_jax.experiment import setup
from clop_jax.runtime import hlo
from clop_jax.runtime import parallel
from clop_jax.runtime import topologies

# Training images, their size and their classes, for data sets that need not be
# on this machine. Theirs are known; all others are read.
_DATA_SETS = {
  'cifar10': (50_000, (32, 32, 3), 10),
  'cifar100': (50_000, (32, 32, 3), 100),
  'tiny_imagenet': (100_000, (64, 64, 3), 200),
  'stl10': (5_000, (96, 96, 3), 10),
  'imagenet2012': (1_281_167, (500, 375, 3), 1000),
}
_UNLABELLED = {'stl10': 100_000}
# Seconds between two kernels of a GPU that follow each other.
_LAUNCH = {'cuda': 2e-6, 'tpu': 0.0}
# Nothing is timed, since the device is not there to time it on.
_COMPILER_OPTIONS = {'cuda': {'xla_gpu_autotune_level': 0}}


@dataclasses.dataclass(frozen=True)
class Part:
  """Kernels and memory traffic of a part of the step, on one device.

  Attributes:
    name: One of `hlo.PARTS`.
    kernels: Number of kernels that the device launches.
    moved: Bytes that they read and write.
  """

  name: str
  kernels: int
  moved: int


@dataclasses.dataclass(frozen=True)
class Plan:
  """Needs of a run; numbers are for one step on one device.

  Attributes:
    config: Name of the data set and the backbone.
    topology: Number and kind of the devices.
    platform: 'cpu', 'gpu' or 'tpu'.
    devices: Number of devices.
    jax_version: Version of JAX that compiled the step.
    compile_seconds: Time that tracing and compiling took here.
    parameters: Number of trained parameters.
    batch_size: Global batch size.
    total_steps: Steps of the whole run.
    images: Images of the whole run, each of which gives two views.
    dtype: Type that the networks compute in.
    flop: Multiplications and additions of convolutions and matrix products.
    memory: Bytes by their use: `state`, `data` (resident), `batch`,
      `temporaries` and `total`.
    capacity: Bytes that the device offers, or None if it is not known.
    parts: Kernels and traffic of each part of a step that is not logged.
    logged: The same of what a logged step adds.
    sent: Bytes that the device sends, by kind of collective.
    roofline: Seconds of a step by what bounds it: `compute`, `memory`,
      `launches`, `network` and `step`; None without published figures.
  """

  config: str
  topology: str
  platform: str
  devices: int
  jax_version: str
  compile_seconds: float
  parameters: int
  batch_size: int
  total_steps: int
  images: int
  dtype: str
  flop: float
  memory: dict[str, int]
  capacity: int | None
  parts: Sequence[Part]
  logged: Sequence[Part]
  sent: dict[str, float]
  roofline: dict[str, float] | None

  @property
  def fits(self) -> bool | None:
    """True if the step's memory is there, None if that is not known."""
    if self.capacity is None:
      return None
    return self.memory['total'] <= self.capacity


def plan(
  config: ml_collections.ConfigDict,
  topology: str | None = None,
  *,
  num_examples: int | None = None,
) -> Plan:
  """Compiles the training step of a config and reads what it needs.

  Args:
    config: See `defaults`.
    topology: Devices to plan for, see `topologies.devices`. None takes the
      devices at hand.
    num_examples: Number of training images. None takes the published number
      of a known data set, or reads the data.

  Returns:
    The plan.

  Raises:
    ValueError: If the config or the topology is invalid, the batch does not
      fit the devices, the data cannot be read, or the compiler refuses the
      program because of its memory.
  """
  defaults.check(config)
  chip: topologies.Chip | None
  if topology is None:
    devices: Sequence[jax.Device] = jax.devices()
    chip = topologies.chip_of(devices[0])
  else:
    chip, devices = topologies.devices(topology)
  began = time.perf_counter()
  mesh = parallel.make_mesh(devices)
  parallel.check_batch_size(config.train.batch_size, mesh)
  config, examples, image_shape = _data(config, num_examples)
  run = setup.plan(config, mesh, num_examples=examples, image_shape=image_shape)
  # One step of a dispatch: a loop over several has the same in its body.
  traced = run.program.trace(1)
  options = _COMPILER_OPTIONS.get(chip.platform) if chip and topology else None
  try:
    compiled = traced.lower().compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(_too_large(error, topology, config)) from error
  seconds = time.perf_counter() - began
  text = compiled.as_text()
  found = hlo.kernels(text)
  collectives = hlo.collectives(text)
  flop = _flop(traced.jaxpr.jaxpr)
  sent = {
    kind: sum(
      c.sent for c in collectives if c.kind == kind and not c.conditional
    )
    for kind in sorted({c.kind for c in collectives if c.devices > 1})
  }
  parts = _parts([k for k in found if not k.conditional])
  kind = chip.name if chip else devices[0].device_kind
  return Plan(
    config=f'{config.data.name}, ResNet-{config.model.depth}',
    topology=f'{len(devices)} x {kind}',
    platform=devices[0].platform,
    devices=len(devices),
    jax_version=jax.__version__,
    compile_seconds=seconds,
    parameters=sum(x.size for x in jax.tree.leaves(run.state.params)),
    batch_size=config.train.batch_size,
    total_steps=run.total_steps,
    images=run.total_steps * config.train.batch_size,
    dtype=np.dtype(
      build.compute_dtype(config.model.dtype, devices[0].platform)
    ).name,
    flop=flop,
    memory=_memory(compiled, *run.program.arguments),
    capacity=_capacity(chip, devices[0], topology),
    parts=parts,
    logged=_parts([k for k in found if k.conditional]),
    sent=sent,
    roofline=_roofline(chip, flop, parts, sum(sent.values()), len(devices)),
  )


def _data(config, num_examples):
  """The config with its classes, the number of examples and their shape."""
  name = config.data.name
  if name in _DATA_SETS:
    examples, shape, num_classes = _DATA_SETS[name]
    if config.data.unlabelled_split is not None:
      examples += _UNLABELLED.get(name, 0)
    if not config.data.num_classes:
      config = ml_collections.ConfigDict(config.to_dict())
      config.data.num_classes = num_classes
      config = config.lock()
  else:
    source = inputs.training_source(config)
    config = inputs.with_num_classes(config, source)
    examples = len(source)
    size = config.data.image_size
    if size is None and not config.data.host_crops:
      shape = np.shape(source[0]['image'])
    else:
      shape = (size or config.augment.size,) * 2
  if num_examples is not None:
    examples = num_examples
  return config, examples, (*shape[:2], config.data.channels)


def _flop(jaxpr):
  """Multiplications and additions of the products and convolutions in it."""
  total = 0.0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == 'conv_general_dilated':
      kernel = equation.invars[1].aval.shape
      numbers = params['dimension_numbers']
      output = math.prod(equation.outvars[0].aval.shape)
      products = math.prod(kernel) / kernel[numbers.rhs_spec[0]]
      # Zeros that dilation puts between the inputs are not multiplied.
      total += 2 * output * products / math.prod(params['lhs_dilation'])
    elif name == 'dot_general':
      (contracted, _), _ = params['dimension_numbers']
      shape = equation.invars[0].aval.shape
      depth = math.prod(shape[axis] for axis in contracted)
      total += 2 * math.prod(equation.outvars[0].aval.shape) * depth
    elif name == 'cond':
      # A choice of the platform always runs; a step may skip other branches.
      if params.get('branches_platforms'):
        total += max(_flop(branch.jaxpr) for branch in params['branches'])
    else:
      times = params.get('length', 1) if name == 'scan' else 1
      for value in params.values():
        inner = getattr(value, 'jaxpr', value)
        if hasattr(inner, 'eqns'):
          total += times * _flop(inner)
  return total


def _parts(found):
  """A `Part` for each that has kernels, in the order of the step."""
  by_name = {name: [] for name in hlo.PARTS}
  for kernel in found:
    by_name[hlo.part_of(kernel.scope)].append(kernel)
  return [
    Part(name, hlo.launches(kernels), hlo.traffic(kernels))
    for name, kernels in by_name.items()
    if kernels
  ]


def _memory(compiled, state, shared):
  def size(tree):
    return sum(
      x.size * x.dtype.itemsize
      for x in jax.tree.leaves(tree)
      if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    )

  analysis = compiled.memory_analysis()
  state_bytes, data = size(state), size(shared['resident'])
  batch = max(0, analysis.argument_size_in_bytes - state_bytes - data)
  temporaries = analysis.temp_size_in_bytes
  # The state is donated; other results are some numbers.
  total = (
    analysis.argument_size_in_bytes
    + temporaries
    + max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
    + analysis.generated_code_size_in_bytes
  )
  return {
    'state': state_bytes,
    'data': data,
    'batch': batch,
    'temporaries': temporaries,
    'total': total,
  }


def _capacity(chip, device, topology):
  if topology is not None:
    return int(chip.memory * chip.usable)
  stats = device.memory_stats()
  if stats and 'bytes_limit' in stats:
    return stats['bytes_limit']
  if device.platform == 'cpu':
    pages = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    return pages // len(jax.local_devices())
  return None


def _roofline(chip, flop, parts, sent, devices):
  """Seconds of a step at the chip's published peaks."""
  if chip is None:
    return None
  seconds = {
    'compute': flop / chip.flops,
    'memory': sum(part.moved for part in parts) / chip.bandwidth,
    'launches': _LAUNCH[chip.platform] * sum(part.kernels for part in parts),
    'network': chip.seconds_to_send(sent, devices),
  }
  # Products and memory overlap; kernels start one after another.
  busy = max(seconds['compute'], seconds['memory'], seconds['launches'])
  return seconds | {'step': busy + seconds['network']}


def _too_large(error, topology, config):
  """One line for what a compiler says of a program that does not fit."""
  text = ' '.join(str(error).split())
  if not memory_lib.is_exhausted(error):
    raise error
  sizes = re.search(
    r'Used ([\d.]+\w) of ([\d.]+\w) hbm.*?Exceeded.*?by ([\d.]+\w)', text
  )
  where = f'--topology={topology}' if topology else 'this machine'
  said = (
    f'it needs {sizes[1]} of {sizes[2]} of device memory, {sizes[3]} too much'
    if sizes
    else f'the compiler says: {text:.200}'
  )
  advice = memory_lib.device_advice(config)
  return f'the step does not fit on {where}: {said}. {advice}'


def to_text(plan_: Plan) -> str:
  """Returns a plan as a text for people.

  Args:
    plan_: The plan.

  Returns:
    Several lines.
  """
  gib = 2**30
  memory = plan_.memory
  lines = [
    f'{plan_.config} on {plan_.topology}; jax {plan_.jax_version}, compiled in '
    f'{plan_.compile_seconds:.0f} s',
    f'{plan_.parameters:,} parameters, {plan_.dtype}; global batch '
    f'{plan_.batch_size:,}, {plan_.total_steps:,} steps',
    f'work: {plan_.flop * plan_.devices / 1e12:.2f} TFLOP a step, '
    f'{plan_.flop / 1e12:.2f} on each device',
    '',
    'memory per device, GiB',
  ]
  for name in ('state', 'data', 'batch', 'temporaries', 'total'):
    lines.append(f'  {name:<22}{memory[name] / gib:>9.2f}')
  if plan_.capacity is None:
    lines.append('  the memory of this device is not known')
  else:
    left = plan_.capacity - memory['total']
    verdict = (
      f'fits, {left / gib:.2f} left'
      if left >= 0
      else f'does not fit, {-left / gib:.2f} too much'
    )
    lines.append(f'  {"available":<22}{plan_.capacity / gib:>9.2f}  {verdict}')
  lines += ['', f'{"kernels and traffic of a step":<32}kernels       GB']
  for part in plan_.parts:
    lines.append(f'  {part.name:<30}{part.kernels:>7,}{part.moved / 1e9:>9.3f}')
  lines.append(
    f'  {"total":<30}{sum(p.kernels for p in plan_.parts):>7,}'
    f'{sum(p.moved for p in plan_.parts) / 1e9:>9.3f}'
  )
  for part in plan_.logged:
    lines.append(
      f'  {"+ on some steps: " + part.name:<30}{part.kernels:>7,}'
      f'{part.moved / 1e9:>9.3f}'
    )
  if plan_.sent:
    lines += ['', 'sent by a device in a step, MB (ring algorithm)']
    for kind, sent in plan_.sent.items():
      lines.append(f'  {kind:<30}{sent / 1e6:>9.2f}')
  lines.append('')
  if plan_.roofline is None:
    return '\n'.join(
      [*lines, 'no estimate of speed: the peaks of this device are not known']
    )
  times = plan_.roofline
  images = plan_.batch_size / times['step']
  whole = _duration(plan_.total_steps * times['step'])
  lines += [
    'estimate (roofline at published peaks: an upper bound, not a measurement)',
    f'  compute {1e3 * times["compute"]:.2f} ms, memory '
    f'{1e3 * times["memory"]:.2f} ms, launches {1e3 * times["launches"]:.2f} '
    f'ms, network {1e3 * times["network"]:.2f} ms',
    f'  a step takes at least {1e3 * times["step"]:.2f} ms: at most '
    f'{images:,.0f} images/s (two views each)',
    f'  the whole run takes at least {whole}',
    '  assumed: all products at the bfloat16 peak, every array moved once for',
    '  each kernel, 2 us for each kernel on a GPU; these three overlap, the',
    '  network does not; input, logging, checkpoints and evaluation are free',
  ]
  return '\n'.join(lines)


def _duration(seconds):
  if seconds < 120:
    return f'{seconds:.0f} s'
  if seconds < 7200:
    return f'{seconds / 60:.0f} min'
  return f'{seconds / 3600:.1f} h'


def define_flags() -> None:
  """Defines the command's flags; importing this module defines none."""
  config_flags.DEFINE_config_file('config', None, 'A file of configs/.')
  flags.DEFINE_string(
    'topology',
    None,
    'Devices to plan for, as v5e:4x4 or h100:8. Default: those at hand.',
  )
  flags.DEFINE_integer(
    'num_examples',
    None,
    'Number of training images. Default: that of the data set.',
    lower_bound=1,
  )
  flags.DEFINE_bool('json', False, 'Print JSON instead of a text.')


def report(
  config: ml_collections.ConfigDict,
  topology: str | None = None,
  *,
  num_examples: int | None = None,
  as_json: bool = False,
) -> None:
  """Prints a plan.

  Args:
    config: See `defaults`.
    topology: See `plan`.
    num_examples: See `plan`.
    as_json: True prints JSON instead of a text.

  Raises:
    ValueError: As `plan`; after printing, if the step does not fit.
  """
  result = plan(config, topology, num_examples=num_examples)
  if as_json:
    values = dataclasses.asdict(result) | {'fits': result.fits}
    print(json.dumps(values, indent=2))
  else:
    print(to_text(result))
  if result.capacity is not None and not result.fits:
    lacking = (result.memory['total'] - result.capacity) / 2**30
    chip = topologies.CHIPS.get((topology or '').split(':')[0])
    advice = memory_lib.device_advice(
      config,
      has_data=bool(result.memory['data']),
      share=chip.usable if chip else 1.0,
    )
    raise ValueError(
      f'the step needs {lacking:.2f} GiB more than a device of '
      f'{result.topology} has. {advice}'
    )


def main() -> None:
  """The command."""
  values = flags.FLAGS
  if values.config is None:
    raise ValueError('--config must name a file of configs/, got none')
  if values.topology is not None:
    # Nothing runs, so the devices of this machine may be busy.
    jax.config.update('jax_platforms', 'cpu')
  report(
    values.config,
    values.topology,
    num_examples=values.num_examples,
    as_json=values.json,
  )


if __name__ == '__main__':
  cli.run(main, define_flags, joins=False)
