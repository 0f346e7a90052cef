"""Converted weights give the same features in NumPy and PyTorch."""

import functools
import hashlib
import importlib.util
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from clop_jax.models import resnet
from clop_jax.models import torchvision
from tests import torchvision_resnet as theirs

MAKE = {
  8: functools.partial(resnet.ResNet8, width=4),
  18: functools.partial(resnet.ResNet18, width=4),
  34: functools.partial(resnet.ResNet34, width=4),
  50: functools.partial(resnet.ResNet50, width=4),
}
TORCH = importlib.util.find_spec('torch') is not None
needs_torch = pytest.mark.skipif(not TORCH, reason='needs PyTorch')


def variables(model, channels=3, size=8, seed=0):
  """Random variables, with batch statistics unlike those of a new network."""
  x = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
  init = functools.partial(model.init, train=False)
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = path[-1].key
    if name == 'scale':
      # Small enough for fifty layers.
      return rng.uniform(0.2, 0.6, leaf.shape).astype(np.float32)
    if name == 'var':
      return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
    scale = 0.2
    if name == 'kernel':
      scale = np.sqrt(2 * leaf.shape[-1] / leaf.size)
    return rng.normal(scale=scale, size=leaf.shape).astype(np.float32)

  shapes = jax.eval_shape(init, jax.random.key(0), x)
  return jax.tree_util.tree_map_with_path(draw, shapes)


def images(channels=3, size=32):
  rng = np.random.default_rng(1)
  return rng.normal(size=(3, size, size, channels)).astype(np.float32)


def our_features(model, own, x):
  return jax.jit(functools.partial(model.apply, train=False))(own, x)


# Numbers of entries of torchvision's state dicts, with the classifier.
@pytest.mark.parametrize(('depth', 'entries'), [(18, 122), (50, 320)])
def test_names_and_shapes_equal_torchvision(depth, entries):
  model = {18: resnet.ResNet18, 50: resnet.ResNet50}[depth](stem='imagenet')
  x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  init = functools.partial(model.init, train=False)
  shapes = jax.eval_shape(init, jax.random.key(0), x)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  weights = torchvision.to_torchvision(zeros)
  expected = theirs.shapes(depth)
  assert len(expected) + len(('fc.weight', 'fc.bias')) == entries
  assert {name: x.shape for name, x in weights.items()} == expected
  for name, value in weights.items():
    counts = name.endswith('num_batches_tracked')
    assert value.dtype == (np.int64 if counts else np.float32)
    assert value.flags.c_contiguous


@pytest.mark.parametrize(
  ('depth', 'stem', 'channels'),
  [(8, 'cifar', 1), (18, 'imagenet', 3), (50, 'cifar', 3)],
)
def test_conversion_there_and_back_is_exact(depth, stem, channels):
  own = variables(MAKE[depth](stem=stem), channels)
  weights = torchvision.to_torchvision(own, num_batches=7)
  back = torchvision.from_torchvision(weights, own)
  assert jax.tree.structure(back) == jax.tree.structure(own)
  jax.tree.map(np.testing.assert_array_equal, back, own)
  given = theirs.state_dict(depth, width=4, stem=stem, channels=channels)
  taken = torchvision.from_torchvision(given, own)
  again = torchvision.to_torchvision(taken, num_batches=7)
  assert again.keys() == given.keys()
  for name, value in given.items():
    np.testing.assert_array_equal(again[name], value)


@pytest.mark.parametrize(
  ('depth', 'stem', 'channels', 'size'),
  [
    (18, 'cifar', 3, 9),
    (50, 'imagenet', 1, 33),
  ],
)
def test_features_equal_those_of_a_numpy_resnet(depth, stem, channels, size):
  model = MAKE[depth](stem=stem)
  own, x = variables(model, channels), images(channels, size)
  weights = torchvision.to_torchvision(own)
  expected = theirs.features(weights, x.transpose(0, 3, 1, 2))
  assert expected.std() > 0.05
  np.testing.assert_allclose(our_features(model, own, x), expected, atol=1e-4)


