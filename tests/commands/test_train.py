import json
import os
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

from clop_jax import defaults
from clop_jax import evaluate
from clop_jax import train
from clop_jax.data import labels as label_policy
from clop_jax.experiment import build
from clop_jax.experiment import checkpoint
from clop_jax.experiment import workdir as workdir_lib
from clop_jax.runtime import files
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
  lines = (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.fixture(scope='module')
def trained(digits_dir, tmp_path_factory):
  """A workdir that was trained without a break, and its config."""
  workdir = tmp_path_factory.mktemp('runs') / 'trained'
  config = small.digits_config(digits_dir)
  run(config, workdir)
  return config, workdir


@pytest.fixture
def copy(trained, tmp_path):
  config, workdir = trained
  return config, shutil.copytree(workdir, tmp_path / 'copy')


def test_a_workdir_holds_what_the_design_says(trained):
  config, workdir = trained
  names = {path.name for path in workdir.iterdir()}
  assert names == {
    'config.json',
    'labels.npz',
    'metrics.jsonl',
    'checkpoints',
    'tensorboard',
  } | {'.lock'}
  steps = {path.name for path in (workdir / 'checkpoints').iterdir()}
  assert steps == {'5', '10'}
  assert workdir_lib.load_config(str(workdir)).to_dict() == (
    workdir_lib.to_json(config)
  )
  with np.load(workdir / 'labels.npz') as labels:
    assert labels['labels'].shape == (1438,)
    assert (labels['labelled'] == (labels['labels'] >= 0)).all()
    assert 130 < labels['labelled'].sum() < 160


def test_the_loss_falls_and_each_logged_step_has_every_metric(trained):
  lines = metrics_of(trained[1])
  assert [line['step'] for line in lines] == [2, 4, 6, 8, 10]
  for line in lines:
    assert set(line) == {
      'step',
      'loss',
      'contrastive_loss',
      'clop_loss',
      'learning_rate',
      'gradient_norm',
      'update_norm',
      'parameter_norm',
      'effective_rank',
      'embedding_std',
      'prototype_cosine',
      'orthonormality_error',
    }
    assert all(value is not None for value in line.values())
  assert lines[-1]['loss'] < lines[0]['loss']
  assert lines[-1]['prototype_cosine'] > lines[0]['prototype_cosine']


@pytest.mark.parametrize('kept', [[], ['5']], ids=['from scratch', 'resumed'])
def test_a_resumed_run_is_bit_for_bit_the_unbroken_one(copy, trained, kept):
  config, workdir = copy
  for folder in (workdir / 'checkpoints').iterdir():
    if folder.name not in kept:
      shutil.rmtree(folder)
  run(config, workdir)
  jax.tree.map(
    np.testing.assert_array_equal,
    final_state(config, workdir),
    final_state(config, trained[1]),
  )
  assert metrics_of(workdir) == metrics_of(trained[1])


def test_a_resumed_stream_sets_the_same_prototypes_and_pseudo_labels(
  digits_dir, tmp_path
):
  config = small.digits_config(
    digits_dir,
    data__label_fraction=0.5,
    data__loader='stream',
    data__num_workers=2,
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
  assert metrics_of(tmp_path / 'resumed') == metrics_of(tmp_path / 'unbroken')
  lines = metrics_of(tmp_path / 'unbroken')
  for line in lines[:5]:
    assert line['loss'] == line['contrastive_loss']
    # Neither is there a pseudo-label in the first epoch.
    assert line['pseudo_label_share'] == 0
  assert lines[5]['loss'] > lines[5]['contrastive_loss']
  # Of the half without a label some are sure, and not all of those are right.
  assert 0 < lines[-1]['pseudo_label_share'] < 1
  assert 0 < lines[-1]['pseudo_label_accuracy'] < 1
  # Prototypes set to suit the classes are sooner reached than random ones.
  assert lines[5]['prototype_cosine'] > lines[4]['prototype_cosine'] + 0.1


def test_a_log_line_that_a_kill_cut_short_is_written_again(copy, trained):
  config, workdir = copy
  shutil.rmtree(workdir / 'checkpoints' / '10')
  path = workdir / 'metrics.jsonl'
  path.write_text(path.read_text()[:-30])
  run(config, workdir)
  assert metrics_of(workdir) == metrics_of(trained[1])


def test_a_damaged_newest_checkpoint_costs_an_epoch_and_not_the_run(
  copy, trained, capsys
):
  config, workdir = copy
  files = [
    p for p in (workdir / 'checkpoints' / '10').rglob('*') if p.is_file()
  ]
  largest = max(files, key=lambda p: p.stat().st_size)
  largest.write_bytes(b'')
  run(config, workdir)
  output = capsys.readouterr()
  assert 'checkpoint of step 10' in output.err and 'damaged' in output.err
  assert 'resuming from step 5 of 10' in output.out
  jax.tree.map(
    np.testing.assert_array_equal,
    final_state(config, workdir),
    final_state(config, trained[1]),
  )


def test_starting_a_finished_run_again_changes_nothing(copy, capsys):
  config, workdir = copy
  before = {
    p: p.stat().st_mtime_ns for p in (workdir / 'checkpoints').rglob('*')
  }
  run(config, workdir)
  assert 'step 10 of 10: already trained' in capsys.readouterr().out
  after = {
    p: p.stat().st_mtime_ns for p in (workdir / 'checkpoints').rglob('*')
  }
  assert {p.name for p in before} == {p.name for p in after}


def test_the_start_says_what_will_run(copy, capsys):
  config, workdir = copy
  run(config, workdir)
  output = capsys.readouterr().out
  assert '1,438 examples, 143 labelled (9.9%); per class: 14 15' in output
  state = final_state(config, workdir)
  count = sum(x.size for x in jax.tree.leaves(state.params))
  assert f'{count:,} parameters' in output
  assert 'GFLOP a step of 256 images' in output
  assert '1 device(s): cpu' in output


@pytest.mark.parametrize(
  'contrastive', ['supcon', 'dcl', 'vicreg', 'barlow_twins', 'none']
)
def test_every_contrastive_loss_can_be_named(contrastive, digits_dir):
  config = small.digits_config(digits_dir, loss__contrastive=contrastive)
  built = build.build(config, total_steps=10, steps_per_epoch=5)
  state = jax.eval_shape(built.create_state)
  batch = {
    'image': jax.ShapeDtypeStruct((8, 8, 8, 1), np.uint8),
    'label': jax.ShapeDtypeStruct((8,), np.int32),
    'index': jax.ShapeDtypeStruct((8,), np.int32),
  }
  mesh = parallel.make_mesh()
  step = parallel.map_step(built.step, mesh, batch_axes=(None, 0, None))
  key = jax.eval_shape(lambda: jax.random.key(0))
  _, metrics = jax.eval_shape(step, state, batch, key)
  assert metrics['loss'].shape == ()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'loss__contrastive': 'simclr'},
      r"config.loss.contrastive must be one of \['nt_xent', .*got 'simclr'",
    ),
    (
      {'model__depth': 19},
      r'config.model.depth must be one of \[8, 18, 34, 50',
    ),
    ({'model__dtype': 'float16'}, r"\['auto', 'float32', 'bfloat16'\]"),
    ({'model__stem': 'tiny'}, r"stem must be one of \['cifar', 'imagenet'\]"),
    (
      {'prototypes__kind': 'etf'},
      r"\['orthonormal', 'simplex_etf', 'random', 'learned', 'aligned'\]",
    ),
    (
      {'prototypes__kind': 'aligned', 'prototypes__align_by': 'luck'},
      r"align_by must be one of \['procrustes', 'assignment'\], got 'luck'",
    ),
    (
      {'prototypes__kind': 'aligned', 'prototypes__align_after_epochs': 0},
      'align_after_epochs.* 1 .* got 0',
    ),
    (
      {'prototypes__kind': 'aligned', 'prototypes__align_after_epochs': 2},
      'below config.train.num_epochs=2, or there would be no CLOP term',
    ),
    (
      {'prototypes__kind': 'aligned', 'prototypes__align_every_epochs': 0},
      'align_every_epochs.*None.*got 0',
    ),
    (
      {'prototypes__kind': 'learned', 'prototypes__learning_rate': 0.0},
      r'prototypes\.learning_rate.*above 0.*got 0\.0',
    ),
    (
      {'loss__pseudo_label_threshold': 1.5},
      r'pseudo_label_threshold.*None.*got 1\.5',
    ),
    (
      {
        'loss__pseudo_label_threshold': 0.9,
        'loss__pseudo_label_after_epochs': 2,
      },
      'pseudo_label_after_epochs must .* below config.train.num_epochs=2',
    ),
    (
      {'loss__clop_after_epochs': 2},
      'clop_after_epochs must .* below config.train.num_epochs=2',
    ),
    ({'loss__clop_repulsion': -1.0}, 'clop_repulsion.*got -1'),
    ({'data__num_classes': 1}, 'num_classes must be at least 2'),
    ({'optimizer__name': 'adam'}, r"optimizer\.name.*'adamw'.*got 'adam'"),
    ({'optimizer__scaling': 'cubic'}, r"scaling.*'sqrt'.*got 'cubic'"),
    ({'optimizer__warmup_epochs': 2.0}, r'warmup_steps must be in \[0, total'),
    ({'loss__clop_distance': 'l2'}, r"distance must be one of \['cosine'"),
    (
      {'data__name': 'digit'},
      r"data.name must be folder, npz, .* got 'digit'; near it: digits",
    ),
    ({'data__label_fraction': 1.5}, r'label_fraction.*got 1\.5'),
    (
      {'model__embedding_dim': 8},
      r'num_classes must be at most dim=8 for orthonormal.*got 10',
    ),
    (
      {'data__num_classes': 7},
      r'^labels must be in \[-1, .*num_classes=7\), got \d at index \d+',
    ),
    ({'train__batch_size': 100}, 'multiple of the 8 devices, got 100'),
    ({'train__batch_size': 1440}, 'at most the 1438 examples, got 1440'),
    ({'train__log_every_steps': 0}, 'log_every_steps.*got 0'),
    ({'train__keep_checkpoints': 0}, r'keep_checkpoints must .*got 0'),
    ({'train__num_micro_batches': 0}, 'num_micro_batches.*got 0'),
    (
      {'train__num_micro_batches': 3},
      r'num_micro_batches must .* divide .* one device .* 32 here, got 3',
    ),
    (
      {'train__keep_best': 'accuracy'},
      r"keep_best must be one of \['clop_loss', .*or None; got 'accuracy'",
    ),
    (
      {'train__keep_best_mode': 'most'},
      r"keep_best_mode must be one of \['max', 'min'\], got 'most'",
    ),
    (
      {'train__keep_best': 'loss', 'train__log_every_steps': 6},
      'log_every_steps=6 logs nothing between two checkpoints',
    ),
    (
      {'loss__contrastive': 'none', 'loss__clop_weight': 0.0},
      'nothing is left to train on',
    ),
    (
      {'augment__mean': (0.1, 0.2)},
      'mean must have one number for each of the',
    ),
  ],
)
def test_a_wrong_config_is_refused_before_anything_is_written(
  digits_dir, tmp_path, changes, message
):
  config = small.digits_config(digits_dir, **changes)
  with pytest.raises(ValueError, match=message):
    run(config, tmp_path / 'new', devices=slice(0, 8))
  assert not (tmp_path / 'new').exists()


