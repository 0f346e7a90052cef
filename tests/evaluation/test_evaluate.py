import csv
import dataclasses
import errno
import json
import os
import pathlib
import shutil

from absl import flags
import jax
import numpy as np
import pytest
from sklearn import neighbors

import clop_jax
from clop_jax import evaluate
from clop_jax import train
from clop_jax.data import arrays
from clop_jax.data import images as images_lib
from clop_jax.evaluation import figures
from clop_jax.evaluation import finetune
from clop_jax.evaluation import measurement
from clop_jax.evaluation import probe
from clop_jax.evaluation import protocol
from clop_jax.evaluation import result as result_lib
from clop_jax.experiment import workdir as workdir_lib
from tests import small

ONE = slice(0, 1)


def changed(workdir, **groups):
  """Changes fields of a workdir's config."""
  path = workdir / 'config.json'
  config = json.loads(path.read_text())
  for group, fields in groups.items():
    config[group] |= fields
  path.write_text(json.dumps(config))
  return workdir


@pytest.fixture(scope='module')
def run(digits_dir, tmp_path_factory):
  """A run with the checkpoints 5 and 10; read-only."""
  workdir = tmp_path_factory.mktemp('dense') / 'run'
  config = small.digits_config(
    digits_dir,
    data__train_split='train[:300]',
    model__name='tests.small:Dense',
    data__test_split='test[:100]',
    train__batch_size=60,
    eval__finetune_learning_rates=[0.01, 0.1],
    eval__finetune_batch_size=10,
    eval__finetune_epochs=2,
    eval__finetune_min_steps=30,
  )
  train.train(config, str(workdir), devices=jax.devices()[ONE])
  return workdir


@pytest.fixture
def copy(run, tmp_path):
  return shutil.copytree(run, tmp_path / 'copy')


@pytest.fixture(scope='module')
def digits(digits_dir):
  """Images and labels of the run's splits."""
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
  """All modes, with one label for each class and with all labels."""
  return evaluated(run, modes=measurement.MODES, fractions=(0.01, 1.0))


@pytest.fixture(scope='module')
def measured(result):
  return {(m['mode'], m['label_fraction']): m for m in result.measurements}


# --- Python -------------------------------------------------------------------


def test_fraction_keeps_the_labels_of_training(run, digits):
  config = workdir_lib.load_config(str(run))
  assert config.data.label_fraction == 0.1
  labels = digits['train'][1]
  with np.load(run / 'labels.npz') as file:
    trained = np.flatnonzero(file['labelled'])
  tenth = protocol.labelled(config, labels, 0.1)
  np.testing.assert_array_equal(tenth, trained)
  hundredth = protocol.labelled(config, labels, 0.01)
  assert {*hundredth} < {*tenth} < {*protocol.labelled(config, labels, 0.5)}
  assert sorted(labels[hundredth]) == [*range(10)]
  assert len(protocol.labelled(config, labels, 1.0)) == 300


def test_knn_uses_labelled_neighbours_only(run, digits, measured):
  loaded = clop_jax.load(str(run), devices=jax.devices()[ONE])
  features = {k: np.asarray(loaded.apply(x)[0]) for k, (x, _) in digits.items()}
  labels = digits['train'][1]
  chosen = protocol.labelled(loaded.config, labels, 0.01)
  oracle = neighbors.KNeighborsClassifier(
    10, metric='cosine', weights=lambda d: np.exp((1 - d) / 0.1)
  )
  oracle.fit(features['train'][chosen], labels[chosen])
  expected = oracle.score(features['test'], digits['test'][1])
  assert measured['knn', 0.01]['knn_top1'] == pytest.approx(expected, abs=0.02)
  assert measured['knn', 0.01]['num_labels'] == len(chosen) == 10


def test_more_labels_help_and_all_labels_give_eval_json(result, measured):
  few, all_labels = (measured['linear', x] for x in (0.01, 1.0))
  assert 0.2 < few['linear_top1'] < all_labels['linear_top1'] - 0.1
  # With one label for each class, none can be held out.
  assert few['linear_held_out_top1'] is None and few['linear_l2'] == 0.1
  for mode in result_lib.COMPLETE:
    top1 = f'{mode}_top1'
    assert result.complete[top1] == measured[mode, 1.0][top1]
  json.dumps([result.complete, result.measurements], allow_nan=False)


