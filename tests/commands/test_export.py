import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
from jax import export as jax_export
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import clop_jax
from clop_jax import export
from clop_jax import train
from clop_jax.experiment import build
from clop_jax.experiment import checkpoint
from clop_jax.experiment import workdir as workdir_lib
from clop_jax.runtime import parallel
from clop_jax.study import cell
from tests import small
from tests import torchvision_resnet as theirs

ONE = slice(0, 1)
DOCS = (small.ROOT / 'docs' / 'export.md').read_text()


def random_state(target, seed):
  """Returns a state of those shapes, unlike that of a new network."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = getattr(path[-1], 'key', None)
    if name in ('scale', 'var'):
      value = rng.uniform(0.5, 1.5, leaf.shape)
    elif name == 'kernel':
      scale = np.sqrt(2 * leaf.shape[-1] / leaf.size)
      value = rng.normal(scale=scale, size=leaf.shape)
    else:
      value = rng.normal(scale=0.2, size=leaf.shape)
    return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

  return jax.tree_util.tree_map_with_path(draw, target)


def save_run(workdir, **changes):
  """Saves a workdir with random weights at steps 3 and 5."""
  config = small.digits_config('unused', **changes)
  run = build.build(config, total_steps=10, steps_per_epoch=5)
  target = build.abstract_state(run, parallel.make_mesh(jax.devices()[ONE]))
  workdir.mkdir()
  text = json.dumps(workdir_lib.to_json(config))
  (workdir / 'config.json').write_text(text)
  with workdir_lib.open_checkpoints(config, str(workdir)) as checkpoints:
    for step in (3, 5):
      state = random_state(target, seed=step)
      state = state.replace(step=jax.numpy.asarray(step, jax.numpy.int32))
      checkpoints.save(state, step)
  return str(workdir)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """ResNet-8 on grey images of 8 px."""
  return save_run(tmp_path_factory.mktemp('runs') / 'grey')


@pytest.fixture(scope='module')
def colour_run(tmp_path_factory):
  """ResNet-18 on colour images, whose views are smaller than what is passed."""
  return save_run(
    tmp_path_factory.mktemp('runs') / 'colour',
    data__channels=3,
    data__image_size=16,
    augment__size=12,
    augment__mean=(0.5, 0.4, 0.3),
    augment__std=(0.2, 0.3, 0.25),
    model__name='resnet18',
    model__stem='imagenet',
    model__width_multiplier=0.125,
  )


@pytest.fixture(scope='module')
def weights_file(run, tmp_path_factory):
  path = tmp_path_factory.mktemp('weights') / 'backbone.safetensors'
  export.export(run, str(path))
  return path


def images(batch, size, channels, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (batch, size, size, channels), np.uint8)


def as_pytorch(x, metadata):
  """Returns images as the metadata describes them."""
  mean, std = json.loads(metadata['mean']), json.loads(metadata['std'])
  x = (x / 255 - np.array(mean)) / np.array(std)
  return x.transpose(0, 3, 1, 2)


def assert_same_network(outputs, expected):
  # A float32 ResNet-18 differs by up to 1.2e-6 of the largest value from one in
  # float64, with every JAX from 0.9 to 0.12.
  atol = 3e-6 * abs(expected).max()
  np.testing.assert_allclose(outputs, expected, rtol=0, atol=atol)


def opened(path):
  with safetensors.safe_open(path, 'np') as file:
    names = list(file.keys())
    return {name: file.get_tensor(name) for name in names}, file.metadata()


# --- Weights ------------------------------------------------------------------


@pytest.mark.parametrize(
  ('which', 'size', 'channels'), [('run', 8, 1), ('colour_run', 12, 3)]
)
def test_weights_give_the_features_of_the_run(
  which, size, channels, request, tmp_path
):
  workdir, out = request.getfixturevalue(which), tmp_path / 'w.safetensors'
  export.export(workdir, str(out), with_head=True)
  weights, metadata = opened(out)
  x = images(5, size, channels)
  restored = clop_jax.load(workdir, devices=jax.devices()[ONE])
  features, embeddings = restored.apply(x)
  expected = theirs.features(weights, as_pytorch(x, metadata))
  assert expected.std() > 0.05
  np.testing.assert_allclose(features, expected, atol=1e-4)
  np.testing.assert_allclose(
    embeddings, theirs.embeddings(weights, expected), atol=1e-4
  )
  np.testing.assert_array_equal(weights['prototypes'], restored.prototypes)
  assert json.loads(metadata['image_size']) == size
  assert json.loads(metadata['channels']) == channels


def test_weights_load_into_a_pytorch_resnet(colour_run, tmp_path):
  torch = pytest.importorskip('torch')
  out = tmp_path / 'w.safetensors'
  export.export(colour_run, str(out))
  weights, metadata = opened(out)
  network = theirs.network(18, width=8)
  network.load_state_dict(
    {name: torch.tensor(x) for name, x in weights.items()}
  )
  x = images(5, 12, 3)
  with torch.no_grad():
    outputs = network(torch.tensor(as_pytorch(x, metadata)).float()).numpy()
  features, _ = clop_jax.load(colour_run, devices=jax.devices()[ONE]).apply(x)
  np.testing.assert_allclose(features, outputs, atol=1e-4)


def test_weights_have_metadata(run, weights_file):
  weights, metadata = opened(weights_file)
  assert weights.keys() == theirs.shapes(8).keys()
  assert {int(weights[x]) for x in weights if x.endswith('tracked')} == {5}
  config = json.loads(pathlib.Path(run, 'config.json').read_text())
  text = json.dumps(config, sort_keys=True)
  assert metadata['config_sha256'] == hashlib.sha256(text.encode()).hexdigest()
  expected = {
    'step': '5',
    'name': 'resnet8',
    'stem': 'cifar',
    'width_multiplier': '0.25',
    'mean': '[0.305]',
    'std': '[0.376]',
    'format': 'pt',
    'torchvision': '',
  }
  assert metadata | expected == metadata


def test_step_and_overwrite(run, weights_file, tmp_path):
  out = tmp_path / 'w.safetensors'
  assert 'step 3 of' in export.export(run, str(out), which='3')[0]
  weights, metadata = opened(out)
  assert metadata['step'] == '3'
  latest, _ = opened(weights_file)
  assert np.abs(weights['conv1.weight'] - latest['conv1.weight']).max() > 0.1
  with pytest.raises(ValueError, match=r'already exists; .*--overwrite'):
    export.export(run, str(out))
  assert opened(out)[1]['step'] == '3'
  export.export(run, str(out), overwrite=True)
  assert opened(out)[1]['step'] == '5'


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--workdir='], '--workdir .*none'),
    (['--workdir=nowhere'], '--workdir=nowhere'),
    (['--checkpoint=4'], r'step 4 .*\[3, 5\]'),
    (['--checkpoint=first'], r"\[3, 5\], got 'first'"),
    (['--out='], '--out .*none'),
    (['--out=backbone.pt'], '--out .*backbone.pt'),
    (['--out=no/w.safetensors'], '--out=no/w.safetensors: folder no '),
    (['--platforms=cpu'], r'--platforms .*w\.safetensors'),
    (['--image_size=8'], r'--image_size .*w\.safetensors'),
    (['--out=n.stablehlo', '--with_head'], r'--with_head .*n\.stablehlo'),
    (['--out=n.stablehlo', '--platforms=cpu,gpu'], '--platforms .*got gpu'),
    (['--out=n.stablehlo', '--platforms='], '--platforms .*none'),
    (['--out=n.stablehlo', '--image_size=0'], '--image_size must be'),
  ],
)
def test_wrong_arguments(arguments, message, run, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  defaults = [f'--workdir={run}', '--out=w.safetensors']
  with pytest.raises(ValueError, match=message):
    small.command(export, *defaults, *arguments)
  assert not os.listdir(tmp_path)


def test_command_prints_how_to_read_the_file(
  run, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  small.command(export, f'--workdir={run}', '--out=w.safetensors')
  assert os.listdir(tmp_path) == ['w.safetensors']
  printed = capsys.readouterr().out
  for line in (
    f'w.safetensors: step 5 of {run}, 0.0 MB',
    'torchvision has no resnet8 of width multiplier 0.25',
    "model.load_state_dict(safetensors.torch.load_file('w.safetensors'))",
    'mean [0.305], std [0.376], 8 px',
  ):
    assert line in printed


# --- StableHLO ----------------------------------------------------------------

# Packages that a server does not need.
_BLOCKED = """
import sys
for name in (
  'clop_jax', 'flax', 'optax', 'orbax', 'ml_collections', 'grain', 'absl',
  'tensorflow', 'tensorflow_datasets', 'safetensors', 'etils', 'dm_pix',
):
  sys.modules[name] = None
