r"""Writes features and embeddings of images into one file.

python -m clop_jax.embed --workdir=runs/digits --out=digits.npz
python -m clop_jax.embed --workdir=runs/digits --source=PHOTOS \
  --out=photos.parquet
python -m clop_jax.embed --workdir=runs/digits --source=cifar10 --split=test \
  --out=cifar10.npz --what=features

Images are read, embedded and written batch by batch, so memory does not grow
with their number. docs/embed.md describes the file.
"""

import collections
from collections.abc import Sequence
import contextlib
import dataclasses
import os
import sys
import tempfile
import time
from typing import Any
import zipfile

from absl import flags
import jax
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
_AHEAD = 2  # batches that the devices compute while the host writes one
_ROW_GROUP = 4096  # rows of a Parquet file that are in memory at a time


@dataclasses.dataclass(frozen=True)
class Request:
  """Arguments of `embed`.

  Attributes:
    workdir: Workdir of a run.
    out: File to write, `*.npz` or `*.parquet`.
    source: Folder, npz file, name of a data set, or a source object. If None,
      the run's own data.
    split: Split of the data set, the npz file or the folder. If None, 'test',
      the only split of the npz file, or all images in the folder.
    data_dir: Folder or file of the data set, as in `config.data.data_dir`.
    which: Checkpoint: 'latest', 'best' (by `train.keep_best`) or a step.
    what: Columns: 'features' and 'embeddings'.
    batch_size: Images per batch. If None, the run's `eval.batch_size`.
    num_workers: Processes that read. If None, as in the run's config.
    skip_corrupt: If True, images that cannot be decoded are left out with a
      warning. If None, as in the run's config.
    overwrite: If True, an existing file is replaced.
    devices: Devices. If None, all devices of all processes.
  """

  workdir: str
  out: str
  source: str | sources.Source | None = None
  split: str | None = None
  data_dir: str | None = None
  which: str = 'latest'
  what: Sequence[str] = WHAT
  batch_size: int | None = None
  num_workers: int | None = None
  skip_corrupt: bool | None = None
  overwrite: bool = False
  devices: Sequence[jax.Device] | None = None


def embed(request: Request) -> int:
  """Writes features and embeddings of all images of a source.

  The columns are `name` (the path in the folder, or the number of the example),
  `label` (-1 if unknown), and `features` and `embeddings` (float32, not
  normalized). The step of the checkpoint is the array `step` of an npz file,
  and metadata of a Parquet file. The file appears when it is complete.

  Args:
    request: Workdir, images and file.

  Returns:
    The number of rows.

  Raises:
    ValueError: If the workdir holds no run or no such checkpoint, `out` exists
      or cannot be written, or an image cannot be decoded.
    OSError: If the system refuses to write `out`.
    FloatingPointError: If an output is not finite because training diverged.
    checkpoint.DamagedCheckpointError: If no checkpoint can be restored.
  """
  _check_request(request)
  config = workdir_lib.load_config(request.workdir)
  source, root = _source(config, request)
  reading = config
  if request.source is not None:
    reading = inputs.on_other_data(config, 'other')
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
    with contextlib.closing(batches):
      return _write(request, run, reader, batches, size, _names(source, root))
  except images_lib.CorruptImageError as error:
    reason = str(error).split(';')[0]
    raise ValueError(
      f'{reason}; repair or remove it, or pass --skip_corrupt'
    ) from error


def _check_request(request):
  what, out = request.what, request.out
  unknown = [repr(name) for name in what if name not in WHAT]
  if unknown or not what:
    got = unknown[0] if unknown else 'none'
    raise ValueError(f'--what must be some of {", ".join(WHAT)}; got {got}')
  if not out or not out.endswith(_ENDINGS):
    endings = ' or *'.join(_ENDINGS)
    raise ValueError(f'--out must be a file *{endings}, got {out or "none"}')
  remote.check_local('--out', out)
  if out.endswith('.parquet'):
    extras.check(f'--out={out}', 'export', 'pyarrow')
  parent = os.path.dirname(os.path.abspath(out))
  if not os.path.isdir(parent):
    raise ValueError(f'--out={out}: folder {parent} does not exist')
  if os.path.exists(out) and not request.overwrite:
    raise ValueError(
      f'--out={out} already exists; choose another name or pass --overwrite'
    )
  parallel.by_main(lambda: files.check_writable(out, f'--out={out}'))


def _source(config, request):
  """Returns the source, and the folder that its names are relative to."""
  name, split, data_dir = request.source, request.split, request.data_dir
  if name is None:
    if data_dir is not None:
      raise ValueError(
        f'--data_dir={data_dir} needs --source=NAME, got no --source'
      )
    split = split or config.data.test_split
    if not split:
      raise ValueError(
        "--split must name a split of the run's data, got none: the run has no "
        'test split'
      )
    is_folder = config.data.name == 'folder'
    root = config.data.data_dir if is_folder else None
    return inputs.source(config, split), root
  root, source = None, name
  try:
    if not isinstance(name, str):
      pass
    elif os.path.isdir(name) and data_dir is None:
      root = name
      source = folder.Folder(split, name) if split else folder.Tree(name)
    elif name.endswith('.npz') and not os.path.exists(name):
      raise ValueError('the file does not exist')
    elif name.endswith('.npz'):
      source = arrays.load_npz(split or _only_split(name), name)
    elif os.path.isfile(name):
      raise ValueError('it is a file, expected a folder, *.npz or a name')
    else:
      source = sources.load(name, split or 'test', data_dir)
      root = data_dir if name == 'folder' else None
  except ValueError as error:
    reason = sources.in_flags(error, '--source').replace(
      '--source must be', 'no such folder exists; a name must be'
    )
    raise ValueError(f'--source={name}: {reason}') from error
  return inputs.fitted(config, source), root


