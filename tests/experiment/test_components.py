"""Backbones, losses and data of a user's own, by name and from Python."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clop_jax
from clop_jax import evaluate
from clop_jax import export
from clop_jax import train
from clop_jax.experiment import workdir as workdir_lib
from clop_jax.runtime import parallel
from tests import small


def config_of(**changes):
  own = {
    'data__name': 'tests.small:squares',
    'data__options': {'count': 48},
    'data__num_classes': 4,
    'data__label_fraction': 1.0,
    'model__name': 'tests.small:Dense',
    'model__options': {'dim': 12},
    'model__embedding_dim': 6,
    'loss__contrastive': 'tests.small:align',
    'loss__options': {'weight': 0.5},
    'train__batch_size': 16,
    'train__log_every_steps': 1,
    'eval__batch_size': 16,
  }
  return small.digits_config(None, **own | changes)


def trained(config, workdir, devices=1, **arguments):
  devices = jax.devices()[:devices]
  train.train(config, str(workdir), devices=devices, **arguments)
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run of six steps with everything of one's own; read-only."""
  workdir = tmp_path_factory.mktemp('own') / 'run'
  trained(config_of(), workdir)
  return workdir


def features(workdir, **arguments):
  images = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 1), np.uint8)
  loaded = clop_jax.load(str(workdir), devices=jax.devices()[:1], **arguments)
  return loaded.apply(images)[0]


def test_a_named_run_is_evaluated_loaded_and_exported(run, tmp_path):
  assert features(run).shape == (3, 12)
  request = evaluate.Request(str(run), devices=jax.devices()[:1])
  linear, knn = evaluate.evaluate(request).measurements
  assert linear['linear_top1'] > 0.9 and knn['knn_top1'] > 0.9
  out = str(tmp_path / 'network.stablehlo')
  assert 'features [batch, 12]' in export.export(str(run), out)[1]
  with pytest.raises(ValueError, match=r'params/.*stablehlo'):
    export.export(str(run), str(tmp_path / 'weights.safetensors'))


def test_a_named_run_resumes_exactly(run, tmp_path):
  again = shutil.copytree(run, tmp_path / 'again')
  shutil.rmtree(again / 'checkpoints' / '6')
  history = trained(config_of(), again)
  assert [x['step'] for x in history] == [1, 2, 3, 4, 5, 6]
  np.testing.assert_array_equal(features(again), features(run))


def test_byol_resumes_exactly(tmp_path):
  config = config_of(
    loss__contrastive='invariance',
    loss__options={},
    method__predictor=True,
    method__predictor_hidden_dim=8,
    method__target='moving_average',
    method__momentum=0.5,
  )
  trained(config, tmp_path / 'whole')
  again = shutil.copytree(tmp_path / 'whole', tmp_path / 'again')
  shutil.rmtree(again / 'checkpoints' / '6')
  trained(config, again)
  np.testing.assert_array_equal(features(again), features(tmp_path / 'whole'))


def test_objects_from_python_train_like_their_names(run, tmp_path):
  given = {
    'backbone': small.Dense(12),
    'contrastive': lambda z, y, *, axis_name: small.align(
      z, y, axis_name=axis_name, weight=0.5
    ),
  }
  config = config_of(
    model__name='resnet8',
    model__options={},
    loss__contrastive='nt_xent',
    loss__options={},
  )
  workdir = tmp_path / 'run'
  trained(config, workdir, **given)
  np.testing.assert_array_equal(
    features(workdir, backbone=small.Dense(12)), features(run)
  )
  saved = workdir_lib.load_config(str(workdir))
  assert saved.model.name == saved.loss.contrastive == '(given)'
  with pytest.raises(ValueError, match=r"model\.name='\(given\)'.*backbone="):
    features(workdir)
  # It resumes, here from its end, with the same objects only.
  trained(config, workdir, **given)
  with pytest.raises(ValueError, match=r'model\.name.*given'):
    trained(config, workdir)


@pytest.mark.parametrize('axis_name', [parallel.DATA_AXIS, None])
def test_batch_statistics_on_eight_devices(axis_name, tmp_path):
  small.need_devices(8)
  config = config_of(train__num_epochs=1)
  backbone = small.Dense(12, axis_name)
  one, eight = (
    trained(config, tmp_path / f'{n}', n, backbone=backbone)[-1]['loss']
    for n in (1, 8)
  )
  # Without the axis each device normalizes over its own two images.
  is_equal = one == pytest.approx(eight, rel=1e-4)
  assert is_equal == (axis_name is not None)
  assert np.isfinite(features(tmp_path / '8', backbone=backbone)).all()


class Pyramid:
  """A backbone that does not pool."""

  def init(self, key, images):
    return {'params': {'w': jnp.ones(())}}

  def apply(self, variables, images, train):
    return images * variables['params']['w'], variables


@pytest.mark.parametrize(
  ('changes', 'match'),
  [
    ({'model__name': 'resnet9'}, r"model\.name.*resnet50.*'resnet9'"),
    ({'model__name': 'no_such:net'}, r"model\.name='no_such:net'.*PYTHONPATH"),
    ({'model__name': 'tests.small:Net'}, r"model\.name.*attribute 'Net'"),
    ({'model__name': 'tests.small:ROOT'}, r'model\.name.*callable.*Path'),
    ({'model__options': {'depth': 3}}, r"model\.options.*Dense.*'depth'"),
    (
      {'model__name': 'tests.experiment.test_components:Pyramid'}
      | {'model__options': {}},
      r'Pyramid.*\[1, \*\].*\(1, 8, 8, 1\)',
    ),
    (
      {'model__name': 'vit_ti', 'model__options': {'patch_size': 3}},
      r'patch_size.*8 x 8.*3',
    ),
    (
      {'loss__contrastive': 'nt_xnet', 'loss__options': {}},
      r"contrastive.*nt_xent.*'nt_xnet'",
    ),
    (
      {'loss__contrastive': 'tests.small:need_devices', 'loss__options': {}},
      r'loss\.options.*need_devices',
    ),
    (
      {'loss__contrastive': 'tests.experiment.test_components:vector'},
      r'loss.*vector.*scalar.*\(16,\)',
    ),
    (
      {'loss__contrastive': 'supcon', 'loss__options': {'variants': 'in'}},
      r"loss\.options.*supcon_loss.*'variants'",
    ),
    ({'method__predictor': True, 'model__head_layers': 0}, 'head_layers=0'),
    ({'data__name': 'tests.small:squirrels'}, r"data\.name.*'squirrels'"),
    ({'data__options': {'number': 3}}, r"data\.options.*'number'"),
  ],
)
def test_wrong_names_fail_before_anything_is_written(changes, match, tmp_path):
  with pytest.raises(ValueError, match=match):
    trained(config_of(**changes), tmp_path / 'run')
  assert not os.listdir(tmp_path)


def vector(embeddings, labels, *, axis_name, weight):
  return weight * jnp.sum(embeddings[0] * embeddings[1], axis=-1)
