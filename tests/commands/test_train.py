import json
import re
import shutil

import jax
import numpy as np
import pytest

import clop_jax
from clop_jax import defaults
from clop_jax import evaluate
from clop_jax import train
from clop_jax.experiment import build
from clop_jax.experiment import checkpoint
from clop_jax.experiment import workdir as workdir_lib
from clop_jax.runtime import parallel
from tests import small

ONE = slice(0, 1)


def run(config, workdir, devices=ONE):
  train.train(config, str(workdir), devices=jax.devices()[devices])


def final_state(config, workdir):
  mesh = parallel.make_mesh(jax.devices()[ONE])
  built = build.build(config, total_steps=10, steps_per_epoch=5)
  with checkpoint.Checkpoints(
    f'{workdir}/checkpoints', read_only=True
  ) as checkpoints:
    return checkpoints.restore_latest(build.abstract_state(built, mesh))


def metrics_of(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.fixture
def copy(digits_dir, digits_run, tmp_path):
  """The config and a copy of the run that was trained without a break."""
  config = small.digits_config(digits_dir)
  return config, shutil.copytree(digits_run, tmp_path / 'copy')


def test_workdir_has_config_labels_log_and_checkpoints(digits_run):
  assert {path.name for path in digits_run.iterdir()} >= {
    'config.json',
    'labels.npz',
    'metrics.jsonl',
    'checkpoints',
    'tensorboard',
  }
  steps = {path.name for path in (digits_run / 'checkpoints').iterdir()}
  assert steps == {'5', '10'}
  assert workdir_lib.load_config(str(digits_run)).train.batch_size == 256
  with np.load(digits_run / 'labels.npz') as labels:
    assert labels['labels'].shape == (1438,)
    assert (labels['labelled'] == (labels['labels'] >= 0)).all()
    assert 130 < labels['labelled'].sum() < 160
  lines = metrics_of(digits_run)
  assert [line['step'] for line in lines] == [2, 4, 6, 8, 10]
  assert all(value is not None for line in lines for value in line.values())
  assert lines[-1]['loss'] < lines[0]['loss']
  assert lines[-1]['prototype_cosine'] > lines[0]['prototype_cosine']


def test_resuming_from_the_last_intact_checkpoint_is_exact(
  copy, digits_run, capsys
):
  config, workdir = copy
  files = [x for x in (workdir / 'checkpoints/10').rglob('*') if x.is_file()]
  max(files, key=lambda x: x.stat().st_size).write_bytes(b'')
  log = workdir / 'metrics.jsonl'
  log.write_text(log.read_text()[:-30])  # as a kill would leave it
  run(config, workdir)
  output = capsys.readouterr()
  assert 'checkpoint of step 10' in output.err and 'damaged' in output.err
  assert 'resuming from step 5 of 10' in output.out
  jax.tree.map(
    np.testing.assert_array_equal,
    final_state(config, workdir),
    final_state(config, digits_run),
  )
  assert metrics_of(workdir) == metrics_of(digits_run)


def test_resumed_stream_has_the_same_prototypes_and_pseudo_labels(
  digits_dir, tmp_path
):
  config = small.digits_config(
    digits_dir,
    data__label_fraction=0.5,
    data__loader='stream',
    data__num_workers=0,
    loss__pseudo_label_threshold=0.3,
    prototypes__kind='aligned',
    prototypes__align_every_epochs=1,
    train__log_every_steps=1,
  )
  run(config, tmp_path / 'unbroken')
  shutil.copytree(tmp_path / 'unbroken', tmp_path / 'resumed')
  shutil.rmtree(tmp_path / 'resumed' / 'checkpoints' / '10')
  run(config, tmp_path / 'resumed')
  states = [final_state(config, tmp_path / x) for x in ('unbroken', 'resumed')]
  jax.tree.map(np.testing.assert_array_equal, *states)
  lines = metrics_of(tmp_path / 'unbroken')
  assert metrics_of(tmp_path / 'resumed') == lines
  for line in lines[:5]:  # neither begins in the first epoch
    assert line['loss'] == line['contrastive_loss']
    assert line['pseudo_label_share'] == 0
  assert lines[5]['loss'] > lines[5]['contrastive_loss']
  assert 0 < lines[-1]['pseudo_label_share'] < 1
  assert 0 < lines[-1]['pseudo_label_accuracy'] < 1
  # Aligned prototypes are closer to the classes than random ones.
  assert lines[5]['prototype_cosine'] > lines[4]['prototype_cosine'] + 0.1


def test_finished_run_prints_a_summary_and_changes_nothing(copy, capsys):
  config, workdir = copy
  path = workdir / 'config.json'
  saved = json.loads(path.read_text())
  # As an older version would have written it.
  del saved['data']['skip_corrupt'], saved['augment']['solarize_threshold']
  del saved['eval']
  path.write_text(json.dumps(saved))
  loaded = workdir_lib.load_config(str(workdir))
  assert loaded.data.skip_corrupt is False
  assert loaded.augment.solarize_threshold == 0.5
  assert loaded.model.width_multiplier == 0.25
  config.eval = defaults.get_config().eval
  before = {x.name for x in (workdir / 'checkpoints').rglob('*')}
  run(config, workdir)
  assert {x.name for x in (workdir / 'checkpoints').rglob('*')} == before
  output = capsys.readouterr().out
  assert 'step 10 of 10: already trained' in output
  assert '1,438 examples, 143 labelled (9.9%); per class: 14 15' in output
  state = final_state(config, workdir)
  count = sum(x.size for x in jax.tree.leaves(state.params))
  assert f'{count:,} parameters' in output
  assert 'GFLOP a step of 256 images' in output
  assert '1 device(s): cpu' in output


# Fields on their own are in tests/experiment/test_defaults.py.
@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'prototypes__kind': 'aligned', 'prototypes__align_after_epochs': 2},
      'align_after_epochs.*num_epochs=2.*got 2',
    ),
    (
      {
        'loss__pseudo_label_threshold': 0.9,
        'loss__pseudo_label_after_epochs': 2,
      },
      'pseudo_label_after_epochs.*num_epochs=2.*got 2',
    ),
    ({'loss__clop_after_epochs': 2}, 'clop_after_epochs.*num_epochs=2.*got 2'),
    ({'loss__contrastive': 'simclr'}, "loss.contrastive.*got 'simclr'"),
    ({'data__num_classes': 1}, 'num_classes must be at least 2'),
    ({'optimizer__warmup_epochs': 2.0}, r'warmup_steps.*got 10'),
    ({'data__name': 'digit'}, "data.name .*'digit'.*digits"),
    ({'model__embedding_dim': 8}, r'num_classes.*dim=8.*got 10'),
    ({'data__num_classes': 7}, r'labels.*num_classes=7\), got \d at index \d+'),
    ({'train__batch_size': 101}, '2 devices, got 101'),
    ({'train__batch_size': 1440}, '1438 examples, got 1440'),
    ({'train__num_micro_batches': 3}, 'num_micro_batches.*128 here, got 3'),
    ({'train__keep_best': 'accuracy'}, r"keep_best.*'clop_loss'.*'accuracy'"),
    (
      {'train__keep_best': 'loss', 'train__log_every_steps': 6},
      'log_every_steps=6 logs nothing between two checkpoints',
    ),
    (
      {'loss__contrastive': 'none', 'loss__clop_weight': 0.0},
      'nothing is left to train on',
    ),
    ({'augment__mean': (0.1, 0.2)}, 'mean must have one number for each'),
  ],
)
def test_wrong_config_is_refused_before_anything_is_written(
  digits_dir, tmp_path, changes, message
):
  config = small.digits_config(digits_dir, **changes)
  with pytest.raises(ValueError, match=message):
    run(config, tmp_path / 'new', devices=slice(0, 2))
  assert not (tmp_path / 'new').exists()


