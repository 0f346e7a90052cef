"""Real processes over loopback give the same numbers and lose nothing."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import time

from absl import flags
import jax
import numpy as np
import pytest
import sklearn.datasets

from clop_jax import cli
from clop_jax import embed
from clop_jax import evaluate
from clop_jax import train
from clop_jax.data import loader
from clop_jax.experiment import build
from clop_jax.experiment import checkpoint
from clop_jax.experiment import metrics_log
from clop_jax.runtime import parallel
from clop_jax.runtime import preemption
from tests import forked
from tests import small

CONFIG = str(small.ROOT / 'configs' / 'digits.py')


def free_port():
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    return listener.getsockname()[1]


def start(arguments, *, processes=1, devices=1):
  """Starts the processes of one run."""
  address = f'127.0.0.1:{free_port()}'
  started = []
  for process_id in range(processes):
    joining = [
      f'--coordinator_address={address}',
      f'--num_processes={processes}',
      f'--process_id={process_id}',
    ]
    started.append(
      forked.Process(
        [*arguments, *(joining if processes > 1 else [])],
        environment=small.environment(devices),
      )
    )
  return started


def finish(started, timeout=240):
  """Returns `(exit codes, outputs, errors)` after all have ended."""
  try:
    outputs, errors = zip(
      *[process.communicate(timeout=timeout) for process in started],
      strict=True,
    )
  finally:
    for process in started:
      process.kill()
  return [process.returncode for process in started], outputs, errors


def run(arguments, **options):
  """Returns the outputs of the processes of a run that must succeed."""
  codes, outputs, errors = finish(start(arguments, **options))
  assert not any(codes), errors
  return outputs


def steps(digits_dir, mesh):
  """Returns arrays of 20 steps, with labels for a quarter of each batch."""
  config = small.digits_config(
    digits_dir,
    train__batch_size=64,
    loss__block_size=32,
    optimizer__name='sgd',
    optimizer__momentum=0.0,
    optimizer__weight_decay=0.0,
    optimizer__warmup_epochs=0.0,
  )
  digits = sklearn.datasets.load_digits()
  images = (15 * digits.images[:256, ..., None]).astype(np.uint8)
  data = loader.ResidentLoader(
    images, digits.target[:256], batch_size=64, seed=1, mesh=mesh
  )
  run = build.build(config, total_steps=1000, steps_per_epoch=4)
  target = build.abstract_state(run, mesh)
  shardings = jax.tree.map(lambda x: x.sharding, target)
  state = jax.jit(run.create_state, out_shardings=shardings)()
  key = parallel.replicate(mesh, build.training_key(config))

  def step(state, resident, batch, key):
    batch = loader.unpack(resident, jax.tree.map(lambda x: x[0], batch))
    rows = batch['label'].shape[0]
    first = jax.lax.axis_index('data') * rows
    labelled = first + jax.numpy.arange(rows) < 16
    batch['label'] = jax.numpy.where(labelled, batch['label'], -1)
    return run.step(state, batch, key)

  program = parallel.map_step(step, mesh, batch_axes=(None, None, 1, None))
  begin = jax.device_get(state.params)
  losses, order = [], []
  for i, batch in enumerate(data.batches([range(i, i + 1) for i in range(20)])):
    shards = sorted(
      (s.index[1].start or 0, np.asarray(s.data)[0].tolist())
      for s in batch['index'].addressable_shards
    )
    order.append(np.concatenate([rows for _, rows in shards]))
    state, metrics = program(state, data.resident, batch, key)
    losses.append(float(metrics['loss']))
    if i == 0:
      one = jax.device_get(state.params)
  # Plain SGD: the first update is the gradient times the rate.
  rate = config.optimizer.learning_rate * 64 / 256
  gradient = jax.tree.map(lambda a, b: (a - b) / rate, begin, one)
  arrays = {'losses': np.array(losses), 'order': np.array(order)}
  for name, tree in (('gradient', gradient), ('params', state.params)):
    leaves = jax.tree.leaves(jax.device_get(tree))
    arrays[name] = np.concatenate([np.ravel(x) for x in leaves])
  return arrays


def steps_command():
  """Writes `steps` and an array of the main process, in each process."""
  flags.DEFINE_string('digits_dir', None, '')
  flags.DEFINE_string('out', None, '')

  def main():
    number, mesh = jax.process_index(), parallel.make_mesh()
    read = {'kernel': np.full(3, 1.5 + number, np.float32)}
    placed = parallel.replicate(mesh, parallel.from_main(read))
    arrays = steps(flags.FLAGS.digits_dir, mesh)
    shards = placed['kernel'].addressable_shards
    arrays['from_main'] = np.stack([np.asarray(x.data) for x in shards])
    np.savez(f'{flags.FLAGS.out}.{number}.npz', **arrays)

  cli.run(main, lambda: None)


def test_numbers_do_not_depend_on_processes_and_devices(digits_dir, tmp_path):
  expected = steps(digits_dir, parallel.make_mesh(jax.devices()[:1]))
  out = tmp_path / 'out'
  code = 'from tests.runtime import test_processes as t; t.steps_command()'
  arguments = ['-c', code, f'--digits_dir={digits_dir}', f'--out={out}']
  run(arguments, processes=2, devices=2)
  both = [dict(np.load(f'{out}.{i}.npz')) for i in range(2)]
  for result in both:
    for name in ('losses', 'gradient', 'params'):
      scale = abs(expected[name]).max()
      np.testing.assert_allclose(
        result[name], expected[name], rtol=1e-4, atol=1e-4 * scale
      )
    # Every device starts with the arrays of the main process.
    np.testing.assert_array_equal(result['from_main'], np.full((2, 3), 1.5))
  # It does train.
  losses = expected['losses']
  assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1
  # Together the processes have the batches of one device.
  together = np.concatenate([result['order'] for result in both], axis=1)
  np.testing.assert_array_equal(together, expected['order'])


def flags_of(digits_dir, workdir, epochs=6):
  """Returns arguments for a training of 5 steps an epoch, saved after each."""
  return [
    '-m',
    'clop_jax.train',
    f'--config={CONFIG}',
    f'--workdir={workdir}',
    f'--config.data.data_dir={digits_dir}',
    '--config.model.width_multiplier=0.25',
    '--config.model.embedding_dim=16',
    '--config.model.head_hidden_dim=16',
    '--config.train.batch_size=256',
    f'--config.train.num_epochs={epochs}',
    '--config.train.log_every_steps=1',
    '--config.train.checkpoint_every_epochs=1',
    '--config.watch.images_every_epochs=0',
    '--config.eval.probe_iterations=30',
  ]


def logged_step(workdir):
  path = pathlib.Path(workdir, 'metrics.jsonl')
  return len(path.read_text().splitlines()) if path.exists() else 0


def wait_until(condition, started, timeout=120):
  deadline = time.monotonic() + timeout
  while not condition():
    ended = [p for p in started if p.poll() is not None]
    assert not ended, ended[0].communicate()
    assert time.monotonic() < deadline, 'the condition never held'
    time.sleep(0.005)


def final_arrays(workdir, step):
  """Returns every array of the last checkpoint, read by Orbax alone."""
  with checkpoint.Checkpoints(
    str(pathlib.Path(workdir, 'checkpoints')), read_only=True
  ) as checkpoints:
    assert checkpoints.steps()[-1] == step
    (device, *_) = jax.local_devices()
    sharding = jax.sharding.SingleDeviceSharding(device)
    state, fault = checkpoints._read(step, sharding)
  assert fault is None
  return jax.tree.map(np.asarray, state)


def last_step(workdir):
  """Returns the last step whose checkpoint exists. All must be intact."""
  if not (workdir / 'checkpoints').is_dir():
    return None  # stopped before it opened the folder
  saved = checkpoint.verify(str(workdir))
  assert all(entry.fault is None for entry in saved)
  return saved[-1].step if saved else None


def is_saving(workdir):
  folder = workdir / 'checkpoints'
  return folder.is_dir() and any('tmp' in name for name in os.listdir(folder))


def send(digits_dir, workdir, condition, number):
  """Signals a run once a condition holds; returns its code and last line."""
  started = start(flags_of(digits_dir, workdir))
  wait_until(condition, started)
  began = time.monotonic()
  started[0].send_signal(number)
  codes, outputs, errors = finish(started)
  assert not errors[0] and time.monotonic() < began + 30
  return codes[0], outputs[0].splitlines()[-1]


def test_a_run_that_was_killed_and_preempted_ends_bit_for_bit_the_same(
  digits_dir, tmp_path
):
  unbroken, workdir = tmp_path / 'unbroken', tmp_path / 'run'
  run(flags_of(digits_dir, unbroken))
  # Before the first step, mostly while it compiles.
  code, _ = send(
    digits_dir, workdir, (workdir / 'labels.npz').exists, signal.SIGTERM
  )
  assert code == 75 and not logged_step(workdir) and not last_step(workdir)

  def at_step(step):
    return lambda: logged_step(workdir) >= step

  # In the middle of an epoch, where no checkpoint is due.
  code, _ = send(digits_dir, workdir, at_step(7), signal.SIGKILL)
  assert code == -signal.SIGKILL
  code, line = send(digits_dir, workdir, at_step(12), signal.SIGTERM)
  assert code == 75 and 'rerun the same command' in line
  step = int(line.split('saved step ')[1].split()[0])
  assert last_step(workdir) == step < 30
  code, _ = send(
    digits_dir, workdir, lambda: is_saving(workdir), signal.SIGKILL
  )
  assert code == -signal.SIGKILL and last_step(workdir)
  (output,) = run(flags_of(digits_dir, workdir))
  assert 'resuming from step' in output
  jax.tree.map(
    np.testing.assert_array_equal,
    final_arrays(workdir, 30),
    final_arrays(unbroken, 30),
  )
  logs = [(x / 'metrics.jsonl').read_text() for x in (workdir, unbroken)]
  assert logs[0] == logs[1]


def children(pid):
  lists = pathlib.Path('/proc', str(pid), 'task').glob('*/children')
  return [int(child) for path in lists for child in path.read_text().split()]


def shared_memory(pid):
  """Returns the files of memory that a process may share with others."""
  lines = pathlib.Path(f'/proc/{pid}/maps').read_text().splitlines()
  names = {line.split(maxsplit=5)[-1] for line in lines if '/dev/shm/' in line}
  return {pathlib.Path(name) for name in names if '(deleted)' not in name}


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_a_streaming_run_leaves_no_workers_and_no_memory(
  number, digits_dir, tmp_path
):
  arguments = [
    *flags_of(digits_dir, tmp_path),
    '--config.data.loader=stream',
    '--config.data.num_workers=1',
    # Batches that are large enough for shared memory.
    '--config.data.image_size=64',
  ]
  started = start(arguments)
  trainer = started[0].pid
  wait_until(lambda: logged_step(tmp_path) >= 7, started)
  workers, memory = children(trainer), set()
  assert len(workers) == 2  # one is the tracker of multiprocessing
  wait_until(lambda: memory.update(shared_memory(trainer)) or memory, started)
  if number == signal.SIGKILL:
    started[0].kill()
  else:
    os.killpg(trainer, number)
  codes, _, errors = finish(started)
  assert codes == [75 if number == signal.SIGTERM else -number], errors
  deadline = time.monotonic() + 10
  while any(pathlib.Path(f'/proc/{pid}/maps').exists() for pid in workers):
    assert time.monotonic() < deadline, 'a worker is left'
    time.sleep(0.05)
  assert not [path for path in memory if path.exists()]
  assert number == signal.SIGKILL or not errors[0]


def test_sigterm_saves_even_if_the_data_fail_afterwards(
  digits_dir, tmp_path, monkeypatch
):
  batches = loader.ResidentLoader.batches

  def failing(data, chunks):
    for number, batch in enumerate(batches(data, chunks)):
      if number == 7:
        signal.raise_signal(signal.SIGTERM)
        raise OSError('stale file handle')
      yield batch

  monkeypatch.setattr(loader.ResidentLoader, 'batches', failing)
  config = small.digits_config(
    digits_dir, train__num_epochs=6, train__log_every_steps=1
  )
  with pytest.raises(preemption.PreemptionError, match='saved step 7 of 30'):
    train.train(config, str(tmp_path))
  assert last_step(tmp_path) == 7


def test_sigterm_to_one_of_two_stops_both_at_one_step(digits_dir, tmp_path):
  started = start(flags_of(digits_dir, tmp_path), processes=2)
  wait_until(lambda: logged_step(tmp_path) >= 7, started)
  began = time.monotonic()
  started[1].send_signal(signal.SIGTERM)
  codes, outputs, errors = finish(started)
  assert codes == [75, 75], errors
  assert time.monotonic() - began < 30
  # Only the main process prints.
  step = int(outputs[0].split('saved step ')[1].split()[0])
  assert 'saved step' not in outputs[1] and 'loss' not in outputs[1]
  assert last_step(tmp_path) == step


def test_the_death_of_process_0_ends_the_others(digits_dir, tmp_path):
  # JAX alone answers it with a stack trace.
  started = start(flags_of(digits_dir, tmp_path, epochs=1000), processes=2)
  wait_until(lambda: logged_step(tmp_path) >= 7, started)
  began = time.monotonic()
  started[0].kill()
  codes, _, errors = finish(started)
  assert time.monotonic() - began < 60
  assert codes == [-signal.SIGKILL, 1]
  assert 'stack trace' not in errors[1]
  (line,) = [x for x in errors[1].splitlines() if x.startswith('error: ')]
  # The error of the step itself may come first.
  assert re.search('process 0 died|another process of this run', line)
  assert last_step(tmp_path)


# Resumes from a workdir. Each process writes the state that it starts with, as
# each of its devices has it.
_WITNESSED = """
from absl import flags
from clop_jax import cli, train
from clop_jax.experiment import workdir

