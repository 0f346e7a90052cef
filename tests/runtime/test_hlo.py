"""Kernels, traffic and collectives of compiled programs."""

import re

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from clop_jax.experiment import build
from clop_jax.runtime import hlo
from clop_jax.runtime import parallel
from tests import small

AXIS = parallel.DATA_AXIS


def found_in(function, devices=8, **keywords):
  mapped = jax.shard_map(
    function,
    mesh=parallel.make_mesh(jax.devices()[:devices]),
    in_specs=P(AXIS),
    out_specs=P(AXIS),
    **keywords,
  )
  x = jax.ShapeDtypeStruct((8 * 16, 3), jnp.float32)
  return hlo.collectives(jax.jit(mapped).lower(x).compile().as_text())


@pytest.mark.parametrize('devices', [2, 8])
def test_the_payload_of_each_kind_is_the_whole_array(devices):
  def function(x):
    whole = lax.all_gather(x, AXIS, axis=0, tiled=True)
    back = lax.psum_scatter(jnp.sin(whole), AXIS, tiled=True)
    return back + lax.psum(jnp.sum(x, axis=0), AXIS)

  found = {c.kind: c for c in found_in(function, devices)}
  assert sorted(found) == ['all-gather', 'all-reduce', 'reduce-scatter']
  whole, one_row = 8 * 16 * 3 * 4, 3 * 4
  assert found['all-gather'].payload == whole
  assert found['reduce-scatter'].payload == whole
  assert found['all-reduce'].payload == one_row
  share = (devices - 1) / devices
  assert found['all-gather'].sent == share * whole
  assert found['reduce-scatter'].sent == share * whole
  assert found['all-reduce'].sent == 2 * share * one_row
  assert not any(c.conditional for c in found.values())


def test_all_arrays_of_one_collective_count():
  def function(x):
    a, b = lax.psum((jnp.sum(x, axis=0), jnp.sum(x * x)), AXIS)
    return x * a + b

  assert hlo.payload(found_in(function), 'all-reduce') == (3 + 1) * 4


def test_a_collective_in_a_loop_counts_for_each_round():
  def function(x):
    def body(x, _):
      return x + lax.psum(jnp.sin(x), AXIS), None

    return lax.scan(body, x, length=5)[0]

  (only,) = found_in(function)
  assert only.times == 5
  assert hlo.payload([only], 'all-reduce') == 5 * 16 * 3 * 4


def test_a_collective_in_a_loop_of_unknown_length_is_an_error():
  def function(x):
    def body(x):
      return x + lax.psum(jnp.abs(x), AXIS)

    return lax.while_loop(lambda x: lax.psum(x[0, 0], AXIS) < 9, body, x)

  with pytest.raises(ValueError, match='unknown length'):
    found_in(function)


def test_a_collective_in_a_branch_is_conditional():
  def function(x):
    seen = lax.psum(jnp.max(x), AXIS)
    return lax.cond(seen > 0, lambda: x + lax.psum(jnp.sin(x), AXIS), lambda: x)

  found = found_in(function)
  assert hlo.payload(found, 'all-reduce') == 4
  assert hlo.payload(found, 'all-reduce', conditional=True) == 16 * 3 * 4


def test_one_device_sends_nothing():
  found = found_in(lambda x: x * lax.psum(jnp.sum(x), AXIS), devices=1)
  assert sum(c.sent for c in found) == 0
  assert hlo.payload(found, 'all-reduce') == 0


def test_sizes_of_arrays_in_a_type():
  text = '(f32[2,3]{1,0}, pred[4], /*index=2*/s64[], bf16[5])'
  assert hlo.array_sizes(text) == [(6, 24), (4, 4), (1, 8), (5, 10)]


