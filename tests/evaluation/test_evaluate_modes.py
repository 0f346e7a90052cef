import csv
import errno
import json
import os
import shutil

import jax
import numpy as np
import pytest
from sklearn import neighbors

import clop_jax
from clop_jax import evaluate
from clop_jax.data import arrays
from clop_jax.data import images as images_lib
from clop_jax.evaluation import finetune
from clop_jax.evaluation import probe
from clop_jax.evaluation import protocol
from clop_jax.experiment import workdir as workdir_lib
from tests import small

ONE = slice(0, 1)
# What eval.json has had since it was first written; readers rely on it.
KEYS = {
  'protocol_version',
  'step',
  'linear_top1',
  'linear_top5',
  'linear_l2',
  'linear_held_out_top1',
  'knn_top1',
  'knn20_top1',
  'knn200_top1',
  'effective_rank',
  'effective_rank_centered',
  'embedding_variance',
  'embedding_std',
  'prototype_cosine',
  'prototype_energy_share',
  'class_mean_cosine',
  'principal_angle_degrees',
  'within_between_ratio',
  'uniformity',
  'features_effective_rank',
  'features_within_between_ratio',
  'parameters_sha256',
  'num_train',
  'num_test',
  'seed',
  'config',
  'commit',
  'versions',
  'device',
  'time',
}


@pytest.fixture(scope='module')
def digits(digits_dir):
  """Images and labels of each split."""
  return {x: small.digits_arrays(digits_dir, x) for x in ('train', 'test')}


@pytest.fixture(scope='module')
def measure(digits_run):
  def call(**arguments):
    return evaluate.measure(
      str(digits_run), devices=jax.devices()[ONE], **arguments
    )

  return call


@pytest.fixture
def copy(digits_run, tmp_path):
  return shutil.copytree(digits_run, tmp_path / 'copy')


def in_memory(digits, **changed):
  splits = digits | changed
  return {name: arrays.Arrays(*both) for name, both in splits.items()}


def test_the_labels_of_a_fraction_are_those_the_run_was_trained_with(
  digits_run, digits
):
  config = workdir_lib.load_config(str(digits_run))
  assert config.data.label_fraction == 0.1
  labels = digits['train'][1]
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
  with pytest.raises(ValueError, match=r'in \(0, 1\].*got 0'):
    protocol.labelled(config, labels, 0)


@pytest.fixture(scope='module')
def few(measure):
  return measure(fractions=(0.01, 1.0))


def test_neighbours_are_looked_for_among_the_labelled_only(
  measure, digits_run, digits
):
  run = clop_jax.load(str(digits_run), devices=jax.devices()[ONE])
  features = {
    split: np.asarray(run.apply(images)[0])
    for split, (images, _) in digits.items()
  }
  chosen = protocol.labelled(run.config, digits['train'][1], 0.1)
  oracle = neighbors.KNeighborsClassifier(
    20, metric='cosine', weights=lambda d: np.exp((1 - d) / 0.1)
  )
  oracle.fit(features['train'][chosen], digits['train'][1][chosen])
  expected = oracle.score(features['test'], digits['test'][1])
  (found,) = measure(modes=('knn',), fractions=(0.1,)).measurements
  assert found['knn_top1'] == pytest.approx(expected, abs=0.006)
  assert found['num_labels'] == len(chosen)


def test_more_labels_do_better_and_all_are_what_eval_json_has(few):
  by = {(m['mode'], m['label_fraction']): m for m in few.measurements}
  assert len(by) == 4
  linear = [by['linear', x]['linear_top1'] for x in (0.01, 1.0)]
  assert 0.2 < linear[0] < linear[1] - 0.1
  # Ten labels, one a class: no strength can be chosen by held-out ones.
  assert by['linear', 0.01]['num_labels'] == 10
  assert by['linear', 0.01]['linear_held_out_top1'] is None
  assert by['linear', 0.01]['linear_l2'] == 0.1
  assert {*few.complete} == KEYS
  for mode in ('linear', 'knn'):
    key = f'{mode}_top1'
    assert few.complete[key] == by[mode, 1.0][key]
  json.dumps(few.measurements, allow_nan=False)


