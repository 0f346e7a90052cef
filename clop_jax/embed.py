r"""Features and embeddings of images, by a checkpoint, into one file.

python -m clop_jax.embed --workdir=runs/digits --out=digits.npz
python -m clop_jax.embed --workdir=runs/digits --source=PHOTOS \\
  --out=photos.parquet
python -m clop_jax.embed --workdir=runs/digits --source=cifar10 --split=test \\
  --out=cifar10.npz --what=features

Images are read, embedded and written batch by batch, so that memory does not
grow with their number. docs/embed.md describes the file.
"""

import collections
from collections.abc import Sequence
import contextlib
import dataclasses
import os
import sys
import tempfile
import time
import zipfile

from absl import flags
import jax
import ml_collections
import numpy as np
import tqdm

from clop_jax import cli
from clop_jax.data import arrays
from clop_jax.data import folder
from clop_jax.data import images as images_lib
from clop_jax.data import loader
from clop_jax.data import sources
from clop_jax.evaluation import probe
from clop_jax.experiment import inputs
from clop_jax.experiment import restored
from clop_jax.experiment import workdir as workdir_lib
from clop_jax.runtime import extras
from clop_jax.runtime import files
from clop_jax.runtime import parallel
from clop_jax.runtime import remote

WHAT = ('features', 'embeddings')
_ENDINGS = ('.npz', '.parquet')
_AHEAD = 2  # batches on the devices while the host writes one
_ROW_GROUP = 4096  # rows of a Parquet file that are in memory at one time


@dataclasses.dataclass(frozen=True)
class Request:
  """Images to embed, and the file to write.

  Attributes:
    workdir: Workdir of a run.
    out: Path of the file, `*.npz` or `*.parquet`.
    source: Name of a source, see `find`; or a source object.
    split: Split, see `find`.
    data_dir: Folder or file of a data set, see `find`.
    root: Folder that the names of a source object's files begin at; None
      numbers the examples.
    which: Checkpoint: 'latest', 'best' (by `train.keep_best`) or a step.
    what: Columns, of 'features' and 'embeddings'.
    batch_size: Images per batch; None is `config.eval.batch_size`.
    num_workers: Processes that read; None is the value of the run's config.
    skip_corrupt: True leaves out images that cannot be decoded, with a warning;
      None is the value of the run's config.
    overwrite: True replaces an existing file.
    devices: Devices, by default all of all processes.
  """

  workdir: str
  out: str
  source: str | sources.Source | None = None
  split: str | None = None
  data_dir: str | None = None
  root: str | None = None
  which: str = 'latest'
  what: Sequence[str] = WHAT
  batch_size: int | None = None
  num_workers: int | None = None
  skip_corrupt: bool | None = None
  overwrite: bool = False
  devices: Sequence[jax.Device] | None = None


def embed(request: Request) -> int:
  """Writes features and embeddings of all images of a source.

  The columns are `name` (the path below the root, or the example's number),
  `label` (-1 is unknown), and `features` and `embeddings` (float32, not
  normalized). The step of the checkpoint is the array `step` of a npz file, and
  metadata of a Parquet file. The file appears when it is complete.

  Args:
    request: Request.

  Returns:
    The number of rows.

  Raises:
    ValueError: If the workdir is missing or holds no run or no such checkpoint,
      `out` exists or cannot be written, or an image does not fit or cannot be
      decoded. No file is written then.
    OSError: If the system refuses to write `out`.
    FloatingPointError: If an output is not finite: the training diverged.
    checkpoint.DamagedCheckpointError: If no checkpoint can be restored.
  """
  _check_what(request.what)
  _check_out(request.out, request.overwrite)
  config = workdir_lib.load_config(request.workdir)
  reading, source, root = _source(config, request)
  size = request.batch_size
  size = config.eval.batch_size if size is None else size
  parallel.check_batch_size(size, parallel.make_mesh(request.devices))
  skip = request.skip_corrupt
  try:
    reader = inputs.evaluation_reader(
      reading,
      source,
      sources.labels_of(source),
      skip_corrupt=config.data.skip_corrupt if skip is None else skip,
      instead='it is left out',
    )
    run = restored.load(
      request.workdir, which=request.which, devices=request.devices
    )
    workers = request.num_workers
    if workers is None:
      workers = inputs.num_workers(reading, reader)
    batches = loader.in_order(reader, batch_size=size, num_workers=workers)
    name_of, longest = _names(source, root)
    rows = 0
    bar = tqdm.tqdm(
      total=len(reader), desc='embedding', disable=not sys.stderr.isatty()
    )
    with (
      _writer(request.out, run.step, len(reader)) as write,
      contextlib.closing(batches),
      bar,
    ):
      for positions, columns in _embedded(run, batches, size, request.what):
        if parallel.is_main():
          names = np.array([name_of(x) for x in positions], f'<U{longest}')
          labels = reader.labels[positions]
          write({'name': names, 'label': labels} | columns)
        rows += len(positions)
        bar.update(len(positions))
    return rows
  except images_lib.CorruptImageError as error:
    reason = str(error).split(';')[0]
    raise ValueError(
      f'{reason}; repair or remove it, or leave such images out with '
      '--skip_corrupt'
    ) from error


