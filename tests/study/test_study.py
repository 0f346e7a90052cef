"""Tests of studies: their cells, folder and jobs."""

import csv
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest

from clop_jax import defaults
from clop_jax import evaluate
from clop_jax import train
from clop_jax.experiment import workdir as workdir_lib
from clop_jax.runtime import locks
from clop_jax.runtime import preemption
from clop_jax.study import __main__ as command
from clop_jax.study import cell
from clop_jax.study import job
from clop_jax.study import plan as plan_lib
from clop_jax.study import report
from clop_jax.study import run
from tests import small
from tests.study import jobs


def digits(digits_dir, **changes):
  return workdir_lib.to_json(small.digits_config(digits_dir, **changes))


def seeds(folder, *values):
  """Returns the plan of a study of seeds that has begun."""
  plan = plan_lib.Plan(str(folder), defaults.get_config(), {'seed': [*values]})
  folder.mkdir(exist_ok=True)
  plan.save()
  return plan


def reread(folder):
  return plan_lib.Plan(str(folder), None, None)


def end(plan, status='done', names=None):
  """Ends cells without any training."""
  for name in names or plan.cells:
    folder = plan.folder(name)
    os.makedirs(folder, exist_ok=True)
    if status == 'done':
      jobs.write_done(folder)
    else:
      cell.write_record(folder, {'status': status, 'error': 'why'})
    plan.finish(name)


def rows_of(folder):
  with open(os.path.join(folder, 'results.csv'), newline='') as file:
    return list(csv.DictReader(file))


def wait_for(path, process=None):
  limit = time.monotonic() + 300
  while not path.exists():
    ended = process is not None and process.poll() is not None
    assert time.monotonic() < limit and not ended, path
    time.sleep(0.02)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'loss__contrastive': 'simclr'}, r"loss\.contrastive.*'simclr'"),
    ({'data__name': 'cifra10'}, "'cifra10'.* cifar10"),
    ({'data__test_split': ''}, r"data\.test_split.*''"),
    ({'data__test_split': 'tset'}, "test_split='tset'"),
    ({'model__embedding_dim': 8}, 'num_classes .*dim=8'),
    ({'train__batch_size': 4096}, 'batch_size .*1438'),
    ({'watch__probe_every_epochs': 1}, 'watch.probe_every_epochs.* 1'),
  ],
)
def test_wrong_configs_are_found_before_any_cell_starts(
  digits_dir, changes, message
):
  _, fault = cell.check({'b': digits(digits_dir, **changes)})
  assert re.match(f'cell b: .*{message}', fault)


def test_cells_that_differ_in_numbers_are_traced_once(digits_dir, monkeypatch):
  traced, check_step = [], cell._check_step

  def recorded(config, source):
    traced.append(config.seed)
    return check_step(config, source)

  monkeypatch.setattr(cell, '_check_step', recorded)
  cells = {str(seed): digits(digits_dir, seed=seed) for seed in range(3)}
  cells['b'] = digits(digits_dir, seed=7, loss__clop_temperature=0.2)
  assert cell.check(cells) == ('cpu', None)
  assert traced == [0, 7]


@pytest.mark.parametrize(
  ('where', 'error', 'status', 'shown'),
  [
    (None, None, 'done', None),
    (train, FloatingPointError('nan at 2; go\nhome'), 'diverged', 'nan at'),
    (train, KeyError('x'), 'failed', "KeyError: 'x'"),
    (evaluate, ValueError('far too long ' * 100), 'failed', 'far too'),
  ],
)
def test_a_cell_records_its_outcome(
  where, error, status, shown, digits_dir, tmp_path, monkeypatch
):
  def act(module):
    print(module.__name__)
    if module is where:
      raise error
    return types.SimpleNamespace(write=lambda folder: None)

  monkeypatch.setattr(train, 'train', lambda *a, **k: act(train))
  monkeypatch.setattr(evaluate, 'evaluate', lambda *a: act(evaluate))
  cell.run(digits(digits_dir), str(tmp_path), attempt=1)
  record = json.loads((tmp_path / 'cell.json').read_text())
  assert (record['status'], record['attempt']) == (status, 1)
  assert (record['evaluate_seconds'] is None) == (status != 'done')
  log = (tmp_path / 'log.txt').read_text()
  assert 'clop_jax.train' in log
  if error is None:
    assert record['error'] is None
  else:
    assert record['error'].startswith(shown) and len(record['error']) <= 300
    assert ';' not in record['error'] and '\n' not in record['error']
    assert type(error).__name__ in log