def test_fine_tuning_learns_the_classes_and_freezes_the_checkpoint(
  measure, digits, digits_run
):
  found = measure(modes=('finetune',))
  (figures,) = found.measurements
  assert found.complete is None and found.arrays is None
  assert figures['finetune_top1'] > 0.45  # chance is 0.1
  assert figures['finetune_top5'] >= figures['finetune_top1']
  assert figures['finetune_learning_rate'] in (0.1, 0.5)
  assert figures['finetune_held_out_top1'] > 0.4
  assert figures['finetune_steps'] == 44  # two epochs of 22 batches of 64
  assert figures['finetune_protocol_version'] == finetune.PROTOCOL_VERSION == 2
  run = clop_jax.load(str(digits_run), devices=jax.devices()[ONE])
  frozen = run.variables['params'], run.variables['batch_stats']
  assert figures['parameters_sha256'] == probe.fingerprint(frozen)
  # The labels did it: with shuffled ones the same procedure is at chance.
  images, labels = digits['train']
  shuffled = np.random.default_rng(0).permutation(labels)
  given = in_memory(digits, train=(images, shuffled))
  (figures,) = measure(modes=('finetune',), given=given).measurements
  assert figures['finetune_top1'] < 0.25


def test_fine_tuning_sees_the_images_of_the_labelled_only(
  measure, digits, digits_run
):
  images, labels = digits['train']
  config = workdir_lib.load_config(str(digits_run))
  chosen = protocol.labelled(config, labels, 0.1)
  others = np.zeros_like(images)
  others[chosen] = images[chosen]
  results = []
  for train in ((images, labels), (others, labels)):
    found = measure(
      modes=('finetune',),
      fractions=(0.1,),
      given=in_memory(digits, train=train),
    )
    results.append(found.measurements[0]['finetune_top1'])
  assert results[0] == results[1] > 0.3


def streamed(workdir):
  path = workdir / 'config.json'
  config = json.loads(path.read_text())
  config['data'] |= {'loader': 'stream', 'num_workers': 0}
  path.write_text(json.dumps(config))


def test_a_streamed_set_is_fine_tuned_on_as_a_resident_one(measure, copy):
  asked = {'modes': ('finetune',), 'fractions': (0.1,)}
  (resident,) = measure(**asked).measurements
  streamed(copy)
  one = jax.devices()[ONE]
  (stream,) = evaluate.measure(str(copy), devices=one, **asked).measurements
  for key in ('top1', 'top5', 'held_out_top1', 'learning_rate'):
    assert stream[f'finetune_{key}'] == resident[f'finetune_{key}']


def test_a_streamed_set_and_few_labels_on_several_devices(copy):
  streamed(copy)
  (figures,) = evaluate.measure(
    str(copy),
    modes=('finetune',),
    fractions=(0.01,),
    devices=jax.devices()[:4],
  ).measurements
  # Ten labels do not go on four devices evenly: some come twice. One of each
  # class: no learning rate can be chosen by held-out ones.
  assert figures['num_labels'] == 10
  assert figures['finetune_steps'] == 30
  assert figures['finetune_held_out_top1'] is None
  assert figures['finetune_learning_rate'] == 0.1
  assert figures['finetune_top1'] > 0.15


@pytest.mark.parametrize('loader', ['resident', 'stream'])
def test_fewer_examples_than_devices_are_fine_tuned_on(copy, digits, loader):
  if loader == 'stream':
    streamed(copy)
  images, labels = digits['train']
  (figures,) = evaluate.measure(
    str(copy),
    modes=('finetune',),
    given=in_memory(digits, train=(images[:6], labels[:6])),
    settings={'finetune_min_steps': 2},
    devices=jax.devices()[:8],
  ).measurements
  assert figures['num_labels'] == 6
  assert figures['finetune_steps'] == 2