def test_a_workdir_of_another_config_is_refused_with_the_difference(copy):
  config, workdir = copy
  config = config.copy_and_resolve_references()
  config.loss.clop_weight = 0.5
  before = sorted(os.listdir(workdir))
  message = r'another config: loss.clop_weight is 1.0 there and 0.5 here'
  with pytest.raises(ValueError, match=message):
    run(config, workdir)
  assert sorted(os.listdir(workdir)) == before


def test_fields_that_are_newer_than_a_workdir_get_their_defaults(copy):
  config, workdir = copy
  path = workdir / 'config.json'
  saved = json.loads(path.read_text())
  del saved['data']['skip_corrupt'], saved['augment']['solarize_threshold']
  del saved['eval']
  path.write_text(json.dumps(saved))
  loaded = workdir_lib.load_config(str(workdir))
  assert loaded.data.skip_corrupt is False
  assert loaded.augment.solarize_threshold == 0.5
  assert loaded.eval.batch_size == defaults.get_config().eval.batch_size
  assert loaded.model.width_multiplier == 0.25  # its own
  # And training goes on there: nothing that it trains with is different.
  config = config.copy_and_resolve_references()
  config.eval = defaults.get_config().eval
  run(config, workdir)


def test_a_workdir_made_from_other_data_is_refused(copy):
  config, workdir = copy
  path = workdir / 'labels.npz'
  labels = files.read_npz(path, ['labels'], fix='')['labels']
  labels[0] = 9 - labels[0]
  path.write_bytes(label_policy.pack(labels, labels))
  with pytest.raises(ValueError, match=r'labels.npz was made from other data'):
    run(config, workdir)


