"""Conversion of ResNet and ViT weights to and from torchvision's names.

Both have the same layers with other names and layouts. A convolution is
`[height, width, in, out]` in Flax and `[out, in, height, width]` in PyTorch.
Batch normalization agrees in evaluation mode. (In training, Flax averages the
biased variance of a batch and PyTorch the unbiased one.)

Reference:
  torchvision, `torchvision/models/resnet.py` and `vision_transformer.py`.
"""

from collections.abc import Mapping
import hashlib
import io
import re
from typing import Any

from etils import epath
from flax import traverse_util
import numpy as np

from clop_jax.models import vit

ENDINGS = ('.safetensors', '.pth')

# PyTorch's names of Flax's leaves.
_LEAVES = {
  'kernel': 'weight',
  'scale': 'weight',
  'bias': 'bias',
  'mean': 'running_mean',
  'var': 'running_var',
}
_LAYER = re.compile(
  r'(?:layer(?P<stage>\d+)_(?P<block>\d+)/)?'
  r'(?P<name>(?:conv|bn|dense)\d+|downsample_conv|downsample_bn)'
)
_DOWNSAMPLE = {
  'downsample_conv': 'downsample.0',
  'downsample_bn': 'downsample.1',
}
_VIT_LAYER = re.compile(
  r'(?:encoder_layer_(?P<index>\d+)/)?'
  r'(?P<name>conv_proj|ln|ln_1|ln_2|in_proj|out_proj|mlp_1|mlp_2)'
)
_VIT_NAMES = {
  'conv_proj': 'conv_proj.',
  'ln': 'encoder.ln.',
  # PyTorch joins these with an underscore.
  'in_proj': 'self_attention.in_proj_',
  'out_proj': 'self_attention.out_proj.',
  'mlp_1': 'mlp.0.',
  'mlp_2': 'mlp.3.',
}
_VIT_PARAMETERS = {
  'class_token': 'class_token',
  'pos_embedding': 'encoder.pos_embedding',
}
# Entries of a file that are not the backbone's: torchvision's classifier,
# PyTorch's counts of batches, and what `export` adds.
_IGNORED = re.compile(
  r'fc\..*|heads\..*|(?:.*\.)?num_batches_tracked|projection_head\..*|prototypes'
)
_PUBLISHED = ('resnet18', 'resnet34', 'resnet50')


def to_torchvision(
  variables: Mapping[str, Any], *, num_batches: int = 0, prefix: str = ''
) -> dict[str, np.ndarray]:
  """Converts a network's variables to a PyTorch state dict.

  Args:
    variables: `{'params': ..., 'batch_stats': ...}` of a `resnet.ResNet`, a
      `vit.ViT` or a `heads.ProjectionHead`.
    num_batches: Value of each layer's `num_batches_tracked`.
    prefix: Prefix of every name, such as 'projection_head.'.

  Returns:
    Contiguous arrays by name.

  Raises:
    ValueError: If a layer has no name in torchvision.
  """
  weights = {}
  for path, value in traverse_util.flatten_dict(variables).items():
    name = prefix + _name(path)
    value = np.asarray(value)
    if path[-1] == 'kernel':
      # Convolutions have four axes, dense layers two.
      value = value.transpose((3, 2, 0, 1) if value.ndim == 4 else (1, 0))
    weights[name] = np.ascontiguousarray(value)
    if path[-1] == 'var':
      counter = name.removesuffix('running_var') + 'num_batches_tracked'
      weights[counter] = np.asarray(num_batches, np.int64)
  return weights


def from_torchvision(
  weights: Mapping[str, np.ndarray], like: Mapping[str, Any]
) -> dict[str, Any]:
  """Converts a PyTorch state dict to a backbone's variables.

  Args:
    weights: Arrays by name. The classifier (`fc.*`, `heads.*`),
      `num_batches_tracked`, and the projection head and prototypes of `export`
      are ignored. Position embeddings of another image size are interpolated.
    like: `{'params': ..., 'batch_stats': ...}` of the backbone, of which only
      structure and shapes matter.

  Returns:
    float32 arrays in the structure of `like`.

  Raises:
    ValueError: If a name is missing or unexpected, or an array has another
      shape or is not finite.
  """
  targets = {
    _name(path): (path, leaf)
    for path, leaf in traverse_util.flatten_dict(like).items()
  }
  faults = {
    'missing': [name for name in targets if name not in weights],
    'unexpected': [
      name
      for name in weights
      if name not in targets and not _IGNORED.fullmatch(name)
    ],
    'wrong shape': [],
    'not finite': [],
  }
  leaves = {}
  for name, (path, leaf) in targets.items():
    if name not in weights:
      continue
    value = np.asarray(weights[name])
    if path[-1] == 'pos_embedding':
      value = _resized(value, leaf.shape)
    expected = tuple(leaf.shape)
    if len(expected) == 4:
      height, width, inputs, outputs = expected
      expected = outputs, inputs, height, width
    elif path[-1] == 'kernel':
      expected = expected[::-1]
    if value.shape != expected:
      faults['wrong shape'].append(f'{name} {value.shape}, must be {expected}')
      continue
    if path[-1] == 'kernel':
      value = value.transpose((2, 3, 1, 0) if value.ndim == 4 else (1, 0))
    leaves[path] = np.ascontiguousarray(value, np.float32)
    if not np.isfinite(leaves[path]).all():
      faults['not finite'].append(name)
  if any(faults.values()):
    listed = [f'{k}: {_first(names)}' for k, names in faults.items() if names]
    raise ValueError(
      'the weights do not fit the backbone; check config.model.name, '
      'config.model.stem, config.model.width_multiplier and '
      f'config.data.channels; {"; ".join(listed)}'
    )
  return traverse_util.unflatten_dict(leaves)