flags.DEFINE_string('workdir', None, '')
flags.DEFINE_string('out', None, '')

def main():
  import jax
  import numpy as np
  run = train._Loop.run

  def witnessed(loop, state):
    arrays = {
      jax.tree_util.keystr(path, simple=True, separator='/'):
        np.stack([shard.data for shard in x.addressable_shards])
      for path, x in jax.tree_util.tree_leaves_with_path(state)
    }
    np.savez(f'{flags.FLAGS.out}.{jax.process_index()}.npz', **arrays)
    run(loop, state)

  train._Loop.run = witnessed
  folder = flags.FLAGS.workdir
  train.train(workdir.load_config(folder), folder)

cli.run(main, lambda: None)
"""


def test_two_processes_resume_from_eight_devices(
  digits_dir, tmp_path, monkeypatch
):
  ours, theirs = tmp_path / 'ours', tmp_path / 'theirs'
  # The step that other tests have compiled.
  config = small.digits_config(
    digits_dir, train__num_epochs=6, train__log_every_steps=1
  )
  assert jax.device_count() == 8
  logged = metrics_log.MetricsLog.logged

  def write_and_signal(log, done, metrics):
    logged(log, done, metrics)
    if done == 21:  # in the middle of an epoch
      signal.raise_signal(signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(metrics_log.MetricsLog, 'logged', write_and_signal)
    with pytest.raises(preemption.PreemptionError, match='saved step 22 of 30'):
      train.train(config, str(ours))
  saved = final_arrays(ours, 22)
  shutil.copytree(ours, theirs)
  train.train(config, str(theirs))
  command = ['-c', _WITNESSED, f'--workdir={ours}', f'--out={tmp_path}/begin']
  outputs = run(command, processes=2, devices=2)
  assert 'resuming from step 22 of 30' in outputs[0].splitlines()
  # Bit for bit, on each device.
  named = {
    jax.tree_util.keystr(path, simple=True, separator='/'): x
    for path, x in jax.tree_util.tree_leaves_with_path(saved)
  }
  for i in range(2):
    with np.load(tmp_path / f'begin.{i}.npz') as begin:
      assert set(begin) == set(named)
      for name, array in named.items():
        np.testing.assert_array_equal(begin[name], np.stack([array, array]))
  # Sums over 4 and over 8 devices differ in the last bit, which makes 1e-6 of
  # the change in 8 steps. One parameter that starts 1e-3 off makes 5e-3.
  before, these, those = (
    np.concatenate([np.ravel(x) for x in jax.tree.leaves(arrays['params'])])
    for arrays in (saved, final_arrays(ours, 30), final_arrays(theirs, 30))
  )
  difference = np.linalg.norm(these - those) / np.linalg.norm(those - before)
  assert difference < 1e-5


# One after the other, so that the processes start once.
_EVALUATIONS = """
from absl import flags
from clop_jax import cli, embed, evaluate
from tests import small

