"""Reading and writing the small files of a workdir or a study.

A file that cannot be read as what it should be is a `ValueError` of one line
that names the file and the fix. What the system refuses (a permission, a disk,
a network) stays an `OSError`: such a file counts neither as damaged nor as
missing. Paths are local, or remote (`gs://`, `s3://`) as far as `etils.epath`
reaches them.
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

# About as many bytes as the files of an evaluation have.
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

  Unlike `os.path.exists`, which is False for everything that cannot be seen.

  Raises:
    OSError: If the system does not say.
  """
  return _mode(path) is not None


def is_folder(path: Path) -> bool:
  """Returns True if the path is a folder.

  Raises:
    OSError: If the system does not say.
  """
  if is_remote(path):
    return epath.Path(path).is_dir()
  mode = _mode(path)
  return mode is not None and stat.S_ISDIR(mode)


def _mode(path):
  if is_remote(path):
    return 0 if epath.Path(path).exists() else None
  try:
    return os.stat(path).st_mode
  except (FileNotFoundError, NotADirectoryError):
    return None


def read_json(path: Path, *, fix: str) -> dict[str, Any]:
  """Reads a file that holds one JSON object.

  Args:
    path: Path of the file.
    fix: Advice for the user if the file is damaged.

  Returns:
    The object.

  Raises:
    ValueError: If the file holds anything else.
    OSError: If the file cannot be read.
  """
  try:
    return _object(epath.Path(path).read_bytes())
  except ValueError as error:
    raise _damaged(path, 'a JSON object', error, fix) from error


def read_json_lines(path: Path, *, fix: str) -> Iterator[dict[str, Any]]:
  """Reads a file with one JSON object of numbers for a step on each line.

  The last line may be cut short, as it is after a process has been killed. It
  is skipped then.

  Args:
    path: Path of the file.
    fix: Advice for the user if a line is damaged.

  Yields:
    Each object. Its `step` is an integer, and other values may be None.

  Raises:
    ValueError: If a line holds anything else, after the lines before it.
    OSError: If the file cannot be read.
  """
  *lines, rest = epath.Path(path).read_bytes().split(b'\n')
  if rest:
    try:
      json.loads(rest)
      lines.append(rest)
    except ValueError:
      if not rest.startswith(b'{'):
        lines.append(rest)
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    try:
      entry = _object(line)
      _check_numbers(entry)
    except ValueError as error:
      where = f'{as_text(str(path))}, line {number},'
      expected = 'a JSON object with a step and numbers'
      raise _damaged(where, expected, error, fix) from error
    yield entry


def _check_numbers(entry):
  if type(entry.get('step')) is not int:
    raise ValueError(f'its step is {entry.get("step")!r:.40}')
  for name, value in entry.items():
    if value is not None and type(value) not in (int, float):
      raise ValueError(f'its {name:.40} is {value!r:.40}')


def _object(data):
  try:
    value = json.loads(data.decode('utf-8'))
    if not isinstance(value, dict):
      raise ValueError(f'it holds {value!r:.40}')
    return value
  except RecursionError:
    raise ValueError('it is nested too deeply') from None


def read_npz(
  path: Path, names: Iterable[str], *, fix: str
) -> dict[str, np.ndarray]:
  """Reads arrays of an npz file.

  Args:
    path: Path of the file.
    names: Names of the arrays.
    fix: Advice for the user if the file is damaged.

  Returns:
    The arrays by name.

  Raises:
    ValueError: If the file is damaged or lacks one of the arrays.
    OSError: If the file cannot be read.
  """
  data = epath.Path(path).read_bytes()
  try:
    with np.load(io.BytesIO(data)) as archive:
      check_unpacked(archive)
      return {name: archive[name] for name in names}
  except Exception as error:
    # zipfile, zlib and NumPy raise a dozen kinds, depending on the place of the
    # damage. The file has been read, so none of them is the system's.
    raise _damaged(path, 'an npz file', error, fix) from error


def check_unpacked(archive: np.lib.npyio.NpzFile) -> None:
  """Checks that the arrays of an npz file fit the memory, before any is read.

  A few megabytes of a zip file can unpack to any size.

  Raises:
    ValueError: If they do not fit.
  """
  members = archive.zip.infolist() if archive.zip else []
  size = sum(member.file_size for member in members)
  free = available_memory()
  if size > free:
    raise ValueError(
      f'it unpacks to {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of '
      'memory are free'
    )


def available_memory() -> int:
  """Returns how many bytes of this machine's memory are free."""
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
  """Writes a file such that it never exists in part.

  Raises:
    OSError: If it cannot be written. An older file stays as it was.
  """
  partial = epath.Path(f'{path}.partial')
  try:
    partial.write_bytes(data)
    partial.replace(path)
  except BaseException:  # an interrupt, too
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)
    raise


def check_writable(path: Path, flag: str) -> None:
  """Checks that a file can be written, by writing and removing one beside it.

  Permissions alone do not show a full disk or a read-only file system.

  Args:
    path: Path of the file. Missing folders are made, and removed again.
    flag: Flag or field that determines the path, as `--out=x`.

  Raises:
    OSError: If the file cannot be written. Nothing is left behind.
  """
  folder = epath.Path(path).parent
  try:
    with _made(folder):
      _write_probe(epath.Path(path))
  except OSError as error:
    failure = OSError(
      f'{flag}: {as_text(str(path))} cannot be written '
      f'({error.strerror or error})'
    )
    failure.errno = error.errno
    raise failure from error


@contextlib.contextmanager
def _made(folder):
  """Makes a folder and those above it, and removes the new ones at the end."""
  missing = []
  while not is_remote(folder) and not exists(folder):
    missing.append(folder)
    folder = folder.parent
  try:
    for one in reversed(missing):
      one.mkdir()
    yield
  finally:
    for one in missing:
      with contextlib.suppress(OSError):
        one.rmdir()


def _write_probe(path):
  # Beside the file and under a name of this process: others may check as well.
  probe = epath.Path(f'{path}.{os.getpid()}.probe')
  try:
    if is_remote(probe):
      probe.write_bytes(b'')
      return
    with open(probe, 'wb') as file:
      file.write(_PROBE)
      file.flush()
      os.fsync(file.fileno())
    if is_folder(path):
      raise IsADirectoryError(None, 'it is a folder')
    if os.path.lexists(path):
      _check_replaceable(path)
  finally:
    with contextlib.suppress(OSError):
      probe.unlink(missing_ok=True)


def _check_replaceable(path):
  """Raises PermissionError in a sticky folder with another user's file."""
  folder = os.stat(os.path.dirname(os.path.abspath(path)))
  owners = {0, folder.st_uid, os.lstat(path).st_uid}
  if folder.st_mode & stat.S_ISVTX and os.geteuid() not in owners:
    raise PermissionError(None, "it is another user's, in a sticky folder")
