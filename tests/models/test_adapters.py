from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from clop_jax.models import adapters
from clop_jax.models import vit
from clop_jax.runtime import parallel
from tests import small

IMAGES = np.random.default_rng(0).normal(size=(4, 6, 6, 1)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(1), 4)


class LinenNet(nn.Module):
  @nn.compact
  def __call__(self, images, train):
    x = nn.Dense(5)(images.reshape(len(images), -1))
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
    return nn.Dropout(0.5, deterministic=not train)(nn.relu(x))


class NNXNet(nnx.Module):
  def __init__(self, rngs):
    self.dense = nnx.Linear(36, 5, rngs=rngs)
    self.bn = nnx.BatchNorm(5, momentum=0.9, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, images):
    x = self.dense(images.reshape(len(images), -1))
    return self.dropout(nnx.relu(self.bn(x)))


KINDS = {
  'linen': adapters.Linen(LinenNet(), rngs=('dropout',)),
  'nnx': adapters.NNX(NNXNet),
}


@pytest.mark.parametrize('kind', KINDS)
def test_adapters_train_and_evaluate_a_module(kind):
  network = adapters.adapt(KINDS[kind])
  variables = jax.jit(network.init)(jax.random.key(0), IMAGES[:1])
  features, updated = jax.jit(network.apply, static_argnums=2)(
    variables, IMAGES, True, KEYS
  )
  assert features.shape == (4, 5) and features.dtype == jnp.float32
  # Dropout is random in training, and batch statistics move.
  other, _ = network.apply(variables, IMAGES, True, KEYS[::-1])
  assert np.abs(features - other).max() > 0.1
  assert jax.tree.all(
    jax.tree.map(
      lambda old, new: np.any(old != new),
      variables['batch_stats'],
      updated['batch_stats'],
    )
  )
  assert jax.tree.all(
    jax.tree.map(np.array_equal, variables['params'], updated['params'])
  )
  still, same = network.apply(updated, IMAGES, False)
  again, _ = network.apply(updated, IMAGES, False)
  np.testing.assert_array_equal(still, again)
  assert jax.tree.all(jax.tree.map(np.array_equal, same, updated))


def test_both_flax_interfaces_compute_the_same():
  networks = [adapters.adapt(x) for x in KINDS.values()]
  linen, nnx_ = (x.init(jax.random.key(0), IMAGES[:1]) for x in networks)
  linen['params']['Dense_0'] = nnx_['params']['dense']
  results = [
    network.apply(variables, IMAGES, False)[0]
    for network, variables in zip(networks, (linen, nnx_), strict=True)
  ]
  np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)


def test_a_module_with_keys_gets_one_for_each_image():
  network = adapters.adapt(
    vit.ViT(dim=4, depth=1, num_heads=2, patch_size=3, dropout=0.5)
  )
  variables = network.init(jax.random.key(0), IMAGES[:1])
  features, _ = network.apply(variables, IMAGES, True, KEYS)
  part, _ = network.apply(variables, IMAGES[2:], True, KEYS[2:])
  np.testing.assert_allclose(part, features[2:], rtol=1e-5, atol=1e-6)


class GlobalNNX(nnx.Module):
  def __init__(self, rngs):
    self.dense = nnx.Linear(36, 5, rngs=rngs)
    self.bn = nnx.BatchNorm(5, axis_name=parallel.DATA_AXIS, rngs=rngs)

  def __call__(self, images):
    return self.bn(self.dense(images.reshape(len(images), -1)))


@pytest.mark.parametrize('module', [small.Dense(5), adapters.NNX(GlobalNNX)])
def test_batch_normalization_with_an_axis_name_is_global(module):
  small.need_devices(8)
  network = adapters.adapt(module)
  images = np.random.default_rng(0).normal(size=(16, 6, 6, 1))
  images = np.float32(images + np.arange(16)[:, None, None, None])
  variables = network.init(jax.random.key(0), images[:1])

  def on(devices):
    return jax.jit(
      jax.shard_map(
        lambda variables, images: network.apply(variables, images, True),
        mesh=parallel.make_mesh(jax.devices()[:devices]),
        in_specs=(P(), P(parallel.DATA_AXIS)),
        out_specs=(P(parallel.DATA_AXIS), P()),
      )
    )(variables, images)

  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4),
    on(8),
    on(1),
  )


class Plain:
  """A backbone without Flax; one result can be broken."""

  def __init__(self, variables=None, result=None):
    self.variables = variables or {'params': {'w': jnp.ones((36, 3))}}
    self.result = result

  def init(self, key, images):
    return self.variables

  def apply(self, variables, images, train):
    features = images.reshape(len(images), -1) @ variables['params']['w']
    return (features, variables) if self.result is None else self.result


def test_any_object_with_init_and_apply_is_a_backbone():
  network = adapters.adapt(Plain())
  variables = network.init(jax.random.key(0), IMAGES[:1])
  features, _ = network.apply(variables, IMAGES, True, KEYS)
  np.testing.assert_allclose(
    features, IMAGES.reshape(4, -1) @ np.ones((36, 3)), rtol=1e-5
  )


@pytest.mark.parametrize(
  ('broken', 'match'),
  [
    (object(), r'mine.*init and apply.*object'),
    (Plain(variables={'weights': 0}), r"mine\.init.*'params'.*dict"),
    (
      Plain(variables={'params': {'w': jnp.ones((36, 3))}, 'cache': 0}),
      r"mine\.init.*\['cache'\]",
    ),
    (Plain(result=jnp.ones((4, 3))), r'mine\.apply.*variables.*\(4, 3\)'),
    (
      Plain(result=(jnp.ones((4, 2, 3)), {})),
      r'mine\.apply.*\[4, \*\].*\(4, 2, 3\)',
    ),
    (Plain(result=(None, {})), r'mine\.apply.*NoneType'),
  ],
)
def test_a_backbone_that_breaks_the_contract_is_named(broken, match):
  with pytest.raises(ValueError, match=match):
    network = adapters.adapt(broken, 'mine')
    variables = network.init(jax.random.key(0), IMAGES[:1])
    network.apply(variables, IMAGES, True)
