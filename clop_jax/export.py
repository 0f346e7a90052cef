"""Exports a trained run to PyTorch, or for serving.

python -m clop_jax.export --workdir=runs/cifar10 --out=backbone.safetensors
python -m clop_jax.export --workdir=runs/cifar10 --out=network.stablehlo

A .safetensors file has the backbone's weights under torchvision's names. A
.stablehlo file has the function from uint8 images to features and embeddings,
including the weights, which JAX can call without this library. See
docs/export.md.
"""

from collections.abc import Sequence
import hashlib
import json
import os
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

import clop_jax
from clop_jax import cli
from clop_jax.data import images as images_lib
from clop_jax.experiment import restored
from clop_jax.experiment import workdir as workdir_lib
from clop_jax.models import torchvision
from clop_jax.runtime import extras
from clop_jax.runtime import files

ENDINGS = ('.safetensors', '.stablehlo')
PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')


def export(
  workdir: str,
  out: str,
  *,
  which: str = 'latest',
  with_head: bool = False,
  platforms: Sequence[str] | None = None,
  image_size: int | None = None,
  overwrite: bool = False,
) -> list[str]:
  """Writes a checkpoint of a run to a file.

  Args:
    workdir: Workdir of the run.
    out: File to write, `*.safetensors` or `*.stablehlo`.
    which: Checkpoint: 'latest', 'best' (by `train.keep_best`) or a step.
    with_head: If True, the projection head and the prototypes are included
      (.safetensors).
    platforms: Platforms to run on, from `PLATFORMS` (.stablehlo). If None, the
      platform of this process.
    image_size: Height and width in pixels of the images that callers will pass,
      which are resized to the size of the run's views (.stablehlo). If None,
      `data.image_size`, or else the size of the views.
    overwrite: If True, an existing file is replaced.

  Returns:
    Lines that describe the file.

  Raises:
    ValueError: If an argument is wrong, the workdir holds no run or no such
      checkpoint, or torchvision has no names for the network.
    checkpoint.DamagedCheckpointError: If the checkpoint cannot be restored.
    OSError: If the file cannot be written.
  """
  _check(out, with_head, platforms, image_size, overwrite)
  # A function exported for several devices needs as many to be called.
  run = restored.load(workdir, which=which, devices=jax.devices()[:1])
  if out.endswith('.stablehlo'):
    size = image_size or run.config.data.image_size or run.config.augment.size
    data, lines = to_stablehlo(run, image_size=size, platforms=platforms)
  else:
    import safetensors.numpy

    weights, metadata = to_weights(run, with_head=with_head)
    data = safetensors.numpy.save(weights, metadata)
    lines = _about_weights(out, weights, metadata)
  files.write_whole(out, data)
  size_text = f'{len(data) / 1e6:,.1f} MB'
  return [f'{out}: step {run.step} of {workdir}, {size_text}', *lines]


def _check(out, with_head, platforms, image_size, overwrite):
  """Raises an error for wrong arguments, before any long work."""
  ending = os.path.splitext(out or '')[1]
  if ending not in ENDINGS:
    raise ValueError(
      f'--out must be a file *{" or *".join(ENDINGS)}, got {out or "none"}'
    )
  if files.exists(out) and not overwrite:
    raise ValueError(
      f'--out={out} already exists; choose another name or pass --overwrite'
    )
  serves = ending == '.stablehlo'
  # jax.export needs flatbuffers.
  module = 'flatbuffers' if serves else 'safetensors'
  extras.check(f'--out={out}', 'export', module)
  folder = os.path.dirname(out) or '.'
  if '://' not in out and not os.path.isdir(folder):
    raise ValueError(f'--out={out}: folder {folder} does not exist')
  if serves and with_head:
    raise ValueError(
      f'--with_head needs *.safetensors, got --out={out}; StableHLO always '
      'returns embeddings'
    )
  for flag, value in (('platforms', platforms), ('image_size', image_size)):
    if not serves and value is not None:
      raise ValueError(f'--{flag} needs *.stablehlo, got --out={out}')
  unknown = [name for name in platforms or () if name not in PLATFORMS]
  if unknown or (platforms is not None and not platforms):
    raise ValueError(
      f'--platforms must be some of {",".join(PLATFORMS)}, got '
      f'{",".join(unknown) or "none"}'
    )
  if image_size is not None:
    images_lib.check_size('--image_size', image_size)
  if jax.process_count() > 1:
    raise ValueError(
      f'export must run in one process, got {jax.process_count()}; start it '
      'without a cluster'
    )
  files.check_writable(out, f'--out={out}')


