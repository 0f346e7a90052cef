r"""Features and embeddings of images, by a checkpoint, into one file.

python -m clop_jax.embed --workdir=runs/digits --out=digits.npz
python -m clop_jax.embed --workdir=runs/digits --source=PHOTOS \\
  --out=photos.parquet
python -m clop_jax.embed --workdir=runs/digits --source=cifar10 --split=test \\
  --out=cifar10.npz --what=features

Images are read, embedded and written batch by batch, so that memory does not
grow with their number. See docs/embed.md for what the file has.
"""

import collections
from collections.abc import Sequence
import contextlib
import os
import sys
import time
import zipfile

from absl import flags
import jax
import ml_collections
import numpy as np
import tqdm

from clop_jax import cli
from clop_jax import column_files
from clop_jax.data import arrays
from clop_jax.data import folder
from clop_jax.data import images as images_lib
from clop_jax.data import loader
from clop_jax.data import sources
from clop_jax.evaluation import probe
from clop_jax.experiment import inputs
from clop_jax.experiment import restored
from clop_jax.experiment import workdir as workdir_lib
from clop_jax.runtime import files
from clop_jax.runtime import parallel
from clop_jax.runtime import remote

WHAT = ('features', 'embeddings')
_AHEAD = 2  # batches that the devices have while the host writes one


def embed(
  workdir: str,
  out: str,
  *,
  source: str | sources.Source | None = None,
  split: str | None = None,
  data_dir: str | None = None,
  root: str | None = None,
  which: str = 'latest',
  what: Sequence[str] = WHAT,
  batch_size: int | None = None,
  num_workers: int | None = None,
  skip_corrupt: bool | None = None,
  overwrite: bool = False,
  devices=None,
) -> int:
  """Writes features and embeddings of all images of a source.

  The columns are `name` (the file's, below `root`, or the example's number),
  `label` (-1 is unknown), and of `what` `features` and `embeddings` (float32,
  not normalized). A npz file has `step`, the checkpoint's, beside them, a
  Parquet file in its metadata. The file is there when it is whole.

  Args:
    workdir: of a run.
    out: `*.npz` or `*.parquet`.
    source: see `find`; or examples of your own.
    split: see `find`.
    data_dir: see `find`.
    root: of the files of examples of your own; None: they have numbers.
    which: checkpoint: 'latest', 'best' (by `train.keep_best`) or a step.
    what: of 'features' and 'embeddings'.
    batch_size: images at one time; None: `config.eval.batch_size`.
    num_workers: processes that read; None: as the run's config has it.
    skip_corrupt: leaves out images that cannot be decoded, with a warning;
      None: as the run's config has it.
    overwrite: replaces a file that is there.
    devices: default: all, of all processes.

  Returns:
    The number of rows.

  Raises:
    ValueError: if the workdir is missing or holds no run or no such checkpoint,
      `out` cannot be written or is there, or an image does not fit or cannot be
      decoded; no file is written then.
    OSError: if the system refuses to write `out`.
    FloatingPointError: if an output is not finite: the training diverged.
    checkpoint.DamagedCheckpointError: if no checkpoint can be restored.
  """
  what = _check_what(what)
  _check_out(out, overwrite)
  config = workdir_lib.load_config(workdir)
  reading = config if source is None else inputs.on_other_data(config, 'other')
  if source is None or isinstance(source, str):
    source, root = find(config, source, split=split, data_dir=data_dir)
  else:
    source = inputs.fitted(config, source)
  size = config.eval.batch_size if batch_size is None else batch_size
  mesh = parallel.make_mesh(devices)
  parallel.check_batch_size(size, mesh)
  skip = config.data.skip_corrupt if skip_corrupt is None else skip_corrupt
  try:
    # Its own number as the label of each example: what comes in the place of
    # one that cannot be decoded shows by its number, and is left out.
    reader = inputs.evaluation_reader(
      reading,
      source,
      np.arange(len(source)),
      skip_corrupt=skip,
      instead='it is left out',
    )
    run = restored.load(workdir, which=which, devices=devices)
    if num_workers is None:
      num_workers = inputs.num_workers(reading, reader)
    batches = loader.in_order(reader, batch_size=size, num_workers=num_workers)
    with (
      _writer(out, _names(source, root), run.step) as write,
      contextlib.closing(batches),
    ):
      return _run(run, batches, size, sources.labels_of(source), what, write)
  except images_lib.CorruptImageError as error:
    reason = str(error).split(';')[0]
    raise ValueError(
      f'{reason}; repair or remove it, or leave such images out with '
      '--skip_corrupt'
    ) from error