def test_at_most_2000_evenly_spaced_embeddings_are_saved(tmp_path):
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


def test_a_finished_study_starts_no_process(tmp_path, monkeypatch):
  monkeypatch.setattr(run, '_LocalJobs', None)
  folder = tmp_path / 'study'
  end(seeds(folder, 0, 1))
  before = (folder / 'results.csv').read_text()
  assert len(run.study(str(folder))) == 2
  assert len(run.study(str(folder), defaults.get_config(), {'seed': [1]})) == 1
  assert (folder / 'results.csv').read_text() == before
  assert list(rows_of(folder)[0]) == [
    *['cell', 'status', 'error', 'seed'],
    *['linear_top1', 'knn_top1', 'effective_rank'],
    *['train_seconds', 'evaluate_seconds', 'commit', 'config'],
  ]


def test_a_study_grows_and_retries_only_failed_cells(tmp_path):
  end(seeds(tmp_path, 1, 2))
  plan = seeds(tmp_path, 0, 2)
  assert list(plan.cells) == ['seed=2', 'seed=0']
  assert list(plan.todo()) == ['seed=0']
  saved = json.loads((tmp_path / 'study.json').read_text())
  assert saved['grid'] == {'seed': [1, 2, 0]}
  end(plan, 'diverged', ['seed=0'])
  rows = rows_of(tmp_path)
  assert [(row['seed'], row['status']) for row in rows] == [
    *[('1', 'done'), ('2', 'done'), ('0', 'diverged')]
  ]
  assert rows[2]['linear_top1'] == ''
  assert not reread(tmp_path).todo()
  # Its process died after it had written its record.
  assert plan.finish('seed=0', 'it died')['status'] == 'diverged'
  end(plan, 'failed', ['seed=0'])
  assert list(reread(tmp_path).todo()) == ['seed=0']


@pytest.mark.parametrize('file', ['cell.json', 'eval.json'])
@pytest.mark.parametrize('text', ['', '[]', '{}'])
def test_a_cell_with_a_damaged_file_runs_again(tmp_path, capsys, file, text):
  end(seeds(tmp_path, 0, 1))
  path = tmp_path / 'cells' / 'seed=1' / file
  path.write_text(text)
  plan = reread(tmp_path)
  assert list(plan.todo()) == ['seed=1']
  plan.save()
  assert str(path) in capsys.readouterr().err


GRID = {'seed': [0, 1]}
LONG = {'data.data_dir': ['a' * 250]}
EPOCHS = {'train.num_epochs': [1]}


@pytest.mark.parametrize(
  ('folder', 'grid', 'options', 'message'),
  [
    ('run', GRID, {}, 'workdir of a run'),
    ('other', GRID, {}, r'study\.json.* notes\.txt'),
    ('file', GRID, {}, 'is a file'),
    ('new', None, {}, '--grid must name'),
    ('made', GRID | EPOCHS, {}, 'seed, train.num_epochs'),
    ('new', {'optimizer.lr': [1]}, {}, "config.optimizer .*'lr'"),
    ('new', {'seed': [0, 0.0]}, {}, 'two cells seed=0'),
    ('new', LONG, {}, '259 bytes'),
    ('new', GRID, {'executor': 'pbs'}, "local, slurm.* 'pbs'"),
    ('new', GRID, {'slurm': {'time': 1}}, '--executor=slurm'),
    ('new', GRID, {'executor': 'slurm'}, 'sbatch and srun'),
  ],
)
def test_bad_arguments_leave_the_folder_as_it_is(
  folder, grid, options, message, tmp_path
):
  seeds(tmp_path / 'made', 0, 1)
  for name, file in (('other', 'notes.txt'), ('run', 'config.json')):
    (tmp_path / name).mkdir()
    (tmp_path / name / file).write_text('{}')
  (tmp_path / 'file').write_text('')
  before = {p: p.is_file() and p.read_text() for p in tmp_path.rglob('*')}
  with pytest.raises(ValueError, match=message):
    run.study(str(tmp_path / folder), defaults.get_config(), grid, **options)
  after = {p: p.is_file() and p.read_text() for p in tmp_path.rglob('*')}
  assert after == before