def test_fine_tuning_learns_and_keeps_the_checkpoint(run, measured):
  made = measured['finetune', 1.0]
  assert made['finetune_top1'] > 0.4  # chance is 0.1
  assert made['finetune_top5'] >= made['finetune_top1']
  assert made['finetune_learning_rate'] in (0.01, 0.1)
  assert made['finetune_held_out_top1'] > 0.3
  assert made['finetune_steps'] == 60
  assert made['finetune_protocol_version'] == finetune.PROTOCOL_VERSION == 2
  loaded = clop_jax.load(str(run), devices=jax.devices()[ONE])
  frozen = loaded.variables['params'], loaded.variables['batch_stats']
  assert made['parameters_sha256'] == probe.fingerprint(frozen)
  # With one label for each class, none can be held out.
  few = measured['finetune', 0.01]
  assert few['finetune_held_out_top1'] is None
  assert few['finetune_learning_rate'] == 0.01
  assert few['num_labels'] == 10


def test_fine_tuning_uses_labelled_images_only(run, digits, measured):
  images, labels = digits['train']
  chosen = protocol.labelled(workdir_lib.load_config(str(run)), labels, 0.01)
  others = np.zeros_like(images)
  others[chosen] = images[chosen]
  given = sources(digits, train=(others, labels))
  (made,) = evaluated(
    run, modes=('finetune',), fractions=(0.01,), given=given
  ).measurements
  assert made['finetune_top1'] == measured['finetune', 0.01]['finetune_top1']
  assert made['finetune_top1'] > 0.15


def test_fine_tuning_with_fewer_examples_than_devices(copy, digits):
  changed(copy, data={'loader': 'stream', 'num_workers': 0})
  images, labels = digits['train']
  (made,) = evaluated(
    copy,
    modes=('finetune',),
    given=sources(digits, train=(images[:6], labels[:6])),
    overrides={'eval.finetune_min_steps': 2, 'eval.finetune_batch_size': 16},
    devices=slice(0, 8),
  ).measurements
  assert made['num_labels'] == 6
  assert made['finetune_steps'] == 2


class Broken(arrays.Arrays):
  """Examples of which one cannot be decoded."""

  def __init__(self, images, labels, broken):
    super().__init__(images, labels)
    self._broken = broken

  def __getitem__(self, index):
    if index == self._broken:
      raise images_lib.CorruptImageError(f'{index} cannot be decoded')
    return super().__getitem__(index)


def test_corrupt_image_is_left_out_and_not_replaced(copy, digits, capsys):
  images, labels = digits['train']
  changed(copy, data={'skip_corrupt': True})
  chosen = protocol.labelled(workdir_lib.load_config(str(copy)), labels, 0.1)
  broken = next(x for x in chosen if x and x + 1 not in chosen)
  blackened = images.copy()
  blackened[broken + 1] = 0
  results = []
  # Neither the next image nor the loader matters.
  for shown, loader in ((images, 'resident'), (blackened, 'stream')):
    changed(copy, data={'loader': loader, 'num_workers': 0})
    made = evaluated(
      copy,
      modes=('knn', 'finetune'),
      fractions=(0.1,),
      given={
        'train': Broken(shown, labels, broken),
        'test': Broken(*digits['test'], 7),
      },
      overrides={'eval.finetune_learning_rates': [0.1]},
    )
    results.append({m['mode']: m for m in made.measurements})
  assert 'cannot be decoded; it is left out' in capsys.readouterr().err
  for mode in ('knn', 'finetune'):
    first, second = (x[mode] for x in results)
    assert first[f'{mode}_top1'] == second[f'{mode}_top1']
    assert first['num_labels'] == len(chosen) - 1
    assert first['num_test'] == 99
    assert first['num_corrupt'] == {'train': 1, 'test': 1}


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


def test_other_data_have_their_own_classes_sizes_and_colours(shapes, run):
  data = evaluate.OtherData('npz', str(shapes), test_split='val')
  made = evaluated(run, modes=('knn', 'finetune'), data=data)
  # The prototypes are for other classes.
  assert made.complete is None
  for x in made.measurements:
    assert (x['num_classes'], x['num_test'], x['test_split']) == (3, 30, 'val')
    assert x[f'{x["mode"]}_top1'] > 0.6
  data = evaluate.OtherData('npz', str(shapes))
  with pytest.raises(ValueError, match=r"--data=npz --test_split=test.*'val'"):
    evaluated(run, data=data)


def test_labels_used_in_training_are_counted(copy, capsys):
  with np.load(copy / 'labels.npz') as file:
    known = int(file['labelled'].sum())
  arguments = {'modes': ('knn',), 'fractions': (0.01, 1.0)}
  made = evaluated(copy, **arguments).measurements
  assert [x['trained_num_labels'] for x in made] == [known] * 2
  warning = capsys.readouterr().err
  assert f'{known} labels, more than --label_fraction=0.01' in warning
  # Without a loss that uses labels:
  changed(copy, loss={'clop_weight': 0.0})
  made = evaluated(copy, **arguments).measurements
  assert [x['trained_num_labels'] for x in made] == [0] * 2
  assert not capsys.readouterr().err