def test_a_loss_that_is_not_finite_stops_and_names_step_and_checkpoint(
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


def test_evaluation_needs_the_workdir_alone_and_freezes_the_backbone(
  trained, capsys
):
  config, workdir = trained
  found = evaluate.evaluate(
    evaluate.Request(str(workdir), devices=jax.devices()[ONE])
  )
  result, arrays = found.complete, found.arrays
  assert result['protocol_version'] == 2
  assert result['step'] == 10
  assert result['config'] == workdir_lib.to_json(config)
  assert 0.5 < result['linear_top1'] <= 1
  assert result['linear_top1'] <= result['linear_top5'] <= 1
  assert result['knn_top1'] == result['knn20_top1'] > 0.5
  assert 1 < result['effective_rank'] <= 16
  assert len(result['parameters_sha256']) == 64
  assert set(result['versions']) >= {'jax', 'flax', 'optax'}
  assert arrays['embeddings'].shape == (359, 16)
  json.dumps(result, allow_nan=False)


def test_evaluation_on_eight_devices_gives_the_same_figures(trained):
  one, eight = (
    evaluate.evaluate(evaluate.Request(str(trained[1]), devices=x)).complete
    for x in (jax.devices()[ONE], None)
  )
  assert eight['knn_top1'] == pytest.approx(one['knn_top1'], abs=0.006)
  assert eight['effective_rank'] == pytest.approx(
    one['effective_rank'], rel=1e-3
  )
  assert eight['parameters_sha256'] == one['parameters_sha256']


def names_in_table(text, heading):
  """The names in the first column of the table behind a text."""
  _, after = text.split(heading)
  rows = after.split('\n\n')[1].splitlines()[2:]
  return {x for row in rows for x in re.findall('`(.*?)`', row.split(' | ')[0])}


def test_the_page_of_the_measures_has_every_name_of_a_run(trained):
  text = (small.ROOT / 'docs' / 'collapse.md').read_text()
  workdir = trained[1]
  for line in metrics_of(workdir):
    assert set(line) | {
      'pseudo_label_share',
      'pseudo_label_accuracy',
    } == names_in_table(text, '`metrics.jsonl`, a line for each logged step')
  request = evaluate.Request(str(workdir), devices=jax.devices()[ONE])
  result = evaluate.evaluate(request).complete
  assert set(result) == names_in_table(text, '`eval.json`, of the whole test')


def test_evaluation_of_a_folder_that_is_no_run_says_what_it_is(tmp_path, copy):
  with pytest.raises(ValueError, match='does not exist; train first'):
    evaluate.evaluate(evaluate.Request(str(tmp_path / 'nowhere')))
  (tmp_path / 'empty').mkdir()
  with pytest.raises(ValueError, match=r'holds no config.json.*nothing'):
    evaluate.evaluate(evaluate.Request(str(tmp_path / 'empty')))
  _, workdir = copy
  shutil.rmtree(workdir / 'checkpoints')
  with pytest.raises(ValueError, match='holds no checkpoint yet; train first'):
    evaluate.evaluate(evaluate.Request(str(workdir)))
  (workdir / 'config.json').write_text('{')
  with pytest.raises(ValueError, match=r'config.json .*JSON object'):
    evaluate.evaluate(evaluate.Request(str(workdir)))


def test_the_best_checkpoint_is_kept_and_can_be_evaluated(digits_dir, tmp_path):
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
  assert best < 20  # else the newest is the best, and the test shows nothing
  found = {entry.step: entry for entry in checkpoint.verify(str(tmp_path))}
  assert {*found} == {best, 20}
  assert found[best].metrics['effective_rank'] == pytest.approx(means.max())
  for which, step in (('best', best), ('latest', 20), (str(best), best)):
    found = evaluate.evaluate(
      evaluate.Request(str(tmp_path), which, devices=jax.devices()[ONE])
    )
    assert found.step == step
  with pytest.raises(
    ValueError, match=rf'no checkpoint of step 7 .*{best}, 20'
  ):
    evaluate.evaluate(evaluate.Request(str(tmp_path), '7'))
  with pytest.raises(ValueError, match="must be 'latest', 'best' or a step"):
    evaluate.evaluate(evaluate.Request(str(tmp_path), 'newest'))


def test_the_best_of_a_run_that_kept_none_is_refused(trained):
  with pytest.raises(ValueError, match=r'train with --config.train.keep_best='):
    evaluate.evaluate(evaluate.Request(str(trained[1]), 'best'))


def test_the_host_is_two_dispatches_ahead_at_most():
  waited = []

  class Result:
    def __init__(self, number):
      self.number = number

    def block_until_ready(self):
      waited.append(self.number)
      return self

  in_flight = train.InFlight()
  for number in range(5):
    in_flight.add({'loss': Result(number)})
    assert waited == list(range(number))