def test_infinite_loss_stops_and_names_step_and_checkpoint(
  digits_dir, tmp_path
):
  config = small.digits_config(
    digits_dir,
    loss__contrastive='vicreg',
    optimizer__learning_rate=1e3,
    model__head_bn=False,
    train__log_every_steps=3,
  )
  message = (
    r'the loss is (nan|inf) at step \d+; the last good checkpoint is '
    r'(none yet|the one of step \d+)\. Lower'
  )
  with pytest.raises(FloatingPointError, match=message):
    run(config, tmp_path)
  for folder in (tmp_path / 'checkpoints').iterdir():
    assert folder.name in ('5', '10')
  for line in metrics_of(tmp_path):
    assert line['loss'] is not None


def test_best_checkpoint_is_kept(digits_dir, tmp_path):
  config = small.digits_config(
    digits_dir,
    train__num_epochs=4,
    train__keep_checkpoints=1,
    train__log_every_steps=1,
    train__keep_best='effective_rank',
  )
  run(config, tmp_path)
  ranks = [line['effective_rank'] for line in metrics_of(tmp_path)]
  means = np.reshape(ranks, (4, 5)).mean(axis=1)
  best = 5 * (int(np.argmax(means)) + 1)
  assert best < 20  # otherwise the newest is the best
  found = {entry.step: entry for entry in checkpoint.verify(str(tmp_path))}
  assert {*found} == {best, 20}
  assert found[best].metrics['effective_rank'] == pytest.approx(means.max())
  for which, step in (('best', best), ('latest', 20), (str(best), best)):
    loaded = clop_jax.load(
      str(tmp_path), which=which, devices=jax.devices()[:1]
    )
    assert loaded.step == step


def names_in_table(text, heading):
  """Returns the names in the first column of the table after a text."""
  _, after = text.split(heading)
  rows = after.split('\n|', 1)[1].split('\n\n')[0].splitlines()[2:]
  return {x for row in rows for x in re.findall('`(.*?)`', row.split(' | ')[0])}


def test_evaluation_gives_the_documented_measures_on_one_and_eight_devices(
  digits_run,
):
  found, eight = (
    evaluate.evaluate(evaluate.Request(str(digits_run), devices=x))
    for x in (jax.devices()[ONE], None)
  )
  result = found.complete
  json.dumps(result, allow_nan=False)
  assert result['protocol_version'] == 2
  assert result['step'] == 10
  assert 0.5 < result['linear_top1'] <= result['linear_top5'] <= 1
  assert result['knn_top1'] == result['knn20_top1'] > 0.5
  assert 1 < result['effective_rank'] <= 16
  assert found.arrays['embeddings'].shape == (359, 16)
  text = (small.ROOT / 'docs' / 'collapse.md').read_text()
  assert set(result) == names_in_table(text, '`eval.json` measures')
  logged = {*metrics_of(digits_run)[0]}
  logged |= {'pseudo_label_share', 'pseudo_label_accuracy', 'cross_entropy'}
  assert logged == names_in_table(text, '`metrics.jsonl` has a line')
  eight = eight.complete
  assert eight['knn_top1'] == pytest.approx(result['knn_top1'], abs=0.006)
  rank = pytest.approx(result['effective_rank'], rel=1e-3)
  assert eight['effective_rank'] == rank
  assert eight['parameters_sha256'] == result['parameters_sha256']