def test_another_config_or_a_used_folder_is_refused(tmp_path, monkeypatch):
  seeds(tmp_path, 0, 1)
  changed = defaults.get_config()
  changed.train.num_epochs = 3
  with pytest.raises(ValueError, match='num_epochs is 20 there and 3 here'):
    run.study(str(tmp_path), changed, GRID)
  with pytest.raises(ValueError, match=r'local folder.* gs://b/x'):
    run.study('gs://b/x', changed, GRID)
  with pytest.raises(ValueError, match='--config must name'):
    run.study(str(tmp_path / 'new'), None, GRID)
  monkeypatch.setattr(run, '_check_cells', lambda *_: 'cpu')
  with (
    workdir_lib.locked(str(tmp_path)),
    pytest.raises(ValueError, match='in use by another run'),
  ):
    run.study(str(tmp_path))


@pytest.mark.skipif(not os.path.exists('/proc'), reason='no such file system')
def test_a_folder_that_cannot_be_created_is_refused_first():
  with pytest.raises(OSError, match=r'^--workdir=/proc/xx: '):
    run.study('/proc/xx', defaults.get_config(), {'seed': [0]})


class DiedError(BaseException):
  """Ends a job without a record, as SIGKILL does."""


class ThreadJob:
  """A job that is a thread of this process."""

  paths = types.SimpleNamespace(stderr='its.err')

  def __init__(self, *arguments):
    self._error = None
    self._thread = threading.Thread(target=self._work, args=arguments)
    self._thread.start()

  def _work(self, *arguments):
    try:
      job.take_cells(*arguments)
    except preemption.PreemptionError:
      pass
    except DiedError as error:
      self._error = error

  def done(self):
    return not self._thread.is_alive()

  def exception(self):
    return self._error

  def stderr(self):
    return 'why\nbecause'


class Jobs:
  """Starts jobs as `run._Jobs` does."""

  study, pause, where, count = 'now', 0.01, 'here', 2

  def start(self, function, *arguments):
    return ThreadJob(*arguments)

  def has_ended(self, job):
    return job.done()

  def stop(self):
    return 1

  def died(self, job):
    return 'the job died'


def execute(plan, monkeypatch, actions=None, came=lambda: False):
  """Runs the cells and returns the calls of `cell.run`.

  Args:
    plan: Plan.
    monkeypatch: Fixture.
    actions: Exceptions by cell and attempt.
    came: `preemption.Notice.came`.
  """
  actions = dict(actions or {})
  calls = []

  def act(values, workdir, attempt):
    name = os.path.basename(workdir)
    calls.append((name, attempt))
    action = actions.pop((name, attempt), None)
    time.sleep(0.1)  # the command looks more often
    if isinstance(action, ValueError):
      cell.write_record(
        workdir, {'status': 'failed', 'error': str(action), 'attempt': attempt}
      )
    elif action:
      raise action
    else:
      jobs.write_done(workdir, attempt=attempt)

  monkeypatch.setattr(cell, 'run', act)
  run._Execution(plan, Jobs()).run(types.SimpleNamespace(came=came))
  return calls


