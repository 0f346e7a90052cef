import csv
import dataclasses
import errno
import json
import os
import shutil

from absl import flags
import jax
import numpy as np
import pytest
from sklearn import neighbors

import clop_jax
from clop_jax import evaluate
from clop_jax.data import arrays
from clop_jax.data import images as images_lib
from clop_jax.evaluation import finetune
from clop_jax.evaluation import measurement
from clop_jax.evaluation import probe
from clop_jax.evaluation import protocol
from clop_jax.experiment import workdir as workdir_lib
from tests import small

ONE = slice(0, 1)
# What eval.json has had since it was first written; readers rely on it.
KEYS = {
  *('protocol_version', 'step', 'seed', 'config', 'commit', 'versions'),
  *('device', 'time', 'parameters_sha256', 'num_train', 'num_test'),
  *('linear_top1', 'linear_top5', 'linear_l2', 'linear_held_out_top1'),
  *('knn_top1', 'knn20_top1', 'knn200_top1'),
  *('effective_rank', 'effective_rank_centered', 'features_effective_rank'),
  *('embedding_variance', 'embedding_std', 'uniformity'),
  *('prototype_cosine', 'prototype_energy_share'),
  *('class_mean_cosine', 'principal_angle_degrees', 'within_between_ratio'),
  'features_within_between_ratio',
}


def changed(workdir, **groups):
  """Changes fields of a workdir's config."""
  path = workdir / 'config.json'
  config = json.loads(path.read_text())
  for group, fields in groups.items():
    config[group] |= fields
  path.write_text(json.dumps(config))
  return workdir


@pytest.fixture(scope='module')
def run(digits_run, tmp_path_factory):
  """The trained run with less to evaluate on; only to be read."""
  workdir = tmp_path_factory.mktemp('few') / 'run'
  shutil.copytree(digits_run, workdir)
  splits = {'train_split': 'train[:300]', 'test_split': 'test[:100]'}
  # One batch size for many and few labels, to compile one program.
  return changed(workdir, data=splits, eval={'finetune_batch_size': 10})


@pytest.fixture
def copy(run, tmp_path):
  return shutil.copytree(run, tmp_path / 'copy')


@pytest.fixture(scope='module')
def digits(digits_dir):
  """Images and labels of each split, as many as the run has."""
  return {
    split: tuple(x[:count] for x in small.digits_arrays(digits_dir, split))
    for split, count in (('train', 300), ('test', 100))
  }


def evaluated(workdir, *, devices=ONE, **fields):
  request = evaluate.Request(
    str(workdir), devices=jax.devices()[devices], **fields
  )
  return evaluate.evaluate(request)


def sources(digits, **replaced):
  return {k: arrays.Arrays(*both) for k, both in (digits | replaced).items()}


@pytest.fixture(scope='module')
def result(run):
  """All modes, with one label of each class and with all labels."""
  return evaluated(run, modes=measurement.MODES, fractions=(0.01, 1.0))


@pytest.fixture(scope='module')
def measured(result):
  return {(m['mode'], m['label_fraction']): m for m in result.measurements}


# --- What is measured ---------------------------------------------------------


def test_the_labels_of_a_fraction_are_those_the_run_was_trained_with(
  digits_run, digits_dir
):
  config = workdir_lib.load_config(str(digits_run))
  assert config.data.label_fraction == 0.1
  _, labels = small.digits_arrays(digits_dir, 'train')
  with np.load(digits_run / 'labels.npz') as file:
    trained = np.flatnonzero(file['labelled'])
  tenth = protocol.labelled(config, labels, 0.1)
  np.testing.assert_array_equal(tenth, trained)
  hundredth = protocol.labelled(config, labels, 0.01)
  assert {*hundredth} < {*tenth} < {*protocol.labelled(config, labels, 0.5)}
  # One of each class at least, in proportion otherwise.
  assert sorted(labels[hundredth]) == [*range(10)]
  shares = np.bincount(labels[tenth]) / np.bincount(labels)
  np.testing.assert_allclose(shares, 0.1, atol=0.005)
  every = protocol.labelled(config, labels, 1.0)
  np.testing.assert_array_equal(every, np.arange(len(labels)))