def test_other_measurements_survive_diverged_fine_tuning(run, monkeypatch):
  monkeypatch.setattr(finetune.FineTuning, '_fit', lambda *_: (None, np.nan))
  parts = []
  request = evaluate.Request(
    str(run), modes=('finetune', 'knn'), devices=jax.devices()[ONE]
  )
  with pytest.raises(FloatingPointError, match=r'diverged .* at step 10'):
    evaluate.evaluate(request, on_part=parts.append)
  assert [m['mode'] for part in parts for m in part.measurements] == ['knn']


# --- The command --------------------------------------------------------------


def test_command_with_overrides(copy, monkeypatch):
  monkeypatch.setattr(jax, 'devices', lambda *_: jax.local_devices()[ONE])
  (copy / 'eval.json').write_text('before')
  small.command(
    evaluate,
    f'--workdir={copy}',
    '--mode=knn',
    '--config.eval.knn_neighbours=3,5',
    '--config.eval.knn_temperature=0.2',
  )
  assert (copy / 'eval.json').read_text() == 'before'
  (name,) = os.listdir(copy / 'evaluations')
  assert name == (
    'step10_digits_knn_1_knn_neighbours-3-5_knn_temperature-0.2.json'
  )
  written = json.loads((copy / 'evaluations' / name).read_text())
  changes = {'knn_neighbours': [3, 5], 'knn_temperature': 0.2}
  assert written['eval_changed'] == changes
  assert {'knn3_top1', 'knn5_top1'} < {*written}
  assert written['eval'].items() >= changes.items()
  assert written['eval']['finetune_batch_size'] == 10  # the run's own


@pytest.fixture
def at_once(result, monkeypatch):
  """Lets the command return a known result; holds its requests."""
  requests = []

  def fake_evaluate(request, *, on_part):
    step = 10 if request.which == 'latest' else int(request.which)
    done = []
    for fraction in request.fractions:
      for mode in request.modes:
        made = [m for m in result.measurements if m['mode'] == mode][-1]
        fields = {'step': step, 'label_fraction': fraction}
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

  def fake_figure(path, names, *_):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    pathlib.Path(path).write_text(' '.join(names))

  monkeypatch.setattr(evaluate, 'evaluate', fake_evaluate)
  monkeypatch.setattr(figures, 'embedding_figure', fake_figure)
  return requests


def rows_of(path):
  with open(path, newline='') as file:
    return list(csv.DictReader(file))


def step_in(path):
  return json.loads(path.read_text())['step']


def test_all_checkpoints_of_several_runs(copy, tmp_path, capsys, at_once):
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
  assert 'a, step 5: knn with 1 of the labels: top-1 0.' in printed.err
  rows = rows_of(table)
  steps = [(x['run'], x['step']) for x in rows]
  assert steps == [('a', '5'), ('a', '10'), ('b', '5'), ('b', '10')]
  for name in 'ab':
    assert step_in(cells / name / 'eval.json') == 10
    assert step_in(cells / name / 'evaluations' / 'step5.json') == 5
    assert os.listdir(cells / name / 'evaluations') == ['step5.json']
  newest = json.loads((cells / 'a' / 'eval.json').read_text())
  for key in ('linear_top1', 'effective_rank'):
    assert float(rows[1][key]) == newest[key]


def test_older_checkpoint_keeps_the_results_of_the_newest(copy, at_once):
  (copy / 'eval.json').write_text('of the newest')
  small.command(evaluate, f'--workdir={copy}', '--checkpoint=5')
  assert (copy / 'eval.json').read_text() == 'of the newest'
  assert not (copy / 'embeddings.npz').exists()
  assert os.listdir(copy / 'evaluations') == ['step5.json']
  small.command(evaluate, f'--workdir={copy}', '--checkpoint=10')
  assert step_in(copy / 'eval.json') == 10


def test_modes_and_fractions(copy, tmp_path, capsys, at_once):
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
  assert f'{json.loads(path.read_text())["finetune_top1"]:.3f}' in lines[0]
  assert not (copy / 'eval.json').exists()


