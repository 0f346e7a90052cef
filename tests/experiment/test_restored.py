import functools
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clop_jax
from clop_jax import evaluate
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


def test_features_are_the_backbones_on_normalized_images(run, images):
  features, embeddings = run.apply(images[:50])
  augment = run.config.augment
  x = (images[:50] / 255 - np.array(augment.mean)) / np.array(augment.std)
  parts = [
    {name: collection[part] for name, collection in run.variables.items()}
    for part in ('backbone', 'projection_head')
  ]
  networks = run.experiment.backbone, run.experiment.projection_head
  apply = [jax.jit(functools.partial(n.apply, train=False)) for n in networks]
  expected = apply[0](parts[0], x.astype(np.float32))
  np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
  expected = apply[1](parts[1], expected)
  np.testing.assert_allclose(embeddings, expected, rtol=1e-3, atol=1e-4)
  assert features.dtype == embeddings.dtype == jnp.float32
  assert embeddings.shape == (50, 16)


@pytest.mark.parametrize(
  ('shape', 'dtype', 'way_out'),
  [
    ((8, 8, 1), np.uint8, 'got uint8 [8, 8, 1]; of one image: images[None]'),
    ((2, 8, 8), np.uint8, 'got uint8 [2, 8, 8]'),
    ((2, 8, 8, 3), np.uint8, 'got uint8 [2, 8, 8, 3]'),
    ((2, 8, 8, 1), np.float32, 'of [0, 1]: (255 * images).round().astype('),
    ((), np.uint8, 'got uint8 []'),
  ],
)
def test_other_images_are_refused(run, shape, dtype, way_out):
  with pytest.raises(ValueError) as caught:
    run.apply(np.zeros(shape, dtype))
  expected = 'images must be uint8 [batch, height, width, 1], as the run was'
  assert expected in str(caught.value)
  assert way_out in str(caught.value)


def test_embeddings_are_those_that_evaluation_measures(run, images, digits_run):
  request = evaluate.Request(str(digits_run), devices=jax.devices()[:1])
  arrays = evaluate.evaluate(request).arrays
  _, embeddings = run.apply(images)
  unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
  np.testing.assert_allclose(unit, arrays['embeddings'], atol=1e-5)
  np.testing.assert_array_equal(run.prototypes, arrays['prototypes'])


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
  # Against the difference quotient along the gradient itself.
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


def test_images_of_any_size_are_taken_but_only_uint8(run, images):
  large = images[:4].repeat(3, axis=1).repeat(3, axis=2)
  features, _ = run.apply(large)
  exact, _ = run.apply(images[:4])
  # Enlarged and brought back: not the same pixels at the edges, but near.
  cosines = np.sum(features * exact, axis=1) / (
    np.linalg.norm(features, axis=1) * np.linalg.norm(exact, axis=1)
  )
  assert (cosines > 0.95).all()
  with pytest.raises(ValueError, match=r'images must be uint8 .*, got float32'):
    run.apply(images[:4].astype(np.float32))


def test_a_step_is_chosen_and_an_unknown_one_lists_those_there_are(digits_run):
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


def test_damage_anywhere_in_a_checkpoint_is_seen_on_any_devices(
  digits_run, tmp_path, capsys, monkeypatch
):
  workdir = shutil.copytree(digits_run, tmp_path / 'run')
  config = workdir_lib.load_config(str(workdir))
  with workdir_lib.open_checkpoints(config, str(workdir)) as checkpoints:
    built = build.build(config, total_steps=10, steps_per_epoch=5)
    target = build.abstract_state(built, parallel.make_mesh())
    state = checkpoints.restore(10, target)
    # Evaluation does not use the optimizer's state, whose checksum is wrong.
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


def test_a_folder_that_is_no_run_is_refused(tmp_path):
  with pytest.raises(ValueError, match='does not exist; train first'):
    clop_jax.load(str(tmp_path / 'nowhere'))
  with pytest.raises(ValueError, match=r'holds no config.json'):
    clop_jax.load(str(tmp_path))


def test_a_fresh_process_gives_the_same_features(run, digits_run):
  code = f"""
import json
import clop_jax
import numpy as np
images = np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8, 1)
features, _ = clop_jax.load({str(digits_run)!r}).apply(images)
print(json.dumps(np.asarray(features, np.float64).tolist()))
"""
  result = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    env=small.environment(1),
  )
  assert result.returncode == 0, result.stderr
  made = np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8, 1)
  np.testing.assert_allclose(
    np.array(json.loads(result.stdout)),
    run.apply(made)[0],
    rtol=1e-3,
    atol=1e-4,
  )