@pytest.mark.parametrize(
  ('failures', 'status', 'told'),
  [
    ([], 'done', ()),
    ([ValueError('odd')], 'done', ('seed=1: failed, odd; see ', 'log.txt')),
    ([DiedError()], 'done', ('seed=1: failed, the job died; see ', 'log.txt')),
    ([preemption.PreemptionError()], 'done', ()),
    ([ValueError('odd'), ValueError('still')], 'failed', ('failed, still; ',)),
    ([DiedError(), DiedError()], 'failed', ('failed, the job died',)),
  ],
)
def test_a_cell_that_fails_is_reported_and_tried_again(
  failures, status, told, tmp_path, monkeypatch, capsys
):
  plan = seeds(tmp_path, 0, 1, 2)
  actions = {('seed=1', i): error for i, error in enumerate(failures, 1)}
  calls = execute(plan, monkeypatch, actions)
  again = len(failures) - (status == 'failed')
  assert len(calls) == 3 + again
  assert [row['status'] for row in rows_of(tmp_path)] == [
    *['done', status, 'done']
  ]
  output = capsys.readouterr().out
  assert '3 of 3 cells to go, 2 at a time here' in output
  assert all(text in output for text in told)
  assert output.count('trying again') == (again if told else 0)
  assert re.search(r'2 left, about 0:00:\d\d h\n', output)
  assert 'none left' in output
  # The same command tries it again.
  plan = reread(tmp_path)
  assert list(plan.todo()) == (['seed=1'] if status == 'failed' else [])
  if plan.todo():
    monkeypatch.setattr(Jobs, 'study', 'later')
    assert execute(plan, monkeypatch) == [('seed=1', 1)]
    assert [row['status'] for row in rows_of(tmp_path)] == ['done'] * 3


def test_jobs_that_fail_before_they_take_a_cell_end_the_study(
  tmp_path, monkeypatch
):
  def die(*arguments):
    raise DiedError

  monkeypatch.setattr(job, 'take_cells', die)
  with pytest.raises(ChildProcessError, match=r'3 jobs .*its\.err: because'):
    execute(seeds(tmp_path, 0), monkeypatch)


def test_a_cell_of_another_process_is_waited_for(tmp_path, monkeypatch):
  plan = seeds(tmp_path, 0, 1)
  os.makedirs(plan.folder('seed=0'))
  file = open(os.path.join(plan.folder('seed=0'), '.claim'), 'a')  # noqa: SIM115
  locks.take(file)
  threading.Timer(0.3, file.close).start()
  calls = execute(plan, monkeypatch)
  assert calls == [('seed=1', 1), ('seed=0', 1)]


def test_a_cell_whose_folder_cannot_be_created_fails_alone(
  tmp_path, monkeypatch
):
  plan = seeds(tmp_path, 0, 1)
  (tmp_path / 'cells').mkdir()
  (tmp_path / 'cells' / 'seed=0').write_text('')
  assert execute(plan, monkeypatch) == [('seed=1', 1)]
  failed, done = rows_of(tmp_path)
  assert 'seed=0' in failed['error'] and done['status'] == 'done'


@pytest.mark.parametrize('interrupt', [KeyboardInterrupt, None])
def test_a_study_that_is_ended_says_how_to_resume(
  interrupt, tmp_path, monkeypatch, capsys
):
  def came():
    if interrupt:
      raise interrupt
    return True

  with pytest.raises(interrupt or preemption.PreemptionError) as caught:
    execute(seeds(tmp_path, 0, 1), monkeypatch, came=came)
  said = capsys.readouterr().out + str(caught.value)
  assert '2 of 2 cells are left' in said and 'rerun the same command' in said
  assert '1 did not save' in said


@pytest.mark.parametrize(
  ('platform', 'count', 'limit', 'places', 'memory'),
  [
    ('cpu', None, 9, [[0], [1], [2], [3]], None),
    ('cpu', None, 1, [[0, 1, 2, 3]], None),
    ('cpu', 2, 9, [[0, 1], [2, 3]], None),
    ('gpu', None, 9, [[0, 1, 2, 3]], None),
    ('gpu', 2, 9, [[0, 1, 2, 3]] * 2, '0.450'),
  ],
)
def test_local_jobs_share_the_machine(
  platform, count, limit, places, memory, tmp_path, monkeypatch
):
  monkeypatch.setattr(run, '_cores', lambda: [0, 1, 2, 3])
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', 'GPU-5')
  crew = run._LocalJobs(str(tmp_path), count, limit, platform)
  assert crew._places == places
  # submitit hides GPUs.
  expected = {'CUDA_VISIBLE_DEVICES': 'GPU-5'}
  if memory:
    expected['XLA_PYTHON_CLIENT_MEM_FRACTION'] = memory
  assert crew.environment() == expected


@pytest.fixture
def fake_cells(monkeypatch):
  """Replaces cells by those of `jobs`, in processes, without their check."""
  monkeypatch.chdir(small.ROOT)
  monkeypatch.setattr(job, 'work', jobs.work)
  monkeypatch.setattr(run, '_check_cells', lambda *arguments: 'cpu')