def test_neighbours_are_looked_for_among_the_labelled_only(
  run, digits, measured
):
  loaded = clop_jax.load(str(run), devices=jax.devices()[ONE])
  features = {k: np.asarray(loaded.apply(x)[0]) for k, (x, _) in digits.items()}
  labels = digits['train'][1]
  chosen = protocol.labelled(loaded.config, labels, 0.01)
  oracle = neighbors.KNeighborsClassifier(
    10, metric='cosine', weights=lambda d: np.exp((1 - d) / 0.1)
  )
  oracle.fit(features['train'][chosen], labels[chosen])
  expected = oracle.score(features['test'], digits['test'][1])
  found = measured['knn', 0.01]
  assert found['knn_top1'] == pytest.approx(expected, abs=0.02)
  assert found['num_labels'] == len(chosen) == 10


def test_more_labels_do_better_and_all_are_what_eval_json_has(result, measured):
  linear = [measured['linear', x]['linear_top1'] for x in (0.01, 1.0)]
  assert 0.2 < linear[0] < linear[1] - 0.1
  # One label of each class: no strength can be chosen by held-out ones.
  assert measured['linear', 0.01]['linear_held_out_top1'] is None
  assert measured['linear', 0.01]['linear_l2'] == 0.1
  assert {*result.complete} == KEYS
  for key in ('linear_top1', 'knn_top1'):
    mode = key.removesuffix('_top1')
    assert result.complete[key] == measured[mode, 1.0][key]
  json.dumps([result.complete, result.measurements], allow_nan=False)


def test_fine_tuning_learns_the_classes_and_freezes_the_checkpoint(
  run, measured
):
  figures = measured['finetune', 1.0]
  assert figures['finetune_top1'] > 0.4  # chance is 0.1
  assert figures['finetune_top5'] >= figures['finetune_top1']
  assert figures['finetune_learning_rate'] in (0.1, 0.5)
  assert figures['finetune_held_out_top1'] > 0.3
  assert figures['finetune_steps'] == 60
  assert figures['finetune_protocol_version'] == finetune.PROTOCOL_VERSION == 2
  loaded = clop_jax.load(str(run), devices=jax.devices()[ONE])
  frozen = loaded.variables['params'], loaded.variables['batch_stats']
  assert figures['parameters_sha256'] == probe.fingerprint(frozen)
  # One label of each class: no rate can be chosen by held-out ones.
  few = measured['finetune', 0.01]
  assert few['finetune_held_out_top1'] is None
  assert few['finetune_learning_rate'] == 0.1
  assert few['num_labels'] == 10


def test_fine_tuning_sees_the_images_of_the_labelled_only(
  run, digits, measured
):
  images, labels = digits['train']
  config = workdir_lib.load_config(str(run))
  chosen = protocol.labelled(config, labels, 0.01)
  others = np.zeros_like(images)
  others[chosen] = images[chosen]
  given = sources(digits, train=(others, labels))
  (found,) = evaluated(
    run, modes=('finetune',), fractions=(0.01,), given=given
  ).measurements
  assert found['finetune_top1'] == measured['finetune', 0.01]['finetune_top1']
  assert found['finetune_top1'] > 0.15


def test_fewer_examples_than_devices_are_fine_tuned_on(copy, digits):
  changed(copy, data={'loader': 'stream', 'num_workers': 0})
  images, labels = digits['train']
  (found,) = evaluated(
    copy,
    modes=('finetune',),
    given=sources(digits, train=(images[:6], labels[:6])),
    overrides={'eval.finetune_min_steps': 2, 'eval.finetune_batch_size': 16},
    devices=slice(0, 8),
  ).measurements
  assert found['num_labels'] == 6
  assert found['finetune_steps'] == 2


class Broken(arrays.Arrays):
  """Examples of which one cannot be decoded."""

  def __init__(self, images, labels, broken):
    super().__init__(images, labels)
    self._broken = broken

  def __getitem__(self, index):
    if index == self._broken:
      raise images_lib.CorruptImageError(
        f'{index} cannot be decoded; repair it'
      )
    return super().__getitem__(index)


