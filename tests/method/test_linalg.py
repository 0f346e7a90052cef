"""Decompositions and measures of rows that are split over devices."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from clop_jax import collapse
from clop_jax import linalg
from clop_jax.runtime import hlo
from clop_jax.runtime import parallel
from tests import small

ROWS, DIM = 256, 24


def unit(rows):
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def np_effective_rank(rows):
  sigma = np.linalg.svd(rows.astype(np.float64), compute_uv=False)
  p = sigma / sigma.sum()
  return np.exp(-sum(q * np.log(q) for q in p if q > 0))


def _spectra():
  rng = np.random.default_rng(0)
  noise = rng.normal(size=(ROWS, DIM))
  point = np.tile(rng.normal(size=DIM), (ROWS, 1))
  low_rank = unit(rng.normal(size=(ROWS, 3)) @ rng.normal(size=(3, DIM)))
  two = np.linalg.qr(rng.normal(size=(DIM, 2)))[0]
  weak = np.outer(np.ones(ROWS), two[:, 0])
  return {
    'healthy': unit(noise),
    'decaying': unit(noise * np.exp(-np.arange(DIM) / 4)),
    'fewer rows than dimensions': unit(noise[:16]),
    'all equal': unit(point),
    'on one line': unit(point) * rng.choice([-1, 1], (ROWS, 1)),
    'rank 3 and noise 1e-3': unit(low_rank + 1e-3 * noise),
    'rank 3 and noise 1e-5': unit(low_rank + 1e-5 * noise),
    # Below what the eigenvalues of Z^T Z show in float32.
    'one weak direction': weak + 3e-4 * np.outer(noise[:, 0], two[:, 1]),
    'zero': np.zeros((ROWS, DIM)),
    'huge': 1e25 * noise,
    'tiny': 1e-25 * noise,
  }


SPECTRA = _spectra()


@functools.cache
def compiled(function):
  """Maps a measure of rows that are split over eight devices."""
  mapped = jax.shard_map(
    functools.partial(function, axis_name=parallel.DATA_AXIS),
    mesh=parallel.make_mesh(),
    in_specs=PartitionSpec(parallel.DATA_AXIS),
    out_specs=PartitionSpec(),
    check_vma=True,
  )
  return jax.jit(mapped)


def on_devices(function, *arrays):
  return compiled(function)(*arrays)


def spectra(rows, axis_name):
  return (
    collapse.singular_values(rows, axis_name=axis_name),
    collapse.effective_rank(rows, axis_name=axis_name),
    collapse.effective_rank(rows, center=True, axis_name=axis_name),
  )


@pytest.mark.parametrize('name', SPECTRA)
def test_split_rows_have_the_spectrum_of_a_float64_svd(name):
  # The method is least accurate for this one.
  weak = name == 'one weak direction'
  rows = SPECTRA[name].astype(np.float32)
  expected = np.linalg.svd(rows.astype(np.float64), compute_uv=False)
  spectrum, rank, centred = on_devices(spectra, rows)
  assert spectrum.shape == (DIM,)
  np.testing.assert_allclose(
    spectrum[: len(expected)], expected, atol=2e-4 * expected[0]
  )
  expected_rank = np_effective_rank(rows) if expected[0] else 0
  assert rank == pytest.approx(expected_rank, rel=0.015 if weak else 1e-3)
  if name == 'healthy':
    rows = rows.astype(np.float64)
    expected_rank = np_effective_rank(rows - rows.mean(0))
    assert centred == pytest.approx(expected_rank, rel=1e-4)


PROTOTYPES = unit(np.random.default_rng(2).normal(size=(3, DIM)))


def batch_measures(rows, labels, axis_name):
  return collapse.batch_measures(rows, labels, PROTOTYPES, axis_name=axis_name)


def test_batch_measures_of_split_rows_equal_those_of_all_rows():
  rng = np.random.default_rng(1)
  # A spread of 1e-4 around one point: a difference of squares would miss it.
  rows = unit(np.ones(DIM) + 1e-4 * rng.normal(size=(ROWS, DIM)))
  rows = rows.astype(np.float32)
  labels = rng.integers(-1, 3, ROWS)
  labels[: ROWS // 8] = -1  # the first device has no labelled example
  measures = on_devices(batch_measures, rows, labels)
  expected = unit(rows.astype(np.float64)).std(0).mean()
  assert measures['embedding_std'] == pytest.approx(expected, rel=1e-3)
  known = labels >= 0
  expected = np.sum(rows[known] * PROTOTYPES[labels[known]], axis=1).mean()
  assert measures['prototype_cosine'] == pytest.approx(expected, abs=1e-6)
  expected = np_effective_rank(rows)
  assert measures['effective_rank'] == pytest.approx(expected, rel=1e-3)


def test_batch_measures_reduce_at_most_a_dim_by_dim_matrix():
  small.need_devices(8)
  rows = jax.ShapeDtypeStruct((8 * ROWS, DIM), np.float32)
  labels = jax.ShapeDtypeStruct((8 * ROWS,), np.int32)
  program = compiled(batch_measures).lower(rows, labels).compile()
  collectives = hlo.collectives(program.as_text())
  assert {c.kind for c in collectives} == {'all-reduce'}
  assert max(c.payload for c in collectives) == 4 * DIM * DIM


@pytest.mark.parametrize(
  ('shape', 'rank'), [((20, 7), 5), ((7, 20), 4), ((3, 9, 5), 1)]
)
def test_the_svd_for_tpus_is_an_svd(monkeypatch, shape, rank):
  # Only a TPU has the operation; any other `eigh` gives the same.
  monkeypatch.setattr(
    linalg, '_eigh_jacobi', lambda matrix: tuple(jnp.linalg.eigh(matrix))
  )
  rng = np.random.default_rng(2)
  matrix = rng.normal(size=(*shape[:-1], rank)) @ rng.normal(
    size=(*shape[:-2], rank, shape[-1])
  )
  u, sigma, vt = map(np.asarray, linalg._svd_by_eigh(matrix.astype(np.float32)))
  expected = np.linalg.svd(matrix, compute_uv=False)
  largest = expected.max()
  np.testing.assert_allclose(sigma, expected, atol=3e-6 * largest)
  np.testing.assert_allclose(
    (u * sigma[..., None, :]) @ vt, matrix, atol=1e-5 * largest
  )
  # Orthonormal also where the matrix is singular.
  for product in (u.mT @ u, vt @ vt.mT):
    identity = np.broadcast_to(np.eye(product.shape[-1]), product.shape)
    np.testing.assert_allclose(product, identity, atol=1e-5)
  assert (np.diff(sigma) <= 0).all()
