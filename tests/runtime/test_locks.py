"""Locks on file systems that have none."""

import errno
import fcntl
import os
import pathlib

import pytest

from clop_jax.data import tfds_source
from clop_jax.experiment import workdir
from clop_jax.runtime import locks


@pytest.fixture
def flock_fails(monkeypatch):
  def fail(number):
    def flock(file, operation):
      raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, 'flock', flock)
    locks._warn.cache_clear()

  return fail


@pytest.mark.parametrize(
  'number', [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]
)
def test_a_workdir_without_locks_is_one_warning(
  number, flock_fails, tmp_path, capsys
):
  flock_fails(number)
  for _ in range(2):
    with workdir.locked(str(tmp_path)):
      pass
  (line,) = capsys.readouterr().err.splitlines()
  assert f'warning: {tmp_path} cannot be locked (' in line


def test_data_are_prepared_without_locks(flock_fails, tmp_path, capsys):
  flock_fails(errno.ENOSYS)
  made = tfds_source.builder('digits', str(tmp_path))
  # Of another process, perhaps.
  folder, version = os.path.split(made.data_dir)
  other = pathlib.Path(folder, f'incomplete.ABCDEF_{version}')
  other.mkdir(parents=True)
  assert tfds_source.prepared('digits', str(tmp_path)).is_prepared()
  assert other.exists()
  assert f'warning: {folder} cannot be locked (' in capsys.readouterr().err


def test_other_errors_of_a_lock_are_raised(flock_fails, tmp_path):
  flock_fails(errno.EBADF)
  with pytest.raises(OSError, match='Bad file'), workdir.locked(str(tmp_path)):
    pass
