"""Prepares a data set of TFDS, so that training finds it.

python -m clop_jax.prepare --name=cifar100

Downloads what can be downloaded and writes array_record files for random
access. Safe to interrupt, and to start several times at once.
"""

import os

from absl import flags

from clop_jax import cli
from clop_jax.data import sources
from clop_jax.data import tfds_source


def define_flags() -> None:
  """Defines the command's flags; importing this module defines none."""
  flags.DEFINE_string(
    'name', None, 'Data set: cifar10, tiny_imagenet, imagenet2012, ...'
  )
  flags.DEFINE(
    cli.PATH,
    'data_dir',
    None,
    "Folder of the data sets; TFDS's default if not given.",
  )


def main() -> None:
  """The command."""
  name, data_dir = flags.FLAGS.name, flags.FLAGS.data_dir
  if not name:
    raise ValueError(
      '--name must name a data set, as cifar10, cifar100, tiny_imagenet or '
      'imagenet2012; got none'
    )
  if name in sources.WITHOUT_PREPARING:
    raise ValueError(f'--name={name} needs no preparing; train with it')
  if data_dir and os.path.exists(data_dir) and not os.path.isdir(data_dir):
    raise ValueError(f'--data_dir must be a folder, got the file {data_dir}')
  try:
    if tfds_source.builder(name, data_dir).is_prepared():
      print(f'{name} was prepared before')
    made = tfds_source.prepared(name, data_dir, progress=True)
  except ValueError as error:
    raise ValueError(sources.in_flags(error, '--name')) from error
  sizes = ', '.join(
    f'{split} {info.num_examples:,}' for split, info in made.info.splits.items()
  )
  num_classes = made.info.features['label'].num_classes
  print(
    f'{made.data_dir}: {num_classes} classes; {sizes}\n'
    f'train with --config.data.name={name}'
    + (f' --config.data.data_dir={data_dir}' if data_dir else '')
  )


if __name__ == '__main__':
  cli.run(main, define_flags)
