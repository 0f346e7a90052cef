import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from clop_jax.models import heads
from clop_jax.models import resnet
from clop_jax.runtime import parallel
from tests import small

AXIS = parallel.DATA_AXIS
DEVICES = 8
TINY = functools.partial(resnet.ResNet8, width=4)


def images(batch=16, size=8, channels=3, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(batch, size, size, channels)).astype(np.float32)


def fill(shapes, seed=0):
  """Random variables, without compiling an init."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = path[-1].key
    if name in ('scale', 'var'):
      return np.ones(leaf.shape, np.float32)
    if name in ('bias', 'mean'):
      return np.zeros(leaf.shape, np.float32)
    fan_out = leaf.size / leaf.shape[-2]
    kernel = rng.normal(size=leaf.shape) * np.sqrt(2 / fan_out)
    return kernel.astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def tiny_variables(**kwargs):
  return fill(shapes(TINY(**kwargs), 16)[0])


@functools.cache
def layers(model):
  """A function to the features and the outputs of every layer."""

  @jax.jit
  def run(variables, x):
    features, state = model.apply(
      variables, x, train=False, capture_intermediates=True
    )
    return features, state['intermediates']

  return run


def shapes(model, size, channels=3):
  x = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
  init = functools.partial(model.init, train=False)
  variables = jax.eval_shape(init, jax.random.key(0), x)
  apply = functools.partial(model.apply, train=False)
  return variables, jax.eval_shape(apply, variables, x)


def count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def convolve(x, kernel, stride, padding):
  """PyTorch's convolution with equal padding on both sides, in float64."""
  size = kernel.shape[0]
  x = np.pad(
    np.asarray(x, np.float64),
    [(0, 0), (padding, padding), (padding, padding), (0, 0)],
  )
  out = (x.shape[1] - size) // stride + 1
  result = np.zeros((x.shape[0], out, out, kernel.shape[-1]))
  for i in range(out):
    for j in range(out):
      top, left = i * stride, j * stride
      window = x[:, top : top + size, left : left + size]
      result[:, i, j] = np.einsum('bhwc,hwco->bo', window, kernel)
  return result


# torchvision's numbers of parameters, which include the classifier.
@pytest.mark.parametrize(
  ('make', 'stem', 'classes', 'dim', 'expected'),
  [
    (resnet.ResNet18, 'imagenet', 1000, 512, 11_689_512),
    (resnet.ResNet34, 'imagenet', 1000, 512, 21_797_672),
    (resnet.ResNet50, 'imagenet', 1000, 2048, 25_557_032),
    (resnet.ResNet18, 'cifar', 10, 512, 11_173_962),
  ],
)
def test_parameter_counts_equal_torchvision(make, stem, classes, dim, expected):
  variables, features = shapes(make(stem=stem), 32)
  assert features.shape == (2, dim)
  classifier = dim * classes + classes
  assert count(variables['params']) + classifier == expected


def test_width_multiplier_scales_the_features():
  _, features = shapes(resnet.ResNet8(width_multiplier=0.5), 8, 1)
  assert features.shape == (2, 32)


def test_bfloat16_keeps_float32_variables_and_outputs():
  x, variables = images(4), tiny_variables()
  exact, _ = layers(TINY())(variables, x)
  coarse, outputs = layers(TINY(dtype=jnp.bfloat16))(variables, x)
  inner = outputs['layer2_0']['conv1']['__call__'][0]
  assert inner.dtype == jnp.bfloat16
  assert coarse.dtype == jnp.float32
  assert (coarse != exact).any()
  np.testing.assert_allclose(coarse, exact, rtol=0.1, atol=0.02)
  head = heads.ProjectionHead(dim=3, hidden_dim=5, dtype=jnp.bfloat16)
  init = functools.partial(head.init_with_output, train=True)
  results = (
    jax.eval_shape(init, jax.random.key(0), coarse),
    shapes(TINY(dtype=jnp.bfloat16), 8),
  )
  assert {leaf.dtype for leaf in jax.tree.leaves(results)} == {
    np.dtype('float32')
  }


