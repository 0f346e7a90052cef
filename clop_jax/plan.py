"""Estimates memory, work and traffic of a training run on any hardware.

python -m clop_jax.plan --config=configs/cifar100.py --topology=h100:8

Compiles the training step for devices that need not be attached, and reads the
figures from the compiled program. Without --topology it plans for the devices
of this machine. The estimate of speed is a roofline: no run can be faster, and
most are slower.
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
from clop_jax.experiment import inputs
from clop_jax.experiment import memory as memory_lib
from clop_jax.experiment import setup
from clop_jax.runtime import hlo
from clop_jax.runtime import parallel
from clop_jax.runtime import topologies

# Number of training images, their shape and classes, for data sets that need
# not be on this machine. All others are read.
_DATA_SETS = {
  'cifar10': (50_000, (32, 32, 3), 10),
  'cifar100': (50_000, (32, 32, 3), 100),
  'tiny_imagenet': (100_000, (64, 64, 3), 200),
  'stl10': (5_000, (96, 96, 3), 10),
  'imagenet2012': (1_281_167, (500, 375, 3), 1000),
}
_UNLABELLED = {'stl10': 100_000}
# Seconds between two consecutive kernels.
_LAUNCH = {'cuda': 2e-6, 'tpu': 0.0}
# The compiler cannot time its choices without the device.
_COMPILER_OPTIONS = {
  'cuda': {
    'xla_gpu_autotune_level': 0,
    # Without a device to try tile sizes on, Triton fails at some products.
    'xla_gpu_enable_triton_gemm': False,
  }
}


@dataclasses.dataclass(frozen=True)
class Part:
  """Kernels that a part of the step, one of `hlo.PARTS`, launches on a device.

  `moved` is the number of bytes that they read and write.
  """

  name: str
  kernels: int
  moved: int


@dataclasses.dataclass(frozen=True)
class Plan:
  """Needs of a run. Numbers are for one step on one device.

  Attributes:
    config: Names of the data set and the backbone.
    topology: Number and kind of the devices.
    platform: 'cpu', 'gpu' or 'tpu'.
    devices: Number of devices.
    jax_version: Version of JAX that compiled the step.
    compile_seconds: Time for tracing and compiling.
    parameters: Number of trained parameters.
    batch_size: Global batch size.
    total_steps: Steps of the whole run.
    images: Images of the whole run, each of which gives two views.
    dtype: Type that the networks compute in.
    flop: Multiplications and additions of convolutions and matrix products.
    memory: Bytes by their use: `state`, `data` (resident), `batch`,
      `temporaries` and `total`.
    capacity: Bytes that the device offers, or None if unknown.
    parts: Kernels and traffic of each part of every step.
    logged: Kernels and traffic that a logged step adds.
    sent: Bytes that the device sends, by kind of collective.
    roofline: Seconds of a step by their bound: `compute`, `memory`, `launches`,
      `network` and `step`. None without published figures.
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
    """True if the step fits the device's memory, None if that is unknown."""
    if self.capacity is None:
      return None
    return self.memory['total'] <= self.capacity


def plan(
  config: ml_collections.ConfigDict,
  topology: str | None = None,
  *,
  num_examples: int | None = None,
) -> Plan:
  """Compiles the training step of a config and returns its needs.

  Args:
    config: See `defaults`.
    topology: Devices to plan for, see `topologies.devices`. Default: the
      devices of this machine.
    num_examples: Number of training images. Default: the published number of a
      known data set, or that of the data.

  Raises:
    ValueError: If the config or the topology is invalid, the batch does not
      fit the devices, the data cannot be read, or the compiler refuses the
      program because of its memory.
  """
  defaults.check(config)
  chip: topologies.Chip | None
  if topology is None:
    devices: Sequence[jax.Device] = jax.devices()
    chip, options = topologies.chip_of(devices[0]), None
  else:
    chip, devices = topologies.devices(topology)
    options = _COMPILER_OPTIONS.get(chip.platform)
  began = time.perf_counter()
  mesh = parallel.make_mesh(devices)
  parallel.check_batch_size(config.train.batch_size, mesh)
  config, examples, image_shape = _data(config, num_examples)
  run = setup.plan(config, mesh, num_examples=examples, image_shape=image_shape)
  # A dispatch of one step: that of several has the same step in a loop.
  traced = run.program.trace(1)
  try:
    compiled = traced.lower().compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(_too_large(error, topology, config)) from error
  seconds = time.perf_counter() - began
  text = compiled.as_text()
  kernels = hlo.kernels(text)
  parts = _parts([k for k in kernels if not k.conditional])
  flop, sent = _flop(traced.jaxpr.jaxpr), _sent(hlo.collectives(text))
  platform = devices[0].platform
  chip_name = chip.name if chip else devices[0].device_kind
  return Plan(
    config=f'{config.data.name}, {config.model.name}',
    topology=f'{len(devices)} x {chip_name}',
    platform=platform,
    devices=len(devices),
    jax_version=jax.__version__,
    compile_seconds=seconds,
    parameters=sum(x.size for x in jax.tree.leaves(run.state.params)),
    batch_size=config.train.batch_size,
    total_steps=run.total_steps,
    images=run.total_steps * config.train.batch_size,
    dtype=np.dtype(run.experiment.dtype).name,
    flop=flop,
    memory=_memory(compiled, *run.program.arguments),
    capacity=_capacity(chip, devices[0], topology),
    parts=parts,
    logged=_parts([k for k in kernels if k.conditional]),
    sent=sent,
    roofline=_roofline(chip, flop, parts, sum(sent.values()), len(devices)),
  )