def test_local_jobs_are_replaced_and_save_at_sigterm(
  tmp_path, fake_cells, capfd
):
  training = tmp_path / 'cells' / 'seed=2' / 'training'

  def terminate():
    wait_for(training)
    # As a scheduler does, to all processes.
    os.kill(int(training.read_text()), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)

  thread = threading.Thread(target=terminate)
  thread.start()
  grid = {'seed': [0, jobs.KILLED, jobs.LONG]}
  with pytest.raises(
    preemption.PreemptionError, match='2 of 3 cells are left; rerun'
  ):
    run.study(str(tmp_path), defaults.get_config(), grid, jobs=1)
  thread.join()
  assert (training.parent / 'saved').exists()
  output = capfd.readouterr().out
  assert 'seed=1: failed, its process died, ' in output
  assert [row['seed'] for row in rows_of(tmp_path)] == ['0']
  allowed = os.sched_getaffinity(0)
  rows = run.study(str(tmp_path), jobs=2)
  assert [row['status'] for row in rows] == ['done'] * 3
  assert os.sched_getaffinity(0) == allowed
  assert not (tmp_path / 'jobs').exists()


SLURM = {
  'sbatch': """
test -z "$REFUSED" || { echo "sbatch: error: $REFUSED" >&2; exit 1; }
cp "$1" "$SLURM/script"
number=$(($(cat $SLURM/last || echo 0) + 1))
echo $number > $SLURM/last
SLURM_JOB_ID=$number bash "$1" > $SLURM/$number.out 2>&1 &
echo $! > $SLURM/$number.pid
echo Submitted batch job $number
""",
  'srun': """
while [[ $1 == --* ]]; do
  [[ $1 == --unbuffered ]] || shift
  shift
done
exec "$@"
""",
  'sacct': """
echo 'JobID|State|NodeList'
for file in $SLURM/*.pid; do
  number=$(basename $file .pid)
  state=RUNNING
  kill -0 $(cat $file) 2> /dev/null || state=OUT_OF_MEMORY
  echo "$number|$state|here"
done
""",
  'scancel': 'echo $1 >> $SLURM/cancelled; pkill -P $(cat $SLURM/$1.pid)\n',
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
  """Makes this machine a Slurm cluster; returns the folder of its state."""
  folder = tmp_path / 'slurm'
  folder.mkdir()
  for name, text in SLURM.items():
    path = folder / name
    path.write_text(f'#!/bin/bash\n{text}')
    path.chmod(0o755)
  monkeypatch.setenv('PATH', f'{folder}:{os.environ["PATH"]}')
  monkeypatch.setenv('SLURM', str(folder))
  monkeypatch.setattr(run._SlurmJobs, 'pause', 0.2)
  monkeypatch.setattr(run._SlurmJobs, 'sacct_pause', 0.5)
  return folder


def test_slurm_runs_the_jobs_and_reports_a_killed_one(
  tmp_path, slurm, fake_cells, capfd
):
  parameters = run.slurm_parameters(
    ['partition=gpu', 'time=90', 'setup=true first', 'setup=true second']
  )
  rows = run.study(
    str(tmp_path / 'study'),
    defaults.get_config(),
    {'seed': [0, jobs.KILLED]},
    executor='slurm',
    slurm=parameters,
  )
  assert [row['status'] for row in rows] == ['done'] * 2
  output = capfd.readouterr().out
  assert 'seed=1: failed, its Slurm job 1 ended (OUT_OF_MEMORY); see' in output
  script = (slurm / 'script').read_text()
  for line in ('--partition=gpu', '--time=90', 'true first\ntrue second'):
    assert line in script
  assert (slurm / 'last').read_text() == '2\n'


@pytest.mark.parametrize(
  ('parameters', 'message'),
  [
    ({}, 'Slurm refused a job: .*invalid partition'),
    ({'nodes': 2}, 'nodes.* --jobs'),
    ({'partitoin': 'gpu'}, 'partitoin.*partition'),
  ],
)
@pytest.mark.usefixtures('slurm', 'fake_cells')
def test_bad_slurm_parameters_are_one_line(
  parameters, message, tmp_path, monkeypatch
):
  monkeypatch.setenv('REFUSED', 'invalid partition')
  with pytest.raises(ValueError, match=f'(?s){message}'):
    run.study(
      str(tmp_path / 'study'),
      defaults.get_config(),
      {'seed': [0]},
      executor='slurm',
      slurm=parameters,
    )


@pytest.mark.parametrize(
  ('statuses', 'code'),
  [
    (['done', 'diverged'], None),
    (['done', 'failed'], 1),
    (['diverged'], None),
    ([], None),
  ],
)
def test_only_a_failed_cell_fails_the_command(
  statuses, code, monkeypatch, capsys
):
  rows = [{'cell': s, 'status': s, 'error': f'why {s}'} for s in statuses]
  asked, reports = {}, []
  monkeypatch.setattr(run, 'study', lambda *a, **k: asked.update(k) or rows)
  monkeypatch.setattr(report, 'study_report', reports.append)
  exits = []
  monkeypatch.setattr(sys, 'exit', exits.append)
  flags = ['--workdir=w', '--jobs=3', '--executor=slurm', '--slurm=time=5']
  small.command(command, *flags)
  assert asked == {'jobs': 3, 'executor': 'slurm', 'slurm': {'time': 5}}
  assert exits == ([code] if code else [])
  assert reports == (['w'] if rows else [])
  listed = capsys.readouterr().err
  for status in statuses:
    assert (f'{status}: why {status}' in listed) == (status != 'done')


def started(workdir, *arguments):
  return subprocess.Popen(
    [
      *[sys.executable, '-m', 'clop_jax.study', f'--workdir={workdir}'],
      *['--jobs=1', '--noreport', *arguments],
    ],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=small.ROOT,
    env=small.environment(),
  )


def test_a_killed_study_resumes_to_the_results_of_an_unbroken_one(
  digits_dir, tmp_path
):
  process = started(
    tmp_path,
    '--config=configs/digits.py',
    f'--config.data.data_dir={digits_dir}',
    '--config.model.width_multiplier=0.25',
    '--config.model.embedding_dim=16',
    '--config.model.head_hidden_dim=16',
    '--config.train.batch_size=256',
    # Long enough for the kill to come before the end on a busy machine.
    '--config.train.num_epochs=4',
    '--config.train.checkpoint_every_epochs=1',
    '--config.eval.probe_iterations=20',
    # This changes no result: the first cell runs unbroken, the second resumes.
    '--grid=train.keep_checkpoints=3,4',
  )
  cells = [tmp_path / 'cells' / f'keep_checkpoints={keep}' for keep in (3, 4)]
  wait_for(cells[1] / 'checkpoints' / '5', process)
  pid = int((cells[1] / '.lock').read_text().split()[1])
  process.kill()
  process.communicate()
  # The job ends with the command.
  limit = time.monotonic() + 20
  while pathlib.Path(f'/proc/{pid}').exists():
    assert time.monotonic() < limit
    time.sleep(0.05)
  kept = {p: p.stat().st_mtime_ns for p in cells[0].rglob('*') if p.is_file()}

  # With the config and grid of the study.
  process = started(tmp_path)
  output, errors = process.communicate()
  assert process.returncode == 0, errors
  assert '1 of 2 cells to go, 1 at a time on cpu' in output
  assert {p: p.stat().st_mtime_ns for p in kept} == kept
  log = (cells[1] / 'log.txt').read_text()
  assert re.search(r'from step \d+ of 20|already trained', log), log
  unbroken, resumed = rows_of(tmp_path)
  assert unbroken['status'] == resumed['status'] == 'done'
  own = {'cell', 'train.keep_checkpoints', 'config'}
  own |= {'train_seconds', 'evaluate_seconds'}
  for name in set(unbroken) - own:
    assert unbroken[name] == resumed[name], name
  assert json.loads(resumed['config'])['train']['keep_checkpoints'] == 4
  with np.load(cells[1] / 'embeddings.npz') as arrays:
    assert arrays['embeddings'].shape == (359, 16)
    assert arrays['prototypes'].shape == (10, 16)