HLO = """
HloModule step, is_scheduled=true

%body (p: (f32[4])) -> (f32[4]) {
  %p = (f32[4]) parameter(0)
  %x = f32[4] get-tuple-element(%p), index=0
  %twice = f32[4] fusion(%x), kind=kLoop, calls=%f, metadata={op_name="jit(step)/networks/add"}
  ROOT %t = (f32[4]) tuple(%twice)
}

%rare (p: f32[4]) -> f32[4] {
  %p.1 = f32[4] parameter(0)
  ROOT %sort = f32[4] sort(%p.1), metadata={op_name="jit(step)/diagnostics/sort"}
}

%never (p: f32[4]) -> f32[4] {
  ROOT %p.2 = f32[4] parameter(0)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4] parameter(0)
  %t.1 = (f32[4]) tuple(%a)
  %loop = (f32[4]) while(%t.1), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %y = f32[4] get-tuple-element(%loop), index=0
  %start = (f32[4], f32[4]{0:S(1)}, u32[]) copy-start(%y)
  %fast = f32[4]{0:S(1)} copy-done(%start)
  %z = f32[8] fusion(%fast, %a), kind=kOutput, calls=%g, metadata={op_name="jit(step)/transpose(networks)/dot"}
  %i = s32[] constant(0)
  ROOT %c.1 = f32[4] conditional(%i, %a, %a), branch_computations={%never, %rare}
}
"""  # noqa: E501


def test_kernels_have_their_bytes_parts_and_times():
  found = {k.name: k for k in hlo.kernels(HLO)}
  assert [*found] == ['twice', 'fast', 'z', 'sort']
  moved = {name: (k.moved, k.times) for name, k in found.items()}
  # Arrays in vector memory (S(1)) move nothing, so a copy to it only reads.
  assert moved == {
    'twice': (32, 3),
    'fast': (16, 1),
    'z': (16 + 32, 1),
    'sort': (32, 1),
  }
  parts = {name: hlo.part_of(k.scope) for name, k in found.items()}
  assert parts['twice'] == 'networks forward'
  assert parts['z'] == 'networks backward'
  assert parts['sort'] == 'diagnostics'
  assert [k.name for k in found.values() if k.conditional] == ['sort']
  assert hlo.traffic(found.values()) == 3 * 32 + 16 + 48 + 32


@pytest.mark.parametrize(
  ('line', 'kind', 'payload'),
  [
    ('f32[4] all-reduce-start(%a), replica_groups={{0,1}}', 'all-reduce', 16),
    ('f32[4] all-reduce(%a), replica_groups=[1,2]<=[2]', 'all-reduce', 16),
    (
      '(f32[4], f32[8]) all-gather-start(%a), replica_groups={{0,1}}',
      'all-gather',
      32,
    ),
  ],
)
def test_the_payload_of_an_asynchronous_collective(line, kind, payload):
  text = f"""
ENTRY %main (a: f32[4]) -> f32[4] {{
  %a = f32[4] parameter(0)
  %s = {line}
  ROOT %d = f32[8] {kind}-done(%s)
}}"""
  (only,) = hlo.collectives(text)
  assert (only.kind, only.payload, only.devices) == (kind, payload, 2)


def reduced_types(stablehlo):
  """Returns the element types that a lowered program all-reduces."""
  tensors = re.findall(
    r'"stablehlo\.all_reduce".*?\}\) : \(tensor<([^>]*)>', stablehlo, re.DOTALL
  )
  return {tensor.split('x')[-1] for tensor in tensors}


@pytest.mark.parametrize('num_micro_batches', [1, 2])
def test_a_bfloat16_step_sums_nothing_over_devices_in_bfloat16(
  num_micro_batches, digits_dir
):
  config = small.digits_config(
    digits_dir,
    model__dtype='bfloat16',
    train__batch_size=32,
    train__num_micro_batches=num_micro_batches,
  )
  mesh = parallel.make_mesh()
  run = build.build(config, total_steps=10, steps_per_epoch=5)
  state = build.abstract_state(run, mesh)
  batch = {
    'image': jax.ShapeDtypeStruct((32, 8, 8, 1), np.uint8),
    'label': jax.ShapeDtypeStruct((32,), np.int32),
    'index': jax.ShapeDtypeStruct((32,), np.int32),
  }
  step = parallel.map_step(run.step, mesh, batch_axes=(None, 0, None))
  key = jax.eval_shape(lambda: jax.random.key(0))
  assert reduced_types(step.lower(state, batch, key).as_text()) == {'f32'}
