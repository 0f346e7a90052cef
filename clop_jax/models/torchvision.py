"""Weights of `models.resnet` under torchvision's names, and back.

Both have the same layers; only names and layouts differ. A convolution is
`[height, width, in, out]` in Flax and `[out, in, height, width]` in PyTorch.
Batch normalization is the same function of its four vectors in evaluation mode:
epsilon is 1e-5 in both. (In training the running averages move alike, Flax's
momentum 0.9 being PyTorch's 0.1, but for the running variance Flax averages the
biased variance of a batch and PyTorch the unbiased one.)

Reference:
  torchvision, `torchvision/models/resnet.py`.
"""

from collections.abc import Mapping
import hashlib
import io
import re
from typing import Any

from etils import epath
import numpy as np

ENDINGS = ('.safetensors', '.pth')

# Of which PyTorch says the same by other names.
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
# What a file may hold besides a backbone: torchvision's classifier, PyTorch's
# count of batches, and what `export` adds.
_BESIDES = re.compile(
  r'fc\..*|(?:.*\.)?num_batches_tracked|projection_head\..*|prototypes'
)
_PUBLISHED = (18, 34, 50)


def to_torchvision(
  variables: Mapping[str, Any], *, num_batches: int = 0, prefix: str = ''
) -> dict[str, np.ndarray]:
  """A network's variables as PyTorch's state dict has them.

  Args:
    variables: `{'params': ..., 'batch_stats': ...}` of a `resnet.ResNet`, or of
      a `heads.ProjectionHead`.
    num_batches: that batch normalization has averaged over; each layer's
      `num_batches_tracked`.
    prefix: before every name, as 'projection_head.'.

  Returns:
    Contiguous arrays by name.

  Raises:
    ValueError: for a layer that torchvision's networks have nothing like.
  """
  weights = {}
  for path, value in _leaves(variables):
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
  """The inverse of `to_torchvision`, for a backbone.

  Args:
    weights: arrays by name. A classifier (`fc.*`), `num_batches_tracked`, and
      a projection head and prototypes of `export`, may be among them and are
      left.
    like: `{'params': ..., 'batch_stats': ...}` of the backbone, of which only
      structure and shapes matter.

  Returns:
    float32 arrays in the structure of `like`.

  Raises:
    ValueError: if a name is missing or unexpected, or a shape is another, or a
      value is not finite; all such names are listed.
  """
  targets = {_name(path): (path, leaf) for path, leaf in _leaves(like)}
  faults = []
  missing = [name for name in targets if name not in weights]
  if missing:
    faults.append(f'missing: {", ".join(missing)}')
  unexpected = [
    name
    for name in weights
    if name not in targets and not _BESIDES.fullmatch(name)
  ]
  if unexpected:
    faults.append(f'unexpected: {", ".join(unexpected)}')
  found, shapes, broken = {}, [], []
  for name, (path, leaf) in targets.items():
    if name not in weights:
      continue
    value = np.asarray(weights[name])
    if path[-1] == 'kernel' and value.ndim == 4:
      value = value.transpose(2, 3, 1, 0)
    if value.shape != tuple(leaf.shape):
      expected = _torch_shape(leaf.shape)
      shapes.append(f'{name} {np.shape(weights[name])}, must be {expected}')
      continue
    found[path] = np.ascontiguousarray(value, np.float32)
    if not np.isfinite(found[path]).all():
      broken.append(name)
  if shapes:
    faults.append(f'of another shape: {", ".join(shapes)}')
  if broken:
    faults.append(f'not finite: {", ".join(broken)}')
  if faults:
    # The way out first: the lists can be long.
    raise ValueError(
      'the weights do not fit the backbone; '
      + '; '.join(_advice(weights, targets) + faults)
    )
  return _nested(found)


def _advice(weights, targets):
  """The way out, where depth or the first layer tell it."""
  theirs, ours = _blocks(weights), _blocks(targets)
  if theirs and theirs != ours:
    return [
      f'these have {theirs} where config.model.depth has the backbone have '
      f'{ours}'
    ]
  if 'conv1.weight' not in weights or 'conv1.weight' not in targets:
    return []
  shape = np.shape(weights['conv1.weight'])
  if len(shape) != 4:
    return []
  _, inputs, *theirs = shape
  *ours, channels, _ = targets['conv1.weight'][1].shape
  if tuple(theirs) == (7, 7) != tuple(ours):
    return ["these are of config.model.stem='imagenet'"]
  if tuple(theirs) == (3, 3) != tuple(ours):
    return ["these are of config.model.stem='cifar'"]
  if inputs != channels:
    return [
      f'these are of config.data.channels={inputs}'
      + (' (grey images are repeated over 3)' if inputs == 3 else '')
    ]
  return []


