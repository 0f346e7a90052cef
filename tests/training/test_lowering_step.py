"""The trainer's own program lowers for every platform, without hardware.

Each row is a config that differs from `configs/digits.py` in one choice, or a
file of `configs/` as it is. Nothing is compiled.
"""

import jax
import pytest

from clop_jax import train
from clop_jax.experiment import build
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

VARIANTS = {
  'nt_xent': {},
  'nt_xent blocked': {'loss__block_size': 64},
  'supcon out': {'loss__contrastive': 'supcon'},
  'supcon in': {'loss__contrastive': 'supcon', 'loss__supcon_variant': 'in'},
  'supcon blocked': {'loss__contrastive': 'supcon', 'loss__block_size': 64},
  'dcl': {'loss__contrastive': 'dcl'},
  'vicreg': {'loss__contrastive': 'vicreg'},
  'barlow_twins': {'loss__contrastive': 'barlow_twins'},
  'no contrastive loss': {'loss__contrastive': 'none'},
  'no clop': {'loss__clop_weight': 0.0},
  'clop after an epoch': {'loss__clop_after_epochs': 1},
  'clop euclidean': {'loss__clop_distance': 'euclidean'},
  'clop manhattan': {'loss__clop_distance': 'manhattan'},
  'clop softmax': {'loss__clop_distance': 'softmax'},
  'clop repulsion': {'loss__clop_repulsion': 1.0},
  'pseudo-labels': {'loss__pseudo_label_threshold': 0.9},
  'simplex_etf': {'prototypes__kind': 'simplex_etf'},
  'random': {'prototypes__kind': 'random'},
  'learned': {'prototypes__kind': 'learned'},
  'aligned by procrustes': ALIGNED,
  'aligned by assignment': ALIGNED | {'prototypes__align_by': 'assignment'},
  'aligned every epoch': ALIGNED | {'prototypes__align_every_epochs': 1},
  'bn_scope device': {'model__bn_scope': 'device'},
  'float32': {'model__dtype': 'float32'},
  'depth 34': {'model__depth': 34},
  'imagenet stem': {'model__stem': 'imagenet', 'augment__size': 32},
  'zero_init_last_bn': {'model__zero_init_last_bn': True},
  'no head': {'model__head_layers': 0},
  'head without bn': {'model__head_layers': 3, 'model__head_bn': False},
  'wide embeddings': {'model__embedding_dim': 512},
  'lars': {'optimizer__name': 'lars'},
  'adamw': {'optimizer__name': 'adamw'},
  'clipped, with warmup': {
    'optimizer__clip_norm': 1.0,
    'optimizer__warmup_epochs': 1.0,
  },
  'micro-batches': {'train__num_micro_batches': 4},
  'micro-batches, bn_scope device': {
    'train__num_micro_batches': 4,
    'model__bn_scope': 'device',
  },
  'several steps per dispatch': {'train__steps_per_dispatch': 5},
  'diagnostics at every step': {'train__log_every_steps': 1},
  'streamed': {'data__loader': 'stream'},
  'host crops': {'data__host_crops': True},
  'image size': {'data__image_size': 20},
  'no augmentation': {
    'augment__crop_probability': 0.0,
    'augment__jitter_probability': 0.0,
  },
  'colour': COLOUR
  | {
    'augment__flip_probability': 0.5,
    'augment__saturation': 0.4,
    'augment__hue': 0.1,
    'augment__grey_probability': 0.2,
  },
  'blur and solarize': {
    'augment__blur_probability': 0.5,
    'augment__solarize_probability': 0.1,
  },
  'randaugment': COLOUR
  | {
    'augment__randaugment_layers': 2,
    'augment__randaugment_magnitude': 18.0,
  },
}

# Number of training images and the side of one. Images of any size are resized
# on the host.
DATA = {
  'cifar10': (50_000, 32),
  'cifar100': (50_000, 32),
  'digits': (1437, 8),
  'folder': (10_000, 500),
  'imagenet2012': (1_281_167, 500),
  'npz': (60_000, 32),
  'stl10': (105_000, 96),
  'synthetic': (2000, 8),
  'tiny_imagenet': (100_000, 64),
}


def config_of(path):
  _, config = test_configs.load(path)
  config = config.copy_and_resolve_references().unlock()
  # Those that take the number from the source are given one here.
  config.data.num_classes = config.data.num_classes or 7
  return config


def program(config, num_examples=1437, side=8):
  return train.abstract_program(
    config,
    lowering.mesh(),
    num_examples=num_examples,
    image_shape=(side, side, config.data.channels),
    # The type of the networks and the blocks of the losses depend on it.
    platform='tpu',
  )


def built(config):
  return build.build(
    config, total_steps=1000, steps_per_epoch=5, platform='tpu'
  )


@pytest.mark.parametrize('name', VARIANTS)
def test_variant_lowers(name):
  config = small.digits_config('unused', **VARIANTS[name])
  lowering.check_traced(program(config).trace(config.train.steps_per_dispatch))


@pytest.mark.parametrize('path', test_configs.PATHS, ids=lambda path: path.stem)
def test_config_lowers(path):
  config = config_of(path)
  traced = program(config, *DATA[path.stem]).trace(
    config.train.steps_per_dispatch
  )
  lowering.check_traced(traced)


@pytest.mark.parametrize(
  'name',
  ['nt_xent', 'simplex_etf', 'random', 'learned', 'aligned by assignment'],
)
def test_first_state_lowers(name):
  config = small.digits_config('unused', **VARIANTS[name])
  run = built(config)
  replicated = parallel.replicated(lowering.mesh())
  create = jax.jit(run.create_state, out_shardings=replicated)
  lowering.check(create, jax.eval_shape(lambda: jax.random.key(0)))
