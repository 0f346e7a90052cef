import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clop_jax
from clop_jax.experiment import build
from clop_jax.experiment import checkpoint
from clop_jax.experiment import workdir as workdir_lib
from clop_jax.runtime import parallel
from tests import small


@pytest.fixture(scope='module')
def run(digits_run):
  return clop_jax.load(str(digits_run), devices=jax.devices()[:1])


@pytest.fixture(scope='module')
def images(digits_dir):
  return small.digits_arrays(digits_dir, 'test')[0]


def test_features_are_those_of_the_backbone_on_normalized_images(run, images):
  features, embeddings = run.apply(images[:50])
  augment = run.config.augment
  x = (images[:50] / 255 - np.array(augment.mean)) / np.array(augment.std)
  parts = [
    {name: collection[part] for name, collection in run.variables.items()}
    for part in ('backbone', 'projection_head')
  ]
  networks = run.experiment.backbone, run.experiment.projection_head
  apply = [jax.jit(functools.partial(n.apply, train=False)) for n in networks]
  expected, _ = apply[0](parts[0], x.astype(np.float32))
  np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
  expected = apply[1](parts[1], expected)
  np.testing.assert_allclose(embeddings, expected, rtol=1e-3, atol=1e-4)
  assert features.dtype == embeddings.dtype == jnp.float32
  assert embeddings.shape == (50, 16)


@pytest.mark.parametrize(
  ('shape', 'dtype', 'message'),
  [
    ((8, 8, 1), np.uint8, r'uint8 \[8, 8, 1\]; .*images\[None\]'),
    ((2, 8, 8, 3), np.uint8, r'uint8 \[2, 8, 8, 3\]'),
    ((2, 8, 8, 1), np.float32, r'float32 .*255 \* images'),
    ((), np.uint8, r'uint8 \[\]'),
  ],
)
def test_images_of_wrong_shape_or_dtype_are_refused(run, shape, dtype, message):
  with pytest.raises(ValueError, match=rf'images must be uint8.*got {message}'):
    run.apply(np.zeros(shape, dtype))


def test_pure_can_be_mapped_jitted_and_differentiated(run, images):
  stacked = images[:12].reshape(3, 4, *images.shape[1:])
  mapped = jax.jit(jax.vmap(run.pure, in_axes=(None, 0)))
  for whole, rows in zip(
    mapped(run.variables, stacked), run.apply(images[:12]), strict=True
  ):
    np.testing.assert_allclose(
      whole.reshape(12, -1), rows, rtol=1e-4, atol=1e-5
    )

  @jax.jit
  def total(variables):
    features, embeddings = run.pure(variables, images[:8])
    return jnp.mean(features) + jnp.mean(embeddings**2)

  gradient = jax.grad(total)(run.variables)['params']
  # Compared with the difference quotient along the gradient.
  norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradient)))
  values = []
  for size in (1e-3, -1e-3):
    params = jax.tree.map(
      lambda p, g, size=size: p + size * g / norm,
      run.variables['params'],
      gradient,
    )
    values.append(float(total(run.variables | {'params': params})))
  np.testing.assert_allclose((values[0] - values[1]) / 2e-3, norm, rtol=0.03)


def test_images_may_have_any_size(run, images):
  large = images[:4].repeat(3, axis=1).repeat(3, axis=2)
  features, _ = run.apply(large)
  exact, _ = run.apply(images[:4])
  # Resizing back changes a few pixels at the edges.
  cosines = np.sum(features * exact, axis=1) / (
    np.linalg.norm(features, axis=1) * np.linalg.norm(exact, axis=1)
  )
  assert (cosines > 0.95).all()


def test_unknown_checkpoint_lists_the_existing_ones(digits_run):
  workdir, one = str(digits_run), jax.devices()[:1]
  earlier = clop_jax.load(workdir, which=5, devices=one)
  assert earlier.step == 5
  assert clop_jax.load(workdir, devices=one).step == 10
  message = r'no checkpoint of step 7 .*there are \[5, 10\]'
  with pytest.raises(ValueError, match=message):
    clop_jax.load(workdir, which='7', devices=one)
  with pytest.raises(ValueError, match=r"or a step of \[5, 10\], got 'newest'"):
    clop_jax.load(workdir, which='newest', devices=one)
  with pytest.raises(ValueError, match=r'train with --config.train.keep_best'):
    clop_jax.load(workdir, which='best', devices=one)


def test_damage_in_the_optimizer_state_is_noticed(
  digits_run, tmp_path, capsys, monkeypatch
):
  workdir = shutil.copytree(digits_run, tmp_path / 'run')
  config = workdir_lib.load_config(str(workdir))
  with workdir_lib.open_checkpoints(config, str(workdir)) as checkpoints:
    built = build.build(config, total_steps=10, steps_per_epoch=5)
    target = build.abstract_state(built, parallel.make_mesh())
    state = checkpoints.restore(10, target)
    # Evaluation does not use the optimizer's state, but the checksum covers it.
    broken = jax.tree.map(lambda x: x + 1, state.opt_state)
    checksum = checkpoint._checksum(state)
    with monkeypatch.context() as patch:
      patch.setattr(checkpoint, '_checksum', lambda _: checksum)
      checkpoints.save(state.replace(opt_state=broken), 15)
      checkpoints.wait()
  run = clop_jax.load(str(workdir))
  assert run.step == 10
  assert 'step 15' in capsys.readouterr().err
  assert len(run.prototypes.sharding.device_set) == jax.device_count()


def test_folder_without_a_run_or_a_checkpoint_is_refused(digits_run, tmp_path):
  with pytest.raises(ValueError, match='does not exist; train first'):
    clop_jax.load(str(tmp_path / 'nowhere'))
  with pytest.raises(ValueError, match=r'no config.json.*nothing'):
    clop_jax.load(str(tmp_path))
  shutil.copy(digits_run / 'config.json', tmp_path)
  with pytest.raises(ValueError, match='holds no checkpoint yet; train first'):
    clop_jax.load(str(tmp_path))