@pytest.fixture
def shapes(tmp_path):
  """Colour images of three classes that nothing but brightness tells apart."""
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


def test_another_data_set_has_its_own_classes_sizes_and_colours(
  shapes, measure
):
  data = evaluate.OtherData('npz', str(shapes), test_split='val')
  found = measure(modes=('linear', 'finetune'), data=data)
  # The prototypes are not of these classes.
  assert found.complete is None
  figures = {m['mode']: m for m in found.measurements}
  for mode in ('linear', 'finetune'):
    assert figures[mode]['num_classes'] == 3
    assert figures[mode]['num_test'] == 30
    assert figures[mode]['test_split'] == 'val'
  assert figures['linear']['linear_top1'] > 0.9
  assert figures['finetune']['finetune_top1'] > 0.6
  data = evaluate.OtherData('npz', str(shapes))
  with pytest.raises(ValueError, match=r"--data=npz --test_split=test.*'val'"):
    measure(data=data)


def rows_of(path):
  with open(path, newline='') as file:
    return list(csv.DictReader(file))


def test_every_checkpoint_of_several_runs_in_one_table(
  copy, tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(jax, 'devices', lambda *_: jax.local_devices()[ONE])
  (tmp_path / 'study' / 'cells').mkdir(parents=True)
  shutil.copytree(copy, tmp_path / 'study' / 'cells' / 'b')
  shutil.move(copy, tmp_path / 'study' / 'cells' / 'a')
  untrained = tmp_path / 'study' / 'cells' / 'c'
  untrained.mkdir()
  shutil.copy(tmp_path / 'study' / 'cells' / 'a' / 'config.json', untrained)
  small.command(
    evaluate,
    f'--workdir={tmp_path}/study',
    '--checkpoint=all',
    f'--table={tmp_path}/table.csv',
  )
  printed = capsys.readouterr()
  assert 'holds no checkpoint yet' in printed.err
  assert 'it is left out' in printed.err
  rows = rows_of(tmp_path / 'table.csv')
  assert [(x['run'], x['step']) for x in rows] == [
    ('a', '5'),
    ('a', '10'),
    ('b', '5'),
    ('b', '10'),
  ]
  assert '| run | step | data   | labels | of all | linear top-1' in printed.out
  for name in ('a', 'b'):
    folder = tmp_path / 'study' / 'cells' / name
    newest = json.loads((folder / 'eval.json').read_text())
    older = json.loads((folder / 'evaluations' / 'step5.json').read_text())
    assert (newest['step'], older['step']) == (10, 5)
    assert {*newest} == {*older} == KEYS
    assert os.listdir(folder / 'evaluations') == ['step5.json']
    for row, result in zip(
      [x for x in rows if x['run'] == name], (older, newest), strict=True
    ):
      assert float(row['linear_top1']) == result['linear_top1']
      assert float(row['effective_rank']) == result['effective_rank']


def test_an_older_checkpoint_leaves_what_is_of_the_newest_alone(
  copy, monkeypatch
):
  monkeypatch.setattr(jax, 'devices', lambda *_: jax.local_devices()[ONE])
  (copy / 'eval.json').write_text('of the newest')
  small.command(evaluate, f'--workdir={copy}', '--checkpoint=5')
  assert (copy / 'eval.json').read_text() == 'of the newest'
  assert not (copy / 'embeddings.npz').exists()
  older = json.loads((copy / 'evaluations' / 'step5.json').read_text())
  assert older['step'] == 5 and {*older} == KEYS
  small.command(evaluate, f'--workdir={copy}', '--checkpoint=10')
  assert json.loads((copy / 'eval.json').read_text())['step'] == 10
  assert os.listdir(copy / 'evaluations') == ['step5.json']


def test_modes_and_fractions_in_one_table_and_a_file_each(
  copy, tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(jax, 'devices', lambda *_: jax.local_devices()[ONE])
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
  assert titles == [
    'run',
    'step',
    'data',
    'labels',
    'of all',
    'kNN top-1',
    'fine-tuned top-1',
  ]
  assert len(lines) == 2
  assert {*os.listdir(copy / 'evaluations')} == {
    f'step10_digits_{mode}_{fraction}.json'
    for mode in ('knn', 'finetune')
    for fraction in (0.1, 0.5)
  }
  path = copy / 'evaluations' / 'step10_digits_finetune_0.1.json'
  figures = json.loads(path.read_text())
  assert f'{figures["finetune_top1"]:.3f}' in lines[0]
  assert figures['label_fraction'] == 0.1
  # Not all labels and not both modes: that file is not this one's to write.
  assert (copy / 'eval.json').read_text() == 'before'


def test_a_run_on_other_data_writes_a_file_of_its_own(
  copy, shapes, monkeypatch
):
  monkeypatch.setattr(jax, 'devices', lambda *_: jax.local_devices()[ONE])
  small.command(
    evaluate,
    f'--workdir={copy}',
    '--data=npz',
    f'--data_dir={shapes}',
    '--test_split=val',
    '--mode=knn',
    '--mode=linear',
  )
  assert {*os.listdir(copy / 'evaluations')} == {
    f'step10_npz-shapes.npz-train-val_{mode}_1.json'
    for mode in ('knn', 'linear')
  }
  assert not (copy / 'eval.json').exists()


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--mode=linear,kmeans'], "must be some of linear, knn, finetune; got 'k"),
    (['--label_fraction=0.1,2'], '--label_fraction must be in (0, 1]'),
    (['--label_fraction=0'], '--label_fraction must be in (0, 1]'),
    (['--label_fraction=all'], '--label_fraction must be numbers'),
    (['--test_split=val'], '--test_split goes with --data=NAME'),
    (['--data=cifra10'], '--data=cifra10 --train_split=train: '),
    (
      ['--data=folder'],
      '--data=folder --train_split=train: --data_dir must be a folder',
    ),
    (
      ['--data=digist'],
      '--data=digist --train_split=train: --data must be folder, npz, ',
    ),
    (['--eval=epochs=3'], '--eval=epochs=... is not a field of config.eval; '),
    (['--eval=finetune_epochs'], '--eval=finetune_epochs must be FIELD=VALUE'),
    (
      ['--eval=finetune_epochs=0.5'],
      '=... must be a whole number from 1 to 1000000000 epochs, got 0.5',
    ),
    (['--eval=probe_l2=a'], '--eval=probe_l2=a must be FIELD=VALUE, as '),
    (['--table=a.txt'], '--table must end in .csv or .md, got a.txt'),
    (['--table=nowhere/a.md'], '--table=nowhere/a.md: there is no folder'),
    (['--figure=a.doc'], '--figure must be a file *.png (or '),
    (['--figure=empty'], 'got the folder empty'),
    (['--figure=/dev/null/a.png'], '/dev/null/a.png: /dev/null is no folder'),
    (['--figure=a.png', '--mode=knn'], '--figure compares runs by their embed'),
    (['--checkpoint=7'], 'no checkpoint of step 7'),
    (['--workdir=no*'], '--workdir=no* matches no workdir of a run'),
    (['--workdir=empty'], '--workdir=empty holds no config.json'),
  ],
)
def test_what_makes_no_sense_is_refused_and_nothing_is_written(
  arguments, message, digits_run, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'empty').mkdir()
  before = sorted(os.listdir(digits_run))
  if not arguments[0].startswith('--workdir'):
    arguments = [f'--workdir={digits_run}', *arguments]
  with pytest.raises(ValueError) as caught:
    small.command(evaluate, *arguments)
  assert message in str(caught.value)
  assert sorted(os.listdir(digits_run)) == before
  assert os.listdir(tmp_path) == ['empty']