@pytest.mark.parametrize(
  ('stem', 'sizes'),
  [('cifar', [32, 32, 16, 8]), ('imagenet', [16, 8, 4, 2])],
)
def test_stems_and_stages_halve_the_image(stem, sizes):
  model = TINY(stem=stem)
  x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)

  def run(key, x):
    variables = model.init(key, x, train=False)
    return model.apply(variables, x, train=False, capture_intermediates=True)

  _, state = jax.eval_shape(run, jax.random.key(0), x)
  outputs = state['intermediates']
  names = ['conv1', 'layer1_0', 'layer2_0', 'layer3_0']
  got = [outputs[name]['__call__'][0].shape[1:3] for name in names]
  assert got == [(size, size) for size in sizes]


# Under 'SAME' an even image is padded on one side only at stride 2.
@pytest.mark.parametrize('size', [8, 7])
def test_strided_convolutions_pad_both_sides_as_pytorch_does(size):
  x, variables = images(4, size), tiny_variables()
  _, outputs = layers(TINY())(variables, x)
  before = outputs['layer1_0']['__call__'][0]
  kernels = variables['params']['layer2_0']
  for name, padding in (('conv1', 1), ('downsample_conv', 0)):
    expected = convolve(before, np.asarray(kernels[name]['kernel']), 2, padding)
    after = outputs['layer2_0'][name]['__call__'][0]
    np.testing.assert_allclose(after, expected, atol=1e-5)


def test_imagenet_stem_pads_both_sides_as_pytorch_does():
  x, variables = images(2, 16), tiny_variables(stem='imagenet')
  _, outputs = layers(TINY(stem='imagenet'))(variables, x)
  kernel = np.asarray(variables['params']['conv1']['kernel'])
  stem = outputs['conv1']['__call__'][0]
  np.testing.assert_allclose(stem, convolve(x, kernel, 2, 3), atol=1e-5)
  # Max pooling over 3x3 at stride 2, padded by one on each side.
  relu = np.maximum(np.asarray(outputs['bn1']['__call__'][0]), 0)
  padded = np.pad(relu, [(0, 0), (1, 1), (1, 1), (0, 0)])
  windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
  pooled = windows[:, ::2, ::2].max((-2, -1))
  kernel = np.asarray(variables['params']['layer1_0']['conv1']['kernel'])
  np.testing.assert_allclose(
    outputs['layer1_0']['conv1']['__call__'][0],
    convolve(pooled, kernel, 1, 1),
    atol=1e-5,
  )


def init(head, key, x):
  return jax.jit(functools.partial(head.init_with_output, train=True))(key, x)


def names_of(path):
  return tuple(entry.key for entry in path)


def scales(model):
  """The initial scales alone: the compiler drops everything else."""

  @jax.jit
  def init(key):
    params = model.init(key, images(1), train=False)['params']
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [leaf for path, leaf in leaves if names_of(path)[-1] == 'scale']

  params = shapes(model, 8)[0]['params']
  leaves = jax.tree_util.tree_leaves_with_path(params)
  names = [names_of(path) for path, _ in leaves]
  names = [name for name in names if name[-1] == 'scale']
  return dict(zip(names, init(jax.random.key(0)), strict=True))


