"""Reference ResNets with torchvision's names, in NumPy and in PyTorch.

They share no code with the library.
"""

import numpy as np

STAGES = {
  8: (1, 1, 1),
  18: (2, 2, 2, 2),
  34: (3, 4, 6, 3),
  50: (3, 4, 6, 3),
}


def shapes(depth, *, width=64, channels=3, stem='imagenet', classes=None):
  """Names and shapes of the state dict, in torchvision's order."""
  result = {}

  def conv(name, outputs, inputs, size):
    result[f'{name}.weight'] = (outputs, inputs, size, size)

  def bn(name, size):
    for part in ('weight', 'bias', 'running_mean', 'running_var'):
      result[f'{name}.{part}'] = (size,)
    result[f'{name}.num_batches_tracked'] = ()

  conv('conv1', width, channels, 7 if stem == 'imagenet' else 3)
  bn('bn1', width)
  inputs = width
  for stage, blocks in enumerate(STAGES[depth]):
    inner = width * 2**stage
    outputs = inner * (4 if depth == 50 else 1)
    for block in range(blocks):
      name = f'layer{stage + 1}.{block}'
      if depth == 50:
        sizes = [(inner, inputs, 1), (inner, inner, 3), (outputs, inner, 1)]
      else:
        sizes = [(inner, inputs, 3), (inner, inner, 3)]
      for index, size in enumerate(sizes):
        conv(f'{name}.conv{index + 1}', *size)
        bn(f'{name}.bn{index + 1}', size[0])
      if block == 0 and inputs != outputs:
        conv(f'{name}.downsample.0', outputs, inputs, 1)
        bn(f'{name}.downsample.1', outputs)
      inputs = outputs
  if classes:
    result |= {'fc.weight': (classes, inputs), 'fc.bias': (classes,)}
  return result


def state_dict(depth, *, seed=0, **arguments):
  """Random weights, with statistics unlike those of a new network."""
  rng = np.random.default_rng(seed)
  weights = {}
  for name, shape in shapes(depth, **arguments).items():
    if name.endswith('num_batches_tracked'):
      weights[name] = np.array(7)
    elif name.endswith('running_var') or (
      len(shape) == 1 and name.endswith('weight')
    ):
      weights[name] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
    elif len(shape) == 1:
      weights[name] = rng.normal(scale=0.2, size=shape).astype(np.float32)
    else:
      scale = np.sqrt(2 / np.prod(shape[1:]))
      weights[name] = rng.normal(scale=scale, size=shape).astype(np.float32)
  return weights


def features(weights, images):
  """Features of images `[batch, channels, height, width]`, in float64."""
  weights = {
    name: np.asarray(value, np.float64) for name, value in weights.items()
  }

  def conv(name, x, stride=1):
    kernel = weights[f'{name}.weight']
    size = kernel.shape[-1]
    x = _padded(x, size // 2, 0.0)
    windows = _windows(x, size, stride)
    return np.einsum('nchwij,ocij->nohw', windows, kernel, optimize=True)

  def bn(name, x):
    scale, bias, mean, var = (
      weights[f'{name}.{part}'][:, None, None]
      for part in ('weight', 'bias', 'running_mean', 'running_var')
    )
    return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

  x = np.asarray(images, np.float64)
  wide = weights['conv1.weight'].shape[-1] == 7
  x = np.maximum(bn('bn1', conv('conv1', x, 2 if wide else 1)), 0)
  if wide:
    x = _windows(_padded(x, 1, -np.inf), 3, 2).max((-2, -1))
  stage = 1
  while f'layer{stage}.0.conv1.weight' in weights:
    block = 0
    while f'layer{stage}.{block}.conv1.weight' in weights:
      name = f'layer{stage}.{block}'
      stride = 2 if stage > 1 and block == 0 else 1
      bottleneck = f'{name}.conv3.weight' in weights
      strides = (1, stride, 1) if bottleneck else (stride, 1)
      y = x
      for index, own in enumerate(strides, 1):
        y = bn(f'{name}.bn{index}', conv(f'{name}.conv{index}', y, own))
        if index < len(strides):
          y = np.maximum(y, 0)
      if f'{name}.downsample.0.weight' in weights:
        x = bn(f'{name}.downsample.1', conv(f'{name}.downsample.0', x, stride))
      x = np.maximum(x + y, 0)
      block += 1
    stage += 1
  return x.mean((2, 3))


def embeddings(weights, x):
  """Embeddings of features by the two dense layers `projection_head.*`."""
  weights = {
    name.removeprefix('projection_head.'): np.asarray(value, np.float64)
    for name, value in weights.items()
    if name.startswith('projection_head.')
  }
  x = x @ weights['dense1.weight'].T
  x = (x - weights['bn1.running_mean']) / np.sqrt(
    weights['bn1.running_var'] + 1e-5
  )
  x = np.maximum(x * weights['bn1.weight'] + weights['bn1.bias'], 0)
  return x @ weights['dense2.weight'].T + weights['dense2.bias']


def _padded(x, width, value):
  sides = (width, width)
  return np.pad(x, ((0, 0), (0, 0), sides, sides), constant_values=value)


def _windows(x, size, stride):
  windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (2, 3))
  return windows[:, :, ::stride, ::stride]


def network(depth, *, width=64, channels=3, stem='imagenet'):
  """The network in PyTorch, without a classifier."""
  from torch import nn

  expansion = 4 if depth == 50 else 1

  class Block(nn.Module):
    def __init__(self, inputs, inner, stride):
      super().__init__()
      outputs = inner * expansion
      if depth == 50:
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
      else:
        self.conv1 = nn.Conv2d(inputs, inner, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(inner, inner, 3, 1, 1, bias=False)
      self.bn1 = nn.BatchNorm2d(inner)
      self.bn2 = nn.BatchNorm2d(inner)
      self.downsample = None
      if stride > 1 or inputs != outputs:
        self.downsample = nn.Sequential(
          nn.Conv2d(inputs, outputs, 1, stride, bias=False),
          nn.BatchNorm2d(outputs),
        )

    def forward(self, x):
      y = self.bn1(self.conv1(x)).relu()
      y = self.bn2(self.conv2(y))
      if depth == 50:
        y = self.bn3(self.conv3(y.relu()))
      return ((x if self.downsample is None else self.downsample(x)) + y).relu()

  class ResNet(nn.Module):
    def __init__(self):
      super().__init__()
      self.maxpool = nn.Identity()
      if stem == 'imagenet':
        self.conv1 = nn.Conv2d(channels, width, 7, 2, 3, bias=False)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
      else:
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
      self.bn1 = nn.BatchNorm2d(width)
      inputs, self.stages = width, []
      for stage, count in enumerate(STAGES[depth]):
        blocks = []
        for block in range(count):
          stride = 2 if stage and not block else 1
          blocks.append(Block(inputs, width * 2**stage, stride))
          inputs = width * 2**stage * expansion
        name = f'layer{stage + 1}'
        setattr(self, name, nn.Sequential(*blocks))
        self.stages.append(name)

    def forward(self, x):
      x = self.maxpool(self.bn1(self.conv1(x)).relu())
      for name in self.stages:
        x = getattr(self, name)(x)
      return x.mean((2, 3))

  return ResNet().eval()