def test_one_checkpoint_that_fails_does_not_lose_the_others(
  copy, tmp_path, capsys, monkeypatch
):
  def measured(workdir, *, which, keep, **_):
    if which == '10':
      raise FloatingPointError('NaN at step 10')
    keep(evaluate.Evaluation(5, [row_of(5)]))
    return evaluate.Evaluation(5, [row_of(5)])

  monkeypatch.setattr(evaluate, 'measure', measured)
  with pytest.raises(FloatingPointError, match=r'1 of 2 .*because NaN at step'):
    small.command(
      evaluate, f'--workdir={copy}', '--mode=knn', '--checkpoint=all'
    )
  printed = capsys.readouterr()
  assert '| copy | 5    | digits | 9      | 1      | 0.250     |' in printed.out
  assert 'NaN at step 10; it is left out of the table' in printed.err
  assert os.listdir(copy / 'evaluations') == ['step5_digits_knn_1.json']


def test_a_run_whose_data_are_gone_does_not_lose_the_others(
  copy, tmp_path, capsys
):
  gone = shutil.copytree(copy, tmp_path / 'gone')
  config = json.loads((gone / 'config.json').read_text())
  config['data'] |= {'name': 'npz', 'data_dir': 'gone.npz'}
  (gone / 'config.json').write_text(json.dumps(config))
  with pytest.raises(ValueError, match=r'1 of 2 .*gone.npz: there is no such'):
    small.command(
      evaluate, f'--workdir={gone}', f'--workdir={copy}', '--mode=knn'
    )
  printed = capsys.readouterr()
  assert 'warning: gone: ' in printed.err
  assert '| copy | 10   | digits |' in printed.out
  # What takes long says how far it is.
  assert 'copy, step 10: knn with 1 of the labels: top-1 0.' in printed.err