def _run(run, batches, size, labels, what, write):
  """Embeds and writes; the number of rows."""
  asked = rows = 0
  ready = collections.deque()
  bar = tqdm.tqdm(
    total=len(labels), desc='embedding', disable=not sys.stderr.isatty()
  )

  def write_oldest():
    outputs, numbers, wanted = ready.popleft()
    kept = numbers == wanted
    columns = {'number': numbers[kept], 'label': labels[numbers[kept]]}
    for name in what:
      column = np.asarray(outputs[name], np.float32)[: len(kept)][kept]
      if not np.isfinite(column).all():
        raise FloatingPointError(
          f'the {name} are not finite at step {run.step}: the training diverged'
        )
      columns[name] = column
    write(columns)
    bar.update(len(kept))
    return int(kept.sum())

  with bar:
    for outputs, numbers in probe.applied(
      run.apply, batches, batch_size=size, mesh=run.mesh
    ):
      count = len(numbers)
      wanted = np.arange(asked, asked + count)
      ready.append((dict(zip(WHAT, outputs, strict=True)), numbers, wanted))
      asked += count
      # The devices have the next batches while the host waits for this one.
      if len(ready) > _AHEAD:
        rows += write_oldest()
    while ready:
      rows += write_oldest()
  return rows


def find(
  config: ml_collections.ConfigDict,
  source: str | None = None,
  *,
  split: str | None = None,
  data_dir: str | None = None,
) -> tuple[sources.Source, str | None]:
  """What `--source` names.

  Args:
    config: of the run.
    source: a folder, a npz file or a data set's name; None: the run's own data.
    split: of the data set, the npz file, or the folder, as `folder.Folder` has
      it; None: 'test', the npz file's only one, or all images of the folder.
    data_dir: of the data set, as `config.data.data_dir`.

  Returns:
    `(source, the folder that names of files begin at or None)`.

  Raises:
    ValueError: if there is no such source.
  """
  if source is None:
    if data_dir is not None:
      raise ValueError(
        f'--data_dir={data_dir} goes with --source=NAME, got no --source'
      )
    name = split or config.data.test_split
    if not name:
      raise ValueError(
        "--split must name a split of the run's data, got none: it was trained "
        'without a test split'
      )
    root = config.data.data_dir if config.data.name == 'folder' else None
    return inputs.source(config, name), root
  root = None
  found: sources.Source
  try:
    if os.path.isdir(source) and data_dir is None:
      root = source
      found = folder.Folder(split, source) if split else folder.Tree(source)
    elif source.endswith('.npz') and not os.path.exists(source):
      raise ValueError('there is no such file')
    elif source.endswith('.npz'):
      found = arrays.load_npz(split or _only_split(source), source)
    elif os.path.isfile(source):
      raise ValueError('it is a file, expected a folder, *.npz or a name')
    else:
      found = sources.load(source, split or 'test', data_dir)
      root = data_dir if source == 'folder' else None
  except ValueError as error:
    reason = sources.in_flags(error, '--source').replace(
      '--source must be', 'there is no such folder; a name must be'
    )
    raise ValueError(f'--source={source}: {reason}') from error
  return inputs.fitted(config, found), root


def _only_split(path):
  """The split of a npz file that has one; else 'test'."""
  try:
    with zipfile.ZipFile(path) as file:
      names = [name.removesuffix('.npy') for name in file.namelist()]
  except (OSError, zipfile.BadZipFile):
    return 'test'  # what is wrong with the file is said where it is read
  splits = [x.removesuffix('_images') for x in names if x.endswith('_images')]
  return splits[0] if len(splits) == 1 else 'test'


