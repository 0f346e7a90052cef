"""File systems without locks, and what holds one."""

import errno
import fcntl
import os
import pathlib

import pytest

from clop_jax.data import tfds_source
from clop_jax.experiment import workdir
from clop_jax.runtime import locks


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def no_locks(request, monkeypatch):
  def flock(file, operation):
    raise OSError(request.param, os.strerror(request.param))

  monkeypatch.setattr(fcntl, 'flock', flock)
  locks._warn.cache_clear()


def warnings_of(capsys):
  return [x for x in capsys.readouterr().err.splitlines() if 'warning: ' in x]


def test_a_workdir_without_locks_is_warned_of_once(no_locks, tmp_path, capsys):
  for _ in range(2):
    with workdir.locked(str(tmp_path)):
      pass
  (line,) = warnings_of(capsys)
  assert f'warning: {tmp_path} cannot be locked (' in line


def test_data_are_prepared_without_locks(no_locks, tmp_path, capsys):
  made = tfds_source.builder('digits', str(tmp_path))
  # Of another process, perhaps.
  folder, version = os.path.split(made.data_dir)
  other = pathlib.Path(folder, f'incomplete.ABCDEF_{version}')
  other.mkdir(parents=True)
  assert tfds_source.prepared('digits', str(tmp_path)).is_prepared()
  assert other.exists()
  (line,) = warnings_of(capsys)
  assert f'warning: {folder} cannot be locked (' in line


def test_other_errors_of_a_lock_are_raised(tmp_path, monkeypatch):
  def flock(file, operation):
    raise OSError(errno.EBADF, 'no')

  monkeypatch.setattr(fcntl, 'flock', flock)
  with pytest.raises(OSError, match='no'), workdir.locked(str(tmp_path)):
    pass