@pytest.mark.parametrize(
  ('block', 'last'),
  [(resnet.BasicBlock, 'bn2'), (resnet.BottleneckBlock, 'bn3')],
)
def test_zero_init_makes_blocks_the_identity(block, last):
  make = functools.partial(
    resnet.ResNet, stage_sizes=(2,), block=block, width=4
  )
  model = make(zero_init_last_bn=True)
  own = scales(model)
  for names, leaf in own.items():
    assert (np.asarray(leaf) == (0.0 if last in names else 1.0)).all(), names
  assert all((np.asarray(x) == 1).all() for x in scales(make()).values())
  # The second block of a stage has a shortcut without parameters.
  variables = fill(shapes(model, 8)[0])
  variables['params'] = jax.tree_util.tree_map_with_path(
    lambda path, leaf: own.get(names_of(path), leaf), variables['params']
  )
  _, outputs = layers(model)(variables, images(2))
  first = np.asarray(outputs['layer1_0']['__call__'][0])
  second = np.asarray(outputs['layer1_1']['__call__'][0])
  np.testing.assert_array_equal(second, np.maximum(first, 0))
  assert first.max() > 0


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: resnet.ResNet8(stem='mnist'), "stem .*'imagenet'.*'mnist'"),
    (lambda: resnet.ResNet8(bn_scope='all'), "bn_scope .*'device'.*'all'"),
    (
      lambda: heads.ProjectionHead(dim=3, hidden_dim=5, bn_scope='all'),
      "bn_scope .*'all'",
    ),
  ],
)
def test_invalid_arguments(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@functools.cache
def sharded_features(bn_scope):
  """Features and running statistics of a batch of 16 over eight devices."""
  small.need_devices(DEVICES)
  model = TINY(bn_scope=bn_scope, axis_name=AXIS)

  def step(variables, x):
    features, updates = model.apply(
      variables, x, train=True, mutable=['batch_stats']
    )
    return features, jax.tree.map(lambda s: s[None], updates['batch_stats'])

  # Without an axis, every device would return the statistics of its own.
  mapped = jax.shard_map(
    step,
    mesh=parallel.make_mesh(),
    in_specs=(P(), P(AXIS)),
    out_specs=(P(AXIS), P(AXIS)),
    check_vma=False,
  )
  return jax.jit(mapped)(tiny_variables(), images())


@functools.cache
def whole_features():
  apply = functools.partial(TINY().apply, train=True, mutable=['batch_stats'])
  features, updates = jax.jit(apply)(tiny_variables(), images())
  return features, updates['batch_stats']


def test_global_batch_statistics_equal_those_of_one_device():
  features, stats = sharded_features('global')
  expected, expected_stats = whole_features()
  np.testing.assert_allclose(features, expected, atol=2e-5)
  for got, want in zip(
    jax.tree.leaves(stats), jax.tree.leaves(expected_stats), strict=True
  ):
    assert got.shape == (DEVICES, *want.shape)
    np.testing.assert_allclose(got, np.broadcast_to(want, got.shape), atol=1e-5)


def test_device_batch_statistics_are_those_of_the_shard():
  features, _ = sharded_features('device')
  expected, _ = whole_features()
  assert np.abs(features - expected).max() > 0.01
  apply = functools.partial(TINY().apply, train=True, mutable=['batch_stats'])
  shard, _ = jax.jit(apply)(tiny_variables(), images()[2:4])
  np.testing.assert_allclose(features[2:4], shard, atol=2e-5)


def test_evaluation_uses_running_averages_only():
  variables, x = tiny_variables(), images(4)
  apply = jax.jit(functools.partial(TINY().apply, train=False))
  together = apply(variables, x)
  others = np.concatenate([x[:2], 10 + 5 * x[2:]])
  np.testing.assert_array_equal(apply(variables, others)[:2], together[:2])
  assert (apply(variables, others)[2:] != together[2:]).any()
  stats = jax.tree.map(lambda s: s + 0.5, variables['batch_stats'])
  shifted = apply({**variables, 'batch_stats': stats}, x)
  assert np.abs(shifted - together).max() > 0.01


def test_running_averages_have_momentum_0_9():
  x = images()
  variables = tiny_variables()
  _, stats = whole_features()
  kernel = np.asarray(variables['params']['conv1']['kernel'])
  batch = convolve(x, kernel, 1, 1)
  np.testing.assert_allclose(
    stats['bn1']['mean'], 0.1 * batch.mean(axis=(0, 1, 2)), atol=1e-5
  )
  np.testing.assert_allclose(
    stats['bn1']['var'], 0.9 + 0.1 * batch.var(axis=(0, 1, 2)), atol=1e-4
  )


@pytest.mark.parametrize(
  ('kwargs', 'expected'),
  [
    (
      {'num_layers': 2},
      {
        ('dense1', 'kernel'): (7, 5),
        ('bn1', 'scale'): (5,),
        ('bn1', 'bias'): (5,),
        ('dense2', 'kernel'): (5, 3),
        ('dense2', 'bias'): (3,),
      },
    ),
    (
      {'num_layers': 3, 'use_bn': False},
      {
        ('dense1', 'kernel'): (7, 5),
        ('dense1', 'bias'): (5,),
        ('dense2', 'kernel'): (5, 5),
        ('dense2', 'bias'): (5,),
        ('dense3', 'kernel'): (5, 3),
        ('dense3', 'bias'): (3,),
      },
    ),
    (
      {'num_layers': 1},
      {('dense1', 'kernel'): (7, 3), ('dense1', 'bias'): (3,)},
    ),
    ({'num_layers': 0}, {}),
  ],
)
def test_projection_head_has_the_requested_layers(kwargs, expected):
  head = heads.ProjectionHead(dim=3, hidden_dim=5, **kwargs)
  x = images(4).reshape(4, -1)[:, :7]
  out, variables = init(head, jax.random.key(0), x)
  leaves = jax.tree_util.tree_leaves_with_path(variables.get('params', {}))
  got = {tuple(e.key for e in path): leaf.shape for path, leaf in leaves}
  assert got == expected
  if kwargs['num_layers'] == 0:
    np.testing.assert_array_equal(out, x)
  else:
    assert out.shape == (4, 3)
    # Behind a ReLU no embedding could be negative.
    assert (out < 0).any()
    assert (out > 0).any()


def test_projection_head_equals_its_formula():
  head = heads.ProjectionHead(dim=3, hidden_dim=5)
  x = images(6).reshape(6, -1)[:, :7]
  out, variables = init(head, jax.random.key(1), x)
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
  p = p['params']
  h = x @ p['dense1']['kernel']
  h = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5)
  h = np.maximum(h * p['bn1']['scale'] + p['bn1']['bias'], 0)
  expected = h @ p['dense2']['kernel'] + p['dense2']['bias']
  np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize('bn_scope', ['global', 'device'])