"""


def test_documented_code_serves_a_run_with_jax_alone(colour_run, tmp_path):
  (code,) = [
    block
    for block in re.findall(r'```python\n(.*?)```', DOCS, re.DOTALL)
    if 'deserialize' in block
  ]
  export.export(colour_run, str(tmp_path / 'network.stablehlo'))
  x = images(5, 16, 3)
  np.save(tmp_path / 'images.npy', x)
  made = 'np.zeros((8, 32, 32, 3), np.uint8)'
  assert made in code
  code = code.replace(made, "np.load('images.npy')")
  code += """
np.savez('out.npz', features=features, embeddings=embeddings)
one, _ = network.call(images[:1])
np.testing.assert_allclose(one, features[:1], rtol=0, atol=1e-4)
"""
  subprocess.run(
    [sys.executable, '-c', _BLOCKED + code],
    check=True,
    cwd=tmp_path,
    env=small.environment(),
  )
  restored = clop_jax.load(colour_run, devices=jax.devices()[ONE])
  features, embeddings = restored.apply(x)
  with np.load(tmp_path / 'out.npz') as served:
    assert served['features'].std() > 0.05
    assert_same_network(served['features'], features)
    assert_same_network(served['embeddings'], embeddings)


def test_one_file_for_several_platforms_and_devices(run, tmp_path):
  out = tmp_path / 'network.stablehlo'
  lines = export.export(
    run, str(out), platforms=['cpu', 'cuda', 'tpu'], image_size=10
  )
  assert 'uint8 images [batch, 10, 10, 1] to features [batch, 16]' in lines[1]
  assert 'on cpu,cuda,tpu, computed in float32' in lines[1]
  exported = jax_export.deserialize(bytearray(out.read_bytes()))
  assert exported.platforms == ('cpu', 'cuda', 'tpu')
  x = images(8, 10, 1)
  expected = clop_jax.load(run, devices=jax.devices()[ONE]).apply(x)
  mesh = parallel.make_mesh()  # eight devices
  split = jax.jit(exported.call)(parallel.shard(mesh, x))
  for output, right in zip(split, expected, strict=True):
    assert_same_network(output, right)
  with pytest.raises(ValueError, match='shape'):
    exported.call(images(8, 9, 1))


# --- Training from exported weights -------------------------------------------


def backbone_of(config, workdir, step):
  run = build.build(config, total_steps=10, steps_per_epoch=5)
  mesh = parallel.make_mesh(jax.devices()[ONE])
  with checkpoint.Checkpoints(
    f'{workdir}/checkpoints', read_only=True
  ) as checkpoints:
    state = checkpoints.restore(step, build.abstract_state(run, mesh))
  return state.params


def test_run_starts_from_exported_weights_and_resumes_without_them(
  digits_dir, weights_file, tmp_path, capsys
):
  path = tmp_path / 'start.safetensors'
  path.write_bytes(weights_file.read_bytes())
  config = small.digits_config(
    digits_dir,
    model__initial_weights=str(path),
    # So small that the weights do not change by a bit.
    optimizer__learning_rate=1e-30,
  )
  workdir = tmp_path / 'run'
  train.train(config, str(workdir), devices=jax.devices()[ONE])
  weights, _ = opened(path)
  params = backbone_of(config, workdir, 5)
  backbone = params['backbone']
  for kernel, name in (
    (backbone['conv1']['kernel'], 'conv1.weight'),
    (backbone['layer3_0']['conv2']['kernel'], 'layer3.0.conv2.weight'),
  ):
    np.testing.assert_array_equal(kernel, weights[name].transpose(2, 3, 1, 0))
  np.testing.assert_array_equal(
    backbone['layer2_0']['bn1']['scale'], weights['layer2.0.bn1.weight']
  )
  # The head comes from the seed.
  run = build.build(config, total_steps=10, steps_per_epoch=5)
  plain = jax.jit(run.create_state)()
  np.testing.assert_array_equal(
    params['projection_head']['dense1']['kernel'],
    plain.params['projection_head']['dense1']['kernel'],
  )
  sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
  assert f'{path} (sha256 {sha256})' in capsys.readouterr().out
  record = json.loads((workdir / 'initial_weights.json').read_text())
  assert record == {'path': str(path), 'sha256': sha256}
  saved = json.loads((workdir / 'config.json').read_text())
  assert saved['model']['initial_weights'] == str(path)

  path.unlink()
  lines = (workdir / 'metrics.jsonl').read_text()
  shutil.rmtree(workdir / 'checkpoints' / '10')
  train.train(config, str(workdir), devices=jax.devices()[ONE])
  assert 'step 5 of 10' in capsys.readouterr().out
  assert (workdir / 'metrics.jsonl').read_text() == lines


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'model__name': 'resnet18'},
      r"initial_weights='.*backbone\.safetensors': the weights do not fit the "
      r'backbone; check config.model.name, .*missing: layer1\.1',
    ),
    (
      {'model__width_multiplier': 0.5},
      r'conv1\.weight \(4, 1, 3, 3\), .*\(8, 1, 3, 3\)',
    ),
    ({'model__initial_weights': 'no.safetensors'}, r'no\.safetensors'),
    ({'model__initial_weights': 'no.npz'}, r'no\.npz'),
  ],
)
def test_unfit_weights_stop_a_run_before_anything_is_written(
  changes, message, digits_dir, weights_file, tmp_path
):
  initial = {'model__initial_weights': str(weights_file)} | changes
  config = small.digits_config(digits_dir, **initial)
  with pytest.raises(ValueError, match=message):
    train.train(config, str(tmp_path / 'run'), devices=jax.devices()[ONE])
  assert not os.listdir(tmp_path)


def test_unfit_weights_stop_a_study(digits_dir, weights_file):
  config = small.digits_config(
    digits_dir,
    model__initial_weights=str(weights_file),
    model__stem='imagenet',
  )
  _, fault = cell.check({'a': workdir_lib.to_json(config)})
  assert fault.startswith('cell a: config.model.initial_weights=')
  assert 'wrong shape: conv1.weight ' in fault
