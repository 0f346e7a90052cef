"""Prototypes: made once, and made orthonormal again at every step."""

from collections.abc import Iterator

import jax
import numpy as np

from clop_jax import prototypes
from tests.benchmarks import contest
from tests.benchmarks import machine


def contests(suite: str, small: bool) -> Iterator[contest.Contest]:
  """At 1,000 classes of dimension 1,024."""
  del suite
  k, dim = (10, 16) if small else (1000, 1024)
  yield contest.Contest(
    'prototypes',
    f'orthonormal, k = {k:,}, dim = {dim:,}',
    {
      'ours, orthonormal_prototypes': lambda: contest.compiled(
        lambda key: prototypes.orthonormal_prototypes(key, k, dim),
        jax.random.key(0),
      ),
      'PyTorch, orthogonal_': lambda: _torch_orthogonal(k, dim),
    },
    check=_agree,
  )
  moved = prototypes.orthonormal_prototypes(jax.random.key(0), k, dim)
  moved += 1e-3 * jax.random.normal(jax.random.key(1), moved.shape)
  yield contest.Contest(
    'prototypes',
    f'orthonormalize after a step, k = {k:,}, dim = {dim:,}',
    {
      'ours, orthonormalize': lambda: contest.compiled(
        prototypes.orthonormalize, moved
      ),
      'PyTorch, polar factor by SVD': lambda: _torch_polar(moved),
    },
    check=_agree,
  )


def _agree(results):
  """All are orthonormal (the sets themselves may differ)."""
  for c in results.values():
    np.testing.assert_allclose(c @ c.T, np.eye(len(c)), atol=1e-4)


def _torch_orthogonal(k, dim):
  torch = machine.import_torch()
  c = torch.empty(k, dim, device=machine.torch_device())

  def run():
    torch.nn.init.orthogonal_(c)
    machine.synchronize(torch)

  return contest.Program(run, result=lambda: c.cpu().numpy())


def _torch_polar(moved):
  torch = machine.import_torch()
  c = torch.tensor(np.asarray(moved), device=machine.torch_device())

  def polar():
    u, _, vt = torch.linalg.svd(c, full_matrices=False)
    return u @ vt

  def run():
    polar()
    machine.synchronize(torch)

  return contest.Program(run, result=lambda: polar().cpu().numpy())