def row_of(step):
  row = {'mode': 'knn', 'step': step, 'data': 'digits', 'other_data': False}
  row |= {'eval_changed': {}}
  return row | {'label_fraction': 1.0, 'num_labels': 9, 'knn_top1': 0.25}


def test_a_step_that_one_run_lacks_is_refused_before_the_work(
  copy, tmp_path, monkeypatch
):
  other = shutil.copytree(copy, tmp_path / 'other')
  shutil.rmtree(other / 'checkpoints' / '5')
  monkeypatch.setattr(evaluate, 'measure', lambda *_, **__: pytest.fail('ran'))
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


def test_the_table_of_what_was_measured_survives_any_error(
  copy, tmp_path, capsys, monkeypatch
):
  def measured(workdir, *, which, **_):
    if which == '10':
      raise ValueError('its photos are gone')
    return evaluate.Evaluation(5, [row_of(5)])

  monkeypatch.setattr(evaluate, 'measure', measured)
  with pytest.raises(ValueError, match='its photos are gone'):
    small.command(
      evaluate,
      f'--workdir={copy}',
      '--mode=knn',
      '--checkpoint=all',
      f'--table={tmp_path}/t.csv',
    )
  assert '| copy | 5    | digits | 9      ' in capsys.readouterr().out
  assert [row['step'] for row in rows_of(tmp_path / 't.csv')] == ['5']


@pytest.mark.parametrize('name', ['eval.json', 'embeddings.npz', 'figures'])
def test_what_could_not_be_written_is_refused_before_the_work(
  name, copy, monkeypatch
):
  place = copy / name
  shutil.rmtree(place, ignore_errors=True)
  place.unlink(missing_ok=True)
  place.symlink_to(name)
  before = sorted(copy.rglob('*'))
  monkeypatch.setattr(evaluate, 'measure', lambda *_, **__: pytest.fail('ran'))
  with pytest.raises(OSError, match=rf'--workdir={copy} .*--out=.*{name}'):
    small.command(evaluate, f'--workdir={copy}')
  assert sorted(copy.rglob('*')) == before


def complete_of(step):
  figures = ('linear_top1', 'knn_top1', 'effective_rank', 'prototype_cosine')
  result = dict.fromkeys(figures, 0.5) | {'step': step}
  arrays = {'labels': np.arange(4) % 2, 'prototypes': np.eye(4)}
  arrays |= {'embeddings': np.eye(4), 'spectrum': np.ones(4)}
  arrays['class_mean_cosines'] = np.eye(2)
  return evaluate.Evaluation(step, [], result, arrays)