def _source(config, request):
  """Returns the config to read with, the source, and the root of its names."""
  source, root = request.source, request.root
  if source is None or isinstance(source, str):
    source, root = find(
      config, source, split=request.split, data_dir=request.data_dir
    )
  else:
    source = inputs.fitted(config, source)
  if request.source is not None:
    config = inputs.on_other_data(config, 'other')
  return config, source, root


def _embedded(run, batches, size, what):
  """Yields the positions and the columns of each batch, on the host.

  The devices compute the next batches while the host waits for this one.
  """
  ready = collections.deque()

  def oldest():
    outputs, positions = ready.popleft()
    columns = {}
    for name, output in zip(WHAT, outputs, strict=True):
      if name in what:
        columns[name] = np.asarray(output, np.float32)[: len(positions)]
        if not np.isfinite(columns[name]).all():
          raise FloatingPointError(
            f'the {name} are not finite at step {run.step}: the training '
            'diverged'
          )
    return positions, columns

  for batch in probe.applied(
    run.apply, batches, batch_size=size, mesh=run.mesh
  ):
    ready.append(batch)
    if len(ready) > _AHEAD:
      yield oldest()
  while ready:
    yield oldest()


def find(
  config: ml_collections.ConfigDict,
  source: str | None = None,
  *,
  split: str | None = None,
  data_dir: str | None = None,
) -> tuple[sources.Source, str | None]:
  """Returns the source of `--source`, and the folder of its files or None.

  Args:
    config: Config of the run.
    source: Folder, npz file or name of a data set; None is the run's own data.
    split: Split of the data set, the npz file or the folder (see
      `folder.Folder`). None is 'test', the only split of the npz file, or all
      images in the folder.
    data_dir: Folder or file of the data set, as in `config.data.data_dir`.

  Raises:
    ValueError: If there is no such source.
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
  """Returns the split of a npz file if it has one, else 'test'."""
  try:
    with zipfile.ZipFile(path) as file:
      names = [name.removesuffix('.npy') for name in file.namelist()]
  except (OSError, zipfile.BadZipFile):
    return 'test'  # reading the file reports what is wrong with it
  splits = [x.removesuffix('_images') for x in names if x.endswith('_images')]
  return splits[0] if len(splits) == 1 else 'test'


def _names(source, root):
  """Returns a function from positions to names, and the longest name."""

  def name_of(position):
    if root is None:
      return str(position)
    name = os.path.relpath(sources.name_of(source, position), root)
    # A file's name need not be text; what is not shows as \udc..., as in repr.
    return name.encode('utf-8', 'backslashreplace').decode('utf-8')

  if root is None:
    return name_of, len(str(len(source) - 1))
  return name_of, max(len(name_of(x)) for x in range(len(source)))


def _check_what(what):
  wrong = [name for name in what if name not in WHAT]
  if wrong or not what:
    got = f'{wrong[0]!r}' if wrong else 'none'
    raise ValueError(f'--what must be some of {", ".join(WHAT)}; got {got}')


def _check_out(out, overwrite):
  if not out or not out.endswith(_ENDINGS):
    endings = ' or *'.join(_ENDINGS)
    raise ValueError(f'--out must be a file *{endings}, got {out or "none"}')
  remote.check_local('--out', out)
  if out.endswith('.parquet'):
    extras.check(f'--out={out}', 'export', 'pyarrow')
  parent = os.path.dirname(os.path.abspath(out))
  if not os.path.isdir(parent):
    raise ValueError(f'--out={out}: there is no folder {parent}')
  if os.path.exists(out) and not overwrite:
    raise ValueError(
      f'--out={out} already exists; choose another name or pass --overwrite'
    )
  parallel.by_main(lambda: files.check_writable(out, f'--out={out}'))


@contextlib.contextmanager
def _writer(out, step, capacity):
  """Yields a function that adds rows of columns to a file.

  The file appears when all is written; an error leaves an older one as it is.
  """
  if not parallel.is_main():
    yield None
    return
  partial = f'{out}.partial'
  write = _npz if out.endswith('.npz') else _parquet
  try:
    with write(partial, step, capacity) as add:
      yield add
    os.replace(partial, out)
  finally:
    with contextlib.suppress(FileNotFoundError):
      os.remove(partial)


@contextlib.contextmanager
def _npz(path, step, capacity):
  """See `_writer`; the columns grow in files that are packed at the end."""
  columns, rows = {}, 0

  def add(part):
    nonlocal rows
    for name, values in part.items():
      if name not in columns:
        place = os.path.join(folder, f'{name}.npy')
        shape = (capacity, *values.shape[1:])
        columns[name] = _reserved(place, values.dtype, shape)
      columns[name][rows : rows + len(values)] = values
    rows += len(values)

  with tempfile.TemporaryDirectory(
    prefix='.embed_', dir=os.path.dirname(os.path.abspath(path))
  ) as folder:
    yield add
    whole = {name: column[:rows] for name, column in columns.items()}
    with open(path, 'wb') as file:
      np.savez(file, **whole, step=step)


def _reserved(path, dtype, shape):
  """Returns an array in a file, whose space on the disk is reserved."""
  array = np.lib.format.open_memmap(path, 'w+', dtype, shape)
  if hasattr(os, 'posix_fallocate'):  # not on macOS
    with open(path, 'r+b') as file:
      # Writing to a mapped file would kill the process on a full disk.
      os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
  return array


@contextlib.contextmanager
def _parquet(path, step, capacity):
  """See `_writer`; a row group is written whenever it is full."""
  del capacity
  import pyarrow
  from pyarrow import parquet

  waiting, writer = [], None

  def flush():
    nonlocal writer
    table = pyarrow.concat_tables(waiting).combine_chunks()
    waiting.clear()
    if writer is None:
      schema = table.schema.with_metadata({'step': str(step)})
      # Looking for repeated floats would take time and find none.
      writer = parquet.ParquetWriter(path, schema, use_dictionary=['label'])
    writer.write_table(table)

  def add(part):
    waiting.append(
      pyarrow.table(
        {
          name: pyarrow.array(column)
          if column.ndim == 1
          else pyarrow.FixedSizeListArray.from_arrays(
            pyarrow.array(column.ravel()), column.shape[1]
          )
          for name, column in part.items()
        }
      )
    )
    if sum(map(len, waiting)) >= _ROW_GROUP:
      flush()

  try:
    yield add
    if waiting:
      flush()
  finally:
    if writer is not None:
      writer.close()


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
  flags.DEFINE_bool('overwrite', False, 'Replace an existing --out.')


def main() -> None:
  """Runs the command."""
  values = flags.FLAGS
  if not values.workdir:
    raise ValueError('--workdir must name the folder of a run, got none')
  start = time.monotonic()
  rows = embed(
    Request(
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
  )
  if parallel.is_main():
    seconds = time.monotonic() - start
    print(
      f'{values.out}: {rows:,} images in {seconds:.1f} s on '
      f'{jax.device_count()} device(s)'
    )


if __name__ == '__main__':
  cli.run(main, define_flags)