def test_a_corrupt_image_is_left_out_and_no_other_takes_its_place(
  copy, digits, capsys
):
  changed(copy, data={'skip_corrupt': True})
  one = jax.devices()[ONE]
  run = clop_jax.load(str(copy), devices=one)
  (images, labels), (tests, test_labels) = digits['train'], digits['test']
  chosen = protocol.labelled(run.config, labels, 0.1)
  # One whose neighbour has not been chosen.
  broken = next(x for x in chosen[3:] if x + 1 not in chosen)
  blackened = images.copy()
  blackened[broken + 1] = 0
  results = []
  for shown, loader in ((images, 'resident'), (blackened, 'stream')):
    changed(copy, data={'loader': loader, 'num_workers': 0})
    given = {
      'train': Broken(shown, labels, broken),
      'test': Broken(tests, test_labels, 7),
    }
    found = evaluated(
      copy,
      modes=('knn', 'finetune'),
      fractions=(0.1,),
      given=given,
      overrides={'eval.finetune_learning_rates': [0.1]},
    )
    results.append({m['mode']: m for m in found.measurements})
  assert 'cannot be decoded; it is left out' in capsys.readouterr().err
  # Neither the image beside it nor the loader matters.
  for mode in ('knn', 'finetune'):
    first, second = (x[mode] for x in results)
    assert first[f'{mode}_top1'] == second[f'{mode}_top1']
    assert first['num_labels'] == len(chosen) - 1
    assert first['num_test'] == len(test_labels) - 1
    assert first['num_corrupt'] == {'train': 1, 'test': 1}
  kept = chosen[chosen != broken]
  tested = np.arange(len(test_labels)) != 7
  bank, asked = (
    np.asarray(run.apply(x)[0]) for x in (images[kept], tests[tested])
  )
  expected = probe.knn(
    bank, labels[kept], asked, test_labels[tested], num_classes=10
  )
  assert results[0]['knn']['knn_top1'] == pytest.approx(expected[20], abs=0.011)


@pytest.fixture
def shapes(tmp_path):
  """Colour images of three classes that differ in brightness alone."""
  rng = np.random.default_rng(0)
  content = {}
  for split, count in (('train', 60), ('val', 30)):
    labels = np.arange(count) % 3
    images = rng.integers(0, 40, (count, 12, 15, 3))
    images += 90 * labels[:, None, None, None]
    content |= {f'{split}_images': images.astype(np.uint8)}
    content |= {f'{split}_labels': labels}
  np.savez(tmp_path / 'shapes.npz', **content)
  return tmp_path / 'shapes.npz'


def test_another_data_set_has_its_own_classes_sizes_and_colours(shapes, run):
  data = evaluate.OtherData('npz', str(shapes), test_split='val')
  found = evaluated(run, modes=('knn', 'finetune'), data=data)
  # The prototypes are not of these classes.
  assert found.complete is None
  figures = {m['mode']: m for m in found.measurements}
  for mode in ('knn', 'finetune'):
    assert figures[mode]['num_classes'] == 3
    assert figures[mode]['num_test'] == 30
    assert figures[mode]['test_split'] == 'val'
  assert figures['knn']['knn_top1'] > 0.9
  assert figures['finetune']['finetune_top1'] > 0.6
  data = evaluate.OtherData('npz', str(shapes))
  with pytest.raises(ValueError, match=r"--data=npz --test_split=test.*'val'"):
    evaluated(run, data=data)


def test_the_labels_that_the_training_used_are_counted(
  copy, digits_run, capsys
):
  with np.load(digits_run / 'labels.npz') as file:
    known = int(file['labelled'].sum())
  asked = {'modes': ('knn',), 'fractions': (0.01, 1.0)}
  found = evaluated(copy, **asked).measurements
  assert [x['trained_num_labels'] for x in found] == [known] * 2
  assert f'{known} labels, more than --label_fraction=0.01' in (
    capsys.readouterr().err
  )
  # The same weights, had no loss used the labels.
  changed(copy, loss={'clop_weight': 0.0})
  found = evaluated(copy, **asked).measurements
  assert [x['trained_num_labels'] for x in found] == [0] * 2
  assert not capsys.readouterr().err


def test_what_was_measured_is_kept_if_fine_tuning_diverges(run, monkeypatch):
  monkeypatch.setattr(finetune.FineTuning, '_fit', lambda *_: (None, np.nan))
  parts = []
  request = evaluate.Request(
    str(run), modes=('finetune', 'knn'), devices=jax.devices()[ONE]
  )
  with pytest.raises(FloatingPointError, match=r'diverged .* at step 10'):
    evaluate.evaluate(request, on_part=parts.append)
  assert [m['mode'] for part in parts for m in part.measurements] == ['knn']


# --- The command --------------------------------------------------------------