def _blocks(names):
  """The number of blocks in each stage, and of which kind, as a text."""
  stages, bottleneck = {}, False
  for name in names:
    match = re.match(r'layer(\d+)\.(\d+)\.(conv3)?', name)
    if match:
      stage, block = int(match[1]), int(match[2])
      stages[stage] = max(stages.get(stage, 0), block + 1)
      bottleneck = bottleneck or match[3] is not None
  if not stages:
    return ''
  kind = 'bottleneck' if bottleneck else 'basic'
  counts = ', '.join(str(stages[stage]) for stage in sorted(stages))
  return f'{counts} {kind} blocks'


def read(path: str) -> tuple[dict[str, np.ndarray], str]:
  """A state dict from a file of a user's.

  Args:
    path: ends in .safetensors, or in .pth where PyTorch is installed.

  Returns:
    Arrays by name, and the file's SHA-256.

  Raises:
    ValueError: for another ending, a file that is missing or damaged, or that
      holds something else.
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
    raise ValueError(f'it is damaged, or no safetensors ({error})') from error
  except KeyError as error:
    raise ValueError(
      f'it holds numbers of type {error}, which NumPy does not have; save them '
      'as float32'
    ) from error


def _pth(data):
  try:
    import torch
  except ImportError as error:
    raise ValueError(
      'reading .pth needs PyTorch; where it is installed, make a safetensors '
      'file of it: safetensors.torch.save_file(torch.load(path), new_path)'
    ) from error
  try:
    loaded = torch.load(io.BytesIO(data), map_location='cpu', weights_only=True)
  except Exception as error:
    # As many kinds as there are ways to be damaged; of another class than
    # tensors, which could run code, is one.
    reason = ' '.join(str(error).split())[:200]
    raise ValueError(f'PyTorch cannot read it ({reason})') from error
  if not isinstance(loaded, dict) or not all(
    isinstance(value, torch.Tensor) for value in loaded.values()
  ):
    kinds = list(loaded) if isinstance(loaded, dict) else type(loaded).__name__
    raise ValueError(
      'it must hold a state dict, tensors by name, as '
      f'torch.save(model.state_dict(), path) writes; it holds {kinds}'
    )
  return {
    name: (value.float() if value.is_floating_point() else value).numpy()
    for name, value in loaded.items()
  }


def construction(
  *, depth: int, stem: str, channels: int, width_multiplier: float
) -> list[str] | None:
  """Lines of Python that make torchvision's network for exported weights.

  Args:
    depth: layers.
    stem: as in `resnet.ResNet`.
    channels: of an image.
    width_multiplier: as in `resnet.ResNet`.

  Returns:
    The lines; None if torchvision has no such network.
  """
  if depth not in _PUBLISHED or width_multiplier != 1:
    return None
  lines = [f'model = torchvision.models.resnet{depth}()']
  if stem == 'cifar':
    lines += [
      f'model.conv1 = torch.nn.Conv2d({channels}, 64, 3, 1, 1, bias=False)',
      'model.maxpool = torch.nn.Identity()',
    ]
  elif channels != 3:
    lines.append(
      f'model.conv1 = torch.nn.Conv2d({channels}, 64, 7, 2, 3, bias=False)'
    )
  return [*lines, 'model.fc = torch.nn.Identity()']


def _name(path):
  """PyTorch's name of the leaf at a path like ('params', 'bn1', 'scale')."""
  _, *layer, leaf = path
  match = _LAYER.fullmatch('/'.join(layer))
  if match is None or leaf not in _LEAVES:
    raise ValueError(
      f'{"/".join(path)} has no name in torchvision: only the ResNets of '
      'clop_jax.models and their projection heads have'
    )
  name = _DOWNSAMPLE.get(match['name'], match['name'])
  if match['stage']:
    name = f'layer{match["stage"]}.{match["block"]}.{name}'
  return f'{name}.{_LEAVES[leaf]}'


def _torch_shape(shape):
  if len(shape) != 4:
    return tuple(shape)
  height, width, inputs, outputs = shape
  return outputs, inputs, height, width


def _leaves(tree, path=()):
  """`(path, leaf)` of all leaves."""
  for name, value in tree.items():
    if isinstance(value, Mapping):
      yield from _leaves(value, (*path, name))
    else:
      yield (*path, name), value


def _nested(leaves):
  """The tree of leaves by path."""
  tree = {}
  for path, value in leaves.items():
    group = tree
    for name in path[:-1]:
      group = group.setdefault(name, {})
    group[path[-1]] = value
  return tree