def test_other_data_have_their_own_files(copy, shapes, at_once):
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
    f'step10_npz-shapes.npz-train-10--test_{mode}_1.json'
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
    (['--data=folder'], '--data=folder .*--data_dir'),
    (['--data=digist'], '--data=digist .*--data must be folder, npz'),
    (['--config.eval.epochs=3'], r'config\.eval\.epochs .*finetune_epochs'),
    (['--config.eval.finetune_epochs=0'], r'eval\.finetune_epochs .*0'),
    (['--config.eval.finetune_epochs=a'], r"eval\.finetune_epochs.*'a'"),
    (['--config.train.batch_size=8'], r'config\.train\.batch_size'),
    (['--config.evil.batch_size=8'], r'config\.evil\.batch_size'),
    (['--eval=finetune_epochs=3'], r'--config\.eval\.FIELD=VALUE'),
    (['--table=a.txt'], r'--table .*a\.txt'),
    (['--table=nowhere/a.md'], '--table=nowhere/a.md'),
    (['--figure=a.doc'], r'--figure .*a\.doc'),
    (['--figure=empty'], '--figure .*empty'),
    (['--figure=/dev/null/a.png'], '--figure=/dev/null/a.png'),
    (['--figure=a.png', '--mode=knn'], '--figure .*--mode'),
    (['--checkpoint=7'], 'step 7'),
    (['--checkpoint=best'], 'config.train.keep_best'),
    (['--checkpoint=newest'], "--checkpoint .*'newest'"),
    (['--workdir=no*'], r'--workdir=no\*'),
    (['--workdir=empty'], '--workdir=empty'),
  ],
)
def test_wrong_arguments(arguments, message, run, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'empty').mkdir()
  before = sorted(os.listdir(run))
  if not arguments[0].startswith('--workdir'):
    arguments = [f'--workdir={run}', *arguments]
  with pytest.raises((ValueError, flags.Error), match=message):
    small.command(evaluate, *arguments)
  assert sorted(os.listdir(run)) == before
  assert os.listdir(tmp_path) == ['empty']


@pytest.mark.parametrize(
  ('error', 'kind'),
  [
    (FloatingPointError('NaN at step 10'), FloatingPointError),
    (OSError('photos deleted'), ValueError),
    (RuntimeError('a bug'), RuntimeError),
  ],
)
def test_failed_checkpoint_does_not_lose_the_others(
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


def test_every_run_must_have_the_step(copy, tmp_path, at_once):
  other = shutil.copytree(copy, tmp_path / 'other')
  shutil.rmtree(other / 'checkpoints' / '5')
  workdirs = [f'--workdir={x}' for x in (copy, other)]
  with pytest.raises(ValueError, match=r'step 5 in .*other; .*\[10\]'):
    small.command(evaluate, *workdirs, '--checkpoint=5')
  assert not at_once


@pytest.mark.parametrize('name', ['eval.json', 'embeddings.npz', 'figures'])
def test_unwritable_result_fails_before_the_work(name, copy, at_once):
  (copy / name).symlink_to(name)
  before = sorted(copy.rglob('*'))
  with pytest.raises(OSError, match=rf'--workdir={copy} .*--out=.*{name}'):
    small.command(evaluate, f'--workdir={copy}')
  assert sorted(copy.rglob('*')) == before
  assert not at_once


def test_out_is_another_folder_and_figure_compares(copy, tmp_path, at_once):
  shutil.copytree(copy, tmp_path / 'runs' / 'a')
  shutil.move(copy, tmp_path / 'runs' / 'b')
  before = sorted((tmp_path / 'runs').rglob('*'))
  out = tmp_path / 'out'
  small.command(
    evaluate,
    f'--workdir={tmp_path}/runs',
    f'--out={out}',
    f'--figure={tmp_path}/ab.png',
  )
  small.command(evaluate, f'--workdir={tmp_path}/runs/a', f'--out={out}/c')
  for name in 'abc':
    assert {*os.listdir(out / name)} == {
      'eval.json',
      'embeddings.npz',
      'figures',
    }
  assert sorted((tmp_path / 'runs').rglob('*')) == before
  assert (tmp_path / 'ab.png').read_text() == 'a b'


def test_table_is_printed_if_results_cannot_be_written(
  copy, capsys, at_once, monkeypatch
):
  def full(*_, **__):
    raise OSError(errno.ENOSPC, 'No space left on device', 'eval.json')

  monkeypatch.setattr(evaluate.Result, 'write', full)
  with pytest.raises(OSError, match=r'No space left .*eval.json') as caught:
    small.command(evaluate, f'--workdir={copy}')
  assert caught.value.errno == errno.ENOSPC
  assert '| copy   | 0.' in capsys.readouterr().out


def test_runs_have_different_names(run, tmp_path, monkeypatch, at_once):
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