def _names(source, root):
  """A function of examples' numbers to their names, and the longest name."""

  def name_of(number):
    if root is None:
      return str(number)
    name = os.path.relpath(sources.name_of(source, number), root)
    # A file's name need not be text; what is not shows as \udc..., as in repr.
    return name.encode('utf-8', 'backslashreplace').decode('utf-8')

  longest = len(str(len(source) - 1))
  if root is not None:
    longest = max(len(name_of(number)) for number in range(len(source)))
  return name_of, longest


def _check_what(what):
  wrong = [name for name in what if name not in WHAT]
  if wrong or not what:
    got = f'{wrong[0]!r}' if wrong else 'none'
    raise ValueError(f'--what must be some of {", ".join(WHAT)}; got {got}')
  return tuple(name for name in WHAT if name in what)


def _check_out(out, overwrite):
  if not out or not out.endswith(column_files.ENDINGS):
    endings = ' or *'.join(column_files.ENDINGS)
    raise ValueError(f'--out must be a file *{endings}, got {out or "none"}')
  remote.check_local('--out', out)
  parent = os.path.dirname(os.path.abspath(out))
  if not os.path.isdir(parent):
    raise ValueError(f'--out={out}: there is no folder {parent}')
  if os.path.exists(out) and not overwrite:
    raise ValueError(
      f'--out={out} is there already; give another name, or --overwrite'
    )
  parallel.by_main(lambda: files.check_writable(out, f'--out={out}'))


@contextlib.contextmanager
def _writer(out, names, step):
  """Gives a function of columns with examples' numbers, which become names."""
  if not parallel.is_main():
    yield lambda columns: None
    return
  name_of, longest = names
  with column_files.writing(out, step) as add:

    def write(columns):
      named = [name_of(number) for number in columns.pop('number')]
      add({'name': np.asarray(named, f'<U{longest}'), **columns})

    yield write


def define_flags() -> None:
  """Defines the command's flags; importing this module defines none."""
  flags.DEFINE(cli.PATH, 'workdir', None, 'Workdir of a run.')
  flags.DEFINE_string(
    'checkpoint', 'latest', 'latest, best (by train.keep_best) or a step.'
  )
  flags.DEFINE(
    cli.PATH,
    'source',
    None,
    'A folder of images, at any depth; a file *.npz with <split>_images; or a '
    "data set's name. Default: the run's test split.",
  )
  flags.DEFINE_string(
    'split', None, 'Of the data set, the npz file or FOLDER/<split>/<class>.'
  )
  flags.DEFINE(
    cli.PATH,
    'data_dir',
    None,
    'Of a data set in --source, as config.data.data_dir.',
  )
  flags.DEFINE(cli.PATH, 'out', None, 'The file to write: *.npz or *.parquet.')
  flags.DEFINE_list('what', list(WHAT), 'features, embeddings or both.')
  flags.DEFINE_integer(
    'batch_size',
    None,
    'Images at one time; default: eval.batch_size of the run.',
  )
  flags.DEFINE_integer(
    'num_workers',
    None,
    "Processes that read; 0: threads; default: as the run's config has it.",
  )
  flags.DEFINE_bool(
    'skip_corrupt', None, 'Leave out images that cannot be decoded.'
  )
  flags.DEFINE_bool('overwrite', False, 'Replace --out if it is there.')


def main() -> None:
  """The command."""
  values = flags.FLAGS
  if not values.workdir:
    raise ValueError('--workdir must name the folder of a run, got none')
  start = time.monotonic()
  rows = embed(
    values.workdir,
    values.out,
    source=values.source,
    split=values.split,
    data_dir=values.data_dir,
    which=values.checkpoint,
    what=values.what,
    batch_size=values.batch_size,
    num_workers=values.num_workers,
    skip_corrupt=values.skip_corrupt,
    overwrite=values.overwrite,
  )
  if parallel.is_main():
    seconds = time.monotonic() - start
    print(
      f'{values.out}: {rows:,} images in {seconds:.1f} s on '
      f'{jax.device_count()} device(s)'
    )


if __name__ == '__main__':
  cli.run(main, define_flags)
