"""Writes a trained run for PyTorch, or for serving.

python -m clop_jax.export --workdir=runs/cifar10 --out=backbone.safetensors
python -m clop_jax.export --workdir=runs/cifar10 --out=network.stablehlo

The suffix selects the content: the backbone's weights under torchvision's
names, or the whole function from uint8 images to features and embeddings,
including the weights, as StableHLO that JAX can call without this library. See
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
    out: Path of the file, ending in .safetensors or .stablehlo.
    which: Checkpoint: 'latest', 'best' (by `train.keep_best`) or a step.
    with_head: True adds the projection head and the prototypes (.safetensors).
    platforms: Platforms to run on, of `PLATFORMS` (.stablehlo). The default is
      the platform of this process.
    image_size: Height and width of the images that will be passed, in pixels
      (.stablehlo). They are resized to the size of the run's views. The default
      is `data.image_size`, or else the size of the views.
    overwrite: True replaces an existing file.

  Returns:
    Lines that describe the file.

  Raises:
    ValueError: If an argument is wrong, the workdir holds no run or no such
      checkpoint, or the format has no names for the network. Nothing is written
      then.
    checkpoint.DamagedCheckpointError: If the checkpoint cannot be restored.
    OSError: If the file cannot be written.
  """
  ending = os.path.splitext(out)[1]
  if ending not in ENDINGS:
    raise ValueError(
      f'--out must name a file ending in {" or ".join(ENDINGS)}, got {out!r}'
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
    raise ValueError(f'--out={out}: there is no folder {folder}; make it first')
  if serves and with_head:
    raise ValueError(
      f'--with_head is for .safetensors, got --out={out}; StableHLO gives the '
      'embeddings as they are'
    )
  for flag, value in (('platforms', platforms), ('image_size', image_size)):
    if not serves and value is not None:
      raise ValueError(f'--{flag} is for .stablehlo, got --out={out}')
  unknown = [name for name in platforms or () if name not in PLATFORMS]
  if unknown or (platforms is not None and not platforms):
    raise ValueError(
      f'--platforms must be of {",".join(PLATFORMS)}, got '
      f'{",".join(unknown) or "none"}'
    )
  if image_size is not None:
    images_lib.check_size('--image_size', image_size)
  if jax.process_count() > 1:
    raise ValueError(
      'export runs in one process, and this is one of several; start it '
      'without a cluster'
    )
  files.check_writable(out, f'--out={out}')
  # A function exported for several devices could only be called on as many.
  run = restored.load(workdir, which=which, devices=jax.devices()[:1])
  if serves:
    size = image_size or run.config.data.image_size or run.config.augment.size
    data = to_stablehlo(run, image_size=size, platforms=platforms)
    lines = _about_stablehlo(run, data, size)
  else:
    weights, metadata = to_weights(run, with_head=with_head)
    data = _pack(weights, metadata)
    lines = _about_weights(out, weights, metadata)
  files.write_whole(out, data)
  return [f'{out}: step {run.step} of {workdir}, {_megabytes(data)}', *lines]


def to_weights(
  run, *, with_head: bool = False
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Returns the backbone of a run under torchvision's names.

  Args:
    run: Run, see `restored.Restored`.
    with_head: True adds the projection head, as `projection_head.*`, and the
      `prototypes` `[num_classes, dim]`.

  Returns:
    `(weights, metadata)`: arrays by name, and as texts what their user needs:
    the network, the step, and the normalization of the images.

  Raises:
    ValueError: If torchvision has no names for the network.
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
    depth=config.model.depth,
    stem=config.model.stem,
    channels=config.data.channels,
    width_multiplier=config.model.width_multiplier,
  )
  metadata = {
    'format': 'pt',  # by which other libraries know PyTorch's names
    'writer': f'clop_jax {clop_jax.__version__}',
    'step': run.step,
    'config_sha256': hashlib.sha256(text.encode()).hexdigest(),
    'depth': config.model.depth,
    'stem': config.model.stem,
    'width_multiplier': config.model.width_multiplier,
    'channels': config.data.channels,
    'image_size': config.augment.size,
    'mean': list(config.augment.mean),
    'std': list(config.augment.std),
    'images': 'float32 [batch, channels, height, width] in [0, 1], then '
    '(images - mean) / std',
    'features': 'global average pool of the last stage',
    'torchvision': '\n'.join(construction or []),
  }
  return weights, {
    name: value if isinstance(value, str) else json.dumps(value)
    for name, value in metadata.items()
  }


def _pack(weights, metadata):
  import safetensors.numpy

  return safetensors.numpy.save(weights, metadata)


def to_stablehlo(
  run, *, image_size: int, platforms: Sequence[str] | None = None
) -> bytes:
  """Returns the network of a run as StableHLO, including its weights.

  Args:
    run: Run on one device, see `restored.Restored`.
    image_size: Height and width of the images that will be passed.
    platforms: Platforms, see `export`.

  Returns:
    The argument of `jax.export.deserialize`: a function from uint8 images
    `[batch, image_size, image_size, channels]` of any batch size to
    `(features [batch, feature_dim], embeddings [batch, dim])`, see
    `restored.Restored.pure`.
  """
  from jax import export as jax_export

  variables: Any = jax.device_get(run.variables)
  (batch,) = jax_export.symbolic_shape('batch')
  shape = (batch, image_size, image_size, run.config.data.channels)

  @jax.jit
  def network(images):
    return run.pure(variables, images)

  exported = jax_export.export(network, platforms=platforms)(
    jax.ShapeDtypeStruct(shape, jnp.uint8)
  )
  return bytes(exported.serialize())


def _about_weights(out, weights, metadata):
  lines = [f"{len(weights)} tensors under torchvision's names; in PyTorch:"]
  if metadata['torchvision']:
    lines += metadata['torchvision'].splitlines()
  else:
    lines.append(
      '# torchvision has no ResNet of depth '
      f'{metadata["depth"]} and width multiplier '
      f'{metadata["width_multiplier"]}: the names are of its kind, but model '
      'is yours to write'
    )
  lines.append(
    f'model.load_state_dict(safetensors.torch.load_file({out!r}))'
    if 'prototypes' not in weights
    else f'weights = safetensors.torch.load_file({out!r})'
  )
  lines.append(
    f'# images: {metadata["images"]}, mean {metadata["mean"]}, std '
    f'{metadata["std"]}, {metadata["image_size"]} px'
  )
  return lines


def _about_stablehlo(run, data, size):
  from jax import export as jax_export

  exported = jax_export.deserialize(bytearray(data))
  features, embeddings = exported.out_avals
  dtype = run.experiment.backbone.dtype
  return [
    f'uint8 images [batch, {size}, {size}, {run.config.data.channels}] to '
    f'features [batch, {features.shape[-1]}] and embeddings [batch, '
    f'{embeddings.shape[-1]}], on {",".join(exported.platforms)}, computed in '
    f'{jnp.dtype(dtype).name}'
  ]


def _megabytes(data):
  return f'{len(data) / 1e6:,.1f} MB'


def define_flags() -> None:
  """Defines the command's flags; importing this module defines none."""
  flags.DEFINE(cli.PATH, 'workdir', None, 'Workdir of the run.')
  flags.DEFINE_string(
    'checkpoint', 'latest', 'latest, best (by train.keep_best) or a step.'
  )
  flags.DEFINE(cli.PATH, 'out', None, f'File to write: {" or ".join(ENDINGS)}.')
  flags.DEFINE_bool(
    'with_head', False, '.safetensors: projection head and prototypes too.'
  )
  flags.DEFINE_list(
    'platforms',
    None,
    f'.stablehlo: of {",".join(PLATFORMS)}; default: where this runs.',
  )
  flags.DEFINE_integer(
    'image_size',
    None,
    '.stablehlo: height and width of the images that will be passed; default: '
    "the run's.",
  )
  flags.DEFINE_bool('overwrite', False, 'Replace an existing file.')


def main() -> None:
  """Runs the command."""
  values = flags.FLAGS
  if not values.workdir:
    raise ValueError('--workdir must name the folder of a run, got none')
  if not values.out:
    raise ValueError(
      f'--out must name a file ending in {" or ".join(ENDINGS)}, got none'
    )
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