@needs_torch
@pytest.mark.parametrize(
  ('depth', 'stem', 'channels', 'size'),
  [
    (8, 'cifar', 1, 8),
    (18, 'cifar', 3, 32),
    (34, 'imagenet', 3, 33),
    (50, 'imagenet', 3, 64),
  ],
)
def test_features_equal_those_of_a_pytorch_resnet(depth, stem, channels, size):
  import torch

  model = MAKE[depth](stem=stem)
  own, x = variables(model, channels), images(channels, size)
  weights = torchvision.to_torchvision(own)
  network = theirs.network(depth, width=4, stem=stem, channels=channels)
  network.load_state_dict(
    {name: torch.tensor(value) for name, value in weights.items()}, strict=True
  )
  with torch.no_grad():
    expected = network(torch.tensor(x.transpose(0, 3, 1, 2))).numpy()
  assert expected.std() > 0.05
  np.testing.assert_allclose(our_features(model, own, x), expected, atol=1e-4)
  # Back, with a classifier as in torchvision's files.
  saved = {
    name: value.numpy() for name, value in network.state_dict().items()
  } | {'fc.weight': np.zeros((10, 2)), 'fc.bias': np.zeros(10)}
  back = torchvision.from_torchvision(saved, own)
  jax.tree.map(np.testing.assert_array_equal, back, own)


@needs_torch
@pytest.mark.parametrize('depth', [18, 50])
def test_the_pytorch_resnet_of_the_tests_equals_torchvision(depth):
  torchvision = pytest.importorskip('torchvision')
  model = getattr(torchvision.models, f'resnet{depth}')()
  shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
  assert shapes == theirs.shapes(depth, classes=1000)


def error_of(weights, own):
  with pytest.raises(ValueError, match='do not fit the backbone') as caught:
    torchvision.from_torchvision(weights, own)
  return str(caught.value)


def test_all_faults_of_weights_are_listed():
  weights = theirs.state_dict(18, width=4, classes=5)
  del weights['bn1.bias'], weights['layer4.1.conv2.weight']
  weights['layer5.0.conv1.weight'] = np.zeros((4, 4, 3, 3))
  weights['extra'] = np.zeros(3)
  weights['layer1.0.conv1.weight'] = np.zeros((4, 2, 3, 3))
  weights['layer2.0.bn1.running_mean'] = np.zeros(9)
  weights['layer3.0.bn1.weight'][2] = np.nan
  message = error_of(weights, variables(MAKE[18](stem='imagenet')))
  for part in (
    r'missing: (?=.*bn1\.bias)(?=.*layer4\.1\.conv2\.weight)',
    r'unexpected: layer5\.0\.conv1\.weight, extra;',
    r'layer1\.0\.conv1\.weight \(4, 2, 3, 3\), must be \(4, 4, 3, 3\)',
    r'layer2\.0\.bn1\.running_mean \(9,\), must be \(8,\)',
    r'not finite: layer3\.0\.bn1\.weight',
  ):
    assert re.search(part, message), message
  # Neither correct nor ignored entries.
  for name in ('fc.', 'num_batches', 'layer2.0.bn2'):
    assert name not in message


def test_weights_of_another_network_fail_with_the_fields_to_check():
  weights = theirs.state_dict(18, width=4, channels=1)
  message = error_of(weights, variables(MAKE[8](stem='cifar')))
  assert 'config.model.name' in message
  assert 'conv1.weight (4, 1, 7, 7), must be (4, 3, 3, 3)' in message
  assert re.search(r'unexpected: layer1\.1\.\S+, .* and \d+ more', message)
  assert len(message) < 600
  weights['conv1.weight'] = np.zeros(3)
  message = error_of(weights, variables(MAKE[8](stem='cifar')))
  assert 'conv1.weight (3,), must be (4, 3, 3, 3)' in message


def test_another_network_has_no_names_in_torchvision():
  dense = {'params': {'attention': {'kernel': np.zeros((2, 3))}}}
  with pytest.raises(ValueError, match='params/attention/kernel has no name'):
    torchvision.to_torchvision(dense)


