import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clop_jax.data import augment
from clop_jax.data import loader
from clop_jax.evaluation import finetune
from clop_jax.evaluation import probe
from clop_jax.models import resnet
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


def backbone(axis_name=None, **arguments):
  return resnet.ResNet8(width_multiplier=0.25, axis_name=axis_name, **arguments)


@pytest.fixture(scope='module')
def variables():
  images = jnp.zeros((1, 8, 8, 1))
  init = functools.partial(backbone().init, train=False)
  return jax.jit(init)(jax.random.key(1), images)


def examples(count=16, seed=0):
  """Classes of another brightness each, with noise."""
  rng = np.random.default_rng(seed)
  labels = np.arange(count, dtype=np.int32) % CLASSES
  images = (
    rng.integers(0, 100, (count, 8, 8, 1)) + 70 * labels[:, None, None, None]
  )
  return images.astype(np.uint8), labels


def test_two_steps_are_those_of_sgd_by_hand(variables):
  images, labels = examples()
  feature_dim, rate, steps = 16, 0.5, 4
  state = finetune.create_state(
    variables, num_classes=CLASSES, feature_dim=feature_dim
  )
  batch = {'image': images, 'label': labels, 'index': np.arange(len(labels))}
  numbers = {'learning_rate': rate, 'total_steps': steps}
  step = functools.partial(
    finetune.train_step, backbone=backbone(), recipe=PLAIN
  )
  step = jax.jit(step)
  first, loss = step(state, batch, jax.random.key(0), numbers)
  second, _ = step(first, batch, jax.random.key(0), numbers)

  # The head begins at 0: every class is equally likely, its gradient is
  # features times (probability - truth), and the backbone has none yet.
  x = (images / 255 - 0.4) / 0.3
  apply = functools.partial(
    backbone().apply, train=True, mutable=['batch_stats']
  )
  features, updated = jax.jit(apply)(variables, x.astype(np.float32))
  features = np.asarray(features, np.float64)
  errors = np.full((len(labels), CLASSES), 1 / CLASSES)
  errors[np.arange(len(labels)), labels] -= 1
  kernel = -rate * features.T @ errors / len(labels)
  bias = -rate * errors.mean(axis=0)
  np.testing.assert_allclose(loss, np.log(CLASSES), rtol=1e-5)
  head = first['params']['head']['Dense_0']
  np.testing.assert_allclose(head['kernel'], kernel, rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(head['bias'], bias, rtol=1e-3, atol=1e-5)
  for a, b in zip(
    jax.tree.leaves(first['params']['backbone']),
    jax.tree.leaves(variables['params']),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  for a, b in zip(
    jax.tree.leaves(first['batch_stats']),
    jax.tree.leaves(updated['batch_stats']),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)

  # Then momentum, a rate of cos(pi / 4), and the backbone moves too.
  logits = features @ kernel + bias
  shares = np.exp(logits - logits.max(axis=1, keepdims=True))
  errors_2 = shares / shares.sum(axis=1, keepdims=True)
  errors_2[np.arange(len(labels)), labels] -= 1
  rate_2 = rate * 0.5 * (1 + np.cos(np.pi / steps))
  momentum = 0.9 * features.T @ errors + features.T @ errors_2
  kernel_2 = kernel - rate_2 * momentum / len(labels)
  head = second['params']['head']['Dense_0']
  np.testing.assert_allclose(head['kernel'], kernel_2, rtol=1e-2, atol=1e-4)
  moved = [
    float(jnp.abs(a - b).max())
    for a, b in zip(
      jax.tree.leaves(second['params']['backbone']),
      jax.tree.leaves(variables['params']),
      strict=True,
    )
  ]
  assert min(moved) > 0


def trainer(variables, devices, **arguments):
  small.need_devices(devices)
  mesh = parallel.make_mesh(jax.devices()[:devices])
  network = backbone(axis_name=parallel.DATA_AXIS, **arguments)
  return mesh, finetune.Trainer(
    network,
    variables,
    num_classes=CLASSES,
    recipe=PLAIN,
    channels=1,
    bn_scope=network.bn_scope,
    mesh=mesh,
    seed=0,
  )


def fit(variables, devices, *, chosen=None, **arguments):
  mesh, made = trainer(variables, devices)
  images, labels = examples(48)
  data = loader.ResidentLoader(images, labels, batch_size=16, seed=0, mesh=mesh)
  if chosen is not None:
    data = data.among(chosen, batch_size=16, seed=0)
  state, loss = made.fit(data, **arguments)
  batches = [(images, labels)]
  _, logits, _ = probe.extract(
    made.apply(state), batches, batch_size=48, mesh=mesh
  )
  return state, loss, logits, labels


def test_a_fit_learns_and_leaves_the_checkpoint_as_it_was(variables):
  before = probe.fingerprint(variables)
  state, loss, logits, labels = fit(
    variables, 1, learning_rate=0.1, total_steps=30
  )
  assert probe.fingerprint(variables) == before
  assert int(state['step']) == 30
  assert loss < 0.5 < np.log(CLASSES)
  # Evaluation mode: the running statistics have followed as well.
  assert np.mean(logits.argmax(axis=1) == labels) > 0.8


def test_eight_devices_fit_as_one_does(variables):
  one, _, one_logits, _ = fit(variables, 1, learning_rate=0.05, total_steps=3)
  eight, _, logits, _ = fit(variables, 8, learning_rate=0.05, total_steps=3)
  np.testing.assert_allclose(logits, one_logits, rtol=0.02, atol=0.02)
  for a, b in zip(
    jax.tree.leaves(eight['params']),
    jax.tree.leaves(one['params']),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=0.02, atol=2e-3)


def test_statistics_of_each_device_are_averaged(variables):
  mesh, made = trainer(variables, 2, bn_scope='device')
  images, labels = examples(48)
  data = loader.ResidentLoader(images, labels, batch_size=16, seed=0, mesh=mesh)
  state, loss = made.fit(data, learning_rate=0.05, total_steps=2)
  assert np.isfinite(loss)
  mean = state['batch_stats']['bn1']['mean']
  shards = [np.asarray(shard.data) for shard in mean.addressable_shards]
  for shard in shards[1:]:
    np.testing.assert_array_equal(shard, shards[0])


def test_only_the_chosen_examples_are_served():
  mesh = parallel.make_mesh(jax.devices()[:1])
  images, labels = examples(48)
  data = loader.ResidentLoader(images, labels, batch_size=1, seed=0, mesh=mesh)
  chosen = np.array([3, 5, 8, 40, 41])
  some = data.among(chosen, batch_size=2, seed=0)
  assert some.steps_per_epoch == 2
  served = []
  for batch in some.batches([range(0, 2), range(2, 4)]):
    for step in range(2):
      unpacked = loader.unpack(
        some.resident, jax.tree.map(lambda x, step=step: x[step], batch)
      )
      served += np.asarray(unpacked['index']).tolist()
      np.testing.assert_array_equal(
        unpacked['label'], labels[np.asarray(unpacked['index'])]
      )
  assert {*served} <= {*chosen.tolist()}
  assert len({*served[:4]}) == 4  # no example twice in an epoch
  np.testing.assert_array_equal(some.indices(0), served[:2])
  assert data.steps_per_epoch == 48  # the other loader is as it was
  with pytest.raises(ValueError, match='at most the 5 examples, got 6'):
    data.among(chosen, batch_size=6, seed=0)


def test_the_light_augmentation_crops_and_flips_and_nothing_else():
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
  seen = set()
  for seed in range(8):
    made = view(jax.random.key(seed), image)
    straight, flipped = image / 255, image[:, ::-1] / 255
    assert any(
      np.allclose(made, expected, atol=1e-5) for expected in (straight, flipped)
    )
    seen.add(bool(np.allclose(made, straight, atol=1e-5)))
  assert seen == {True, False}


def test_the_best_rate_is_chosen_the_lowest_on_a_tie():
  accuracies = {0.3: 0.5, 0.1: 0.7, 0.01: 0.7, 1.0: -1.0}
  rate, best = finetune.choose([0.3, 1.0, 0.1, 0.01], accuracies.get)
  assert (rate, best) == (0.01, 0.7)
  assert finetune.choose([0.3], None) == (0.3, None)
  for wrong in ([], [0.1, 0.0], [-1]):
    with pytest.raises(ValueError, match='finetune_learning_rates must hold'):
      finetune.choose(wrong, accuracies.get)
