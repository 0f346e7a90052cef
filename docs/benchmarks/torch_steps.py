"""Whole training steps in PyTorch, as peers of clop_jax/training/train_step.py.

`authors` is the step of the authors' code, `expert` the step that an expert in
PyTorch would write for the same loss. Both have the same network, NT-Xent plus
the CLOP term, and SGD with momentum. Callers set the number of threads.
"""

from collections.abc import Callable
import dataclasses
import os
import random
import shutil

import numpy as np
from PIL import Image
import torch
from torch import nn
from torch.utils import data

from docs.benchmarks import pillow_views
from docs.benchmarks import torch_augment
from docs.benchmarks import torch_losses
from docs.benchmarks import torch_networks

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 1e-6


@dataclasses.dataclass
class Step:
  """A training step; a call does not wait for a GPU to finish it.

  Attributes:
    network: Network that is trained, images to embeddings.
    run: Makes the step and returns its loss.
    close: Ends the step's processes.
    loss: Loss of the last step, a scalar on the device.
  """

  network: nn.Module
  run: Callable[[], torch.Tensor]
  close: Callable[[], None] = lambda: None
  loss: torch.Tensor | None = None

  def __call__(self):
    self.loss = self.run()


def synchronize(device):
  """Waits until the device has finished its work."""
  if torch.device(device).type == 'cuda':
    torch.cuda.synchronize(device)


class TwoViews(data.Dataset):
  """Two views of each image, made one at a time with Pillow, and its label."""

  def __init__(self, images, labels, size):
    self.images, self.labels, self.size = images, labels, size
    self.mean = torch_augment.channels(torch_augment.MEAN)
    self.std = torch_augment.channels(torch_augment.STD)

  def __len__(self):
    return len(self.images)

  def __getitem__(self, index):
    picture = Image.fromarray(self.images[index])
    # Each worker has its own seed for Python's generator, given by PyTorch.
    first, second = (
      self.tensor(pillow_views.view(picture, self.size, random))
      for _ in range(2)
    )
    return first, second, int(self.labels[index])

  def tensor(self, picture):
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
    return x.float().div_(255).sub_(self.mean).div_(self.std)


@dataclasses.dataclass(frozen=True)
class Work:
  """The work of a step.

  Attributes:
    depth: Depth of the ResNet, see `torch_networks.STAGES`.
    stem: 'cifar' or 'imagenet'.
    size: Side of a view, in pixels.
    batch: Images of a step.
    device: 'cpu' or 'cuda'.
    images: `[examples, height, width, 3]` uint8, NumPy.
    labels: `[examples]` integers, -1 is unlabelled.
    num_classes: Number of prototypes, at most `dim`.
    dim: Dimension of the embeddings and of the head's hidden layer.
    temperature: Temperature of NT-Xent.
  """

  depth: int
  stem: str
  size: int
  batch: int
  device: str
  images: np.ndarray
  labels: np.ndarray
  num_classes: int
  dim: int
  temperature: float

  def __post_init__(self):
    if len(self.images) < self.batch:
      raise ValueError(
        f'images must hold at least one batch of {self.batch}, got '
        f'{len(self.images)}'
      )
    if self.num_classes > self.dim:
      raise ValueError(
        f'num_classes must be at most dim={self.dim}, got {self.num_classes}'
      )

  def network(self):
    """Returns the network on the device."""
    # The shapes never change, so cuDNN may search the best algorithm. It is a
    # switch of the process: set in both forms, whatever their order.
    torch.backends.cudnn.benchmark = True
    network = torch_networks.network(self.depth, self.stem, self.dim, self.dim)
    return network.to(self.device)

  def prototypes(self):
    """Returns orthogonalized Gaussian prototypes, as the paper's."""
    c = torch.empty(self.num_classes, self.dim)
    return nn.init.orthogonal_(c).to(self.device)


