"""Tests of the log for Weights & Biases, read back from its own files."""

from importlib import machinery
import json
import struct

from PIL import Image
import pytest

from clop_jax.runtime import extras
from clop_jax.tracking import wandb as wandb_log
from tests import small


def records_of(path):
  """Yields the records of a file, which is a log in LevelDB's format."""
  from wandb.proto import wandb_internal_pb2

  data, block = path.read_bytes(), 1 << 15
  assert data[:4] == b':W&B'
  position, parts = 7, b''
  while position + 7 <= len(data):
    if block - position % block < 7:
      position += block - position % block
      continue
    length, kind = struct.unpack('<HB', data[position + 4 : position + 7])
    parts += data[position + 7 : position + 7 + length]
    position += 7 + length
    if kind in (1, 4):  # whole, or the last part
      yield wandb_internal_pb2.Record.FromString(parts)
      parts = b''


def history_of(records):
  """Returns the logged values of each step."""
  return {
    record.history.step.num: {
      '/'.join(item.nested_key) or item.key: json.loads(item.value_json)
      for item in record.history.item
    }
    for record in records
    if record.WhichOneof('record_type') == 'history'
  }


@pytest.mark.usefixtures('collapse')
def test_weights_and_biases_get_the_events_of_tensorboard(
  digits_dir, tmp_path, monkeypatch, run
):
  pytest.importorskip('wandb')
  monkeypatch.delenv('WANDB_PROJECT', raising=False)
  config = small.digits_config(
    digits_dir,
    train__num_epochs=1,
    watch__tensorboard=False,
    watch__images_every_epochs=1,
    watch__collapse_share=0.5,
    watch__collapse_patience=1,
  )
  workdir = tmp_path / 'run'
  run(config, workdir, wandb='offline')
  assert not (workdir / 'tensorboard').exists()
  (file,) = workdir.glob('wandb/offline-run-*/*.wandb')
  records = list(records_of(file))
  (begun,) = [r.run for r in records if r.WhichOneof('record_type') == 'run']
  assert (begun.project, begun.run_group) == ('clop_jax', 'run')
  history = history_of(records)
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  for line in map(json.loads, lines):
    for name in set(line) - {'step'}:
      assert history[line['step']][f'train/{name}'] == line[name]
  assert history[5]['embeddings/singular_values/_type'] == 'histogram'
  for name in ('pictures/views', 'pictures/embeddings'):
    picture = file.parent / 'files' / history[5][f'{name}/path']
    with Image.open(picture) as image:
      assert image.width > image.height > 300
  (alert,) = [r.alert for r in records if r.HasField('alert')]
  assert 'the embeddings are collapsing' in alert.text


def test_a_missing_library_names_the_extra(tmp_path, monkeypatch):
  (tmp_path / 'wandb').mkdir()
  folder = machinery.PathFinder.find_spec('wandb', [str(tmp_path)])
  assert folder is not None  # a folder of that name is not the library
  for spec in (None, folder):
    monkeypatch.setattr(
      extras.importlib.util, 'find_spec', lambda _, spec=spec: spec
    )
    with pytest.raises(ValueError, match=r'--wandb=offline.*clop-jax\[wandb\]'):
      wandb_log.check('offline')


def test_another_mode_is_refused():
  with pytest.raises(ValueError, match=r"--wandb.*'offline', 'online'.*'on'"):
    wandb_log.check('on')


def test_a_missing_key_is_one_line(tmp_path, monkeypatch):
  pytest.importorskip('wandb')
  monkeypatch.delenv('WANDB_API_KEY', raising=False)
  monkeypatch.setenv('HOME', str(tmp_path))
  with pytest.raises(OSError, match=r'--wandb=online: .*--wandb=offline'):
    wandb_log.WandbLog(str(tmp_path), {}, mode='online', start=0)