def test_bn_scope_of_the_projection_head(bn_scope):
  small.need_devices(DEVICES)
  x = images(16).reshape(16, -1)[:, :7]
  kwargs = {'dim': 3, 'hidden_dim': 5, 'bn_scope': bn_scope}
  alone = heads.ProjectionHead(**kwargs)
  mapped = heads.ProjectionHead(**kwargs, axis_name=AXIS)
  expected, variables = init(alone, jax.random.key(0), x)

  def step(variables, x):
    return mapped.apply(variables, x, train=True, mutable=['batch_stats'])[0]

  got = jax.jit(
    jax.shard_map(
      step,
      mesh=parallel.make_mesh(),
      in_specs=(P(), P(AXIS)),
      out_specs=P(AXIS),
    )
  )(variables, x)
  difference = np.abs(got - expected).max()
  assert difference < 1e-5 if bn_scope == 'global' else difference > 0.1


def test_linear_head_starts_at_zero_and_is_linear():
  head = heads.LinearHead(num_classes=4)
  x = images(5).reshape(5, -1)[:, :7]
  out, variables = head.init_with_output(
    jax.random.key(0), x.astype(jnp.bfloat16)
  )
  assert out.shape == (5, 4)
  assert out.dtype == jnp.float32
  assert not out.any()
  rng = np.random.default_rng(0)
  p = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), variables)
  layer = p['params']['Dense_0']
  np.testing.assert_allclose(
    head.apply(jax.tree.map(jnp.float32, p), x),
    x @ layer['kernel'] + layer['bias'],
    atol=1e-5,
  )