def test_the_command_measures_and_overrides(copy, monkeypatch):
  monkeypatch.setattr(jax, 'devices', lambda *_: jax.local_devices()[ONE])
  (copy / 'eval.json').write_text('of the settings of the run')
  small.command(
    evaluate,
    f'--workdir={copy}',
    '--mode=knn',
    '--config.eval.knn_neighbours=3,5',
    '--config.eval.knn_temperature=0.2',
  )
  assert (copy / 'eval.json').read_text() == 'of the settings of the run'
  (name,) = os.listdir(copy / 'evaluations')
  assert name == (
    'step10_digits_knn_1_knn_neighbours-3-5_knn_temperature-0.2.json'
  )
  figures = json.loads((copy / 'evaluations' / name).read_text())
  changes = {'knn_neighbours': [3, 5], 'knn_temperature': 0.2}
  assert figures['eval_changed'] == changes
  assert {'knn3_top1', 'knn5_top1'} < {*figures}
  assert figures['eval'].items() >= changes.items()
  assert figures['eval']['finetune_batch_size'] == 10  # the run's own


@pytest.fixture
def at_once(result, monkeypatch):
  """Makes the command give a known result at once; returns the requests."""
  requests = []

  def fake(request, *, on_part):
    step = 10 if request.which == 'latest' else int(request.which)
    done = []
    for fraction in request.fractions:
      for mode in request.modes:
        made = [m for m in result.measurements if m['mode'] == mode][-1]
        fields = {'step': step, 'label_fraction': fraction, 'other_data': False}
        if request.data is not None:
          fields |= dataclasses.asdict(request.data) | {'other_data': True}
          fields['data'] = fields.pop('name')
        done.append(made | fields)
    whole = evaluate.Result(step, done)
    if request.is_plain:
      complete = result.complete | {'step': step}
      whole = evaluate.Result(step, done, complete, result.arrays)
    requests.append(request)
    on_part(whole)
    return whole

  monkeypatch.setattr(evaluate, 'evaluate', fake)
  return requests


def rows_of(path):
  with open(path, newline='') as file:
    return list(csv.DictReader(file))


def test_every_checkpoint_of_several_runs_in_one_table(
  copy, tmp_path, capsys, at_once
):
  cells = tmp_path / 'study' / 'cells'
  shutil.copytree(copy, cells / 'b')
  shutil.move(copy, cells / 'a')
  (cells / 'c').mkdir()
  shutil.copy(cells / 'a' / 'config.json', cells / 'c')
  table = tmp_path / 'table.csv'
  small.command(
    evaluate,
    f'--workdir={tmp_path}/study',
    '--checkpoint=all',
    f'--table={table}',
  )
  printed = capsys.readouterr()
  assert 'c holds no checkpoint yet' in printed.err
  assert '| run | step | data   | labels | of all | linear top-1' in printed.out
  # What takes long reports its progress.
  assert 'a, step 5: knn with 1 of the labels: top-1 0.' in printed.err
  found = [(x['run'], x['step']) for x in rows_of(table)]
  assert found == [('a', '5'), ('a', '10'), ('b', '5'), ('b', '10')]
  for name in 'ab':
    newest = json.loads((cells / name / 'eval.json').read_text())
    older = json.loads((cells / name / 'evaluations/step5.json').read_text())
    assert (newest['step'], older['step']) == (10, 5)
    assert os.listdir(cells / name / 'evaluations') == ['step5.json']
  row = rows_of(table)[1]
  assert float(row['linear_top1']) == newest['linear_top1']
  assert float(row['effective_rank']) == newest['effective_rank']


def test_an_older_checkpoint_leaves_the_results_of_the_newest_alone(
  copy, at_once
):
  (copy / 'eval.json').write_text('of the newest')
  small.command(evaluate, f'--workdir={copy}', '--checkpoint=5')
  assert (copy / 'eval.json').read_text() == 'of the newest'
  assert not (copy / 'embeddings.npz').exists()
  assert os.listdir(copy / 'evaluations') == ['step5.json']
  small.command(evaluate, f'--workdir={copy}', '--checkpoint=10')
  assert json.loads((copy / 'eval.json').read_text())['step'] == 10
  assert os.listdir(copy / 'evaluations') == ['step5.json']


