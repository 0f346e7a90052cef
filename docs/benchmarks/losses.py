"""NT-Xent, value and gradient: ours, Optax and PyTorch."""

from collections.abc import Iterator
import functools

import jax
import numpy as np
import optax

from clop_jax import loss
from docs.benchmarks import contest
from docs.benchmarks import machine

DIM, TEMPERATURE = 128, 0.5
# Number of similarity matrices in PyTorch's memory, to check that they fit.
_TORCH_MATRICES = {'authors': 8, 'expert': 4}
BATCHES = (256, 1024, 4096, 16384, 65536)


def contests(suite: str, small: bool) -> Iterator[contest.Contest]:
  """Yields one contest for each batch size."""
  for batch in (32,) if small else BATCHES:
    z = jax.random.normal(jax.random.key(batch), (2, batch, DIM))
    block_size = loss.choose_block_size(2 * batch)
    contestants = {
      'ours, as training chooses': functools.partial(_ours, z, block_size),
      'ours, dense': functools.partial(_ours, z, None),
      'optax.losses.ntxent': functools.partial(_optax, z),
      "PyTorch, authors' form": functools.partial(_torch, z, 'authors'),
      'PyTorch, expert form': functools.partial(_torch, z, 'expert'),
    }
    turns = 7
    if suite == 'cpu' and batch > 10_000:
      # A call takes seconds; at 65,536 minutes, and the matrix does not fit.
      turns = 3 if batch < 50_000 else 1
      if turns == 1:
        contestants = dict(list(contestants.items())[:1])
    yield contest.Contest(
      'losses',
      f'NT-Xent, value and gradient, batch {batch:,}, dim {DIM}',
      contestants,
      turns=turns,
      check=_agree,
    )


def _agree(results):
  """Checks that value and gradient of all forms are the same."""
  first, *others = results.values()
  for value, gradient in others:
    np.testing.assert_allclose(value, first[0], rtol=1e-4)
    error = np.linalg.norm(gradient - first[1]) / np.linalg.norm(first[1])
    assert error < 1e-3, f'gradients differ by {error:.1e} of their norm'


def _fitting(program):
  machine.check_fits(program.temporaries)
  return program


def _ours(z, block_size):
  function = functools.partial(
    loss.nt_xent_loss, temperature=TEMPERATURE, block_size=block_size
  )
  return _fitting(contest.compiled(jax.value_and_grad(function), z))


def _optax(z):
  labels = np.tile(np.arange(z.shape[1]), 2)

  def function(z):
    rows = z.reshape(-1, DIM)
    return optax.losses.ntxent(rows, labels, temperature=TEMPERATURE)

  return _fitting(contest.compiled(jax.value_and_grad(function), z))


def _torch(embeddings, form):
  torch = machine.import_torch()
  from docs.benchmarks import torch_losses

  device = machine.torch_device()
  rows = embeddings.shape[0] * embeddings.shape[1]
  machine.check_fits(_TORCH_MATRICES[form] * 4 * rows**2)
  z = torch.tensor(np.asarray(embeddings), device=device, requires_grad=True)
  last = {}

  def run():
    z.grad = None
    if form == 'authors':
      value = torch_losses.nt_xent_authors(z[0], z[1], TEMPERATURE)
    else:
      value = torch_losses.nt_xent_expert(z, TEMPERATURE)
    value.backward()
    last['value'] = value.detach()
    machine.synchronize(torch)

  def result():
    run()
    return last['value'].cpu().numpy(), z.grad.cpu().numpy()

  temporaries = None
  if device == 'cuda':
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    temporaries = torch.cuda.max_memory_allocated() - before
  return contest.Program(run, temporaries, result)
