"""File locks that end with the process that holds them."""

import errno
import fcntl
import functools
import os
import sys
from typing import IO

# Errors of Lustre without the mount option flock, and of some NFS.
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


def take(file: IO, *, wait: bool = False) -> bool:
  """Locks a file that is open for writing, until it is closed.

  Args:
    file: The file.
    wait: If True, waits for a process that holds the lock.

  Returns:
    True, or False after a warning if the file system has no locks.

  Raises:
    BlockingIOError: If another process holds the lock and `wait` is False.
  """
  try:
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
  except OSError as error:
    if error.errno not in _UNSUPPORTED:
      raise
    _warn(os.path.dirname(os.path.abspath(file.name)), error.strerror)
    return False
  return True


@functools.cache
def _warn(folder, reason):
  print(
    f'warning: {folder} cannot be locked ({reason}), so nothing stops two '
    'commands from writing there at once; start only one at a time',
    file=sys.stderr,
    flush=True,
  )
