"""A run's folder, here and remote."""

import json
import os

from etils import epath
import fsspec
from fsspec.implementations import memory
import numpy as np
import pytest

from clop_jax import defaults
from clop_jax import metrics_log
from clop_jax import workdir
from clop_jax.data import labels as label_policy

LABELS = np.array([0, -1, 2], np.int32)
TRUE = np.array([0, 1, 2], np.int32)


class Bucket(memory.MemoryFileSystem):
  """A remote file system that is in memory."""

  protocol = 's3'


@pytest.fixture(params=['local', 'remote'])
def folder(request, tmp_path):
  if request.param == 'local':
    yield str(tmp_path / 'run')
    return
  fsspec.register_implementation('s3', Bucket, clobber=True)
  path = f's3://bucket/{tmp_path.name}/run'
  yield path
  Bucket.store.clear()


def config_of(**changes):
  config = defaults.get_config()
  for name, value in changes.items():
    config.train[name] = value
  return config


def test_a_claimed_workdir_has_its_config_and_labels(folder):
  with workdir.claim(config_of(), folder, LABELS, TRUE):
    loaded = workdir.load_config(folder)
    assert workdir.to_json(loaded) == workdir.to_json(config_of())
    data = (epath.Path(folder) / 'labels.npz').read_bytes()
    np.testing.assert_array_equal(label_policy.unpack(data), LABELS)
  names = {path.name for path in epath.Path(folder).iterdir()}
  assert names - {'.lock'} == {'config.json', 'labels.npz'}
  # And again, with the same.
  with workdir.claim(config_of(), folder, LABELS, TRUE):
    pass


def test_another_config_or_other_data_are_refused(folder):
  with workdir.claim(config_of(), folder, LABELS, TRUE):
    pass
  message = 'another config: train.num_epochs is 20 there and 3 here'
  with (
    pytest.raises(ValueError, match=message),
    workdir.claim(config_of(num_epochs=3), folder, LABELS, TRUE),
  ):
    pass
  with (
    pytest.raises(ValueError, match=r'other data .*3 examples there, 2 here'),
    workdir.claim(config_of(), folder, LABELS[:2], TRUE[:2]),
  ):
    pass


def test_other_settings_of_the_evaluation_go_on_and_hold(folder):
  with workdir.claim(config_of(), folder, LABELS, TRUE):
    pass
  config = config_of()
  config.eval.finetune_epochs = 7
  config.watch.probe = 'both'
  with workdir.claim(config, folder, LABELS, TRUE):
    pass
  loaded = workdir.load_config(folder)
  assert loaded.eval.finetune_epochs == 7
  loaded = workdir.to_json(loaded)
  assert loaded | {'eval': None} == workdir.to_json(config_of()) | {
    'eval': None
  }


def test_a_local_workdir_is_one_run_s_until_it_ends(tmp_path):
  path = str(tmp_path)
  with workdir.claim(config_of(), path, LABELS, TRUE):
    message = f'in use by another run .process {os.getpid()} on '
    with (
      pytest.raises(ValueError, match=message),
      workdir.claim(config_of(), path, LABELS, TRUE),
    ):
      pass
  with workdir.claim(config_of(), path, LABELS, TRUE):
    pass


def log_of(folder, start):
  epath.Path(folder).mkdir(parents=True, exist_ok=True)
  path = os.path.join(folder, 'metrics.jsonl')
  options = {'start': start, 'total_steps': 10, 'batch_size': 4}
  return path, metrics_log.MetricsLog(path, **options)


def test_the_log_goes_on_from_where_the_run_does(folder, capsys):
  values = {'loss': 1.5, 'clop_loss': 0.25, 'effective_rank': float('nan')}
  path, log = log_of(folder, 0)
  with log:
    for step in (1, 2, 3):
      log.write(step, values)
  assert 'step 3/10: loss 1.5000, clop 0.2500' in capsys.readouterr().out
  # A line that a kill cut short, and one that will be trained again.
  file = epath.Path(path)
  file.write_text(file.read_text() + '{"step": 4, "lo')
  path, log = log_of(folder, 2)
  with log:
    log.write(3, values | {'loss': 7.0})
  lines = [json.loads(line) for line in file.read_text().splitlines()]
  assert [line['step'] for line in lines] == [1, 2, 3]
  assert [line['loss'] for line in lines] == [1.5, 1.5, 7.0]
  # NaN is no JSON.
  assert lines[0]['effective_rank'] is None


def test_a_silent_log_writes_nothing(tmp_path, capsys):
  with metrics_log.Silent() as log:
    log.write(1, {'loss': 1.0})
  assert not capsys.readouterr().out