def measured_at_once(*_, keep, **__):
  keep(complete_of(10))
  return complete_of(10)


def test_results_go_to_another_folder(copy, tmp_path, monkeypatch):
  monkeypatch.setattr(evaluate, 'measure', measured_at_once)
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
  copy, capsys, monkeypatch
):
  def full(*_):
    raise OSError(errno.ENOSPC, 'No space left on device', 'eval.json')

  monkeypatch.setattr(evaluate, 'measure', measured_at_once)
  monkeypatch.setattr(evaluate, 'write', full)
  with pytest.raises(OSError, match=r'No space left .*eval.json') as caught:
    small.command(evaluate, f'--workdir={copy}')
  assert caught.value.errno == errno.ENOSPC
  assert '| copy   | 0.500 ' in capsys.readouterr().out


def test_other_settings_are_used_and_kept_apart(copy, monkeypatch):
  monkeypatch.setattr(jax, 'devices', lambda *_: jax.local_devices()[ONE])
  (copy / 'eval.json').write_text('of the settings of the run')
  small.command(
    evaluate,
    f'--workdir={copy}',
    '--mode=linear,knn,finetune',
    '--eval=finetune_epochs=1',
    '--eval=finetune_min_steps=7',
    '--eval=finetune_learning_rates=0.25',
    '--eval=knn_neighbours=3,5',
    '--eval=finetune_augment=false',
  )
  assert (copy / 'eval.json').read_text() == 'of the settings of the run'
  found = {}
  for name in os.listdir(copy / 'evaluations'):
    figures = json.loads((copy / 'evaluations' / name).read_text())
    found[figures['mode']] = figures
    for part in ('knn_neighbours-3-5', 'finetune_epochs-1', 'rates-0.25'):
      assert part in name
    assert {*figures['eval_changed']} == {
      'finetune_epochs',
      'finetune_min_steps',
      'finetune_learning_rates',
      'finetune_augment',
      'knn_neighbours',
    }
  assert {*found} == {'linear', 'knn', 'finetune'}
  assert found['finetune']['finetune_steps'] == 22  # one epoch
  assert found['finetune']['finetune_learning_rate'] == 0.25
  assert {'knn3_top1', 'knn5_top1'} < {*found['knn']}
  assert found['knn']['eval']['knn_neighbours'] == [3, 5]
  assert found['knn']['eval']['finetune_batch_size'] == 64  # the run's own


def test_runs_have_names_of_their_own_and_come_once(
  digits_run, tmp_path, monkeypatch, capsys
):
  for name in ('s1/a', 's1/b', 's2/a', 's2/b'):
    (tmp_path / name).mkdir(parents=True)
    shutil.copy(digits_run / 'config.json', tmp_path / name)
  monkeypatch.setattr(evaluate.restored, 'check', lambda *_: [5])
  monkeypatch.setattr(evaluate.restored, 'steps', lambda *_: [5])
  monkeypatch.setattr(
    evaluate, 'measure', lambda *_, **__: evaluate.Evaluation(5, [row_of(5)])
  )
  monkeypatch.chdir(tmp_path)

  def names(*paths):
    small.command(
      evaluate,
      *(f'--workdir={path}' for path in paths),
      '--mode=knn',
      '--table=t.csv',
    )
    return [row['run'] for row in rows_of('t.csv')]

  assert names('s1', 's2') == ['s1/a', 's1/b', 's2/a', 's2/b']
  assert names('s1/a', 's1/*') == ['a', 'b']
  assert names('s1/a', f'{tmp_path}/s2/../s1/a') == ['a']
  assert names('s2/b', 's1/b') == ['s2/b', 's1/b']