def _only_split(path):
  """Returns the split of an npz file if it has one, else 'test'."""
  try:
    with zipfile.ZipFile(path) as file:
      names = [name.removesuffix('.npy') for name in file.namelist()]
  except (OSError, zipfile.BadZipFile):
    return 'test'  # load_npz reports the error
  splits = [x.removesuffix('_images') for x in names if x.endswith('_images')]
  return splits[0] if len(splits) == 1 else 'test'


def _names(source, root):
  """Returns a function from positions to an array of names."""

  def name_of(position):
    if root is None:
      return str(position)
    name = os.path.relpath(sources.name_of(source, position), root)
    # Bytes that are no text become \udc..., as in repr.
    return name.encode('utf-8', 'backslashreplace').decode('utf-8')

  # All batches need one width.
  last = len(source) - 1
  shown = range(len(source)) if root is not None else (last,)
  dtype = f'<U{max(len(name_of(x)) for x in shown)}'
  return lambda positions: np.array([name_of(x) for x in positions], dtype)


def _write(request, run, reader, batches, size, names):
  """Embeds and writes all batches; returns the number of rows."""
  rows = 0
  with (
    _writer(request.out, run.step, len(reader)) as write,
    tqdm.tqdm(
      total=len(reader), desc='embedding', disable=not sys.stderr.isatty()
    ) as bar,
  ):
    for positions, columns in _embedded(run, batches, size, request.what):
      if parallel.is_main():
        columns = {'label': reader.labels[positions], **columns}
        write({'name': names(positions), **columns})
      rows += len(positions)
      bar.update(len(positions))
  return rows


def _embedded(run, batches, size, what):
  """Yields the positions and the columns of each batch, on the host."""
  # The devices compute the next batches while the host waits for the oldest.
  ready = collections.deque()

  def oldest():
    outputs, positions = ready.popleft()
    columns = {}
    for name, output in zip(WHAT, outputs, strict=True):
      if name in what:
        columns[name] = np.asarray(output, np.float32)[: len(positions)]
        if not np.isfinite(columns[name]).all():
          raise FloatingPointError(
            f'{name} are not finite at step {run.step}: training diverged'
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


@contextlib.contextmanager
def _writer(out, step, capacity):
  """Yields a function that adds rows, given as columns by name.

  The file is replaced when all rows are written. Only the main process writes.
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
  """See `_writer`. Each column is a file, packed into one at the end."""
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
  """Returns an array in a file whose disk space is reserved."""
  array = np.lib.format.open_memmap(path, 'w+', dtype, shape)
  if hasattr(os, 'posix_fallocate'):  # not on macOS
    with open(path, 'r+b') as file:
      # On a full disk, writing to a mapped file would kill the process.
      os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
  return array


@contextlib.contextmanager
def _parquet(path, step, capacity):
  """See `_writer`. Row groups are written as soon as they are full."""
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
      # A dictionary of floats would cost time and save nothing.
      writer = parquet.ParquetWriter(path, schema, use_dictionary=['label'])
    writer.write_table(table)

  def add(part):
    columns = {}
    for name, values in part.items():
      columns[name] = pyarrow.array(values.ravel())
      if values.ndim == 2:
        columns[name] = pyarrow.FixedSizeListArray.from_arrays(
          columns[name], values.shape[1]
        )
    waiting.append(pyarrow.table(columns))
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
  """Defines the flags of the command."""
  flags.DEFINE(cli.PATH, 'workdir', None, 'Workdir of a run.')
  flags.DEFINE_string(
    'checkpoint', 'latest', 'latest, best (by train.keep_best) or a step.'
  )
  flags.DEFINE(
    cli.PATH,
    'source',
    None,
    'Folder of images, an npz file with <split>_images, or name of a data '
    "set; default: the run's test split.",
  )
  flags.DEFINE_string(
    'split',
    None,
    'Split of the data set or npz file; reads FOLDER/<split>/<class> in a '
    'folder.',
  )
  flags.DEFINE(
    cli.PATH, 'data_dir', None, 'Folder or file of a data set in --source.'
  )
  flags.DEFINE(cli.PATH, 'out', None, 'File to write: *.npz or *.parquet.')
  flags.DEFINE_list('what', list(WHAT), 'Columns: features, embeddings.')
  flags.DEFINE_integer(
    'batch_size', None, "Images per batch; default: the run's eval.batch_size."
  )
  flags.DEFINE_integer(
    'num_workers',
    None,
    "Processes that read, 0 for threads; default: as in the run's config.",
  )
  flags.DEFINE_bool(
    'skip_corrupt', None, 'Leave out images that cannot be decoded.'
  )
  flags.DEFINE_bool('overwrite', False, 'Replace an existing file.')


def main() -> None:
  """Runs the command."""
  values = flags.FLAGS
  if not values.workdir:
    raise ValueError('--workdir must name the folder of a run, got none')
  start = time.monotonic()
  names = {field.name for field in dataclasses.fields(Request)} & {*values}
  arguments: Any = {name: values[name].value for name in names}
  rows = embed(Request(**arguments, which=values.checkpoint))
  if parallel.is_main():
    seconds = time.monotonic() - start
    print(
      f'{values.out}: {rows:,} images in {seconds:.1f} s on '
      f'{jax.device_count()} device(s)'
    )


if __name__ == '__main__':
  cli.run(main, define_flags)
