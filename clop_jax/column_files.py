"""Columns of arrays, written part by part into one npz or Parquet file.

Memory does not grow with the rows.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import os
import shutil
import tempfile
from typing import Any
import zipfile

import numpy as np

_ROW_GROUP = 4096  # rows of a Parquet file that are in memory at one time


@contextlib.contextmanager
def writing(
  path: str, step: int
) -> Iterator[Callable[[Mapping[str, np.ndarray]], None]]:
  """Gives a function that adds rows; the file appears when all went well.

  The function takes columns by name, `[rows, ...]` each: always the same names,
  kinds and widths, and as many rows in each.

  Args:
    path: ends in one of `ENDINGS`; what is there is replaced.
    step: of a checkpoint. A npz file has it as `step`, a Parquet file in its
      metadata.

  Raises:
    OSError: if something cannot be written; nothing is left of it then.
  """
  partial = f'{path}.partial'
  try:
    with _WRITERS[os.path.splitext(path)[1]](partial, step) as writer:
      yield writer.add
      writer.finish()
    os.replace(partial, path)
  except BaseException:  # also an interrupt
    with contextlib.suppress(FileNotFoundError):
      os.remove(partial)
    raise


class _Npz:
  """A npz file whose arrays grow on the disk, each in a file without a name."""

  def __init__(self, path, step):
    self._path, self._step = path, step
    self._files, self._kinds, self._rows = {}, {}, 0

  def __enter__(self):
    return self

  def __exit__(self, *error):
    for file in self._files.values():
      file.close()

  def add(self, columns):
    for name, column in columns.items():
      if name not in self._files:
        parent = os.path.dirname(os.path.abspath(self._path))
        # The system forgets it with this process, however that ends.
        self._files[name] = tempfile.TemporaryFile(dir=parent)  # noqa: SIM115
        self._kinds[name] = (column.dtype, column.shape[1:])
      self._files[name].write(column.tobytes())
    self._rows += _num_rows(columns)

  def finish(self):
    with zipfile.ZipFile(self._path, 'w', zipfile.ZIP_STORED) as archive:
      for name, file in self._files.items():
        dtype, shape = self._kinds[name]
        header = {
          'descr': np.lib.format.dtype_to_descr(dtype),
          'fortran_order': False,
          'shape': (self._rows, *shape),
        }
        file.seek(0)
        with archive.open(f'{name}.npy', 'w', force_zip64=True) as member:
          np.lib.format.write_array_header_1_0(member, header)
          shutil.copyfileobj(file, member, 1 << 20)
        file.close()  # gives its space back before the next is copied
      with archive.open('step.npy', 'w') as member:
        np.lib.format.write_array(member, np.asarray(self._step))


class _Parquet:
  """A Parquet file, written one row group after another."""

  def __init__(self, path, step):
    self._path, self._step = path, step
    self._writer, self._waiting = None, []

  def __enter__(self):
    return self

  def __exit__(self, *error):
    if self._writer is not None:
      self._writer.close()

  def add(self, columns):
    self._waiting.append(columns)
    if sum(map(_num_rows, self._waiting)) >= _ROW_GROUP:
      self._write_waiting()

  def _write_waiting(self):
    import pyarrow
    from pyarrow import parquet

    arrays = {}
    for name in self._waiting[0]:
      column = np.concatenate([part[name] for part in self._waiting])
      if column.ndim == 1:
        arrays[name] = pyarrow.array(column)
      else:
        arrays[name] = pyarrow.FixedSizeListArray.from_arrays(
          pyarrow.array(column.ravel()), column.shape[1]
        )
    self._waiting.clear()
    table = pyarrow.table(arrays)
    if self._writer is None:
      schema = table.schema.with_metadata({'step': str(self._step)})
      # Looking for repeated floats would take time and find none.
      self._writer = parquet.ParquetWriter(
        self._path,
        schema,
        use_dictionary=[
          field.name for field in schema if pyarrow.types.is_integer(field.type)
        ],
      )
    self._writer.write_table(table)

  def finish(self):
    if self._waiting:
      self._write_waiting()


def _num_rows(columns):
  return len(next(iter(columns.values())))


_WRITERS: dict[str, Any] = {'.npz': _Npz, '.parquet': _Parquet}
ENDINGS = tuple(_WRITERS)