def test_the_labels_that_the_training_knew_are_told(
  copy, digits_run, measure, capsys
):
  with np.load(digits_run / 'labels.npz') as file:
    known = int(file['labelled'].sum())
  asked = {'modes': ('knn',), 'fractions': (0.01, 0.1, 1.0)}
  measured = measure(**asked).measurements
  assert [x['trained_num_labels'] for x in measured] == [known] * 3
  warning = f'knew {known} labels, more than --label_fraction=0.01 gives'
  assert warning in capsys.readouterr().err
  # The same weights, had no loss used the labels.
  path = copy / 'config.json'
  config = json.loads(path.read_text())
  config['loss']['clop_weight'] = 0.0
  path.write_text(json.dumps(config))
  one = jax.devices()[ONE]
  measured = evaluate.measure(str(copy), devices=one, **asked).measurements
  assert [x['trained_num_labels'] for x in measured] == [0] * 3
  assert not capsys.readouterr().err


class Broken(arrays.Arrays):
  """Examples of which some cannot be decoded."""

  def __init__(self, images, labels, broken):
    super().__init__(images, labels)
    self._broken = {*broken}

  def __getitem__(self, index):
    if index in self._broken:
      raise images_lib.CorruptImageError(
        f'{index} cannot be decoded; repair it'
      )
    return super().__getitem__(index)


@pytest.mark.parametrize('loader', ['resident', 'stream'])
def test_a_corrupt_image_is_left_out_and_no_other_takes_its_place(
  copy, digits, loader, capsys
):
  if loader == 'stream':
    streamed(copy)
  path = copy / 'config.json'
  config = json.loads(path.read_text())
  config['data']['skip_corrupt'] = True
  path.write_text(json.dumps(config))
  one = jax.devices()[ONE]
  run = clop_jax.load(str(copy), devices=one)
  images, labels = digits['train']
  chosen = protocol.labelled(run.config, labels, 0.1)
  # One whose neighbour has not been chosen.
  broken = next(x for x in chosen[3:] if x + 1 not in chosen)
  results = []
  for blackened in (
    images,
    images
    * (np.arange(len(images)) != broken + 1)[:, None, None, None].astype(
      np.uint8
    ),
  ):
    given = {
      'train': Broken(blackened, labels, [broken]),
      'test': Broken(*digits['test'], [7]),
    }
    found = evaluate.measure(
      str(copy),
      modes=('linear', 'knn', 'finetune'),
      fractions=(0.1,),
      given=given,
      settings={'finetune_learning_rates': 0.1},
      devices=one,
    )
    results.append({m['mode']: m for m in found.measurements})
  assert 'cannot be decoded; it is left out' in capsys.readouterr().err
  # The other image has no say in anything.
  for mode in ('linear', 'knn', 'finetune'):
    first, second = (result[mode] for result in results)
    assert first[f'{mode}_top1'] == second[f'{mode}_top1']
    assert first['num_labels'] == len(chosen) - 1
    assert first['num_test'] == len(digits['test'][1]) - 1
    assert first['num_corrupt'] == {'train': 1, 'test': 1}
  kept = chosen[chosen != broken]
  tested = np.arange(len(digits['test'][1])) != 7
  bank, asked = (
    np.asarray(run.apply(x)[0])
    for x in (images[kept], digits['test'][0][tested])
  )
  expected = probe.knn(
    bank, labels[kept], asked, digits['test'][1][tested], num_classes=10
  )
  assert results[0]['knn']['knn_top1'] == pytest.approx(expected[20], abs=2e-3)


def test_what_was_measured_is_kept_if_fine_tuning_diverges(copy, monkeypatch):
  monkeypatch.setattr(jax, 'devices', lambda *_: jax.local_devices()[ONE])
  monkeypatch.setattr(protocol.FineTuning, '_fit', lambda *_: (None, np.nan))
  with pytest.raises(FloatingPointError, match=r'diverged .* at step 10'):
    small.command(
      evaluate,
      f'--workdir={copy}',
      '--mode=finetune,linear,knn',
      '--label_fraction=0.1,1',
    )
  assert {*os.listdir(copy / 'evaluations')} == {
    'step10_digits_linear_0.1.json',
    'step10_digits_knn_0.1.json',
  }
  result = json.loads((copy / 'eval.json').read_text())
  assert {*result} == KEYS and result['step'] == 10