def to_weights(
  run, *, with_head: bool = False
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Returns weights under torchvision's names, and metadata.

  The metadata names the network, the step and the normalization of images.

  Args:
    run: Run, see `restored.Restored`.
    with_head: If True, the projection head is included as `projection_head.*`,
      and the prototypes `[num_classes, dim]` as `prototypes`.
  """
  config, variables = run.config, jax.device_get(run.variables)

  def of(part, prefix):
    return torchvision.to_torchvision(
      {name: variables[name][part] for name in ('params', 'batch_stats')},
      num_batches=run.step,
      prefix=prefix,
    )

  weights = of('backbone', '')
  if with_head:
    weights |= of('projection_head', 'projection_head.')
    weights['prototypes'] = np.asarray(run.prototypes)
  text = json.dumps(workdir_lib.to_json(config), sort_keys=True)
  construction = torchvision.construction(
    name=config.model.name,
    channels=config.data.channels,
    image_size=config.augment.size,
    stem=config.model.stem,
    width_multiplier=config.model.width_multiplier,
    options=config.model.options,
  )
  metadata = {
    'format': 'pt',  # tells other libraries that the names are PyTorch's
    'writer': f'clop_jax {clop_jax.__version__}',
    'step': run.step,
    'config_sha256': hashlib.sha256(text.encode()).hexdigest(),
    'name': config.model.name,
    'options': config.model.options.to_dict(),
    'stem': config.model.stem,
    'width_multiplier': config.model.width_multiplier,
    'channels': config.data.channels,
    'image_size': config.augment.size,
    'mean': list(config.augment.mean),
    'std': list(config.augment.std),
    'images': 'float32 [batch, channels, height, width] in [0, 1], then '
    '(images - mean) / std',
    'features': 'output of the backbone',
    'torchvision': '\n'.join(construction or []),
  }
  return weights, {
    name: value if isinstance(value, str) else json.dumps(value)
    for name, value in metadata.items()
  }


def to_stablehlo(
  run, *, image_size: int, platforms: Sequence[str] | None = None
) -> tuple[bytes, list[str]]:
  """Returns the network as StableHLO, and lines that describe it.

  The function takes uint8 images `[batch, image_size, image_size, channels]` of
  any batch size and returns `(features [batch, feature_dim], embeddings [batch,
  dim])`. The weights are included.
  """
  from jax import export as jax_export

  variables: Any = jax.device_get(run.variables)
  channels = run.config.data.channels
  (batch,) = jax_export.symbolic_shape('batch')
  shape = (batch, image_size, image_size, channels)

  @jax.jit
  def network(images):
    return run.pure(variables, images)

  exported = jax_export.export(network, platforms=platforms)(
    jax.ShapeDtypeStruct(shape, jnp.uint8)
  )
  features, embeddings = exported.out_avals
  line = (
    f'uint8 images [batch, {image_size}, {image_size}, {channels}] to '
    f'features [batch, {features.shape[-1]}] and embeddings [batch, '
    f'{embeddings.shape[-1]}], on {",".join(exported.platforms)}, computed in '
    f'{jnp.dtype(run.experiment.dtype).name}'
  )
  return bytes(exported.serialize()), [line]


def _about_weights(out, weights, metadata):
  lines = [
    f"{len(weights)} tensors under torchvision's names; in PyTorch:",
    *metadata['torchvision'].splitlines(),
  ]
  if not metadata['torchvision']:
    lines.append(
      f'# torchvision has no {metadata["name"]} of width multiplier '
      f'{metadata["width_multiplier"]} and these options: write the model '
      "yourself, with torchvision's names"
    )
  loaded = f'safetensors.torch.load_file({out!r})'
  has_head = 'prototypes' in weights
  return [
    *lines,
    f'weights = {loaded}' if has_head else f'model.load_state_dict({loaded})',
    f'# images: {metadata["images"]}, mean {metadata["mean"]}, std '
    f'{metadata["std"]}, {metadata["image_size"]} px',
  ]


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE(cli.PATH, 'workdir', None, 'Workdir of a run.')
  flags.DEFINE_string(
    'checkpoint', 'latest', 'latest, best (by train.keep_best) or a step.'
  )
  flags.DEFINE(
    cli.PATH, 'out', None, f'File to write: *{" or *".join(ENDINGS)}.'
  )
  flags.DEFINE_bool(
    'with_head',
    False,
    'Include the projection head and the prototypes (.safetensors).',
  )
  flags.DEFINE_list(
    'platforms',
    None,
    f'Some of {",".join(PLATFORMS)} (.stablehlo); default: the platform of '
    'this process.',
  )
  flags.DEFINE_integer(
    'image_size',
    None,
    'Height and width of the images that callers will pass (.stablehlo); '
    "default: the run's.",
  )
  flags.DEFINE_bool('overwrite', False, 'Replace an existing file.')


def main() -> None:
  """Runs the command."""
  values = flags.FLAGS
  if not values.workdir:
    raise ValueError('--workdir must name the folder of a run, got none')
  lines = export(
    values.workdir,
    values.out,
    which=values.checkpoint,
    with_head=values.with_head,
    platforms=values.platforms,
    image_size=values.image_size,
    overwrite=values.overwrite,
  )
  print('\n'.join(lines))


if __name__ == '__main__':
  cli.run(main, define_flags)