def test_dense_layers_are_transposed_and_float16_is_converted():
  head = {'params': {'dense1': {'kernel': np.arange(6.0).reshape(2, 3)}}}
  weights = torchvision.to_torchvision(head, prefix='projection_head.')
  (name,) = weights
  assert name == 'projection_head.dense1.weight'
  np.testing.assert_array_equal(weights[name], [[0, 3], [1, 4], [2, 5]])
  given = theirs.state_dict(8, width=4, stem='cifar')
  half = {name: x.astype(np.float16) for name, x in given.items()}
  own = variables(MAKE[8]())
  leaves = torchvision.from_torchvision(half, own)
  assert {x.dtype for x in jax.tree.leaves(leaves)} == {np.dtype(np.float32)}
  kernel = half['conv1.weight'].transpose(2, 3, 1, 0)
  np.testing.assert_array_equal(leaves['params']['conv1']['kernel'], kernel)


def test_a_safetensors_file_is_read_with_its_sha256(tmp_path):
  weights = theirs.state_dict(8, width=4)
  path = tmp_path / 'weights.safetensors'
  safetensors.numpy.save_file(weights, path)
  arrays, sha256 = torchvision.read(str(path))
  assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
  assert arrays.keys() == weights.keys()
  for name, value in weights.items():
    np.testing.assert_array_equal(arrays[name], value)


BFLOAT16 = b'{"x":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}'


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('w.npz', b'', r'must end in \.safetensors or \.pth'),
    ('w.safetensors', None, 'no such file'),
    ('w.safetensors', b'not weights', 'damaged'),
    (
      'w.safetensors',
      len(BFLOAT16).to_bytes(8, 'little') + BFLOAT16 + b'00',
      "dtype 'BF16'.*float32",
    ),
  ],
)
def test_unreadable_files(name, content, message, tmp_path):
  path = tmp_path / name
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(ValueError, match=message):
    torchvision.read(str(path))


def test_pth_without_pytorch_names_the_conversion(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  path = tmp_path / 'weights.pth'
  path.write_bytes(b'any')
  with pytest.raises(ValueError, match=r'needs PyTorch.*safetensors\.torch'):
    torchvision.read(str(path))


@needs_torch
def test_pth_must_be_a_state_dict(tmp_path):
  import torch

  path = tmp_path / 'weights.pth'
  weights = theirs.state_dict(8, width=4)
  torch.save(
    {
      name: torch.tensor(x).bfloat16() if x.ndim == 4 else torch.tensor(x)
      for name, x in weights.items()
    },
    path,
  )
  arrays, _ = torchvision.read(str(path))
  assert arrays.keys() == weights.keys()
  np.testing.assert_array_equal(arrays['bn1.weight'], weights['bn1.weight'])
  assert arrays['conv1.weight'].dtype == np.float32
  np.testing.assert_allclose(
    arrays['conv1.weight'], weights['conv1.weight'], rtol=1e-2
  )
  torch.save({'epoch': 3, 'state_dict': {}}, path)
  with pytest.raises(ValueError, match=r"\['epoch', 'state_dict'\]"):
    torchvision.read(str(path))
  torch.save(pytest.raises, path)  # code, which must not run
  with pytest.raises(ValueError, match='PyTorch cannot read it'):
    torchvision.read(str(path))
  path.write_bytes(b'not weights')
  with pytest.raises(ValueError, match='PyTorch cannot read it'):
    torchvision.read(str(path))


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    (
      {'name': 'resnet50', 'stem': 'imagenet', 'channels': 3},
      ['model = torchvision.models.resnet50()'],
    ),
    (
      {'name': 'resnet18', 'stem': 'cifar', 'channels': 3},
      [
        'model = torchvision.models.resnet18()',
        'model.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)',
        'model.maxpool = torch.nn.Identity()',
      ],
    ),
    (
      {'name': 'resnet34', 'stem': 'imagenet', 'channels': 1},
      [
        'model = torchvision.models.resnet34()',
        'model.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)',
      ],
    ),
    ({'name': 'resnet8', 'stem': 'cifar', 'channels': 3}, None),
  ],
)
def test_construction_of_the_torchvision_network(arguments, expected):
  lines = torchvision.construction(**arguments, image_size=32)
  if expected is not None:
    expected = [*expected, 'model.fc = torch.nn.Identity()']
  assert lines == expected
  other = torchvision.construction(
    **arguments, image_size=32, width_multiplier=0.5
  )
  assert other is None
