"""Public functions lower for every platform, under each transformation."""

import functools
import inspect

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from clop_jax import collapse
from clop_jax import linalg
from clop_jax import loss
from clop_jax import prototypes
from clop_jax.runtime import parallel
from tests import lowering

AXIS = parallel.DATA_AXIS
VIEWS, BATCH, DIM, CLASSES = 2, 16, 12, 5


def floats(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def integers(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.int32)


Z, Y, C = floats(VIEWS, BATCH, DIM), integers(BATCH), floats(CLASSES, DIM)
Y_OF_VIEWS = integers(VIEWS, BATCH)
KEY = jax.eval_shape(lambda: jax.random.key(0))

# Name: function, arguments.
ROWS = {}


def rows(module, arguments, **variants):
  """Adds rows: a function's name and its keyword arguments for each."""
  for row, (name, keywords) in variants.items():
    function = functools.partial(getattr(module, name), **keywords)
    ROWS[row] = function, arguments


def plain(module, arguments, names, **keywords):
  """Adds a row for each function, named like it."""
  variants = {name: (name, keywords) for name in names.split()}
  rows(module, arguments, **variants)


rows(
  loss,
  (Z, Y, C),
  clop=('clop_loss', {}),
  clop_euclidean=('clop_loss', {'distance': 'euclidean'}),
  clop_manhattan=('clop_loss', {'distance': 'manhattan'}),
  clop_softmax=('clop_loss', {'distance': 'softmax'}),
  clop_repulsion=('clop_loss', {'repulsion': 1.0}),
  clop_weighted=('clop_loss', {'class_weights': np.ones(CLASSES)}),
)
rows(
  loss,
  (Z, Y),
  supcon=('supcon_loss', {}),
  supcon_in=('supcon_loss', {'variant': 'in'}),
  cross_entropy=('cross_entropy_loss', {}),
  supcon_blocked=('supcon_loss', {'block_size': 10}),
)
rows(loss, (Z,), nt_xent_blocked=('nt_xent_loss', {'block_size': 10}))
plain(
  loss,
  (Z,),
  'nt_xent_loss dcl_loss vicreg_loss barlow_twins_loss w_mse_loss '
  'invariance_loss alignment_uniformity_loss spectral_contrastive_loss '
  'sigmoid_loss',
)
LOSSES = tuple(ROWS)
plain(loss, (floats(DIM), integers(), C), 'prototype_distances')
plain(
  prototypes,
  (KEY,),
  'orthonormal_prototypes simplex_etf_prototypes random_prototypes',
  num_classes=CLASSES,
  dim=DIM,
)
plain(prototypes, (C,), 'orthonormality_error orthonormalize align_prototypes')
plain(prototypes, (C, C), 'assign_prototypes')
plain(prototypes, (Z, Y, C), 'pseudo_labels', threshold=0.9)
plain(
  collapse,
  (Z,),
  'normalize effective_rank embedding_variance embedding_std alignment '
  'uniformity',
)
plain(collapse, (Z,), 'singular_values', center=True)
plain(collapse, (floats(DIM),), 'effective_rank_of_spectrum')
plain(
  collapse,
  (Z, Y_OF_VIEWS),
  'class_means within_between_ratio',
  num_classes=CLASSES,
)
rows(
  collapse,
  (Z, Y_OF_VIEWS),
  class_mean_cosines=(
    'class_mean_cosines',
    {'num_classes': CLASSES, 'center': True},
  ),
  principal_angles=(
    'principal_angles',
    {'num_classes': CLASSES, 'subspace_dim': 2},
  ),
)
plain(
  collapse,
  (Z, Y_OF_VIEWS, C),
  'prototype_cosine prototype_energy_share batch_measures',
)
# JAX decomposes matrices of more than 256 rows by another algorithm.
ROWS['svd_300'] = (lambda x: linalg.svd(x)[1], (floats(300, 300),))
ROWS['singular_values_of_rows'] = (linalg.singular_values, (floats(40, 300),))

# Measures of the global batch: the axis of each argument that is split.
OF_GLOBAL_BATCH = {
  'singular_values': (1,),
  'effective_rank': (1,),
  'embedding_std': (1,),
  'prototype_cosine': (1, 1, None),
  'batch_measures': (1, 1, None),
  'singular_values_of_rows': (0,),
}


def value_and_gradient(name):
  """The function of a row with its gradient, if it has one."""
  function, arguments = ROWS[name]

  def is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)

  argnums = [i for i, x in enumerate(arguments) if is_float(x)]
  results = jax.tree.leaves(jax.eval_shape(function, *arguments))
  if not argnums or not all(map(is_float, results)):
    return function

  def total_and_result(*arguments):
    result = function(*arguments)
    return sum(jnp.sum(x) for x in jax.tree.leaves(result)), result

  return jax.grad(total_and_result, argnums=argnums, has_aux=True)


def on_eight_devices(name):
  """Maps a function and its gradient over arguments that differ by device."""
  function = value_and_gradient(name)

  def local(*arguments):
    results = function(*(x[0] for x in arguments))
    return jax.tree.map(lambda x: x[None], results)

  mapped = jax.shard_map(
    local,
    mesh=lowering.mesh(),
    in_specs=P(AXIS),
    out_specs=P(AXIS),
    check_vma=True,
  )
  return jax.jit(mapped), [batched(x, 8) for x in ROWS[name][1]]


def batched(argument, size=3):
  return jax.ShapeDtypeStruct((size, *argument.shape), argument.dtype)


@pytest.mark.parametrize('name', ROWS)
def test_lowers_under_vmap_and_grad(name):
  function = jax.jit(jax.vmap(value_and_gradient(name)))
  lowering.check(function, *map(batched, ROWS[name][1]))


@pytest.mark.parametrize('name', ROWS)
def test_lowers_under_shard_map_and_grad(name):
  function, arguments = on_eight_devices(name)
  lowering.check(function, *arguments)


def check_global(function, name, in_specs, out_specs):
  mapped = jax.shard_map(
    function(functools.partial(ROWS[name][0], axis_name=AXIS)),
    mesh=lowering.mesh(),
    in_specs=in_specs,
    out_specs=out_specs,
    check_vma=True,
  )
  lowering.check(jax.jit(mapped), *ROWS[name][1])


@pytest.mark.parametrize('name', LOSSES)
def test_loss_of_the_global_batch_lowers(name):
  in_specs = (P(None, AXIS), P(AXIS), P())[: len(ROWS[name][1])]
  check_global(jax.value_and_grad, name, in_specs, (P(), P(None, AXIS)))


@pytest.mark.parametrize('name', OF_GLOBAL_BATCH)
def test_measure_of_the_global_batch_lowers(name):
  axes = OF_GLOBAL_BATCH[name]
  in_specs = tuple(P() if a is None else P(*[None] * a, AXIS) for a in axes)
  check_global(lambda function: function, name, in_specs, P())


@pytest.mark.parametrize('module', [loss, prototypes, collapse])
def test_every_public_function_has_a_row(module):
  functions = {
    name
    for name, value in vars(module).items()
    if inspect.isfunction(value)
    and value.__module__ == module.__name__
    and not name.startswith('_')
  }
  tested = {
    getattr(function, 'func', function).__name__
    for function, _ in ROWS.values()
  }
  # `choose_block_size` returns a number on the host.
  assert functions - tested <= {'choose_block_size'}
