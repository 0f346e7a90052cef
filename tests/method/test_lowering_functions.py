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

Z = jax.ShapeDtypeStruct((VIEWS, BATCH, DIM), jnp.float32)
Y = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
Y_OF_VIEWS = jax.ShapeDtypeStruct((VIEWS, BATCH), jnp.int32)
C = jax.ShapeDtypeStruct((CLASSES, DIM), jnp.float32)
KEY = jax.eval_shape(lambda: jax.random.key(0))

# Name: function, arguments.
ROWS = {}


def rows(module, *arguments, **variants):
  """Adds a row for each variant: a function's name, keyword arguments."""
  for row, (name, keywords) in variants.items():
    function = getattr(module, name)
    bound = functools.partial(function, **keywords) if keywords else function
    ROWS[row] = (bound, arguments)


rows(
  loss,
  Z,
  Y,
  C,
  clop=('clop_loss', {}),
  clop_euclidean=('clop_loss', {'distance': 'euclidean'}),
  clop_manhattan=('clop_loss', {'distance': 'manhattan'}),
  clop_softmax=('clop_loss', {'distance': 'softmax'}),
  clop_repulsion=('clop_loss', {'repulsion': 1.0}),
  clop_weighted=('clop_loss', {'class_weights': np.ones(CLASSES)}),
)
rows(
  loss,
  Z,
  nt_xent=('nt_xent_loss', {}),
  nt_xent_blocked=('nt_xent_loss', {'block_size': 10}),
  dcl=('dcl_loss', {}),
  vicreg=('vicreg_loss', {}),
  barlow_twins=('barlow_twins_loss', {}),
)
rows(
  loss,
  Z,
  Y,
  supcon=('supcon_loss', {}),
  supcon_in=('supcon_loss', {'variant': 'in'}),
  supcon_blocked=('supcon_loss', {'block_size': 10}),
)
LOSSES = tuple(ROWS)
SIZES = {'num_classes': CLASSES, 'dim': DIM}
rows(
  prototypes,
  KEY,
  orthonormal_prototypes=('orthonormal_prototypes', SIZES),
  simplex_etf_prototypes=('simplex_etf_prototypes', SIZES),
  random_prototypes=('random_prototypes', SIZES),
)
rows(
  loss,
  jax.ShapeDtypeStruct((DIM,), jnp.float32),
  jax.ShapeDtypeStruct((), jnp.int32),
  C,
  prototype_distances=('prototype_distances', {}),
)
rows(
  prototypes,
  C,
  orthonormality_error=('orthonormality_error', {}),
  orthonormalize=('orthonormalize', {}),
  align_prototypes=('align_prototypes', {}),
)
rows(prototypes, C, C, assign_prototypes=('assign_prototypes', {}))
rows(prototypes, Z, Y, C, pseudo_labels=('pseudo_labels', {'threshold': 0.9}))
rows(
  collapse,
  Z,
  normalize=('normalize', {}),
  singular_values_centered=('singular_values', {'center': True}),
  effective_rank=('effective_rank', {}),
  embedding_variance=('embedding_variance', {}),
  embedding_std=('embedding_std', {}),
  alignment=('alignment', {}),
  uniformity=('uniformity', {}),
)
rows(
  collapse,
  jax.ShapeDtypeStruct((DIM,), jnp.float32),
  effective_rank_of_spectrum=('effective_rank_of_spectrum', {}),
)
of_classes = {'num_classes': CLASSES}
rows(
  collapse,
  Z,
  Y_OF_VIEWS,
  class_means=('class_means', of_classes),
  class_mean_cosines=('class_mean_cosines', of_classes | {'center': True}),
  within_between_ratio=('within_between_ratio', of_classes),
  principal_angles=('principal_angles', of_classes | {'subspace_dim': 2}),
)
rows(
  collapse,
  Z,
  Y_OF_VIEWS,
  C,
  prototype_cosine=('prototype_cosine', {}),
  prototype_energy_share=('prototype_energy_share', {}),
)


