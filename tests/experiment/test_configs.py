"""Every file of configs/ builds, and has the settings that it claims."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clop_jax import defaults
from clop_jax.data import augment
from clop_jax.data import loader
from clop_jax.experiment import build
from clop_jax.experiment import components
from clop_jax.runtime import parallel
from tests import small

PATHS = sorted((small.ROOT / 'configs').glob('*.py'))


def load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module, module.get_config()


def all_fields(config, prefix=''):
  for name, value in config.items():
    if hasattr(value, 'items') and name != 'options':
      yield from all_fields(value, f'{prefix}{name}.')
    else:
      yield f'{prefix}{name}'


@pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)
def test_config_traces_a_whole_step(path):
  _, config = load(path)
  assert config.is_locked
  assert {*all_fields(config)} == {*all_fields(defaults.get_config())}
  config = config.copy_and_resolve_references().unlock()
  # Some take the number from the source.
  config.data.num_classes = config.data.num_classes or 7
  config.model.name = 'resnet8'  # deeper networks take longer to trace
  run = build.build(config, total_steps=2000, steps_per_epoch=10)
  mesh = parallel.make_mesh(jax.devices()[:1])
  state = build.abstract_state(run, mesh)
  assert state.prototypes.shape == (
    config.data.num_classes,
    config.model.embedding_dim,
  )
  size, channels = config.augment.size, config.data.channels
  crops = (2,) if config.data.host_crops else ()
  batch = {
    'image': jax.ShapeDtypeStruct((4, *crops, size, size, channels), np.uint8),
    'label': jax.ShapeDtypeStruct((4,), np.int32),
    'index': jax.ShapeDtypeStruct((4,), np.int32),
  }
  step = parallel.map_step(
    lambda state, batch, key: run.step(state, loader.unpack({}, batch), key),
    mesh,
    batch_axes=(None, 0, None),
  )
  new_state, metrics = jax.eval_shape(step, state, batch, jax.random.key(0))
  assert new_state.step.shape == metrics['loss'].shape == ()


def test_imagenet_has_a_recipe_for_vits():
  module, _ = load(small.ROOT / 'configs' / 'imagenet2012.py')
  config = module.get_config('vit_s')
  defaults.check(config)
  assert (config.model.name, config.optimizer.name) == ('vit_s', 'adamw')
  assert config.optimizer.warmup_epochs == 40
  networks = components.networks(config)
  shapes = jax.eval_shape(
    networks.backbone.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3))
  )
  # ViT-S/16 has 22 million parameters without a classifier.
  assert sum(x.size for x in jax.tree.leaves(shapes)) == 21_665_664
  with pytest.raises(ValueError, match=r"colon.*'vit_x'"):
    module.get_config('vit_x')


@pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)
def test_config_documents_its_commands_and_requirements(path):
  module, config = load(path)
  train = rf'clop_jax\.train --config=configs/{path.name} --workdir='
  assert re.search(train, module.__doc__)
  assert 'clop_jax.evaluate --workdir=' in module.__doc__
  assert re.search(r'[Nn]eeds? ', module.__doc__)
  for field in re.findall(r'--config\.([\w.]+)=', module.__doc__):
    assert field in {*all_fields(config)}
  if config.data.name in ('cifar10', 'cifar100', 'stl10', 'imagenet2012'):
    assert f'prepare --name={config.data.name}' in module.__doc__
    assert 'TensorFlow' in module.__doc__


# From the authors' code.
@pytest.mark.parametrize(
  ('name', 'dim', 'temperature', 'size', 'mean', 'std', 'warmup'),
  [
    ('cifar10', 128, 0.5, 32, None, None, 0),
    (
      'cifar100',
      128,
      0.2,
      32,
      (0.5071, 0.4867, 0.4408),
      (0.2675, 0.2565, 0.2761),
      0,
    ),
    (
      'tiny_imagenet',
      256,
      0.1,
      64,
      (0.4802, 0.4481, 0.3975),
      (0.2302, 0.2265, 0.2262),
      0,
    ),
    (
      'imagenet2012',
      1024,
      0.1,
      224,
      (0.485, 0.456, 0.406),
      (0.229, 0.224, 0.225),
      10,
    ),
  ],
)
def test_settings_of_the_paper(name, dim, temperature, size, mean, std, warmup):
  _, config = load(small.ROOT / 'configs' / f'{name}.py')
  assert config.model.embedding_dim == dim
  assert config.loss.temperature == temperature
  assert config.augment.size == size
  if mean is not None:
    assert tuple(config.augment.mean) == mean
    assert tuple(config.augment.std) == std
  optimizer = config.optimizer
  assert (optimizer.name, optimizer.learning_rate) == ('lars', 0.3)
  assert optimizer.scaling == 'linear'
  assert (optimizer.momentum, optimizer.weight_decay) == (0.9, 1e-6)
  assert optimizer.trust_coefficient == 0.001
  assert optimizer.warmup_epochs == warmup
  assert config.train.num_epochs == 200
  assert config.model.name == 'resnet50'
  assert config.model.stem == ('cifar' if size <= 64 else 'imagenet')
  assert config.loss.clop_weight == 1
  assert config.data.label_fraction == 0.1
  if name.startswith('cifar'):
    jitter = ('brightness', 'contrast', 'saturation', 'hue')
    assert [config.augment[x] for x in jitter] == [0.4, 0.4, 0.4, 0.1]
    assert config.augment.jitter_probability == 0.8
    assert config.augment.grey_probability == 0.2
    assert config.augment.flip_probability == 0.5
  if name == 'tiny_imagenet':
    assert config.augment.randaugment_layers == 3
    assert config.augment.randaugment_magnitude == 18
  if name == 'imagenet2012':
    assert config.augment.blur_probability == 0.5
    assert config.augment.solarize_probability > 0


def test_recipes_make_finite_views():
  for name in ('imagenet2012', 'tiny_imagenet'):
    _, config = load(small.ROOT / 'configs' / f'{name}.py')
    config = config.copy_and_resolve_references().unlock()
    config.augment.size = 16
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(4, 16, 16, 3)).astype(np.uint8)
    if config.data.host_crops:
      images = np.stack([images, images])
    keys = augment.example_keys(jax.random.key(0), 0, np.arange(4))
    views = augment.two_views(keys, images, build.recipe(config))
    assert views.shape == (2, 4, 16, 16, 3)
    assert np.isfinite(views).all() and np.std(views) > 0.1