def test_modes_and_fractions_in_one_table_and_a_file_each(
  copy, tmp_path, capsys, at_once
):
  (copy / 'eval.json').write_text('before')
  small.command(
    evaluate,
    f'--workdir={tmp_path}/co*',
    '--mode=finetune,knn',
    '--label_fraction=0.1,0.5',
    f'--table={tmp_path}/table.md',
  )
  text = (tmp_path / 'table.md').read_text()
  assert text in capsys.readouterr().out
  header, _, *lines = text.splitlines()
  titles = [x.strip() for x in header.strip('|').split('|')]
  assert titles[:5] == ['run', 'step', 'data', 'labels', 'of all']
  assert titles[5:] == ['kNN top-1', 'fine-tuned top-1']
  assert len(lines) == 2
  assert {*os.listdir(copy / 'evaluations')} == {
    f'step10_digits_{mode}_{fraction}.json'
    for mode in ('knn', 'finetune')
    for fraction in (0.1, 0.5)
  }
  path = copy / 'evaluations' / 'step10_digits_finetune_0.1.json'
  figures = json.loads(path.read_text())
  assert f'{figures["finetune_top1"]:.3f}' in lines[0]
  # Not all labels and not both modes: that file is for other requests.
  assert (copy / 'eval.json').read_text() == 'before'


def test_other_data_have_files_of_their_own(copy, shapes, at_once):
  small.command(
    evaluate,
    f'--workdir={copy}',
    '--data=npz',
    f'--data_dir={shapes}',
    '--train_split=train[:10%]',
    '--mode=knn',
    '--mode=linear',
  )
  assert {*os.listdir(copy / 'evaluations')} == {
    f'step10_npz-shapes.npz-train-10-test_{mode}_1.json'.replace(
      '10-t', '10--t'
    )
    for mode in ('knn', 'linear')
  }
  assert not (copy / 'eval.json').exists()


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--mode=linear,kmeans'], "--mode .*'kmeans'"),
    (['--label_fraction=0.1,2'], '--label_fraction .*2'),
    (['--label_fraction=0'], '--label_fraction .*0'),
    (['--label_fraction=all'], '--label_fraction .*all'),
    (['--test_split=val'], '--test_split .*--data=NAME'),
    (['--data=folder'], '--data=folder .*--data_dir must be a folder'),
    (['--data=digist'], '--data=digist .*--data must be folder, npz'),
    (['--config.eval.epochs=3'], r'config\.eval\.epochs .*finetune_epochs'),
    (['--config.eval.finetune_epochs=0'], r'eval\.finetune_epochs .*0'),
    (['--table=a.txt'], r'--table .*a\.txt'),
    (['--table=nowhere/a.md'], '--table=nowhere/a.md'),
    (['--figure=a.doc'], '--figure must be a file'),
    (['--figure=empty'], 'the folder empty'),
    (['--figure=/dev/null/a.png'], '/dev/null is no folder'),
    (['--figure=a.png', '--mode=knn'], '--figure .*--mode'),
    (['--checkpoint=7'], 'no checkpoint of step 7'),
    (['--workdir=no*'], r'--workdir=no\* matches no'),
    (['--workdir=empty'], '--workdir=empty holds no config.json'),
  ],
)
def test_wrong_arguments_are_refused_and_nothing_is_written(
  arguments, message, run, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'empty').mkdir()
  before = sorted(os.listdir(run))
  if not arguments[0].startswith('--workdir'):
    arguments = [f'--workdir={run}', *arguments]
  with pytest.raises(ValueError, match=message):
    small.command(evaluate, *arguments)
  assert sorted(os.listdir(run)) == before
  assert os.listdir(tmp_path) == ['empty']


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    ('--eval=finetune_epochs=3', r'--config\.eval\.FIELD=VALUE'),
    ('--config.eval.finetune_epochs=a', r"config\.eval\.finetune_epochs.*'a'"),
    ('--config.train.batch_size=8', r'config\.train\.batch_size'),
    ('--config.evil.batch_size=8', r'config\.evil\.batch_size'),
  ],
)
def test_flags_that_are_unknown_name_the_field(argument, message, run):
  with pytest.raises(flags.Error, match=message):
    small.command(evaluate, f'--workdir={run}', argument)