flags.DEFINE_string('folder', None, '')

def main():
  folder = flags.FLAGS.folder
  run = f'--workdir={folder}/run'
  small.command(embed, run, f'--out={folder}/two.npz')
  small.command(evaluate, run)
  small.command(
    evaluate,
    f'--workdir={folder}/tuned',
    '--mode=finetune',
    '--label_fraction=0.5',
    '--config.eval.finetune_epochs=1',
    '--config.eval.finetune_min_steps=12',
  )

cli.run(main, lambda: None)
"""


def test_two_processes_evaluate_and_embed_as_one_does(digits_run, tmp_path):
  for name in ('run', 'tuned'):
    workdir = shutil.copytree(digits_run, tmp_path / name)
    shutil.rmtree(workdir / 'evaluations', ignore_errors=True)
  outputs = run(['-c', _EVALUATIONS, f'--folder={tmp_path}'], processes=2)
  # Only the main process prints.
  for text in ('359 images in', 'linear top-1', '| tuned | 10   | digits |'):
    assert text in outputs[0] and text not in outputs[1]
  devices = jax.devices()[:2]
  both = json.loads((tmp_path / 'run' / 'eval.json').read_text())
  request = evaluate.Request(str(digits_run), devices=devices)
  one = evaluate.evaluate(request).complete
  assert both['knn_top1'] == pytest.approx(one['knn_top1'], abs=0.01)
  assert both['parameters_sha256'] == one['parameters_sha256']
  (path,) = (tmp_path / 'tuned' / 'evaluations').iterdir()
  both = json.loads(path.read_text())
  assert both['device'].startswith('2 x ')
  request = evaluate.Request(
    str(tmp_path / 'tuned'),
    modes=('finetune',),
    fractions=(0.5,),
    overrides={'eval.finetune_epochs': 1, 'eval.finetune_min_steps': 12},
    devices=devices,
  )
  (one,) = evaluate.evaluate(request).measurements
  for name in ('finetune_learning_rate', 'finetune_steps', 'num_labels'):
    assert both[name] == one[name]
  # A batch and its augmentation do not depend on the number of processes.
  for name in ('finetune_top1', 'finetune_held_out_top1'):
    assert both[name] == pytest.approx(one[name], abs=0.01)
  assert both['finetune_top1'] > 0.15
  small.command(
    embed, f'--workdir={digits_run}', f'--out={tmp_path / "one.npz"}'
  )
  one, two = (dict(np.load(tmp_path / f'{x}.npz')) for x in ('one', 'two'))
  assert {*one} == {*two}
  for name, array in one.items():
    assert array.dtype == two[name].dtype
    if array.dtype == np.float32:
      np.testing.assert_allclose(two[name], array, rtol=1e-4, atol=1e-5)
    else:
      np.testing.assert_array_equal(two[name], array)


def test_a_missing_process_is_one_line_in_the_others():
  arguments = [
    *('-m', 'clop_jax.evaluate', '--workdir=nowhere'),
    f'--coordinator_address=localhost:{free_port()}',
    *('--num_processes=2', '--process_id=1', '--join_timeout_seconds=1'),
  ]
  process = forked.Process(arguments, environment=small.environment())
  codes, outputs, errors = finish([process])
  assert codes == [1] and not outputs[0]
  notice, line = errors[0].splitlines()
  assert notice.startswith('process 1 of 2: waiting ')
  assert re.search('error: process 1: .*--join_timeout_seconds', line)


@pytest.mark.skipif(os.geteuid() != 0, reason='only root mounts a small disk')
def test_a_full_disk_is_named(digits_dir, tmp_path):
  arguments = flags_of(digits_dir, tmp_path, epochs=1000)
  arguments.append('--config.train.keep_checkpoints=100')
  disk = ['-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', str(tmp_path)]
  if subprocess.run(['mount', *disk]).returncode:
    pytest.skip('this machine mounts nothing')
  try:
    codes, _, errors = finish(start(arguments), timeout=60)
    assert codes == [1], errors
    (line,) = errors[0].splitlines()
    assert re.search('error: .*No space left on device.*free some space', line)
    assert last_step(tmp_path)  # the checkpoints from before are intact
  finally:
    subprocess.run(['umount', '-l', str(tmp_path)], check=True)
