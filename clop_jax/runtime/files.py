"""Reading and writing the small files of a workdir or a study.

A file with the wrong content is a `ValueError` of one line that names the file
and the fix. An error of the system (a permission, a disk, a network) stays an
`OSError`, since such a file is neither damaged nor missing. Paths are local, or
remote (`gs://`, `s3://`) as far as `etils.epath` supports them.
"""

from collections.abc import Iterable, Iterator
import contextlib
import io
import json
import os
import stat
from typing import Any

from etils import epath
import numpy as np

# About the size of the files of an evaluation.
_PROBE = bytes(2**20)

Path = str | os.PathLike[str]


def is_remote(path: Path) -> bool:
  """Returns True for a path such as `gs://bucket/run`."""
  return '://' in str(path)


def expanded(path: str) -> str:
  """Returns the path with a leading `~` or `~user` as the home folder.

  Raises:
    ValueError: If there is no such user.
  """
  result = os.path.expanduser(path)
  if result.startswith('~'):
    raise ValueError(
      f'{path} starts with the home folder of an unknown user; write ./{path} '
      'for a folder of that name'
    )
  return result


def as_text(path: str) -> str:
  """Returns the path with bytes that are not UTF-8 as backslash escapes."""
  return path.encode('utf-8', 'backslashreplace').decode('utf-8')


def exists(path: Path) -> bool:
  """Returns True if there is a file or folder at the path.

  Raises:
    OSError: If the system cannot tell, where `os.path.exists` returns False.
  """
  return _mode(path) is not None


def is_folder(path: Path) -> bool:
  """Returns True if the path is a folder.

  Raises:
    OSError: If the system cannot tell, where `os.path.isdir` returns False.
  """
  if is_remote(path):
    return epath.Path(path).is_dir()
  return stat.S_ISDIR(_mode(path) or 0)


def _mode(path):
  if is_remote(path):
    return 0 if epath.Path(path).exists() else None
  try:
    return os.stat(path).st_mode
  except (FileNotFoundError, NotADirectoryError):
    return None


def read_json(path: Path, *, fix: str) -> dict[str, Any]:
  """Returns the JSON object in a file.

  Args:
    path: Path of the file.
    fix: Advice for the user if the file is damaged.

  Raises:
    ValueError: If the file holds anything else.
    OSError: If the file cannot be read.
  """
  try:
    return _object(epath.Path(path).read_bytes())
  except ValueError as error:
    raise _damaged(path, 'a JSON object', error, fix) from error


def read_json_lines(path: Path, *, fix: str) -> Iterator[dict[str, Any]]:
  """Yields the JSON object of numbers on each line of a log.

  Each has an integer `step`, and other values may be None. A last line that was
  cut short, as by a process that was killed, is skipped.

  Args:
    path: Path of the file.
    fix: Advice for the user if a line is damaged.

  Raises:
    ValueError: If a line holds anything else, after the lines before it.
    OSError: If the file cannot be read.
  """
  *lines, last = epath.Path(path).read_bytes().split(b'\n')
  if not last.startswith(b'{') or _is_json(last):
    lines.append(last)
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    try:
      entry = _object(line)
      for name, value in {'step': None, **entry}.items():
        kinds = (int,) if name == 'step' else (int, float, type(None))
        if type(value) not in kinds:
          raise ValueError(f'its {name:.40} is {value!r:.40}')
    except ValueError as error:
      where = f'{as_text(str(path))}, line {number},'
      expected = 'a JSON object with a step and numbers'
      raise _damaged(where, expected, error, fix) from error
    yield entry


def _is_json(data):
  try:
    json.loads(data)
    return True
  except ValueError:
    return False


def _object(data):
  try:
    value = json.loads(data.decode('utf-8'))
  except RecursionError:
    raise ValueError('it is nested too deeply') from None
  if not isinstance(value, dict):
    raise ValueError(f'it holds {value!r:.40}')
  return value


def read_npz(
  path: Path, names: Iterable[str], *, fix: str
) -> dict[str, np.ndarray]:
  """Returns arrays of an npz file by their names.

  Args:
    path: Path of the file.
    names: Names of the arrays.
    fix: Advice for the user if the file is damaged.

  Raises:
    ValueError: If the file is damaged or lacks one of the arrays.
    OSError: If the file cannot be read.
  """
  data = epath.Path(path).read_bytes()
  try:
    with np.load(io.BytesIO(data)) as archive:
      return {name: archive[name] for name in names}
  except Exception as error:
    # zipfile, zlib and NumPy raise a dozen kinds. The system's come before.
    raise _damaged(path, 'an npz file', error, fix) from error


def check_unpacked(archive: np.lib.npyio.NpzFile) -> None:
  """Raises ValueError if the arrays of an npz file do not fit the memory."""
  members = archive.zip.infolist() if archive.zip else []
  size = sum(member.file_size for member in members)
  free = _available_memory()
  if size > free:
    raise ValueError(
      f'it unpacks to {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of '
      'memory are free'
    )


def _available_memory():
  with contextlib.suppress(OSError, ValueError, StopIteration):
    with open('/proc/meminfo') as file:
      line = next(x for x in file if x.startswith('MemAvailable:'))
    return int(line.split()[1]) * 1024
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def _damaged(where, expected, error, fix):
  reason = ' '.join(str(error).split()) or type(error).__name__
  return ValueError(
    f'{as_text(str(where))} must be {expected} and is damaged '
    f'({reason:.150}); {fix}'
  )


def write_whole(path: Path, data: bytes) -> None:
  """Writes a file that never exists in part.

  Raises:
    OSError: If it cannot be written. An older file stays as it was.
  """
  partial = epath.Path(f'{path}.partial')
  try:
    partial.write_bytes(data)
    partial.replace(path)
  except BaseException:  # including KeyboardInterrupt
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)
    raise


def check_writable(path: Path, flag: str) -> None:
  """Checks that a file can be written, by writing another one beside it.

  Permissions alone show neither a full disk nor a read-only file system.

  Args:
    path: Path of the file. If its folder is missing, the nearest existing one
      above it is used.
    flag: Flag or field that determines the path, as `--out=x`.

  Raises:
    OSError: If the file cannot be written. Nothing is left behind.
  """
  try:
    if is_folder(path):
      raise IsADirectoryError('it is a folder')
    folder = epath.Path(path).parent
    while not is_remote(folder) and not exists(folder):
      folder = folder.parent
    # Other processes may check the same file.
    probe = folder / f'.{os.getpid()}.probe'
    try:
      probe.write_bytes(_PROBE)
    finally:
      probe.unlink(missing_ok=True)
  except OSError as error:
    failure = OSError(
      f'{flag}: {as_text(str(path))} cannot be written '
      f'({error.strerror or error})'
    )
    failure.errno = error.errno
    raise failure from error
