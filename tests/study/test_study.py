"""Studies: the grid, the workers, and cells that fail, diverge and go on."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types

import ml_collections
import numpy as np
import pytest

from clop_jax import defaults
from clop_jax import evaluate
from clop_jax import train
from clop_jax.experiment import workdir as workdir_lib
from clop_jax.runtime import preemption
from clop_jax.study import __main__ as study
from clop_jax.study import cell
from clop_jax.study import ensemble
from clop_jax.study import grid
from clop_jax.study import report
from clop_jax.study import workers
from tests import small

ENVIRONMENT = small.environment()


@pytest.mark.parametrize(
  ('given', 'field', 'values'),
  [
    ('optimizer.learning_rate=0.001,1,1e1', 'optimizer.learning_rate', None),
    ('seed=0,2', 'seed', [0, 2]),
    ('model.head_bn=true,False', 'model.head_bn', [True, False]),
    ('optimizer.clip_norm=None,2', 'optimizer.clip_norm', [None, 2.0]),
    ('loss.block_size=None,64', 'loss.block_size', [None, 64]),
    ('loss.contrastive=nt_xent,dcl', 'loss.contrastive', ['nt_xent', 'dcl']),
    ('data.unlabelled_split=None,a=b', 'data.unlabelled_split', [None, 'a=b']),
  ],
)
def test_values_get_the_type_of_their_field(given, field, values):
  values = [0.001, 1.0, 10.0] if values is None else values
  parsed = grid.parse([given], defaults.get_config())
  assert parsed == {field: values}
  assert [type(v) for v in parsed[field]] == [type(v) for v in values]
  # A config from study.json has lost what None stands for, and its tuples.
  saved = ml_collections.ConfigDict(workdir_lib.to_json(defaults.get_config()))
  assert grid.parse([given], saved) == parsed


@pytest.mark.parametrize(
  ('texts', 'message'),
  [
    (
      ['loss.clop_wieght=0,1'],
      "--grid loss.clop_wieght: config.loss has no field 'clop_wieght'; it "
      'has: barlow_weight, block_size, clop_after_epochs, ',
    ),
    (['lr=1'], "config has no field 'lr'; it has: augment, data, eval"),
    (['seed.x=1'], "config.seed has no field 'x'; it has: no fields"),
    (['loss=1'], 'config.loss is a group; name a field of it: barlow_weight'),
    (['loss.clop_weight'], "must be field=value,value, as .* got 'loss.clop"),
    (['=1'], "must be field=value,value, as .* got '=1'"),
    (['loss.clop_weight=abc'], 'clop_weight=abc: must be a number like 1.0'),
    (['loss.clop_weight=nan'], 'clop_weight=nan: must be a number like 1.0'),
    (['loss.clop_weight=None'], 'clop_weight=None: must be a number like 1.0'),
    (['optimizer.clip_norm=x'], 'must be a number like 1.0 or None'),
    (['seed=0.5'], 'seed=0.5: must be a whole number like 1'),
    (['seed=0,,1'], 'seed=: must be a whole number like 1'),
    (['seed='], 'seed=: must be a whole number like 1'),
    (['model.head_bn=1'], 'head_bn=1: must be true or false'),
    (
      ['eval.probe_l2=0.1,1'],
      r'config.eval.probe_l2 is a list, .* with --config.eval.probe_l2=',
    ),
    (['seed=0', 'seed=1'], '--grid seed is there twice; give all its values'),
    (['optimizer.learning_rate=1,1.0'], 'the value 1.0 is there twice'),
    (['data.options.noise=1'], "config.data.options has no field 'noise'"),
  ],
)
def test_a_wrong_grid_is_one_clear_line(texts, message):
  with pytest.raises(ValueError, match=message) as caught:
    grid.parse(texts, defaults.get_config())
  assert '\n' not in str(caught.value)


def test_options_that_the_config_file_has_can_vary():
  config = defaults.get_config()
  config.data.options.noise = 0.5
  assert grid.parse(['data.options.noise=1,2'], config) == {
    'data.options.noise': [1.0, 2.0]
  }


def test_cells_have_names_for_files_and_the_first_field_changes_last():
  named = grid.cells({'optimizer.learning_rate': [0.1, 10.0], 'seed': [0, 1]})
  assert list(named) == [
    'learning_rate=0.1,seed=0',
    'learning_rate=0.1,seed=1',
    'learning_rate=10,seed=0',
    'learning_rate=10,seed=1',
  ]
  assert named['learning_rate=10,seed=1'] == {
    'optimizer.learning_rate': 10.0,
    'seed': 1,
  }
  # Fields that end alike keep their whole names; other names cannot collide.
  named = grid.cells({'train.batch_size': [8], 'eval.batch_size': [8]})
  assert list(named) == ['train.batch_size=8,eval.batch_size=8']
  named = grid.cells({'data.data_dir': ['a/b', 'a_b', '..', None]})
  assert list(named) == [
    'data_dir=a%2Fb',
    'data_dir=a_b',
    'data_dir=..',
    'data_dir=None',
  ]


def test_a_cell_s_config_is_the_base_with_its_values():
  base = workdir_lib.to_json(defaults.get_config())
  got = grid.applied(base, {'loss.clop_weight': 7.0, 'seed': 3})
  assert workdir_lib.differences(base, got) == [
    'loss.clop_weight is 1.0 there and 7.0 here',
    'seed is 0 there and 3 here',
  ]


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'optimizer.lr': [1, 2]}, "config.optimizer has no field 'lr'; it has: "),
    ({'seed.x': [1]}, "config.seed has no field 'x'; it has: no fields"),
    ({'seed': [0, 0.0]}, 'has two cells seed=0; leave one of them out'),
    ({'data.data_dir': ['a' * 250]}, 'a folder, has 259 bytes, and 255 are'),
  ],
)
def test_a_grid_that_is_no_text_is_checked_as_well(tmp_path, fields, message):
  folder = tmp_path / 'study'
  with pytest.raises(ValueError, match=message):
    study.study(str(folder), defaults.get_config(), fields)
  assert not folder.exists()


def digits(digits_dir, **changes):
  return workdir_lib.to_json(small.digits_config(digits_dir, **changes))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'loss__contrastive': 'simclr'},
      r"cell b: config.loss.contrastive must be one of \['nt_xent', .*'simclr'",
    ),
    ({'data__num_classes': 1}, 'num_classes must be at least 2 for .*, got 1'),
    ({'data__name': 'cifra10'}, "cell b: .* got 'cifra10'; near it: cifar10"),
    (
      {'data__test_split': ''},
      'config.data.test_split must name a split: a st',
    ),
    ({'data__test_split': 'tset'}, "cell b: config.data.test_split='tset'"),
    ({'loss__clop_distance': 'cosin'}, "distance must be one of .*got 'cosin'"),
    ({'model__embedding_dim': 8}, 'num_classes must be at most dim=8'),
    ({'train__batch_size': 4096}, 'batch_size must be at most the 1438'),
    ({'data__label_fraction': 2.0}, 'label_fraction must be '),
  ],
)
def test_a_wrong_cell_is_found_before_any_starts(digits_dir, changes, message):
  platform, fault = cell.check({'b': digits(digits_dir, **changes)})
  assert platform == 'cpu'
  with pytest.raises(ValueError, match=message):
    raise ValueError(fault)


def test_cells_that_differ_in_numbers_are_traced_once(digits_dir, monkeypatch):
  traced = []

  def check_step(config, source, labels):
    traced.append((config.seed, len(source), len(labels)))
    return {'total_steps': 10, 'steps_per_epoch': 5}

  monkeypatch.setattr(cell, '_check_step', check_step)
  cells = {str(seed): digits(digits_dir, seed=seed) for seed in range(3)}
  cells['b'] = digits(digits_dir, seed=7, loss__clop_temperature=0.2)
  assert cell.check(cells) == ('cpu', None)
  assert traced == [(0, 1438, 1438), (7, 1438, 1438)]
  # What the numbers can break is looked at in each.
  cells['c'] = digits(digits_dir, loss__contrastive='none')
  cells['d'] = digits(
    digits_dir, loss__contrastive='none', loss__clop_weight=0.0
  )
  assert cell.check(cells)[1].startswith('cell d: config.loss.contrastive is')


def test_a_cell_that_can_be_trained_passes(digits_dir):
  assert cell.check({'a': digits(digits_dir)}) == ('cpu', None)


def test_groups_are_of_cells_alike_and_not_too_many(digits_dir):
  todo = {str(seed): digits(digits_dir, seed=seed) for seed in range(5)}
  todo['b'] = digits(digits_dir, train__batch_size=64)
  assert study._groups(todo, 0) == [['0'], ['1'], ['2'], ['3'], ['4'], ['b']]
  assert study._groups(todo, 3) == [['0', '1', '2'], ['3', '4'], ['b']]


def test_cells_in_one_program_end_each_in_its_own_way(
  digits_dir, tmp_path, monkeypatch
):
  def train_together(configs, workdirs, *, diverged):
    assert [config.seed for config in configs] == [0, 1, 2]
    assert workdirs == [str(tmp_path / name) for name in 'abc']
    print('training')
    time.sleep(0.05)
    diverged(1, FloatingPointError('the loss is nan at step 2; go\nhome'))

  def evaluated(workdir):
    if workdir.endswith('c'):
      raise ValueError('far too long ' * 100)
    return {'linear_top1': 0.5}, {}

  monkeypatch.setattr(ensemble, 'train_together', train_together)
  monkeypatch.setattr(evaluate, 'evaluate', evaluated)
  monkeypatch.setattr(evaluate, 'write', lambda workdir, result, arrays: None)
  got = cell.run(
    {
      name: (digits(digits_dir, seed=seed), str(tmp_path / name))
      for seed, name in enumerate('abc')
    }
  )
  assert [got[name]['status'] for name in 'abc'] == [
    'done',
    'diverged',
    'failed',
  ]
  assert got['a']['error'] is None
  assert got['b']['error'] == 'the loss is nan at step 2'
  assert len(got['c']['error']) == 300
  for name, outcome in got.items():
    # A third of the time that they took together.
    assert 0.01 < outcome['train_seconds'] < 5
    assert (outcome['evaluate_seconds'] is None) == (name != 'a')
    written = json.loads((tmp_path / name / 'cell.json').read_text())
    assert written.items() >= outcome.items()
  assert 'training' in (tmp_path / 'a' / 'log.txt').read_text()
  assert 'together with a' in (tmp_path / 'b' / 'log.txt').read_text()
  assert 'far too long ' * 100 in (tmp_path / 'c' / 'log.txt').read_text()


def test_a_cell_whose_folder_cannot_be_made_fails_alone(
  digits_dir, tmp_path, monkeypatch
):
  monkeypatch.setattr(train, 'train', None)
  (tmp_path / 'cells').write_text('')
  plan = study._Plan(
    str(tmp_path / 'new'), defaults.get_config(), {'seed': [0]}
  )
  path = str(tmp_path / 'cells' / 'a')
  got = cell.run({'a': (digits(digits_dir), path)})
  assert got['a']['status'] == 'failed'
  assert 'Not a directory' in got['a']['error']
  monkeypatch.setattr(plan, 'folder', lambda name: path)
  (tmp_path / 'new').mkdir()
  row = plan.finish('seed=0', got['a']['error'])
  assert (row['status'], row['error']) == ('failed', got['a']['error'])


WORKER = """
import os, pathlib, signal, sys, time
from clop_jax.runtime import preemption, workers