def batch_measures(*arguments, **keywords):
  """Stacks them: the rows here have one array as their result."""
  return jnp.stack([*collapse.batch_measures(*arguments, **keywords).values()])


ROWS['batch_measures'] = (batch_measures, (Z, Y_OF_VIEWS, C))
# JAX decomposes matrices of more than 256 rows by another algorithm.
for n in (DIM, 300):
  square = jax.ShapeDtypeStruct((n, n), jnp.float32)
  ROWS[f'eigh_{n}'] = (lambda x: linalg.eigh(x)[1], (square,))
  ROWS[f'svd_{n}'] = (lambda x: linalg.svd(x)[1], (square,))
TALL = jax.ShapeDtypeStruct((40, 300), jnp.float32)
ROWS['singular_values_of_rows'] = (linalg.singular_values, (TALL,))

# Of the global batch: the arguments' axis that is split over the devices.
OF_GLOBAL_BATCH = {
  'singular_values_centered': (1,),
  'effective_rank': (1,),
  'embedding_std': (1,),
  'prototype_cosine': (1, 1, None),
  'batch_measures': (1, 1, None),
  'singular_values_of_rows': (0,),
}


def batched(argument):
  return jax.ShapeDtypeStruct((3, *argument.shape), argument.dtype)


def on_eight_devices(function, arguments):
  """Maps a function over arguments that differ from device to device."""

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
  shapes = [jax.ShapeDtypeStruct((8, *x.shape), x.dtype) for x in arguments]
  return jax.jit(mapped), shapes


def differentiable(name):
  function, arguments = ROWS[name]
  result = jax.eval_shape(function, *arguments)
  return [
    i
    for i, argument in enumerate(arguments)
    if jnp.issubdtype(argument.dtype, jnp.floating)
    and jnp.issubdtype(result.dtype, jnp.floating)
  ]


def value_and_gradient(name):
  """The function of a row with its gradient, if it has one."""
  function, _ = ROWS[name]
  argnums = differentiable(name)
  if not argnums:
    return function

  def total_and_result(*arguments):
    result = function(*arguments)
    return jnp.sum(result), result

  return jax.grad(total_and_result, argnums=argnums, has_aux=True)


@pytest.mark.parametrize('name', ROWS)
def test_under_jit_and_grad(name):
  lowering.check(jax.jit(value_and_gradient(name)), *ROWS[name][1])


@pytest.mark.parametrize('name', ROWS)
def test_under_vmap(name):
  function, arguments = ROWS[name]
  lowering.check(jax.jit(jax.vmap(function)), *map(batched, arguments))


@pytest.mark.parametrize('name', ROWS)
def test_under_shard_map_and_grad(name):
  function, shapes = on_eight_devices(value_and_gradient(name), ROWS[name][1])
  lowering.check(function, *shapes)


@pytest.mark.parametrize('name', LOSSES)
def test_loss_of_the_global_batch_under_shard_map(name):
  function, arguments = ROWS[name]
  function = functools.partial(function, axis_name=AXIS)
  # Embeddings and labels are split, prototypes are not.
  mapped = jax.shard_map(
    jax.value_and_grad(function),
    mesh=lowering.mesh(),
    in_specs=(P(None, AXIS), P(AXIS), P())[: len(arguments)],
    out_specs=(P(), P(None, AXIS)),
    check_vma=True,
  )
  lowering.check(jax.jit(mapped), *arguments)


@pytest.mark.parametrize('name', OF_GLOBAL_BATCH)
def test_measure_of_the_global_batch_under_shard_map(name):
  function, arguments = ROWS[name]
  axes = OF_GLOBAL_BATCH[name]
  mapped = jax.shard_map(
    functools.partial(function, axis_name=AXIS),
    mesh=lowering.mesh(),
    in_specs=tuple(P() if a is None else P(*[None] * a, AXIS) for a in axes),
    out_specs=P(),
    check_vma=True,
  )
  lowering.check(jax.jit(mapped), *arguments)


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
