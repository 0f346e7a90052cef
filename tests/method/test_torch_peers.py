"""The PyTorch programs of the benchmarks compute the same as the library."""

import colorsys
import functools
import importlib.util
import multiprocessing
import random

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from clop_jax import loss
from clop_jax.models import heads
from clop_jax.models import resnet
from docs.benchmarks import pillow_views

if importlib.util.find_spec('torch') is None:
  pytest.skip(
    "needs PyTorch (pip install 'clop-jax[bench]')", allow_module_level=True
  )

import torch

from docs.benchmarks import torch_augment
from docs.benchmarks import torch_losses
from docs.benchmarks import torch_networks
from docs.benchmarks import torch_steps

HIDDEN_DIM, DIM = 24, 12
BACKBONES = {
  8: resnet.ResNet8,
  18: resnet.ResNet18,
  50: resnet.ResNet50,
}
PEERS = {
  'authors': lambda z, t: torch_losses.nt_xent_authors(z[0], z[1], t),
  'expert': torch_losses.nt_xent_expert,
}


@pytest.fixture(autouse=True)
def seeded():
  torch.manual_seed(0)
  torch.set_num_threads(1)  # other tests use the other cores


def embeddings(views=2, batch=9, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(scale=3, size=(views, batch, DIM)).astype(np.float32)


def assert_same_loss_and_gradient(ours, theirs, z):
  value, gradient = jax.value_and_grad(ours)(jnp.asarray(z))
  z = torch.from_numpy(z).requires_grad_()
  other = theirs(z)
  other.backward()
  assert other.dtype == torch.float32
  np.testing.assert_allclose(other.item(), value, rtol=1e-5)
  np.testing.assert_allclose(z.grad, gradient, atol=1e-5)


@pytest.mark.parametrize('temperature', [0.1, 0.5])
@pytest.mark.parametrize('form', ['authors', 'expert'])
def test_nt_xent_equals_ours_in_value_and_gradient(form, temperature):
  assert_same_loss_and_gradient(
    functools.partial(loss.nt_xent_loss, temperature=temperature),
    lambda z: PEERS[form](z, temperature),
    embeddings(),
  )


def lightly(name, module='lightly.loss', **keywords):
  """A loss of lightly as a function of the embeddings of both views."""
  module = getattr(pytest.importorskip(module), name)(**keywords)
  return lambda z: module(z[0], z[1])


def whitened_by_lightly():
  module = pytest.importorskip('lightly.loss.wmse_loss').WMSELoss(
    embedding_dim=DIM, w_size=32
  )
  module.train()
  whiten = module.whitening

  def loss_of(z):
    # The whole batch of each view, not random parts of it.
    return module.loss_f(whiten(z[0]), whiten(z[1]))

  return loss_of


def sigmoid_of_open_clip():
  module = pytest.importorskip('open_clip.loss').SigLipLoss()

  def loss_of(z):
    first, second = torch.nn.functional.normalize(z, dim=-1)
    return module(first, second, logit_scale=1 / 0.1, logit_bias=-10.0)

  return loss_of


PUBLISHED = {
  'invariance': (
    lambda z: loss.invariance_loss(z) - 1,
    lambda: lightly('NegativeCosineSimilarity'),
  ),
  'alignment and uniformity': (
    lambda z: loss.alignment_uniformity_loss(z, t=1.5),
    lambda: lightly('HypersphereLoss', 'lightly.loss.hypersphere_loss', t=1.5),
  ),
  'w_mse': (
    lambda z: loss.w_mse_loss(z, epsilon=0.0),
    whitened_by_lightly,
  ),
  'sigmoid': (loss.sigmoid_loss, sigmoid_of_open_clip),
  'dcl': (
    lambda z: loss.dcl_loss(z, temperature=0.1),
    lambda: lightly('DCLLoss', temperature=0.1),
  ),
  'nt_xent': (
    lambda z: loss.nt_xent_loss(z, temperature=0.2),
    lambda: lightly('NTXentLoss', temperature=0.2),
  ),
  # It takes half of the variance term.
  'vicreg': (
    lambda z: loss.vicreg_loss(z, variance_weight=12.5),
    lambda: lightly('VICRegLoss'),
  ),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_loss_equals_that_of_a_published_package(name):
  ours, theirs = PUBLISHED[name]
  # So short that VICReg's variance term counts.
  assert_same_loss_and_gradient(ours, theirs(), embeddings(batch=32) / 6)


@pytest.mark.parametrize('views', [1, 2])
@pytest.mark.parametrize(
  'labels', [[0, 1, 2, 3, 0, 1, 2, 3, 0], [-1, 3, -1, 0, -1, 2, 2, -1, -1]]
)
def test_clop_equals_ours_in_value_and_gradient(labels, views):
  prototypes = work(num_classes=4, dim=DIM).prototypes()
  np.testing.assert_allclose(prototypes @ prototypes.T, np.eye(4), atol=1e-6)
  squeezed = (lambda z: z[0]) if views == 1 else (lambda z: z)
  assert_same_loss_and_gradient(
    lambda z: loss.clop_loss(
      squeezed(z), jnp.array(labels), jnp.asarray(prototypes.numpy())
    ),
    lambda z: torch_losses.clop(squeezed(z), torch.tensor(labels), prototypes),
    embeddings(views),
  )


def test_clop_without_a_labelled_example_is_zero():
  z, prototypes = torch.from_numpy(embeddings()), torch.eye(4, DIM)
  labels = torch.full((z.shape[1],), -1)
  assert torch_losses.clop(z, labels, prototypes) == 0


def our_networks(depth, stem):
  head = heads.ProjectionHead(dim=DIM, hidden_dim=HIDDEN_DIM)
  return BACKBONES[depth](stem=stem), head


def our_shapes(depth, stem):
  backbone, head = our_networks(depth, stem)
  init = functools.partial(backbone.init, train=False)
  key, images = jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), float)
  variables = jax.eval_shape(init, key, images)
  apply = functools.partial(backbone.apply, train=False)
  features = jax.eval_shape(apply, variables, images)
  init = functools.partial(head.init, train=False)
  return variables, jax.eval_shape(init, key, features)