@pytest.mark.parametrize(
  ('error', 'kind'),
  [
    (FloatingPointError('NaN at step 10'), FloatingPointError),
    (ValueError('its photos are gone'), ValueError),
    (RuntimeError('a bug'), RuntimeError),
  ],
)
def test_one_checkpoint_that_fails_does_not_lose_the_others(
  error, kind, copy, tmp_path, capsys, at_once, monkeypatch
):
  fake = evaluate.evaluate

  def failing(request, **arguments):
    if request.which == '10':
      raise error
    return fake(request, **arguments)

  monkeypatch.setattr(evaluate, 'evaluate', failing)
  table = tmp_path / 't.csv'
  with pytest.raises(kind, match=str(error)):
    small.command(
      evaluate,
      f'--workdir={copy}',
      '--mode=knn',
      '--checkpoint=all',
      f'--table={table}',
    )
  printed = capsys.readouterr()
  assert '| copy | 5    | digits |' in printed.out
  assert [row['step'] for row in rows_of(table)] == ['5']
  if kind is not RuntimeError:
    assert f'{error}; it is left out of the table' in printed.err
  assert os.listdir(copy / 'evaluations') == ['step5_digits_knn_1.json']


def test_a_step_that_one_run_lacks_is_refused_before_the_work(
  copy, tmp_path, at_once
):
  other = shutil.copytree(copy, tmp_path / 'other')
  shutil.rmtree(other / 'checkpoints' / '5')
  for which, message in (
    ('5', r'no checkpoint of step 5 in .*other; there are \[10\]'),
    ('best', r'train with --config.train.keep_best=METRIC'),
    ('newest', r"must be 'latest', 'best' or a step of"),
  ):
    with pytest.raises(ValueError, match=message):
      small.command(
        evaluate,
        f'--workdir={copy}',
        f'--workdir={other}',
        f'--checkpoint={which}',
      )
  assert not at_once


@pytest.mark.parametrize('name', ['eval.json', 'embeddings.npz', 'figures'])
def test_what_could_not_be_written_is_refused_before_the_work(
  name, copy, at_once
):
  (copy / name).symlink_to(name)
  before = sorted(copy.rglob('*'))
  with pytest.raises(OSError, match=rf'--workdir={copy} .*--out=.*{name}'):
    small.command(evaluate, f'--workdir={copy}')
  assert sorted(copy.rglob('*')) == before
  assert not at_once


def test_results_go_to_another_folder(copy, tmp_path, at_once):
  shutil.copytree(copy, tmp_path / 'runs' / 'a')
  shutil.move(copy, tmp_path / 'runs' / 'b')
  before = sorted((tmp_path / 'runs').rglob('*'))
  out = tmp_path / 'out'
  small.command(evaluate, f'--workdir={tmp_path}/runs', f'--out={out}')
  small.command(evaluate, f'--workdir={tmp_path}/runs/a', f'--out={out}/c')
  expected = {'eval.json', 'embeddings.npz', 'figures'}
  for name in 'abc':
    assert {*os.listdir(out / name)} == expected
  assert sorted((tmp_path / 'runs').rglob('*')) == before


def test_the_table_is_printed_if_the_results_cannot_be_written(
  copy, capsys, at_once, monkeypatch
):
  def full(*_, **__):
    raise OSError(errno.ENOSPC, 'No space left on device', 'eval.json')

  monkeypatch.setattr(evaluate.Result, 'write', full)
  with pytest.raises(OSError, match=r'No space left .*eval.json') as caught:
    small.command(evaluate, f'--workdir={copy}')
  assert caught.value.errno == errno.ENOSPC
  assert '| copy   | 0.' in capsys.readouterr().out


def test_runs_have_names_of_their_own_and_come_once(
  run, tmp_path, monkeypatch, at_once
):
  for name in ('s1/a', 's1/b', 's2/a', 's2/b'):
    (tmp_path / name).mkdir(parents=True)
    shutil.copy(run / 'config.json', tmp_path / name)
  monkeypatch.setattr(evaluate.restored, 'check', lambda *_: [5])
  monkeypatch.setattr(evaluate.restored, 'steps', lambda *_: [5])
  monkeypatch.chdir(tmp_path)

  def names(*paths):
    workdirs = [f'--workdir={path}' for path in paths]
    small.command(evaluate, *workdirs, '--mode=knn', '--table=t.csv')
    return [row['run'] for row in rows_of('t.csv')]

  assert names('s1', 's2') == ['s1/a', 's1/b', 's2/a', 's2/b']
  assert names('s1/a', 's1/*') == ['a', 'b']
  assert names('s1/a', f'{tmp_path}/s2/../s1/a') == ['a']
  assert names('s2/b', 's1/b') == ['s2/b', 's1/b']
