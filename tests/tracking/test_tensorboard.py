"""Tests of event files without a training."""

import errno

from etils import epath
import fsspec
import numpy as np
import pytest

from clop_jax.tracking import tensorboard
from tests.experiment import test_workdir
from tests.tracking import events


def losses(workdir):
  return [(e.step, e.value) for e in events.read(workdir).Scalars('train/loss')]


def test_a_run_that_resumes_has_no_doubled_points(tmp_path):
  for start, stop in ((0, 4), (2, 5), (0, 1)):
    log = tensorboard.TensorBoard(str(tmp_path), start=start)
    for step in range(start + 1, stop + 1):
      log.scalars(step, {'train/loss': 10.0 * start + step})
    log.close()
    if start == 2:
      assert losses(tmp_path) == [(1, 1), (2, 2), (3, 23), (4, 24), (5, 25)]
  assert losses(tmp_path) == [(1, 1)]


def test_a_full_disk_is_an_error_and_not_a_wait(tmp_path):
  log = tensorboard.TensorBoard(str(tmp_path), start=0)
  stream = log._file._stream
  log._file._stream = open('/dev/full', 'wb', buffering=0)  # noqa: SIM115
  stream.close()
  for step in range(20):
    log._writer.add_scalar('a', 1.0, step)
  with pytest.raises(OSError, match=r'watch\.tensorboard.*No space') as caught:
    log.close()
  assert caught.value.errno == errno.ENOSPC
  with pytest.raises(OSError, match='No space'):
    log.scalars(1, {'a': 1.0})


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
  (tmp_path / 'tensorboard').write_text('in the way')
  with pytest.raises(OSError, match=r'watch\.tensorboard.*/tensorboard'):
    tensorboard.TensorBoard(str(tmp_path), start=0)
  with pytest.raises(OSError, match=r'watch\.tensorboard.*/tensorboard'):
    tensorboard.check(str(tmp_path))


def test_a_remote_folder_gets_the_whole_file(tmp_path):
  fsspec.register_implementation('s3', test_workdir.Bucket, clobber=True)
  workdir = f's3://bucket/{tmp_path.name}'
  try:
    log = tensorboard.TensorBoard(workdir, start=0)
    for step in range(3):
      log.scalars(step, {'train/loss': 2.0 * step})
    log.close()
    (remote,) = epath.Path(f'{workdir}/tensorboard').iterdir()
    (tmp_path / 'tensorboard').mkdir()
    (tmp_path / 'tensorboard' / remote.name).write_bytes(remote.read_bytes())
  finally:
    test_workdir.Bucket.store.clear()
  assert losses(tmp_path) == [(0, 0), (1, 2), (2, 4)]


@pytest.mark.parametrize('spectrum', [np.r_[1.0, np.full(99, 1e-9)], [0.5]])
def test_the_histogram_of_a_collapse_has_few_bins(spectrum, tmp_path):
  log = tensorboard.TensorBoard(str(tmp_path), start=0)
  log.histogram(3, 'values', np.asarray(spectrum))
  log.close()
  (event,) = events.read(tmp_path).Histograms('values')
  values = event.histogram_value
  assert len(values.bucket) <= 51 and sum(values.bucket) == len(spectrum)
  assert values.max == np.max(spectrum)