def _resized(positions, shape):
  """Interpolates position embeddings if only the number of patches differs."""
  same = positions.ndim == 3 and positions.shape[2] == shape[2]
  if not same or positions.shape == tuple(shape):
    return positions
  return np.asarray(vit.resize_positions(positions, shape[1] - 1))


def _first(names, count=5):
  """Joins the first names and counts the others."""
  others = len(names) - count
  more = f' and {others} more' if others > 0 else ''
  return ', '.join(names[:count]) + more


def read(path: str) -> tuple[dict[str, np.ndarray], str]:
  """Reads a state dict.

  Args:
    path: Path ending in .safetensors, or in .pth where PyTorch is installed.

  Returns:
    Arrays by name, and the file's SHA-256.

  Raises:
    ValueError: If the file does not exist, is damaged or is no state dict.
  """
  if not path.endswith(ENDINGS):
    raise ValueError(f'must end in {" or ".join(ENDINGS)}')
  file = epath.Path(path)
  if not file.is_file():
    raise ValueError('there is no such file')
  data = file.read_bytes()
  parse = _safetensors if path.endswith('.safetensors') else _pth
  return parse(data), hashlib.sha256(data).hexdigest()


def _safetensors(data):
  try:
    import safetensors
    import safetensors.numpy
  except ImportError as error:
    raise ValueError(
      "reading it needs safetensors: pip install 'clop-jax[export]'"
    ) from error
  try:
    return safetensors.numpy.load(data)
  except safetensors.SafetensorError as error:
    raise ValueError(f'it is damaged or not safetensors ({error})') from error
  except KeyError as error:
    raise ValueError(
      f'it has dtype {error}, which NumPy does not support; save it as float32'
    ) from error


def _pth(data):
  try:
    import torch
  except ImportError as error:
    raise ValueError(
      'reading .pth needs PyTorch; convert it where PyTorch is installed: '
      'safetensors.torch.save_file(torch.load(path), new_path)'
    ) from error
  try:
    loaded = torch.load(io.BytesIO(data), map_location='cpu', weights_only=True)
  # PyTorch raises many kinds for damaged files and for objects that could run
  # code.
  except Exception as error:
    reason = ' '.join(str(error).split())[:200]
    raise ValueError(f'PyTorch cannot read it ({reason})') from error
  if not isinstance(loaded, dict) or not all(
    isinstance(value, torch.Tensor) for value in loaded.values()
  ):
    content = list(loaded) if isinstance(loaded, dict) else type(loaded)
    raise ValueError(
      'it must contain a state dict, as written by '
      f'torch.save(model.state_dict(), path), got {content}'
    )
  return {
    name: (value.float() if value.is_floating_point() else value).numpy()
    for name, value in loaded.items()
  }


def construction(
  *,
  name: str,
  channels: int,
  image_size: int,
  stem: str = 'imagenet',
  width_multiplier: float = 1.0,
  options: Mapping[str, Any] | None = None,
) -> list[str] | None:
  """Returns lines of Python that create torchvision's network.

  Args:
    name: Name as in `config.model.name`.
    channels: Number of channels of an image.
    image_size: Height and width of the views.
    stem: As for `resnet.ResNet`.
    width_multiplier: As for `resnet.ResNet`.
    options: Options of a ViT, as in `config.model.options`.

  Returns:
    The lines, or None if torchvision has no such network.
  """
  options = dict(options or {})
  if name == 'vit_b' and channels == 3 and options.get('pool') != 'mean':
    size = options.get('patch_size', 16)
    if size not in (16, 32):
      return None
    return [
      f'model = torchvision.models.vit_b_{size}(image_size={image_size})',
      'model.heads = torch.nn.Identity()',
    ]
  if name not in _PUBLISHED or width_multiplier != 1:
    return None
  lines = [f'model = torchvision.models.{name}()']
  if stem == 'cifar' or channels != 3:
    kernel = '3, 1, 1' if stem == 'cifar' else '7, 2, 3'
    lines.append(
      f'model.conv1 = torch.nn.Conv2d({channels}, 64, {kernel}, bias=False)'
    )
  if stem == 'cifar':
    lines.append('model.maxpool = torch.nn.Identity()')
  return [*lines, 'model.fc = torch.nn.Identity()']


def _name(path):
  """PyTorch's name of the leaf at a path like ('params', 'bn1', 'scale')."""
  _, *layer, leaf = path
  if leaf in _VIT_PARAMETERS and not layer:
    return _VIT_PARAMETERS[leaf]
  match = _VIT_LAYER.fullmatch('/'.join(layer))
  if match and leaf in _LEAVES:
    name = _VIT_NAMES.get(match['name'], f'{match["name"]}.')
    if match['index']:
      name = f'encoder.layers.encoder_layer_{match["index"]}.{name}'
    return name + _LEAVES[leaf]
  match = _LAYER.fullmatch('/'.join(layer))
  if match is None or leaf not in _LEAVES:
    raise ValueError(
      f'{"/".join(path)} has no name in torchvision; only the ResNets, ViTs '
      'and projection heads of clop_jax.models have names. For another '
      'backbone export *.stablehlo, or use clop_jax.load'
    )
  name = _DOWNSAMPLE.get(match['name'], match['name'])
  if match['stage']:
    name = f'layer{match["stage"]}.{match["block"]}.{name}'
  return f'{name}.{_LEAVES[leaf]}'
