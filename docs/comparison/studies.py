"""Trains and evaluates every method of docs/comparison.md.

python -m docs.comparison.studies --out=runs/comparison --glyphs=glyphs100.npz

The methods are crossed with CLOP off and on (10 % of the labels), three
learning rates over two decades and three seeds, on digits and on glyphs100. By
default the networks are small and glyphs100 is a part at 16 px, for an hour on
two CPU cores. `--full` trains ResNet-18 on all of glyphs100 at 32 px, for a
GPU. `--cifar=FOLDER` adds CIFAR-100 from TFDS to that. The same command
continues what was interrupted.
"""

import argparse
from collections.abc import Iterator
import os
import shlex
import time

import ml_collections
import numpy as np

from clop_jax.study import grid
from clop_jax.study import run
from configs import cifar100
from configs import digits
from configs import npz

RATES = (0.1, 1.0, 10.0)
SEEDS = (0, 1, 2)
# Methods that are a loss alone. SupCon knows the labelled tenth only; all other
# examples have label -1 and their own views as positives.
LOSSES = (
  'invariance',
  'alignment_uniformity',
  'nt_xent',
  'dcl',
  'spectral',
  'sigmoid',
  'vicreg',
  'barlow_twins',
  'w_mse',
  'supcon',
)
# Other methods, by the fields that they change.
METHODS = {
  'simsiam': {
    'loss.contrastive': 'invariance',
    'method.predictor': True,
    'method.target': 'stop_gradient',
  },
  'byol': {
    'loss.contrastive': 'invariance',
    'method.predictor': True,
    'method.target': 'moving_average',
  },
  'nt_xent+ce': {
    'loss.contrastive': 'nt_xent',
    'loss.cross_entropy_weight': 1.0,
  },
}
_PARTS = ('train_images', 'train_labels', 'test_images', 'test_labels')


def small_digits() -> ml_collections.ConfigDict:
  """Returns the config of digits, minutes on a CPU for a whole study."""
  return _changed(
    digits.get_config(),
    {
      'model.embedding_dim': 64,  # w_mse needs more examples than dimensions
      'train.num_epochs': 10,
      'train.checkpoint_every_epochs': 10,
      **_SMALL,
    },
  )


def small_glyphs(path: str) -> ml_collections.ConfigDict:
  """Returns the config of a part of glyphs100 at 16 px."""
  return _changed(
    npz.get_config(),
    {
      'data.data_dir': path,
      'augment.size': 16,
      'model.head_hidden_dim': 128,
      'optimizer.name': 'sgd',
      'train.batch_size': 256,
      'train.num_epochs': 6,
      'train.checkpoint_every_epochs': 6,
      'train.steps_per_dispatch': 1,
      **_SMALL,
    },
  )


_SMALL = {
  'model.name': 'docs.comparison.network:ConvNet',
  'model.head_bn': False,  # with it, hardly anything collapses
  'method.predictor_hidden_dim': 64,
  'watch.images_every_epochs': 0,
  'watch.tensorboard': False,
  'eval.probe_l2': (1e-3,),
  'eval.probe_iterations': 60,
}


def full_size(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Returns a config of `configs/` for runs of 30 epochs with SGD."""
  return _changed(
    config,
    {
      'model.name': 'resnet18',
      'optimizer.name': 'sgd',
      'optimizer.warmup_epochs': 0.0,
      'train.batch_size': 512,
      'train.num_epochs': 30,
      'train.checkpoint_every_epochs': 30,
      'watch.images_every_epochs': 0,
    },
  )


def studies(
  out: str, config: ml_collections.ConfigDict
) -> Iterator[tuple[str, ml_collections.ConfigDict, dict]]:
  """Yields folder, config and grid of the studies of one data set."""
  axes = {
    'optimizer.learning_rate': RATES,
    'loss.clop_weight': (0.0, 1.0),
    'seed': SEEDS,
  }
  yield (
    os.path.join(out, 'losses'),
    config,
    _grid({'loss.contrastive': LOSSES, **axes}, config),
  )
  for name, changes in METHODS.items():
    changed = _changed(config, changes)
    yield os.path.join(out, name), changed, _grid(axes, changed)


def _grid(axes, config):
  texts = [f'{k}={",".join(map(str, v))}' for k, v in axes.items()]
  return grid.parse(texts, config)


def _changed(config, changes):
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return config.lock()


def _part(path: str, out: str) -> str:
  """Writes every sixteenth image of an npz file; returns its path."""
  part = os.path.join(out, 'glyphs.npz')
  if not os.path.exists(part):
    with np.load(path) as arrays:
      np.savez(part, **{name: arrays[name][::16] for name in _PARTS})
  return part


def main() -> None:
  """The command."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', required=True, help='Folder of all studies.')
  parser.add_argument('--glyphs', required=True, help='Path of glyphs100.npz.')
  parser.add_argument('--full', action='store_true', help='For a GPU.')
  parser.add_argument('--cifar', help='Folder of TFDS with cifar100.')
  parser.add_argument('--jobs', type=int, help='Jobs at a time.')
  options = parser.parse_args()
  os.makedirs(options.out, exist_ok=True)
  if options.full:
    glyphs = _changed(npz.get_config(), {'data.data_dir': options.glyphs})
    configs = {'glyphs100': full_size(glyphs)}
    if options.cifar:
      cifar = _changed(cifar100.get_config(), {'data.data_dir': options.cifar})
      configs['cifar100'] = full_size(cifar)
  else:
    part = _part(options.glyphs, options.out)
    configs = {'digits': small_digits(), 'glyphs100': small_glyphs(part)}
  began = time.monotonic()
  for name, config in configs.items():
    for folder, changed, axes in studies(
      os.path.join(options.out, name), config
    ):
      print(f'== {shlex.quote(folder)}', flush=True)
      run.study(folder, changed, axes, jobs=options.jobs)
  print(f'{(time.monotonic() - began) / 60:.1f} min')


if __name__ == '__main__':
  main()