def peer(depth, stem):
  return torch_networks.network(depth, stem, HIDDEN_DIM, DIM)


@pytest.mark.parametrize('stem', ['cifar', 'imagenet'])
@pytest.mark.parametrize('depth', [8, 18, 50])
def test_the_networks_have_as_many_parameters_as_ours(depth, stem):
  for ours, theirs in zip(
    our_shapes(depth, stem), peer(depth, stem), strict=True
  ):
    expected = sum(x.size for x in jax.tree.leaves(ours['params']))
    assert sum(x.numel() for x in theirs.parameters()) == expected


def random_variables(shapes):
  """Variables without an initial value."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    name = path[-1].key
    if name in ('scale', 'var'):
      return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
    fan_out = leaf.size / leaf.shape[-2] if name == 'kernel' else 100
    return rng.normal(scale=fan_out**-0.5, size=leaf.shape).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def copy(theirs, ours, statistics=None):
  """Copies a layer's parameters and statistics to its PyTorch module."""
  tensors = {
    'weight': ours.get('kernel', ours.get('scale')),
    'bias': ours.get('bias'),
  }
  if statistics is not None:
    tensors |= {
      'running_mean': statistics['mean'],
      'running_var': statistics['var'],
    }
  for name, value in tensors.items():
    if value is not None:
      axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[value.ndim]
      getattr(theirs, name).copy_(torch.tensor(value.transpose(axes)))


@torch.no_grad()
def copy_backbone(variables, theirs):
  params, statistics = variables['params'], variables['batch_stats']
  copy(theirs.conv1, params['conv1'])
  copy(theirs.bn1, params['bn1'], statistics['bn1'])
  for stage, blocks in enumerate(theirs.layers):
    for index, block in enumerate(blocks):
      name = f'layer{stage + 1}_{index}'
      modules = dict(block.named_children())
      shortcut = modules.pop('downsample')
      if not isinstance(shortcut, torch.nn.Identity):
        modules['downsample_conv'], modules['downsample_bn'] = shortcut
      assert set(modules) == set(params[name])
      for child, module in modules.items():
        copy(module, params[name][child], statistics[name].get(child))


@torch.no_grad()
def copy_head(variables, theirs):
  params, statistics = variables['params'], variables['batch_stats']
  copy(theirs.dense1, params['dense1'])
  copy(theirs.bn1, params['bn1'], statistics['bn1'])
  copy(theirs.dense2, params['dense2'])