def optimizer_of(network, **options):
  return torch.optim.SGD(
    network.parameters(),
    LEARNING_RATE,
    momentum=MOMENTUM,
    weight_decay=WEIGHT_DECAY,
    **options,
  )


def authors(work, *, workers=2):
  """Returns the step of the authors' code.

  Pillow on single images in worker processes, float32 without compilation, and
  three passes of the network: one for each view, and another of the first view
  for the CLOP term.

  Args:
    work: Work of the step.
    workers: Number of worker processes; 0 loads in this process.
  """
  device = torch.device(work.device)
  network, prototypes = work.network(), work.prototypes()
  optimizer = optimizer_of(network)
  loader = data.DataLoader(
    TwoViews(work.images, work.labels, work.size),
    batch_size=work.batch,
    shuffle=True,
    drop_last=True,
    num_workers=workers,
    pin_memory=device.type == 'cuda',
    # Not forked, because JAX's threads would not survive, and kept over epochs,
    # so that their start is not in the steps.
    multiprocessing_context='forkserver' if workers else None,
    persistent_workers=bool(workers),
  )
  # In a list that `close` empties: the workers end with their loader.
  batches = [endless(loader)]

  def run():
    first, second, labels = (
      x.to(device, non_blocking=True) for x in next(batches[0])
    )
    z1, z2 = network(first), network(second)
    loss = torch_losses.nt_xent_authors(z1, z2, work.temperature)
    loss = loss + torch_losses.clop(network(first), labels, prototypes)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()

  return Step(network, run, batches.clear)


def expert(work, *, dtype=None, compile=None, mode=None):
  """Returns the step that an expert would write.

  The images stay on the device, where both views of a batch are made at once
  and go through the network in one pass, channels_last.

  Args:
    work: Work of the step.
    dtype: 'float32' or 'bfloat16' (autocast). If None, bfloat16 on CUDA and
      float32 elsewhere.
    compile: If None, compile where a compiler is available.
    mode: Mode of torch.compile.
  """
  device, batch = torch.device(work.device), work.batch
  if dtype is None:
    dtype = 'bfloat16' if device.type == 'cuda' else 'float32'
  if dtype not in ('float32', 'bfloat16'):
    raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
  if compile is None:
    compiler = shutil.which(os.environ.get('CXX', 'g++'))
    compile = device.type == 'cuda' or compiler is not None
  network = work.network().to(memory_format=torch.channels_last)
  prototypes = work.prototypes()
  optimizer = optimizer_of(network, fused=True)
  images = torch.from_numpy(work.images).permute(0, 3, 1, 2)
  images = images.contiguous().to(device)
  labels = torch.as_tensor(work.labels, dtype=torch.long, device=device)

  mean = torch_augment.channels(torch_augment.MEAN, device)
  std = torch_augment.channels(torch_augment.STD, device)

  @torch.no_grad()
  def two_views(index):
    both = images[index].repeat(2, 1, 1, 1)
    return torch_augment.views(both, work.size, mean, std)

  def total(views, labels):
    with torch.autocast(
      device.type, dtype=torch.bfloat16, enabled=dtype == 'bfloat16'
    ):
      z = network(views).unflatten(0, (2, batch))
    loss = torch_losses.nt_xent_expert(z, work.temperature)
    return loss + torch_losses.clop(z, labels, prototypes)

  if compile:
    two_views = torch.compile(two_views, dynamic=False, mode=mode)
    total = torch.compile(total, dynamic=False, mode=mode)
  indices = shuffled(len(images), batch, device)

  def run():
    index = next(indices)
    optimizer.zero_grad(set_to_none=True)
    loss = total(two_views(index), labels[index])
    loss.backward()
    optimizer.step()
    return loss.detach()

  return Step(network, run)


def endless(loader):
  while True:
    yield from loader


def shuffled(num_examples, batch, device):
  """Yields the examples of each batch, each example once an epoch."""
  while True:
    order = torch.randperm(num_examples, device=device)
    yield from order.split(batch)[: num_examples // batch]