def work(task):
  if task == 'die':
    os.kill(os.getpid(), signal.SIGKILL)
  if task == 'sleep':
    time.sleep(60)
  if task == 'train':
    with preemption.Notice() as notice:
      pathlib.Path('training').write_text('')
      while not notice.reached(range(0)):
        time.sleep(0.02)
      pathlib.Path('saving').write_text('')
      time.sleep(1)
      pathlib.Path('saved').write_text('')
    sys.exit(75)
  return task, os.getpid(), sorted(os.sched_getaffinity(0))

workers.serve(work, end=preemption.ask)
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
  """Starts a worker of WORKER, and keeps it in `start.made`."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'sample_worker.py').write_text(WORKER)
  path = os.pathsep.join([str(tmp_path), str(small.ROOT)])
  environment = os.environ | {'PYTHONPATH': path}
  first = min(os.sched_getaffinity(0))

  def make(place):
    worker = workers.Worker(
      'sample_worker', cores={first}, environment=environment
    )
    make.made.append(worker)
    return worker

  make.made = []
  yield make
  assert all(worker.ended() for worker in make.made)


def test_a_worker_that_dies_fails_its_task_alone_and_is_replaced(start):
  tasks = list(enumerate(['a', 'die', 'b', 'c']))
  replies = {}
  allowed = os.sched_getaffinity(0)
  for name, reply, error in workers.run(tasks, start, 1):
    replies[name] = (reply, error)
  assert replies[1] == (None, 'the process was ended by SIGKILL')
  assert [replies[i][0][0] for i in (0, 2, 3)] == ['a', 'b', 'c']
  assert all(replies[i][1] is None for i in (0, 2, 3))
  # One process for all, but for the one in the place of the dead.
  before, after = [worker.pid for worker in start.made]
  assert [replies[i][0][1] for i in (0, 2, 3)] == [before, after, after]
  # Each on its own cores, which are not those of this process from then on.
  assert replies[0][0][2] == [min(allowed)]
  assert os.sched_getaffinity(0) == allowed


def test_workers_are_ended_when_told_and_when_left(start):
  began = time.monotonic()
  tasks = list(enumerate(['a', 'sleep', 'sleep']))
  told = []
  for _ in workers.run(tasks, start, 2, told=lambda: bool(told)):
    told.append(True)
  (running,) = [workers.run(tasks[1:], start, 1, told=lambda: True)]
  assert list(running) == []
  assert time.monotonic() - began < 15


@pytest.mark.parametrize('first', ['signal', 'pipe'])
def test_a_sigterm_to_the_whole_job_lets_a_worker_save(start, tmp_path, first):
  worker = start(0)
  worker.send('train')
  wait_for(tmp_path / 'training', worker)
  if first == 'signal':
    os.kill(worker.pid, signal.SIGTERM)
    wait_for(tmp_path / 'saving', worker)
    workers.stop([worker])
  else:
    worker.tell_to_end()
    wait_for(tmp_path / 'saving', worker)
    os.kill(worker.pid, signal.SIGTERM)
    worker.wait()
  assert (tmp_path / 'saved').exists()
  assert not worker.killed


def test_a_worker_that_does_not_end_is_killed(start, tmp_path, monkeypatch):
  monkeypatch.setattr(workers, 'SECONDS_TO_END', 0.3)
  worker = start(0)
  worker.send('train')
  wait_for(tmp_path / 'training', worker)
  workers.stop([worker])
  assert worker.killed
  assert not (tmp_path / 'saved').exists()


def test_a_system_that_binds_no_process_to_cores(start, monkeypatch):
  monkeypatch.delattr(os, 'sched_getaffinity')
  monkeypatch.delattr(os, 'sched_setaffinity')
  assert workers.cores() == list(range(os.cpu_count()))
  tasks = [('a', 'a')]
  assert [reply[0] for _, reply, _ in workers.run(tasks, start, 1)] == ['a']


STUDY_WORKER = """
import json, os, pathlib, sys, time
from clop_jax.study import cell, preemption, workers