@pytest.mark.parametrize(
  ('depth', 'stem'), [(18, 'cifar'), (18, 'imagenet'), (50, 'cifar')]
)
def test_features_and_embeddings_equal_ours_for_the_same_variables(depth, stem):
  variables = [random_variables(shapes) for shapes in our_shapes(depth, stem)]
  images = np.random.default_rng(1).normal(size=(2, 32, 32, 3))
  images = images.astype(np.float32)
  theirs = peer(depth, stem).eval()
  copy_backbone(variables[0], theirs[0])
  copy_head(variables[1], theirs[1])
  x, y = jnp.asarray(images), torch.from_numpy(images.transpose(0, 3, 1, 2))
  networks = our_networks(depth, stem)
  for ours, ours_variables, their in zip(
    networks, variables, theirs, strict=True
  ):
    x = jax.jit(functools.partial(ours.apply, train=False))(ours_variables, x)
    with torch.no_grad():
      y = their(y)
    scale = float(jnp.abs(x).max())
    assert scale > 0.1
    np.testing.assert_allclose(y, x, atol=1e-4 * max(1.0, scale))


MEAN = torch_augment.channels(torch_augment.MEAN)
STD = torch_augment.channels(torch_augment.STD)


def views(images, size, **recipe):
  """The batched views before their normalization."""
  return torch_augment.views(images, size, MEAN, STD, **recipe) * STD + MEAN


@pytest.mark.parametrize('shape', [(8, 8), (12, 20)])
def test_batched_views_have_the_requested_size(shape):
  images = torch.randint(256, (64, 3, *shape), dtype=torch.uint8)
  x = torch_augment.views(images, 8, MEAN, STD)
  assert x.shape == (64, 3, 8, 8)
  assert x.dtype == torch.float32
  assert x.is_contiguous(memory_format=torch.channels_last)
  x = views(images, 8)
  assert x.min() > -1e-5
  assert x.max() < 1 + 1e-5
  assert x.std() > 0.1


def test_batched_views_of_grey_images_are_grey():
  images = torch.full((256, 3, 8, 8), 100, dtype=torch.uint8)
  plain = views(images, 8, jitter_probability=0)
  torch.testing.assert_close(plain, images / 255)
  # Brightness is all that is left of the jitter.
  jittered = views(images, 8) * 255
  level = jittered[:, :1, :1, :1]
  torch.testing.assert_close(jittered, level.expand_as(jittered))
  assert 60 < level.min() < 65
  assert 135 < level.max() < 140
  untouched = (level - 100).abs() < 1e-3
  assert 0.12 < untouched.float().mean() < 0.28


def test_about_half_of_the_batched_views_are_flipped():
  ramp = torch.arange(0, 256, 8, dtype=torch.uint8).expand(1000, 3, 32, 32)
  rows = views(ramp, 32, jitter_probability=0)[:, 0, 0]
  rising = (rows.diff() >= 0).all(1)
  assert (rising | (rows.diff() <= 0).all(1)).all()
  assert 0.4 < rising.float().mean() < 0.6


def test_about_a_fifth_of_the_batched_views_are_grey():
  images = torch.randint(256, (1000, 3, 1, 1), dtype=torch.uint8)
  x = views(images, 4, jitter_probability=0)
  grey = (x.amax(1) - x.amin(1)).amax((1, 2)) < 1e-5
  assert 0.15 < grey.float().mean() < 0.25


def test_a_batched_crop_reads_its_box(monkeypatch):
  columns = torch.arange(16.0) + 0.5  # centres of pixels
  images = (columns / 16).expand(4, 3, 16, 16)
  box = torch.tensor([0.375, 0.5, 0.5, 0.25])  # columns 2 to 10, rows 6 to 10
  monkeypatch.setattr(
    torch_augment, 'random_boxes', lambda x: box[:, None].expand(4, 4)
  )
  crops = torch_augment.crop_and_flip(images, 8)[:, 0] * 16
  expected = (torch.arange(8) + 2.5).expand(4, 8, 8)
  torch.testing.assert_close(crops.sort().values, expected)  # flipped or not
  crops = torch_augment.crop_and_flip(images.mT, 8)[:, 0] * 16
  expected = (6 + (torch.arange(8) + 0.5) / 2)[:, None].expand(4, 8, 8)
  torch.testing.assert_close(crops, expected)


def test_random_boxes_lie_in_the_image_and_keep_area_and_aspect():
  x, y, width, height = torch_augment.random_boxes(torch.empty(2000, 3, 10, 20))
  for centre, side in ((x, width), (y, height)):
    assert (centre - side / 2).min() > -1e-6
    assert (centre + side / 2).max() < 1 + 1e-6
  fitted = (width < 1) | (height < 1)
  area = (width * height)[fitted]
  aspect = (2 * width / height)[fitted]
  assert 0.08 <= area.min() < 0.1
  assert area.max() > 0.6
  assert 0.75 - 1e-4 <= aspect.min() < 0.77
  assert 1.3 < aspect.max() < 4 / 3 + 1e-4