def _data(config, num_examples):
  """Returns the config with its classes, the number and shape of examples."""
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
  """Returns the multiplications and additions of products and convolutions."""
  total = 0.0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == 'conv_general_dilated':
      kernel = equation.invars[1].aval.shape
      numbers = params['dimension_numbers']
      output = math.prod(equation.outvars[0].aval.shape)
      products = math.prod(kernel) / kernel[numbers.rhs_spec[0]]
      # The zeros between dilated inputs are not multiplied.
      total += 2 * output * products / math.prod(params['lhs_dilation'])
    elif name == 'dot_general':
      (contracted, _), _ = params['dimension_numbers']
      shape = equation.invars[0].aval.shape
      depth = math.prod(shape[axis] for axis in contracted)
      total += 2 * math.prod(equation.outvars[0].aval.shape) * depth
    elif name == 'cond':
      # A choice of the platform always runs. A step may skip other branches.
      if params.get('branches_platforms'):
        total += max(_flop(branch.jaxpr) for branch in params['branches'])
    else:
      times = params.get('length', 1) if name == 'scan' else 1
      for value in params.values():
        inner = getattr(value, 'jaxpr', value)
        if hasattr(inner, 'eqns'):
          total += times * _flop(inner)
  return total


def _parts(kernels):
  """Returns a `Part` for each that has kernels, in the order of the step."""
  by_name = {name: [] for name in hlo.PARTS}
  for kernel in kernels:
    by_name[hlo.part_of(kernel.scope)].append(kernel)
  return [
    Part(name, sum(kernel.times for kernel in found), hlo.traffic(found))
    for name, found in by_name.items()
    if found
  ]


