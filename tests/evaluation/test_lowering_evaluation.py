import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clop_jax
from clop_jax.evaluation import finetune
from clop_jax.evaluation import probe
from clop_jax.experiment import build
from clop_jax.experiment import inputs
from clop_jax.experiment import restored
from clop_jax.runtime import parallel
from clop_jax.tracking import contact_sheet
from tests import lowering
from tests import small
from tests.commands import test_export
from tests.training import test_lowering_step as steps

FEATURE_DIM, CLASSES = 64, 10


def images_of(config, count=64, side=None):
  """Shapes of a batch as `probe.applied` splits it over the devices."""
  side = side or config.data.image_size or config.augment.size
  return jax.ShapeDtypeStruct(
    (count, side, side, config.data.channels),
    np.uint8,
    sharding=parallel.split(lowering.mesh()),
  )


def floats(*shape):
  return jax.ShapeDtypeStruct(shape, np.float32)


def integers(*shape):
  return jax.ShapeDtypeStruct(shape, np.int32)


@pytest.fixture(autouse=True)
def defaults_of_an_accelerator(monkeypatch):
  # `clop_jax.load` chooses the dtype by the platform of the process.
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')


@pytest.mark.parametrize('name', steps.DATA)
def test_feature_extraction_lowers(name):
  config = steps.config_of(name)
  run = steps.built(config)
  function = restored.frozen(run, config, lowering.mesh())
  variables = build.abstract_state(run, lowering.mesh()).variables
  lowering.check(function, variables, images_of(config))


def test_restored_run_lowers_inside_other_functions(tmp_path):
  run = clop_jax.load(test_export.save_run(tmp_path / 'run'))
  # Another size than the run's views, so that they are resized.
  images = images_of(run.config, side=12)
  lowering.check(jax.jit(run.apply), images)
  lowering.check(run.pure, run.variables, images)

  def total(variables, images):
    return jnp.sum(run.pure(variables, images)[1])

  lowering.check(jax.jit(jax.grad(total)), run.variables, images)


def test_linear_probe_lowers():
  lowering.check(
    probe._fit,
    floats(100, FEATURE_DIM),
    integers(100),
    floats(100),
    floats(),
    num_classes=CLASSES,
    steps=30,
  )


def test_knn_lowers():
  # The size of CIFAR-10 with the default neighbours.
  lowering.check(
    probe._nearest,
    floats(50_000, 2048),
    integers(50_000),
    floats(1024, 2048),
    (20, 200),
    CLASSES,
    0.1,
  )


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'model__bn_scope': 'device', 'data__loader': 'stream'},
    {'eval__finetune_augment': False},
  ],
  ids=str,
)
def test_fine_tuning_lowers(changes):
  config = small.digits_config('unused', **changes)
  mesh = lowering.mesh()
  run = steps.built(config)
  variables = build.abstract_state(run, mesh).variables
  variables = {name: part['backbone'] for name, part in variables.items()}
  trainer = finetune.Trainer(
    run.backbone,
    variables,
    num_classes=CLASSES,
    recipe=finetune.recipe(config.augment, random=config.eval.finetune_augment),
    channels=config.data.channels,
    bn_scope=config.model.bn_scope,
    mesh=mesh,
    seed=0,
  )
  data = inputs.abstract_loader(
    config, mesh, num_examples=1437, image_shape=(8, 8, 1)
  )
  state = jax.eval_shape(trainer._create, variables)
  shared = {
    'key': jax.eval_shape(lambda: jax.random.key(0)),
    'numbers': {'learning_rate': floats(), 'total_steps': floats()},
    'resident': data.resident,
  }
  lowering.check(trainer._step, state, shared, data.structure(1))
  lowering.check(trainer._apply, state, images_of(config))


@pytest.mark.parametrize('name', ['digits', *steps.DATA])
def test_pictures_of_views_lower(name):
  config = steps.config_of(name)
  size, channels = config.augment.size, config.data.channels
  sheets = contact_sheet.Sheets(
    build.recipe(config),
    build.training_key(config),
    reader=None,
    plain=None,
    host_crops=config.data.host_crops,
  )
  crops = (2,) if config.data.host_crops else ()
  images = jax.ShapeDtypeStruct((*crops, 16, size, size, channels), np.uint8)
  key = build.training_key(config)
  lowering.check(sheets._make, key, integers(), integers(16), images)