def test_the_batched_hue_equals_colorsys():
  colours = torch.rand(50, 3, 1, 1)
  turns = torch.rand(50, 1, 1, 1) - 0.5
  turned = torch_augment.turn_hue(colours, turns).flatten(1)
  for colour, turn, got in zip(
    colours.flatten(1).tolist(), turns.flatten().tolist(), turned, strict=True
  ):
    hue, saturation, value = colorsys.rgb_to_hsv(*colour)
    expected = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize('size', [(40, 12), (12, 40)])
def test_pillow_boxes_lie_in_the_image(size):
  rng = random.Random(0)
  width, height = size
  for _ in range(200):
    left, top, right, bottom = pillow_views.random_box(rng, *size)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_pillow_views_of_grey_images_are_grey_and_half_are_flipped():
  rng = random.Random(0)
  flat = Image.new('RGB', (16, 16), (100, 100, 100))
  levels = set()
  for _ in range(100):
    view = np.asarray(pillow_views.view(flat, 8, rng))
    assert view.shape == (8, 8, 3)
    assert np.ptp(view) <= 1  # hue and back in 8 bits
    levels.add(int(view.max()))
  assert 60 <= min(levels) < 70
  assert 130 < max(levels) <= 140
  ramp = np.broadcast_to(np.arange(0, 256, 8, np.uint8)[:, None], (32, 32, 3))
  ramp = Image.fromarray(np.ascontiguousarray(ramp))
  rising = 0
  for _ in range(300):
    row = np.asarray(pillow_views.view(ramp, 32, rng)).mean((0, 2))
    rising += row[-1] > row[0]
  assert 120 < rising < 180


def tiny_data(examples=20):
  rng = np.random.default_rng(0)
  images = rng.integers(256, size=(examples, 8, 8, 3), dtype=np.uint8)
  return images, rng.integers(-1, 4, size=examples)


def work(examples=20, num_classes=4, dim=8):
  images, labels = tiny_data(examples)
  return torch_steps.Work(
    depth=18,
    stem='cifar',
    size=8,
    batch=8,
    device='cpu',
    images=images,
    labels=labels,
    num_classes=num_classes,
    dim=dim,
    temperature=0.5,
  )


def make_step(form, **options):
  return getattr(torch_steps, form)(work(), **options)


@pytest.mark.parametrize(
  ('form', 'options', 'passes'),
  [
    ('authors', {'workers': 0}, 3),
    ('expert', {'compile': False}, 1),
    ('expert', {'compile': False, 'dtype': 'bfloat16'}, 1),
  ],
)
def test_a_step_trains_every_parameter(form, options, passes):
  step = make_step(form, **options)
  seen = []
  step.network.register_forward_hook(
    lambda module, images, z: seen.append((images[0].shape, z.dtype))
  )
  before = [x.clone() for x in step.network.parameters()]
  step()
  rows = 8 if form == 'authors' else 16
  assert seen == passes * [((rows, 3, 8, 8), torch.float32)]
  assert torch.isfinite(step.loss)
  for x, y in zip(step.network.parameters(), before, strict=True):
    assert x.dtype == torch.float32
    assert (x != y).any()
  step.close()


# 20 examples are two batches of 8, so the fifth step is in a third epoch.
def test_workers_last_several_epochs_and_stop_when_closed():
  step = make_step('authors', workers=2)
  step()
  workers = multiprocessing.active_children()
  assert len(workers) == 2
  for _ in range(4):
    step()
  assert multiprocessing.active_children() == workers
  step.close()
  assert multiprocessing.active_children() == []
  assert not any(worker.is_alive() for worker in workers)


def test_an_epoch_has_each_example_once():
  batches = torch_steps.shuffled(20, 8, 'cpu')
  first, second, third = (next(batches) for _ in range(3))
  assert len({*first.tolist(), *second.tolist()}) == 16
  assert len(third) == 8


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: peer(34, 'cifar'), 'depth.*34'),
    (lambda: peer(18, 'tiny'), "stem.*'tiny'"),
    (lambda: work(examples=7), 'images.* one batch'),
    (lambda: work(num_classes=5, dim=4), 'num_classes.*dim=4'),
    (lambda: make_step('expert', dtype='float16'), "dtype.*'float16'"),
  ],
)
def test_invalid_arguments(call, message):
  with pytest.raises(ValueError, match=message):
    call()