def _sent(collectives):
  """Returns the bytes that a device sends in every step, by kind."""
  sent = {c.kind: 0.0 for c in collectives if c.devices > 1}
  for c in collectives:
    if c.devices > 1 and not c.conditional:
      sent[c.kind] += c.sent
  return dict(sorted(sent.items()))


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
  # The state is donated, so its results need no memory.
  results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
  total = (
    analysis.argument_size_in_bytes
    + temporaries
    + max(0, results)
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
  """Returns the seconds of a step at the chip's published peaks."""
  if chip is None:
    return None
  seconds = {
    'compute': flop / chip.flops,
    'memory': sum(part.moved for part in parts) / chip.bandwidth,
    'launches': _LAUNCH[chip.platform] * sum(part.kernels for part in parts),
    'network': chip.seconds_to_send(sent, devices),
  }
  # The device computes, moves data and launches kernels at the same time.
  busy = max(seconds['compute'], seconds['memory'], seconds['launches'])
  return seconds | {'step': busy + seconds['network']}


def _too_large(error, topology, config):
  """Returns one line for a compiler's error of too large a program."""
  if not memory_lib.is_exhausted(error):
    raise error
  text = ' '.join(str(error).split())
  sizes = re.search(
    r'Used ([\d.]+\w) of ([\d.]+\w) hbm.*?Exceeded.*?by ([\d.]+\w)', text
  )
  where = f'--topology={topology}' if topology else 'this machine'
  reason = (
    f'it needs {sizes[1]} of {sizes[2]} of device memory, {sizes[3]} too much'
    if sizes
    else f'the compiler says: {text:.200}'
  )
  advice = memory_lib.device_advice(config)
  return f'the step does not fit on {where}: {reason}. {advice}'


def to_text(plan_: Plan) -> str:
  """Returns a plan as several lines of text."""
  flop = plan_.flop / 1e12
  lines = [
    f'{plan_.config} on {plan_.topology}; jax {plan_.jax_version}, compiled in '
    f'{plan_.compile_seconds:.0f} s',
    f'{plan_.parameters:,} parameters, {plan_.dtype}; global batch '
    f'{plan_.batch_size:,}, {plan_.total_steps:,} steps',
    f'work: {flop * plan_.devices:.2f} TFLOP a step, {flop:.2f} on each device',
    '',
    'memory per device, GiB',
    *_memory_lines(plan_),
    '',
    f'{"kernels and traffic of a step":<32}kernels       GB',
    *[_part_line(part) for part in plan_.parts],
    _part_line(
      Part(
        'total',
        sum(part.kernels for part in plan_.parts),
        sum(part.moved for part in plan_.parts),
      )
    ),
    *[_part_line(part, '+ on some steps: ') for part in plan_.logged],
  ]
  if plan_.sent:
    lines += ['', 'sent by a device in a step, MB (ring algorithm)']
    lines += [f'  {k:<30}{sent / 1e6:>9.2f}' for k, sent in plan_.sent.items()]
  return '\n'.join([*lines, '', *_roofline_lines(plan_)])


def _memory_lines(plan_):
  gib = 2**30
  for name in ('state', 'data', 'batch', 'temporaries', 'total'):
    yield f'  {name:<22}{plan_.memory[name] / gib:>9.2f}'
  if plan_.capacity is None:
    yield '  the memory of this device is not known'
    return
  left = (plan_.capacity - plan_.memory['total']) / gib
  verdict = (
    f'fits, {left:.2f} left'
    if left >= 0
    else f'does not fit, {-left:.2f} too much'
  )
  yield f'  {"available":<22}{plan_.capacity / gib:>9.2f}  {verdict}'


def _part_line(part, prefix=''):
  return f'  {prefix + part.name:<30}{part.kernels:>7,}{part.moved / 1e9:>9.3f}'


def _roofline_lines(plan_):
  if plan_.roofline is None:
    return ['no estimate of speed: the peaks of this device are not known']
  ms = {name: f'{1e3 * x:.2f} ms' for name, x in plan_.roofline.items()}
  step = plan_.roofline['step']
  return [
    'estimate (roofline at published peaks: an upper bound, not a measurement)',
    f'  compute {ms["compute"]}, memory {ms["memory"]}, launches '
    f'{ms["launches"]}, network {ms["network"]}',
    f'  a step takes at least {ms["step"]}: at most '
    f'{plan_.batch_size / step:,.0f} images/s (two views each)',
    f'  the whole run takes at least {_duration(plan_.total_steps * step)}',
    '  assumed: all products at the bfloat16 peak, every array moved once for',
    '  each kernel, 2 us for each kernel on a GPU; these three overlap, the',
    '  network does not; input, logging, checkpoints and evaluation are free',
  ]


def _duration(seconds):
  if seconds < 120:
    return f'{seconds:.0f} s'
  if seconds < 7200:
    return f'{seconds / 60:.0f} min'
  return f'{seconds / 3600:.1f} h'


def define_flags() -> None:
  """Defines the command's flags."""
  config_flags.DEFINE_config_file('config', None, 'A file of configs/.')
  flags.DEFINE_string(
    'topology',
    None,
    'Devices to plan for, as v5e:4x4 or h100:8. Default: this machine.',
  )
  flags.DEFINE_integer(
    'num_examples',
    None,
    'Number of training images. Default: that of the data set.',
    lower_bound=1,
  )
  flags.DEFINE_bool('json', False, 'Print JSON instead of text.')


def report(
  config: ml_collections.ConfigDict,
  topology: str | None = None,
  *,
  num_examples: int | None = None,
  as_json: bool = False,
) -> None:
  """Prints a plan, as text or JSON. The arguments are those of `plan`.

  Raises:
    ValueError: As `plan` does, and after printing if the step does not fit.
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
  """Runs the command."""
  values = flags.FLAGS
  if values.config is None:
    raise ValueError('--config must name a file of configs/, got none')
  if values.topology is not None:
    # The devices of this machine may be busy, and are not needed.
    jax.config.update('jax_platforms', 'cpu')
  report(
    values.config,
    values.topology,
    num_examples=values.num_examples,
    as_json=values.json,
  )


if __name__ == '__main__':
  cli.run(main, define_flags, joins=False)
