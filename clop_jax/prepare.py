"""Downloads and prepares a TFDS data set for training.

python -m clop_jax.prepare --name=cifar100

Writes array_record files, which allow random access. The command can be
interrupted, and started several times at once.
"""

import os

from absl import flags

from clop_jax import cli
from clop_jax.data import sources
from clop_jax.data import tfds_source


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string('name', None, 'Name of the data set, such as cifar10.')
  flags.DEFINE(
    cli.PATH, 'data_dir', None, 'Folder of data sets (default: that of TFDS).'
  )


def main() -> None:
  """Runs the command."""
  name, data_dir = flags.FLAGS.name, flags.FLAGS.data_dir
  if not name:
    raise ValueError('--name must be a data set, such as --name=cifar10')
  if name in sources.WITHOUT_PREPARING:
    raise ValueError(f'--name={name} needs no preparation')
  if data_dir and os.path.exists(data_dir) and not os.path.isdir(data_dir):
    raise ValueError(f'--data_dir must be a folder, got the file {data_dir}')
  try:
    if tfds_source.builder(name, data_dir).is_prepared():
      print(f'{name} is already prepared')
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
