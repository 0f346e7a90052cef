"""The trainer's own program lowers for every platform, without hardware.

Each row is `configs/digits.py` with some changes, or a file of `configs/` with
a shallow network. Nothing is compiled.
"""

import jax
import pytest

from clop_jax.experiment import build
from clop_jax.experiment import setup
from clop_jax.runtime import parallel
from tests import lowering
from tests import small
from tests.experiment import test_configs

COLOUR = {
  'data__channels': 3,
  'augment__mean': (0.5, 0.5, 0.5),
  'augment__std': (0.2, 0.2, 0.2),
}
ALIGNED = {'prototypes__kind': 'aligned'}

# Each row makes one choice of several independent kinds, so that few programs
# have them all.
VARIANTS = {
  'nt_xent': {},
  'simplex_etf': {
    'prototypes__kind': 'simplex_etf',
    'loss__block_size': 64,
    'loss__clop_after_epochs': 1,
    'model__dtype': 'float32',
    'optimizer__name': 'lars',
    'train__log_every_steps': 1,
  },
  'random': {
    'prototypes__kind': 'random',
    'loss__contrastive': 'supcon',
    'loss__clop_distance': 'euclidean',
    'model__bn_scope': 'device',
    'optimizer__name': 'adamw',
    'train__num_micro_batches': 4,
    'data__loader': 'stream',
  },
  'learned': {
    'prototypes__kind': 'learned',
    'loss__contrastive': 'supcon',
    'loss__options': {'variant': 'in'},
    'loss__clop_distance': 'manhattan',
    'model__stem': 'imagenet',
    'augment__size': 32,
    'optimizer__clip_norm': 1.0,
    'optimizer__warmup_epochs': 1.0,
    'train__steps_per_dispatch': 5,
  },
  'aligned by procrustes': ALIGNED
  | {
    'loss__contrastive': 'supcon',
    'loss__block_size': 64,
    'loss__clop_distance': 'softmax',
    'model__zero_init_last_bn': True,
    'train__num_micro_batches': 4,
    'data__host_crops': True,
  },
  'aligned by assignment': ALIGNED
  | {
    'prototypes__align_by': 'assignment',
    'loss__contrastive': 'dcl',
    'loss__clop_repulsion': 1.0,
    'model__head_layers': 0,
    'data__image_size': 20,
    'augment__crop_probability': 0.0,
    'augment__jitter_probability': 0.0,
  },
  'pseudo-labels': ALIGNED
  | COLOUR
  | {
    'prototypes__align_every_epochs': 1,
    'loss__pseudo_label_threshold': 0.9,
    'loss__contrastive': 'vicreg',
    'model__head_layers': 3,
    'model__head_bn': False,
    'augment__flip_probability': 0.5,
    'augment__saturation': 0.4,
    'augment__hue': 0.1,
    'augment__grey_probability': 0.2,
  },
  'no clop': COLOUR
  | {
    'loss__clop_weight': 0.0,
    'loss__contrastive': 'barlow_twins',
    'model__embedding_dim': 512,
    'augment__randaugment_layers': 2,
    'augment__randaugment_magnitude': 18.0,
  },
  'no contrastive loss': {
    'loss__contrastive': 'none',
    'model__name': 'resnet50',
    'augment__blur_probability': 0.5,
    'augment__solarize_probability': 0.1,
  },
}

# Number of training images and the side of one. Each of these files makes
# choices that no other has.
DATA = {
  'cifar10': (50_000, 32),
  'imagenet2012': (1_281_167, 500),
  'tiny_imagenet': (100_000, 64),
}


def config_of(name):
  """Returns a file of `configs/` with a shallow network."""
  _, config = test_configs.load(small.ROOT / 'configs' / f'{name}.py')
  config = config.copy_and_resolve_references().unlock()
  config.model.name = 'resnet8'  # more blocks are no other program
  return config


def built(config):
  return build.build(
    config, total_steps=1000, steps_per_epoch=5, platform='tpu'
  )


def program(config, num_examples=1437, side=8):
  return setup.plan(
    config,
    lowering.mesh(),
    num_examples=num_examples,
    image_shape=(side, side, config.data.channels),
    # The type of the networks and the blocks of the losses depend on it.
    platform='tpu',
  ).program


@pytest.mark.parametrize('name', VARIANTS)
def test_variant_lowers(name):
  config = small.digits_config('unused', **VARIANTS[name])
  lowering.check_traced(program(config).trace(config.train.steps_per_dispatch))


@pytest.mark.parametrize('name', DATA)
def test_config_lowers(name):
  config = config_of(name)
  traced = program(config, *DATA[name]).trace(config.train.steps_per_dispatch)
  lowering.check_traced(traced)


@pytest.mark.parametrize(
  'name', ['nt_xent', 'simplex_etf', 'random', 'aligned by assignment']
)
def test_first_state_lowers(name):
  run = built(small.digits_config('unused', **VARIANTS[name]))
  replicated = parallel.replicated(lowering.mesh())
  create = jax.jit(run.create_state, out_shardings=replicated)
  lowering.check(create, jax.eval_shape(lambda: jax.random.key(0)))
