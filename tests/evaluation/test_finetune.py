import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clop_jax.data import augment
from clop_jax.data import loader
from clop_jax.evaluation import finetune
from clop_jax.evaluation import probe
from clop_jax.runtime import parallel
from tests import small

CLASSES = 3
AUGMENT = {
  'size': 8,
  'mean': (0.4,),
  'std': (0.3,),
  'crop_area': (0.5, 1.0),
  'crop_aspect': (0.75, 1.25),
  'flip_probability': 0.5,
  'interpolation': 'bilinear',
}
PLAIN = finetune.recipe(AUGMENT, random=False)


class Dense(nn.Module):
  """Stands for a ResNet, which takes much longer to compile."""

  axis_name: str | None = None
  bn_scope: str = 'global'

  @nn.compact
  def __call__(self, images, train):
    x = nn.Dense(16)(images.reshape(len(images), -1))
    is_global = train and self.bn_scope == 'global'
    axis_name = self.axis_name if is_global else None
    x = nn.BatchNorm(
      use_running_average=not train, axis_name=axis_name, momentum=0.9
    )(x)
    return nn.relu(x)


@pytest.fixture(scope='module')
def variables():
  images = jnp.zeros((1, 8, 8, 1))
  return Dense().init(jax.random.key(1), images, train=False)


def examples(count=48):
  """Classes that differ in brightness, with noise."""
  rng = np.random.default_rng(0)
  labels = np.arange(count, dtype=np.int32) % CLASSES
  images = rng.integers(0, 100, (count, 8, 8, 1))
  images += 70 * labels[:, None, None, None]
  return images.astype(np.uint8), labels


def assert_trees_close(found, expected, **tolerances):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **tolerances),
    found,
    expected,
  )


def test_two_steps_equal_sgd_by_hand(variables):
  images, labels = examples(16)
  rate, steps = 0.5, 4
  state = finetune.create_state(variables, num_classes=CLASSES, feature_dim=16)
  batch = {'image': images, 'label': labels, 'index': np.arange(len(labels))}
  numbers = {'learning_rate': rate, 'total_steps': steps}
  step = jax.jit(
    functools.partial(finetune.train_step, backbone=Dense(), recipe=PLAIN)
  )
  first, loss = step(state, batch, jax.random.key(0), numbers)
  second, _ = step(first, batch, jax.random.key(0), numbers)

  # The head starts at 0, so every class is equally likely, its gradient is
  # features times (probability - truth), and the backbone has no gradient yet.
  x = (images / 255 - 0.4) / 0.3
  features, updated = Dense().apply(
    variables, x.astype(np.float32), train=True, mutable=['batch_stats']
  )
  features = np.asarray(features, np.float64)
  errors = np.full((len(labels), CLASSES), 1 / CLASSES)
  errors[np.arange(len(labels)), labels] -= 1
  kernel = -rate * features.T @ errors / len(labels)
  bias = -rate * errors.mean(axis=0)
  np.testing.assert_allclose(loss, np.log(CLASSES), rtol=1e-5)
  head = first['params']['head']['Dense_0']
  np.testing.assert_allclose(head['kernel'], kernel, rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(head['bias'], bias, rtol=1e-3, atol=1e-5)
  assert_trees_close(first['params']['backbone'], variables['params'], rtol=0)
  assert_trees_close(
    first['batch_stats'], updated['batch_stats'], rtol=1e-4, atol=1e-6
  )

  # The second step has momentum and a rate of (1 + cos(pi / 4)) / 2.
  logits = features @ kernel + bias
  shares = np.exp(logits - logits.max(axis=1, keepdims=True))
  errors_2 = shares / shares.sum(axis=1, keepdims=True)
  errors_2[np.arange(len(labels)), labels] -= 1
  rate_2 = rate * 0.5 * (1 + np.cos(np.pi / steps))
  momentum = 0.9 * features.T @ errors + features.T @ errors_2
  kernel_2 = kernel - rate_2 * momentum / len(labels)
  head = second['params']['head']['Dense_0']
  np.testing.assert_allclose(head['kernel'], kernel_2, rtol=1e-2, atol=1e-4)
  moved = jax.tree.map(
    lambda a, b: bool((a != b).any()),
    second['params']['backbone'],
    variables['params'],
  )
  assert moved['Dense_0']['kernel'] and moved['BatchNorm_0']['scale']


def fit(variables, devices, bn_scope='global', **arguments):
  small.need_devices(devices)
  mesh = parallel.make_mesh(jax.devices()[:devices])
  trainer = finetune.Trainer(
    Dense(parallel.DATA_AXIS, bn_scope),
    variables,
    num_classes=CLASSES,
    recipe=PLAIN,
    channels=1,
    bn_scope=bn_scope,
    mesh=mesh,
    seed=0,
  )
  images, labels = examples()
  data = loader.ResidentLoader(images, labels, batch_size=16, seed=0, mesh=mesh)
  state, loss = trainer.fit(data, **arguments)
  _, logits, _ = probe.extract(
    trainer.apply(state), [(images, labels)], batch_size=48, mesh=mesh
  )
  return state, loss, logits


def test_fit_learns_and_keeps_the_checkpoint(variables):
  before = probe.fingerprint(variables)
  state, loss, logits = fit(variables, 1, learning_rate=0.1, total_steps=30)
  assert probe.fingerprint(variables) == before
  assert int(state['step']) == 30
  assert loss < 0.5 < np.log(CLASSES)
  # In evaluation mode, so the running statistics have followed.
  assert np.mean(logits.argmax(axis=1) == examples()[1]) > 0.8


def test_fit_on_8_devices_equals_1_device(variables):
  arguments = {'learning_rate': 0.05, 'total_steps': 3}
  one, _, one_logits = fit(variables, 1, **arguments)
  eight, _, logits = fit(variables, 8, **arguments)
  np.testing.assert_allclose(logits, one_logits, rtol=1e-3, atol=1e-3)
  assert_trees_close(eight['params'], one['params'], rtol=1e-3, atol=1e-4)


def test_batch_statistics_per_device_are_averaged(variables):
  state, loss, _ = fit(
    variables, 2, bn_scope='device', learning_rate=0.05, total_steps=2
  )
  assert np.isfinite(loss)
  mean = state['batch_stats']['BatchNorm_0']['mean']
  first, second = (np.asarray(shard.data) for shard in mean.addressable_shards)
  np.testing.assert_array_equal(first, second)


def test_recipe_crops_and_flips_only():
  recipe = finetune.recipe(
    AUGMENT
    | {
      'mean': (0.0,) * 3,
      'std': (1.0,) * 3,
      'crop_area': (1.0, 1.0),
      'crop_aspect': (1.0, 1.0),
    }
  )
  image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
  view = jax.jit(functools.partial(augment.view, recipe=recipe))
  straight, flipped = image / 255, image[:, ::-1] / 255
  seen = set()
  for seed in range(8):
    made = view(jax.random.key(seed), image)
    is_straight = np.allclose(made, straight, atol=1e-5)
    assert is_straight or np.allclose(made, flipped, atol=1e-5)
    seen.add(is_straight)
  assert seen == {True, False}


def test_learning_rate_is_the_best_one_and_the_lowest_on_a_tie():
  accuracies = {0.3: 0.5, 0.1: 0.7, 0.01: 0.7, 1.0: -1.0}
  assert finetune.choose([0.3, 1.0, 0.1, 0.01], accuracies.get) == (0.01, 0.7)