def work(task):
  if task[0] == 'check':
    return 'cpu', None
  ((name, (_, folder)),) = task[1].items()
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  if name == 'seed=1' and not (folder / 'saved').exists():
    with preemption.Notice() as notice:
      (folder / 'training').write_text(str(os.getpid()))
      while not notice.reached(range(0)):
        time.sleep(0.02)
      time.sleep(0.5)
      (folder / 'saved').write_text('')
    sys.exit(75)
  figures = dict.fromkeys(('linear_top1', 'knn_top1', 'effective_rank'), 0.5)
  (folder / 'eval.json').write_text(json.dumps(figures))
  outcome = {'status': 'done', 'error': None}
  outcome |= {'train_seconds': 1.0, 'evaluate_seconds': 1.0}
  cell.record(str(folder), outcome)
  return {name: outcome}

workers.serve(work, end=preemption.ask)
"""


def test_a_study_that_is_told_to_end_saves_and_goes_on(tmp_path, monkeypatch):
  (tmp_path / 'study_worker.py').write_text(STUDY_WORKER)
  path = os.pathsep.join([str(tmp_path), str(small.ROOT)])
  monkeypatch.setenv('PYTHONPATH', path)
  monkeypatch.setattr(study, '_WORKER', 'study_worker')
  folder = tmp_path / 'study'
  training = folder / 'cells' / 'seed=1' / 'training'

  def tell():
    wait_for(training)
    # As a scheduler does, to all of the job.
    os.kill(int(training.read_text()), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)

  teller = threading.Thread(target=tell)
  teller.start()
  message = 'preempted: 2 of 3 cells are left; rerun the same command to resume'
  with pytest.raises(preemption.PreemptionError, match=f'^{message}$'):
    study.study(str(folder), defaults.get_config(), {'seed': [0, 1, 2]}, jobs=1)
  teller.join()
  assert (training.parent / 'saved').exists()
  assert [row['seed'] for row in rows_of(folder)] == ['0']
  rows = study.study(str(folder), jobs=1)
  assert [row['status'] for row in rows] == ['done'] * 3


def test_a_worker_ends_with_the_process_that_started_it(start):
  worker = start(0)
  worker.send('sleep')
  worker.connection.close()
  worker.wait()
  assert worker.ended()


def test_kept_embeddings_are_few_and_evenly_spaced(tmp_path):
  n, dim, k = 5001, 4, 3
  rows = np.arange(n, dtype=np.float32)
  arrays = {
    'embeddings': np.stack([rows / n] * dim, axis=1),
    'labels': np.arange(n) % k,
    'spectrum': np.ones(dim),
    'class_mean_cosines': np.eye(k),
    'prototypes': np.eye(k, dim),
  }
  evaluate.Result(1, [], {'step': 1}, arrays).write(str(tmp_path))
  assert json.loads((tmp_path / 'eval.json').read_text()) == {'step': 1}
  with np.load(tmp_path / 'embeddings.npz') as kept:
    assert {name: (x.shape, str(x.dtype)) for name, x in kept.items()} == {
      'embeddings': ((2000, dim), 'float16'),
      'labels': ((2000,), 'int32'),
      'spectrum': ((dim,), 'float32'),
      'class_mean_cosines': ((k, k), 'float32'),
      'prototypes': ((k, dim), 'float32'),
    }
    # Rows 0, 2.5, 5, ... of the whole, and their own labels.
    position = kept['embeddings'][:, 0].astype(float) * n
    np.testing.assert_allclose(position, np.linspace(0, n - 1, 2000), atol=2)
    assert kept['labels'][-1] == (n - 1) % k


def fake_study(folder, config, values):
  """A study whose cells (of seeds) are through, without any training."""
  plan = study._Plan(str(folder), config, {'seed': values})
  folder.mkdir(exist_ok=True)
  plan.save()
  for name in plan.cells:
    os.makedirs(plan.folder(name))
    times = {'train_seconds': 1.0, 'evaluate_seconds': 2.0}
    ended(plan, name, 'done', **times)
    with open(os.path.join(plan.folder(name), 'eval.json'), 'w') as file:
      result = {'linear_top1': 0.5, 'knn_top1': 0.25, 'effective_rank': 3.0}
      json.dump(result | {'seed': 9, 'commit': 'x', 'config': {}}, file)
    plan.finish(name)


def ended(plan, name, status, error=None, **times):
  os.makedirs(plan.folder(name), exist_ok=True)
  cell.record(plan.folder(name), {'status': status, 'error': error} | times)


def rows_of(folder):
  with open(os.path.join(folder, 'results.csv'), newline='') as file:
    return list(csv.DictReader(file))


def test_a_study_that_is_through_starts_no_process(tmp_path, monkeypatch):
  monkeypatch.setattr(study, '_Pool', None)
  folder = tmp_path / 'study'
  config = defaults.get_config()
  fake_study(folder, config, [0, 1])
  before = (folder / 'results.csv').read_text()
  assert len(study.study(str(folder))) == 2
  assert len(study.study(str(folder), config, {'seed': [1]})) == 1
  assert (folder / 'results.csv').read_text() == before
  assert list(rows_of(folder)[0]) == [
    'cell',
    'status',
    'error',
    'seed',
    'linear_top1',
    'knn_top1',
    'effective_rank',
    'train_seconds',
    'evaluate_seconds',
    'commit',
    'config',
  ]
  assert [row['seed'] for row in rows_of(folder)] == ['0', '1']


def test_a_study_grows_by_values_and_keeps_those_it_has(tmp_path):
  folder = tmp_path / 'study'
  config = defaults.get_config()
  fake_study(folder, config, [1, 2])
  plan = study._Plan(str(folder), config, {'seed': [0, 2]})
  assert list(plan.cells) == ['seed=2', 'seed=0']
  assert list(plan.todo()) == ['seed=0']
  plan.save()
  saved = json.loads((folder / 'study.json').read_text())
  assert saved['grid'] == {'seed': [1, 2, 0]}
  ended(plan, 'seed=0', 'diverged', 'at step 3')
  plan.finish('seed=0')
  assert [(r['cell'], r['status']) for r in rows_of(folder)] == [
    ('seed=1', 'done'),
    ('seed=2', 'done'),
    ('seed=0', 'diverged'),
  ]
  # A diverged cell is a result, without figures; a failed one is not.
  assert rows_of(folder)[2]['linear_top1'] == ''
  assert study._Plan(str(folder), None, None).todo() == {}
  # The process of a group dies after one of its cells has diverged.
  assert plan.finish('seed=0', 'it died')['status'] == 'diverged'
  ended(plan, 'seed=0', 'failed', 'of some kind')
  assert list(study._Plan(str(folder), None, None).todo()) == ['seed=0']


@pytest.mark.parametrize('file', ['cell.json', 'eval.json'])
@pytest.mark.parametrize('text', ['', '{"status": "done', '[]', '{}'])
def test_a_cell_of_a_cut_file_is_not_through(tmp_path, capsys, file, text):
  folder = tmp_path / 'study'
  fake_study(folder, defaults.get_config(), [0, 1])
  path = folder / 'cells' / 'seed=1' / file
  path.write_text(text)
  plan = study._Plan(str(folder), None, None)
  assert list(plan.todo()) == ['seed=1']
  plan.save()
  warned = capsys.readouterr().err
  assert warned == (
    f'warning: {path} is empty or damaged; that cell is taken as not through\n'
  )


@pytest.mark.skipif(not os.path.exists('/proc'), reason='no such file system')
def test_a_folder_that_cannot_be_made_is_refused_first(monkeypatch):
  monkeypatch.setattr(study, '_Pool', None)
  with pytest.raises(
    OSError, match=r'^--workdir=/proc/xx: .* cannot be written'
  ):
    study.study('/proc/xx', defaults.get_config(), {'seed': [0]})


def test_a_folder_of_something_else_is_refused_and_left_as_it_is(tmp_path):
  config, seeds = defaults.get_config(), {'seed': [0, 1]}
  made = tmp_path / 'study'
  fake_study(made, config, [0, 1])
  run, other, file = tmp_path / 'run', tmp_path / 'other', tmp_path / 'file'
  for path in (run, other):
    path.mkdir()
  (run / 'config.json').write_text('{}')
  (other / 'notes.txt').write_text('mine')
  file.write_text('')
  changed = defaults.get_config()
  changed.train.num_epochs = 3
  for path, arguments, message in (
    (run, (config, seeds), 'is the workdir of a run, not of a study'),
    (other, (config, seeds), r'holds no study.json, .* it has: notes.txt'),
    (file, (config, seeds), 'is a file, not a folder'),
    ('gs://b/x', (config, seeds), 'must be a local folder, got gs://b/x'),
    (tmp_path / 'new', (None, seeds), '--config must name a file'),
    (tmp_path / 'new', (config, None), '--grid must name a field'),
    (
      made,
      (changed, seeds),
      'of another study: train.num_epochs is 20 there and 3 here',
    ),
    (
      made,
      (config, seeds | {'loss.clop_weight': [0.0]}),
      'the fields of --grid are seed there and seed, loss.clop_weight here',
    ),
  ):
    with pytest.raises(ValueError, match=message):
      study.study(str(path), *arguments)
  assert os.listdir(run) == ['config.json']
  assert os.listdir(other) == ['notes.txt']
  assert not (tmp_path / 'new').exists()


def test_two_studies_at_once_in_one_folder_are_refused(tmp_path):
  fake_study(tmp_path / 'study', defaults.get_config(), [0])
  with (
    workdir_lib.locked(str(tmp_path / 'study')),
    pytest.raises(ValueError, match='in use by another run'),
  ):
    study.study(str(tmp_path / 'study'))


@pytest.mark.parametrize(
  ('statuses', 'code', 'reported'),
  [
    (['done', 'diverged'], 0, True),
    (['done', 'failed'], 1, True),
    (['diverged'], 0, True),
    (['failed'], 1, True),
    ([], 0, False),
  ],
)
def test_only_a_failed_cell_fails_the_command(
  statuses, code, reported, monkeypatch, capsys
):
  rows = [{'cell': s, 'status': s, 'error': f'why {s}'} for s in statuses]
  values = {'workdir': 'w', 'config': None, 'grid': [], 'jobs': 1, 'vmap': 0}
  flags = types.SimpleNamespace(FLAGS=types.SimpleNamespace(**values))
  flags.FLAGS.report = True
  reports = []
  monkeypatch.setattr(study, 'flags', flags)
  monkeypatch.setattr(study, 'study', lambda *a, **k: rows)
  monkeypatch.setattr(report, 'study_report', reports.append, raising=False)
  if code:
    with pytest.raises(SystemExit) as caught:
      study.main()
    assert caught.value.code == code
  else:
    study.main()
  assert reports == (['w'] if reported else [])
  listed = capsys.readouterr().err
  for status in statuses:
    assert (f'{status}: why {status}' in listed) == (status != 'done')


def command(workdir, *arguments):
  return subprocess.Popen(
    [
      *[sys.executable, '-m', 'clop_jax.study', f'--workdir={workdir}'],
      *['--jobs=1', '--noreport', *arguments],
    ],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=small.ROOT,
    env=ENVIRONMENT,
  )


def wait_for(path, process=None):
  ended = getattr(process, 'ended', None) or getattr(process, 'poll', None)
  limit = time.monotonic() + 120
  while not path.exists():
    assert time.monotonic() < limit and not (ended and ended()), path
    time.sleep(0.02)


def test_the_command_refuses_a_wrong_grid_in_one_line(tmp_path):
  process = command(
    tmp_path / 'study', '--config=configs/digits.py', '--grid', 'seed=x'
  )
  _, error = process.communicate()
  assert process.returncode == 1
  assert error == 'error: --grid seed=x: must be a whole number like 1\n'
  assert not (tmp_path / 'study').exists()


def test_a_study_is_killed_continued_and_loses_a_process(digits_dir, tmp_path):
  folder = tmp_path / 'study'
  process = command(
    folder,
    '--config=configs/digits.py',
    f'--config.data.data_dir={digits_dir}',
    '--config.model.width_multiplier=0.25',
    '--config.model.embedding_dim=16',
    '--config.model.head_hidden_dim=16',
    '--config.train.batch_size=256',
    # Long enough for the kill to come before the end on a busy machine.
    '--config.train.num_epochs=4',
    '--config.train.log_every_steps=5',
    '--config.train.checkpoint_every_epochs=1',
    '--config.eval.probe_iterations=20',
    '--grid=optimizer.learning_rate=0.2,1e30',
    # Which changes nothing in the results: the first of these runs unbroken,
    # the second is stopped and goes on, the third dies.
    '--grid',
    'train.keep_checkpoints=3,4,5',
  )
  cells = [
    folder / 'cells' / f'learning_rate=0.2,keep_checkpoints={keep}'
    for keep in (3, 4, 5)
  ]
  wait_for(cells[1] / 'checkpoints' / '5', process)
  process.kill()
  process.communicate()
  assert [row['status'] for row in rows_of(folder)] == ['done']
  kept = {p: p.stat().st_mtime_ns for p in cells[0].rglob('*') if p.is_file()}

  # The study's own config and grid.
  process = command(folder)
  wait_for(cells[2] / 'checkpoints' / '5', process)
  worker = int((cells[2] / '.lock').read_text().split()[1])
  os.kill(worker, signal.SIGKILL)
  output, errors = process.communicate()
  assert process.returncode == 1, errors
  assert '5 of 6 cells to go, 1 at the same time on cpu' in output
  assert {p: p.stat().st_mtime_ns for p in kept} == kept
  log = (cells[1] / 'log.txt').read_text()
  assert re.search(r'going on from step \d+ of 20|already trained', log), log

  rows = rows_of(folder)
  expected = ['done', 'done', 'failed', 'diverged', 'diverged', 'diverged']
  assert [row['status'] for row in rows] == expected
  unbroken, continued, killed, diverged = rows[:4]
  assert killed['error'] == (
    'the process was ended by SIGKILL, most often because memory has run out: '
    f'try fewer --jobs (or a smaller --vmap); see {cells[2] / "log.txt"}'
  )
  assert diverged['error'] == 'the loss is nan at step 2'
  assert diverged['train_seconds']
  assert f'failed: {killed["cell"]}: {killed["error"]}\n' in errors
  assert f'diverged: {diverged["cell"]}: {diverged["error"]}\n' in errors
  own = {'cell', 'train.keep_checkpoints', 'config'}
  own |= {'train_seconds', 'evaluate_seconds'}
  for name in set(rows[0]) - own:
    assert unbroken[name] == continued[name], name
  for name in ('linear_top1', 'effective_rank', 'evaluate_seconds'):
    assert unbroken[name] and not killed[name] and not diverged[name]
  config = json.loads(continued['config'])
  assert config['train']['keep_checkpoints'] == 4
  with np.load(cells[1] / 'embeddings.npz') as arrays:
    assert arrays['embeddings'].shape == (359, 16)
    assert arrays['prototypes'].shape == (10, 16)
