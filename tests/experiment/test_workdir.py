"""The workdir of a run, local and remote."""

import io
import json
import os

from etils import epath
import fsspec
from fsspec.implementations import memory
import numpy as np
import pytest

from clop_jax import defaults
from clop_jax.experiment import metrics_log
from clop_jax.experiment import workdir
from clop_jax.runtime import files

LABELS = np.array([0, -1, 2], np.int32)
TRUE = np.array([0, 1, 2], np.int32)


class Bucket(memory.MemoryFileSystem):
  """A remote file system in memory."""

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


def test_claimed_workdir_has_config_and_labels(folder):
  with workdir.claim(config_of(), folder, LABELS, TRUE):
    loaded = workdir.load_config(folder)
    assert workdir.to_json(loaded) == workdir.to_json(config_of())
    path = epath.Path(folder) / 'labels.npz'
    found = files.read_npz(path, ['labels'], fix='')['labels']
    np.testing.assert_array_equal(found, LABELS)
  names = {path.name for path in epath.Path(folder).iterdir()}
  assert names - {'.lock'} == {'config.json', 'labels.npz'}
  with workdir.claim(config_of(), folder, LABELS, TRUE):
    pass


def test_other_config_or_data_are_refused(folder):
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


def _half(data):
  return data[: len(data) // 2]


def _npz(**arrays):
  file = io.BytesIO()
  np.savez(file, **arrays)
  return file.getvalue()


def _config(**fields):
  return json.dumps(workdir.to_json(defaults.get_config()) | fields).encode()


_DAMAGES = [
  ('labels.npz', _half, 'damaged'),
  ('labels.npz', lambda _: _npz(other=LABELS), 'damaged'),
  ('labels.npz', lambda _: _npz(labels=np.ones((2, 2))), 'float64'),
  ('config.json', _half, 'damaged'),
  ('config.json', lambda _: b'17', 'damaged .*17'),
  ('config.json', lambda _: _config(train=5), 'train .*5'),
  ('config.json', lambda _: _config(seed={}), 'seed .*{}'),
  ('config.json', lambda _: _config(data={'name': None}), 'data.name .*None'),
  ('metrics.jsonl', lambda _: b'{"loss": 3}\n', 'line 1, .*step is None'),
  ('metrics.jsonl', lambda _: b'{"step": 1}\nx\n{"step": 2}\n', 'line 2, '),
]


@pytest.mark.parametrize(('name', 'damage', 'message'), _DAMAGES)
def test_damaged_file_is_named_and_nothing_is_changed(
  name, damage, message, tmp_path
):
  with workdir.claim(config_of(), str(tmp_path), LABELS, TRUE):
    pass
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\n')
  path = tmp_path / name
  path.write_bytes(damage(path.read_bytes()))
  before = {file: file.read_bytes() for file in tmp_path.iterdir()}
  # A new value of `eval`, which a run would write.
  config = config_of()
  config.eval.probe_iterations = 7
  with (
    pytest.raises(ValueError, match=f'{name}.*{message}'),
    workdir.claim(config, str(tmp_path), LABELS, TRUE),
  ):
    pass
  assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
  readers = {
    'labels.npz': lambda: workdir.num_labels(str(tmp_path)),
    'config.json': lambda: workdir.load_config(str(tmp_path)),
    'metrics.jsonl': lambda: metrics_log.JsonLines(str(path), start=9),
  }
  with pytest.raises(ValueError, match=f'{name}.*{message}'):
    readers[name]()
  assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize('name', ['config.json', 'labels.npz', 'metrics.jsonl'])
def test_unreadable_file_does_not_count_as_missing(name, tmp_path):
  with workdir.claim(config_of(), str(tmp_path), LABELS, TRUE):
    pass
  (tmp_path / name).unlink(missing_ok=True)
  (tmp_path / name).symlink_to(name)
  with (
    pytest.raises(OSError, match=f'Too many .*{name}'),
    workdir.claim(config_of(), str(tmp_path), LABELS, TRUE),
  ):
    pass
  assert (tmp_path / name).is_symlink()


@pytest.mark.parametrize('has_begun', [False, True])
def test_run_that_fails_before_its_first_step_leaves_no_config(
  has_begun, folder
):
  with (
    pytest.raises(ValueError, match='not logged in'),
    workdir.claim(config_of(), folder, LABELS, TRUE),
  ):
    if has_begun:
      (epath.Path(folder) / 'metrics.jsonl').write_text('{"step": 1}\n')
    raise ValueError('not logged in')
  for name in ('config.json', 'labels.npz'):
    assert (epath.Path(folder) / name).exists() is has_begun


def test_class_fractions_of_older_workdirs_are_read(tmp_path):
  saved = workdir.to_json(config_of())
  for text, value in (('', {}), ('0:0.6, 1:0.23', {'0': 0.6, '1': 0.23})):
    saved['data']['class_fractions'] = text
    (tmp_path / 'config.json').write_text(json.dumps(saved))
    config = workdir.load_config(str(tmp_path))
    assert config.data.class_fractions.to_dict() == value


@pytest.mark.parametrize(
  ('contrastive', 'older', 'options'),
  [
    ('nt_xent', {}, {}),
    ('supcon', {}, {}),
    ('supcon', {'supcon_variant': 'in'}, {'variant': 'in'}),
    (
      'vicreg',
      {'vicreg_weights': [25.0, 12.5, 1.0]},
      {'variance_weight': 12.5},
    ),
    ('barlow_twins', {'barlow_weight': 0.1}, {'redundancy_weight': 0.1}),
  ],
)
def test_networks_and_losses_of_older_workdirs_are_read(
  contrastive, older, options
):
  new = defaults.get_config()
  new.model.name, new.loss.contrastive = 'resnet18', contrastive
  new.loss.options = options
  saved = workdir.to_json(new)
  del saved['model']['name'], saved['model']['options'], saved['method']
  del saved['loss']['options']
  saved['model']['depth'] = 18
  saved['loss'] |= {
    'supcon_variant': 'out',
    'vicreg_weights': [25.0, 25.0, 1.0],
    'barlow_weight': 0.005,
  } | older
  # So a new command resumes an older run.
  assert workdir.completed(saved, 'config.json') == workdir.to_json(new)


@pytest.mark.parametrize(
  ('pattern', 'expected'),
  [
    ('a[1]', ['a[1]']),
    ('a*', ['a1', 'a[1]']),
    ('[2]/*', ['2/b']),
    ('[2]', ['[2]/b']),
    ('a[0-9]', ['a1']),
  ],
)
def test_patterns_and_literal_brackets_match(
  pattern, expected, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  for name in ('a1', 'a[1]', '2/b', '[2]/b'):
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / 'config.json').touch()
  assert workdir.find(pattern) == expected


def test_eval_and_watch_may_change_and_eval_is_saved(folder):
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


def test_local_workdir_is_locked_until_the_run_ends(tmp_path):
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
  steps = range(start, 10)
  return path, metrics_log.MetricsLog(path, steps=steps, batch_size=4)


def test_log_resumes_at_the_step_of_the_run(folder, capsys):
  values = {'loss': 1.5, 'clop_loss': 0.25, 'effective_rank': float('nan')}
  path, log = log_of(folder, 0)
  with log:
    for step in (1, 2, 3):
      log.logged(step, values)
  first, _, last = capsys.readouterr().out.splitlines()
  assert 'step 3/10: loss 1.5000, clop 0.2500' in last
  assert 'images/s' in last and 'images/s' not in first
  # A line that a kill truncated, and one of a step that is trained again.
  file = epath.Path(path)
  file.write_text(file.read_text() + '{"step": 4, "lo')
  path, log = log_of(folder, 2)
  with log:
    log.logged(3, values | {'loss': 7.0})
  lines = [json.loads(line) for line in file.read_text().splitlines()]
  assert [line['step'] for line in lines] == [1, 2, 3]
  assert [line['loss'] for line in lines] == [1.5, 1.5, 7.0]
  assert lines[0]['effective_rank'] is None
