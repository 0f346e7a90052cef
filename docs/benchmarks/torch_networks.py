"""ResNets and projection head in PyTorch, as peers of clop_jax/models/."""

import torch
from torch import nn
from torch.nn import functional

# Blocks of each stage; 8 is for trying things out.
STAGES = {8: (1, 1, 1), 18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}
WIDTHS = {8: 16, 18: 64, 50: 64}


def conv(inputs, outputs, kernel_size, stride=1):
  return nn.Conv2d(
    inputs,
    outputs,
    kernel_size,
    stride,
    padding=(kernel_size - 1) // 2,
    bias=False,
  )


def shortcut(inputs, outputs, stride):
  if stride == 1 and inputs == outputs:
    return nn.Identity()
  return nn.Sequential(
    conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
  )


class BasicBlock(nn.Module):
  expansion = 1

  def __init__(self, inputs, filters, stride):
    super().__init__()
    self.conv1 = conv(inputs, filters, 3, stride)
    self.bn1 = nn.BatchNorm2d(filters)
    self.conv2 = conv(filters, filters, 3)
    self.bn2 = nn.BatchNorm2d(filters)
    self.downsample = shortcut(inputs, filters, stride)

  def forward(self, x):
    y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
    y = self.bn2(self.conv2(y))
    return functional.relu(y + self.downsample(x), inplace=True)


class BottleneckBlock(nn.Module):
  expansion = 4

  def __init__(self, inputs, filters, stride):
    super().__init__()
    outputs = filters * self.expansion
    self.conv1 = conv(inputs, filters, 1)
    self.bn1 = nn.BatchNorm2d(filters)
    self.conv2 = conv(filters, filters, 3, stride)
    self.bn2 = nn.BatchNorm2d(filters)
    self.conv3 = conv(filters, outputs, 1)
    self.bn3 = nn.BatchNorm2d(outputs)
    self.downsample = shortcut(inputs, outputs, stride)

  def forward(self, x):
    y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
    y = functional.relu(self.bn2(self.conv2(y)), inplace=True)
    y = self.bn3(self.conv3(y))
    return functional.relu(y + self.downsample(x), inplace=True)


class ResNet(nn.Module):
  """`[n, 3, height, width]` to float32 features `[n, feature_dim]`."""

  def __init__(self, depth, stem):
    super().__init__()
    if depth not in STAGES:
      raise ValueError(f'depth must be one of {list(STAGES)}, got {depth}')
    if stem not in ('cifar', 'imagenet'):
      raise ValueError(f"stem must be 'cifar' or 'imagenet', got {stem!r}")
    block = BottleneckBlock if depth == 50 else BasicBlock
    width = WIDTHS[depth]
    if stem == 'imagenet':
      self.conv1 = conv(3, width, 7, 2)
      self.pool = nn.MaxPool2d(3, stride=2, padding=1)
    else:
      self.conv1 = conv(3, width, 3)
      self.pool = nn.Identity()
    self.bn1 = nn.BatchNorm2d(width)
    inputs, stages = width, []
    for stage, num_blocks in enumerate(STAGES[depth]):
      blocks = []
      for index in range(num_blocks):
        stride = 2 if stage > 0 and index == 0 else 1
        blocks.append(block(inputs, width * 2**stage, stride))
        inputs = width * 2**stage * block.expansion
      stages.append(nn.Sequential(*blocks))
    self.layers = nn.Sequential(*stages)
    self.feature_dim = inputs
    for module in self.modules():
      if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode='fan_out')

  def forward(self, images):
    x = functional.relu(self.bn1(self.conv1(images)), inplace=True)
    x = self.layers(self.pool(x))
    return x.mean((2, 3), dtype=torch.float32)


class ProjectionHead(nn.Module):
  """Features to float32 embeddings `[n, dim]`, also under autocast."""

  def __init__(self, feature_dim, hidden_dim, dim):
    super().__init__()
    self.dense1 = nn.Linear(feature_dim, hidden_dim, bias=False)
    self.bn1 = nn.BatchNorm1d(hidden_dim)
    self.dense2 = nn.Linear(hidden_dim, dim)

  def forward(self, features):
    x = functional.relu(self.bn1(self.dense1(features)))
    with torch.autocast(x.device.type, enabled=False):
      return self.dense2(x.float())


def network(depth, stem, hidden_dim, dim):
  """Images to embeddings."""
  backbone = ResNet(depth, stem)
  head = ProjectionHead(backbone.feature_dim, hidden_dim, dim)
  return nn.Sequential(backbone, head)
