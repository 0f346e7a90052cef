import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clop_jax.models import torchvision
from clop_jax.models import vit
from tests import lowering

SMALL = {'dim': 12, 'depth': 2, 'num_heads': 3, 'patch_size': 4}
IMAGES = np.random.default_rng(0).normal(size=(3, 8, 12, 2)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(1), 3)


def network(**changes):
  module = vit.ViT(**SMALL | changes)
  variables = module.init(jax.random.key(0), IMAGES, train=False)
  # No parameter is 0 or 1, so that each one matters.
  leaves, tree = jax.tree.flatten(variables)
  rng = np.random.default_rng(2)
  leaves = [0.5 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
  return module, jax.tree.unflatten(tree, leaves)


def reference(params, images, num_heads=3, size=4, pool='token'):
  """The forward pass in float64, one image and one token at a time."""
  erf = np.vectorize(math.erf)

  def dense(x, layer):
    return x @ layer['kernel'] + layer['bias']

  def layer_norm(x, layer):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * layer['scale'] + layer['bias']

  def attention(x, layer):
    query, key, value = np.split(dense(x, layer['in_proj']), 3, axis=-1)
    outputs = []
    for q, k, v in zip(
      *(np.split(y, num_heads, axis=-1) for y in (query, key, value)),
      strict=True,
    ):
      weights = np.exp(q @ k.T / math.sqrt(q.shape[-1]))
      outputs.append(weights / weights.sum(-1, keepdims=True) @ v)
    return dense(np.concatenate(outputs, -1), layer['out_proj'])

  features = []
  for image in images.astype(np.float64):
    patches = [
      np.einsum(
        'hwc,hwcd->d',
        image[y : y + size, x : x + size],
        params['conv_proj']['kernel'],
      )
      for y in range(0, image.shape[0], size)
      for x in range(0, image.shape[1], size)
    ]
    tokens = [params['class_token'][0, 0]]
    tokens += [patch + params['conv_proj']['bias'] for patch in patches]
    x = np.stack(tokens) + params['pos_embedding'][0]
    for index in range(2):
      layer = params[f'encoder_layer_{index}']
      x = x + attention(layer_norm(x, layer['ln_1']), layer)
      y = dense(layer_norm(x, layer['ln_2']), layer['mlp_1'])
      y = y * 0.5 * (1 + erf(y / math.sqrt(2)))
      x = x + dense(y, layer['mlp_2'])
    x = layer_norm(x, params['ln'])
    features.append(x[0] if pool == 'token' else x[1:].mean(0))
  return np.stack(features)


@pytest.mark.parametrize('pool', vit.POOLS)
def test_features_equal_the_float64_reference(pool):
  module, variables = network(pool=pool)
  features = module.apply(variables, IMAGES, train=False)
  assert features.dtype == jnp.float32
  params = jax.tree.map(np.float64, variables['params'])
  expected = reference(params, IMAGES, pool=pool)
  np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_computes_in_bfloat16_and_returns_float32():
  module, variables = network(dtype=jnp.bfloat16)
  features = module.apply(variables, IMAGES, train=False)
  assert features.dtype == jnp.float32
  params = jax.tree.map(np.float64, variables['params'])
  expected = reference(params, IMAGES)
  np.testing.assert_allclose(features, expected, atol=0.1)
  assert np.abs(features - expected).max() > 1e-4


@pytest.mark.parametrize('option', ['dropout', 'stochastic_depth'])
def test_random_parts_follow_each_images_key(option):
  module, variables = network(**{option: 0.5})

  def apply(images, keys, train=True):
    return module.apply(variables, images, train=train, keys=keys)

  features = apply(IMAGES, KEYS)
  still = apply(IMAGES, None, train=False)
  assert np.abs(features - still).max() > 1e-3
  # Images keep their features in another order and in another batch.
  np.testing.assert_allclose(
    apply(IMAGES[::-1], KEYS[::-1])[::-1], features, rtol=1e-5, atol=1e-6
  )
  np.testing.assert_allclose(
    apply(IMAGES[:1], KEYS[:1]), features[:1], rtol=1e-5, atol=1e-6
  )
  with pytest.raises(ValueError, match=r'keys.*None'):
    apply(IMAGES, None)


def test_stochastic_depth_keeps_the_mean_of_a_branch():
  x = jnp.ones((4000, 2, 3))
  random = vit._Random(jax.random.split(jax.random.key(0), 4000))
  y = vit._skip(x, 0.25, random)
  assert set(np.unique(y)) == {0, np.float32(4 / 3)}
  # A whole image at a time.
  assert (np.ptp(np.asarray(y).reshape(4000, -1), axis=1) == 0).all()
  assert np.mean(y) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(
  ('changes', 'match'),
  [
    ({'patch_size': 5}, r'patch_size.*8 x 12.*5'),
    ({'num_heads': 5}, r'num_heads.*12.*5'),
    ({'pool': 'max'}, r"pool.*'max'"),
  ],
)
def test_impossible_sizes_are_named(changes, match):
  with pytest.raises(ValueError, match=match):
    network(**changes)


def test_positions_are_interpolated_to_another_image_size():
  ramp = np.linspace(0, 1, 4)
  grid = np.broadcast_to(ramp[:, None, None], (4, 4, 2)).reshape(1, 16, 2)
  positions = np.concatenate([np.full((1, 1, 2), 7.0), grid], axis=1)
  larger = np.asarray(vit.resize_positions(positions, 64))
  assert larger.shape == (1, 65, 2)
  assert (larger[:, 0] == 7).all()
  rows = larger[0, 1:].reshape(8, 8, 2)
  # Away from the edges a bicubic keeps a ramp.
  np.testing.assert_allclose(np.diff(rows[2:6, 0, 0]), 1 / 6, atol=0.02)
  np.testing.assert_allclose(rows, rows[:, :1] + 0 * rows, atol=1e-6)
  same = vit.resize_positions(positions, 16)
  np.testing.assert_allclose(same, positions, atol=1e-6)
  with pytest.raises(ValueError, match=r'num_patches.*15'):
    vit.resize_positions(positions, 15)


def test_the_gradient_lowers_on_every_platform():
  module, variables = network(dropout=0.1, stochastic_depth=0.1)

  def total(variables, images, keys):
    return jnp.sum(module.apply(variables, images, train=True, keys=keys))

  lowering.check(jax.jit(jax.grad(total)), variables, IMAGES, KEYS)


# --- torchvision's names ------------------------------------------------------


def torchvision_names(depth):
  """The names of torchvision's VisionTransformer without its classifier."""
  layer = [
    f'{name}.{kind}'
    for name in ('ln_1', 'self_attention.out_proj', 'ln_2', 'mlp.0', 'mlp.3')
    for kind in ('weight', 'bias')
  ]
  layer += ['self_attention.in_proj_weight', 'self_attention.in_proj_bias']
  names = ['class_token', 'encoder.pos_embedding']
  names += [f'conv_proj.{kind}' for kind in ('weight', 'bias')]
  names += [f'encoder.ln.{kind}' for kind in ('weight', 'bias')]
  return {
    *names,
    *(
      f'encoder.layers.encoder_layer_{i}.{name}'
      for i in range(depth)
      for name in layer
    ),
  }


def test_conversion_to_torchvision_and_back_is_exact():
  _, variables = network()
  weights = torchvision.to_torchvision(variables)
  assert weights.keys() == torchvision_names(2)
  assert weights['conv_proj.weight'].shape == (12, 2, 4, 4)
  classifier = {'heads.head.weight': np.zeros((1000, 12))}
  back = torchvision.from_torchvision(weights | classifier, variables)
  jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_weights_of_another_image_size_are_interpolated():
  module = vit.ViT(**SMALL)
  images = np.zeros((1, 16, 16, 2), np.float32)
  small = module.init(jax.random.key(0), images[:, :8, :8], train=False)
  large = module.init(jax.random.key(1), images, train=False)
  loaded = torchvision.from_torchvision(
    torchvision.to_torchvision(small), large
  )
  np.testing.assert_allclose(
    loaded['params']['pos_embedding'],
    vit.resize_positions(small['params']['pos_embedding'], 16),
    atol=1e-6,
  )
  other = vit.ViT(**SMALL | {'dim': 6}).init(
    jax.random.key(0), images, train=False
  )
  with pytest.raises(ValueError, match=r'conv_proj\.weight \(12, 2, 4, 4\)'):
    torchvision.from_torchvision(torchvision.to_torchvision(small), other)


def test_features_equal_torchvision():
  torch = pytest.importorskip('torch')
  models = pytest.importorskip('torchvision').models
  torch.manual_seed(0)
  theirs = models.VisionTransformer(
    image_size=32,
    patch_size=8,
    num_layers=2,
    num_heads=3,
    hidden_dim=24,
    mlp_dim=96,
  ).eval()
  with torch.no_grad():
    for parameter in theirs.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  images = np.random.default_rng(0).normal(size=(2, 32, 32, 3))
  images = images.astype(np.float32)
  ours = vit.ViT(dim=24, depth=2, num_heads=3, patch_size=8)
  like = ours.init(jax.random.key(0), images, train=False)
  weights = {k: v.numpy() for k, v in theirs.state_dict().items()}
  variables = torchvision.from_torchvision(weights, like)
  features = ours.apply(variables, images, train=False)
  theirs.heads = torch.nn.Identity()
  with torch.no_grad():
    expected = theirs(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
  difference = np.linalg.norm(features - expected) / np.linalg.norm(expected)
  assert difference < 1e-5
