"""Real processes over loopback: the same numbers, and nothing lost."""

import contextlib
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


def start(arguments, *, processes=1, devices=1, peer_timeout=60):
  """Processes of one run, with the arguments of each."""
  address = f'127.0.0.1:{free_port()}'
  started = []
  for process_id in range(processes):
    flags = []
    if processes > 1:
      flags = [
        f'--coordinator_address={address}',
        f'--num_processes={processes}',
        f'--process_id={process_id}',
        f'--peer_timeout_seconds={peer_timeout}',
      ]
    started.append(
      forked.Process(
        [*arguments, *flags], environment=small.environment(devices)
      )
    )
  return started


def finish(started, timeout=240):
  """`(exit codes, outputs, errors)` of all, none of which is left behind."""
  try:
    results = [process.communicate(timeout=timeout) for process in started]
  finally:
    for process in started:
      process.kill()
  codes = [process.returncode for process in started]
  return codes, [out for out, _ in results], [errors for _, errors in results]


# --- the same numbers -------------------------------------------------------


def steps(digits_dir, mesh):
  """Twenty real steps; only the first quarter of each batch is labelled."""
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
  """`steps` in one of several processes, with an array of the main one."""
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


def test_processes_and_devices_do_not_change_the_numbers(digits_dir, tmp_path):
  expected = steps(digits_dir, parallel.make_mesh(jax.devices()[:1]))
  out = tmp_path / 'out'
  code = 'from tests.runtime import test_processes as t; t.steps_command()'
  arguments = ['-c', code, f'--digits_dir={digits_dir}', f'--out={out}']
  codes, _, errors = finish(start(arguments, processes=2, devices=2))
  assert codes == [0, 0], errors
  both = [dict(np.load(f'{out}.{i}.npz')) for i in range(2)]
  for result in both:
    for name in ('losses', 'gradient', 'params'):
      scale = abs(expected[name]).max()
      np.testing.assert_allclose(
        result[name], expected[name], rtol=1e-4, atol=1e-4 * scale
      )
    # Every device starts from what the main process has read.
    np.testing.assert_array_equal(result['from_main'], np.full((2, 3), 1.5))
  # It trains, so equal numbers are not those of nothing happening.
  losses = expected['losses']
  assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1
  # Row by row the processes have the batches of one device.
  together = np.concatenate([result['order'] for result in both], axis=1)
  np.testing.assert_array_equal(together, expected['order'])


# --- nothing lost -----------------------------------------------------------


def flags_of(digits_dir, workdir, epochs=6):
  """A training of 5 steps an epoch, saved after each epoch."""
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
  if not path.exists():
    return 0
  lines = path.read_text().splitlines()
  return len(lines)


def wait_until(condition, started, timeout=120):
  deadline = time.monotonic() + timeout
  while not condition():
    ended = [p for p in started if p.poll() is not None]
    assert not ended, ended[0].communicate()
    assert time.monotonic() < deadline, 'it never came to that'
    time.sleep(0.005)


def final_arrays(workdir, step):
  """Every array of the last checkpoint, by Orbax alone."""
  with checkpoint.Checkpoints(
    str(pathlib.Path(workdir, 'checkpoints')), read_only=True
  ) as checkpoints:
    assert checkpoints.steps()[-1] == step
    (device, *_) = jax.local_devices()
    sharding = jax.sharding.SingleDeviceSharding(device)
    state, fault = checkpoints._read(step, sharding)
  assert fault is None
  return jax.tree.map(np.asarray, state)


def assert_same_end(workdir, other, step):
  jax.tree.map(
    np.testing.assert_array_equal,
    final_arrays(workdir, step),
    final_arrays(other, step),
  )
  logs = [
    pathlib.Path(x, 'metrics.jsonl').read_text() for x in (workdir, other)
  ]
  assert logs[0] == logs[1]


@pytest.fixture(scope='module')
def unbroken(digits_dir, tmp_path_factory):
  """One process, one device, never stopped: 30 steps."""
  workdir = tmp_path_factory.mktemp('runs') / 'unbroken'
  codes, _, errors = finish(start(flags_of(digits_dir, workdir)))
  assert codes == [0], errors
  return workdir


def is_saving(workdir):
  folder = workdir / 'checkpoints'
  return folder.is_dir() and any('tmp' in name for name in os.listdir(folder))


def system_state(pid):
  """Parent and state (R, S, T: stopped, Z: ended, ...) of a process."""
  text = pathlib.Path(f'/proc/{pid}/stat').read_text()
  state, parent, *_ = text.rpartition(')')[2].split()
  return int(parent), state


def kill_when(condition, process):
  """Kills a process while a condition holds, of which it misses none."""
  while True:
    wait_until(condition, [process])
    # The condition may have passed, which is decided while nothing moves.
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: system_state(process.pid)[1] == 'T', [process])
    if condition():
      process.kill()
      return
    process.send_signal(signal.SIGCONT)


def send(digits_dir, workdir, condition, *numbers):
  """Starts a run, sends signals, and returns its code and last line."""
  started = start(flags_of(digits_dir, workdir))
  wait_until(condition, started)
  deadline = time.monotonic() + 30
  for number in numbers:
    started[0].send_signal(number)
    time.sleep(0.001)
  codes, outputs, errors = finish(started)
  assert not errors[0] and time.monotonic() < deadline
  # Whatever was being written, the checkpoints are intact.
  assert all(found.fault is None for found in checkpoint.verify(str(workdir)))
  return codes[0], outputs[0].splitlines()[-1]


def test_kills_and_preemptions_cost_nothing_but_time(
  digits_dir, unbroken, tmp_path
):
  # Before the first step, mostly while it compiles.
  code, _ = send(
    digits_dir, tmp_path, (tmp_path / 'labels.npz').exists, signal.SIGTERM
  )
  assert code == 75 and not logged_step(tmp_path)
  assert not checkpoint.verify(str(tmp_path))
  # In the middle of an epoch, where no checkpoint is due.
  at_step = lambda step: lambda: logged_step(tmp_path) >= step  # noqa: E731
  code, _ = send(digits_dir, tmp_path, at_step(7), signal.SIGKILL)
  assert code == -signal.SIGKILL
  code, line = send(digits_dir, tmp_path, at_step(12), signal.SIGTERM)
  assert code == 75 and 'rerun the same command' in line
  step = int(line.split('saved step ')[1].split()[0])
  assert checkpoint.verify(str(tmp_path))[-1].step == step < 30
  # A second SIGTERM ends it at once.
  code, _ = send(
    digits_dir, tmp_path, at_step(step + 1), *[signal.SIGTERM] * 1000
  )
  assert code == 75
  started = start(flags_of(digits_dir, tmp_path))
  kill_when(lambda: is_saving(tmp_path), started[0])
  finish(started)
  codes, outputs, errors = finish(start(flags_of(digits_dir, tmp_path)))
  assert codes == [0], errors
  assert 'resuming from step' in outputs[0]
  assert_same_end(tmp_path, unbroken, 30)


def children(pid):
  """The processes that a process has started, and that have not ended."""
  found = []
  for folder in pathlib.Path('/proc').iterdir():
    if folder.name.isdigit():
      with contextlib.suppress(OSError):
        parent, state = system_state(folder.name)
        if parent == pid and state != 'Z':
          found.append(int(folder.name))
  return found


def shared_memory(pid):
  """Files of the memory that a process may share with others."""
  lines = pathlib.Path(f'/proc/{pid}/maps').read_text().splitlines()
  names = {line.split(maxsplit=5)[-1] for line in lines if '/dev/shm/' in line}
  return {pathlib.Path(name) for name in names if '(deleted)' not in name}


@pytest.mark.parametrize(
  ('sent', 'code'),
  [
    (signal.SIGTERM, 75),
    (signal.SIGKILL, -signal.SIGKILL),
  ],
)
def test_a_signal_to_a_streaming_run_leaves_nothing_behind(
  sent, code, digits_dir, tmp_path
):
  flags = flags_of(digits_dir, tmp_path)
  flags += ['--config.data.loader=stream', '--config.data.num_workers=1']
  if sent == signal.SIGKILL:
    # Batches that are large enough for shared memory.
    flags.append('--config.data.image_size=64')
  started = start(flags)
  trainer = started[0].pid
  wait_until(lambda: logged_step(tmp_path) >= 7, started)
  workers, memory = children(trainer), set()
  assert len(workers) == 2  # one is the tracker of multiprocessing
  if sent == signal.SIGKILL:

    def has_memory():
      memory.update(shared_memory(trainer))
      return memory

    wait_until(has_memory, started)
  if sent == signal.SIGKILL:
    started[0].kill()
  else:
    os.killpg(trainer, sent)
  codes, _, errors = finish(started)
  assert codes == [code], errors
  deadline = time.monotonic() + 10
  while any(pathlib.Path(f'/proc/{pid}/maps').exists() for pid in workers):
    assert time.monotonic() < deadline, 'a worker is left'
    time.sleep(0.05)
  assert not [path for path in memory if path.exists()]
  if sent == signal.SIGTERM:
    assert errors == ['']


def test_data_that_are_lost_after_sigterm_do_not_lose_the_state(
  digits_dir, tmp_path, monkeypatch
):
  batches = loader.ResidentLoader.batches

  def lost(data, chunks):
    for number, batch in enumerate(batches(data, chunks)):
      if number == 7:
        signal.raise_signal(signal.SIGTERM)
        raise OSError('stale file handle')
      yield batch

  monkeypatch.setattr(loader.ResidentLoader, 'batches', lost)
  config = small.digits_config(
    digits_dir, train__num_epochs=6, train__log_every_steps=1
  )
  with pytest.raises(preemption.PreemptionError, match='saved step 7 of 30'):
    train.train(config, str(tmp_path))
  saved = checkpoint.verify(str(tmp_path))[-1]
  assert (saved.step, saved.fault) == (7, None)


def test_sigterm_to_one_of_two_stops_both_at_one_step(digits_dir, tmp_path):
  started = start(flags_of(digits_dir, tmp_path), processes=2, devices=2)
  wait_until(lambda: logged_step(tmp_path) >= 7, started)
  began = time.monotonic()
  started[1].send_signal(signal.SIGTERM)
  codes, outputs, errors = finish(started)
  assert codes == [75, 75], errors
  assert time.monotonic() - began < 30
  # Only the main process talks.
  step = int(outputs[0].split('saved step ')[1].split()[0])
  assert 'saved step' not in outputs[1] and 'loss' not in outputs[1]
  found = checkpoint.verify(str(tmp_path))
  assert found[-1].step == step
  assert all(entry.fault is None for entry in found)


def test_a_lost_peer_ends_the_others_in_bounded_time(digits_dir, tmp_path):
  # The loss of process 0, which JAX answers with a stack trace.
  flags = flags_of(digits_dir, tmp_path, epochs=1000)
  started = start(flags, processes=2)
  wait_until(lambda: logged_step(tmp_path) >= 7, started)
  began = time.monotonic()
  started[0].kill()
  codes, _, errors = finish(started)
  assert time.monotonic() - began < 60
  assert codes == [-signal.SIGKILL, 1]
  assert 'stack trace' not in errors[1]
  (line,) = [x for x in errors[1].splitlines() if x.startswith('error: ')]
  # The step's own error may come first where it is known at once.
  assert re.search('process 0 has ended|another process of this run has', line)
  found = checkpoint.verify(str(tmp_path))
  assert found and all(entry.fault is None for entry in found)


# Goes on with the training of a workdir; each process writes down the state it
# begins with, as each of its devices has it.
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


def sigterm_after(step, monkeypatch):
  """This process gets SIGTERM while that step is logged."""
  logged = metrics_log.MetricsLog.logged

  def write_and_signal(log, done, metrics):
    logged(log, done, metrics)
    if done == step:
      signal.raise_signal(signal.SIGTERM)

  monkeypatch.setattr(metrics_log.MetricsLog, 'logged', write_and_signal)


def test_two_processes_go_on_from_eight_devices(
  digits_dir, tmp_path, monkeypatch
):
  ours, theirs = tmp_path / 'ours', tmp_path / 'theirs'
  # The step that other tests have compiled.
  config = small.digits_config(
    digits_dir, train__num_epochs=6, train__log_every_steps=1
  )
  assert jax.device_count() == 8
  with monkeypatch.context() as patch:
    # In the middle of an epoch.
    sigterm_after(21, patch)
    with pytest.raises(preemption.PreemptionError, match='saved step 22 of 30'):
      train.train(config, str(ours))
  saved = final_arrays(ours, 22)
  shutil.copytree(ours, theirs)
  train.train(config, str(theirs))
  command = ['-c', _WITNESSED, f'--workdir={ours}', f'--out={tmp_path}/begin']
  codes, outputs, errors = finish(start(command, processes=2, devices=2))
  assert codes == [0, 0], errors
  assert 'resuming from step 22 of 30' in outputs[0].splitlines()
  # To the bit, on each device.
  named = {
    jax.tree_util.keystr(path, simple=True, separator='/'): x
    for path, x in jax.tree_util.tree_leaves_with_path(saved)
  }
  for i in range(2):
    with np.load(tmp_path / f'begin.{i}.npz') as begin:
      assert set(begin) == set(named)
      for name, array in named.items():
        np.testing.assert_array_equal(begin[name], np.stack([array, array]))
  # Sums over four devices and over eight differ in the last bit: after these
  # eight steps by 0.9e-6 and 1.2e-6 (two seeds) of what the steps changed. One
  # parameter begun 1e-3 off makes it 5e-3.
  before, these, those = (
    np.concatenate([np.ravel(x) for x in jax.tree.leaves(arrays['params'])])
    for arrays in (saved, final_arrays(ours, 30), final_arrays(theirs, 30))
  )
  difference = np.linalg.norm(these - those) / np.linalg.norm(those - before)
  assert difference < 1e-5


# The commands one after the other, so that processes start once.
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
  command = ['-c', _EVALUATIONS, f'--folder={tmp_path}']
  codes, outputs, errors = finish(start(command, processes=2))
  assert codes == [0, 0], errors
  # Only the main process talks.
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
  # A batch and its augmentation do not depend on who has the examples.
  for name in ('finetune_learning_rate', 'finetune_steps', 'num_labels'):
    assert both[name] == one[name]
  for name in ('finetune_top1', 'finetune_held_out_top1'):
    assert both[name] == pytest.approx(one[name], abs=0.01)
  assert both['finetune_top1'] > 0.15
  small.command(
    embed, f'--workdir={digits_run}', f'--out={tmp_path / "one.npz"}'
  )
  with (
    np.load(tmp_path / 'one.npz') as one,
    np.load(tmp_path / 'two.npz') as two,
  ):
    assert {*one} == {*two}
    for name in one:
      assert one[name].dtype == two[name].dtype
      if one[name].dtype == np.float32:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-5)
      else:
        np.testing.assert_array_equal(two[name], one[name])


def test_processes_that_do_not_come_end_the_wait_in_one_line():
  arguments = [
    *('-m', 'clop_jax.evaluate', '--workdir=nowhere'),
    f'--coordinator_address=localhost:{free_port()}',
    *('--num_processes=2', '--process_id=1', '--join_timeout_seconds=1'),
  ]
  process = forked.Process(arguments, environment=small.environment(1))
  codes, outputs, errors = finish([process])
  assert codes == [1] and not outputs[0]
  notice, line = errors[0].splitlines()
  assert notice.startswith('process 1 of 2: waiting for ')
  assert re.search('error: process 1: .*--join_timeout_seconds', line)


def test_what_only_some_processes_are_told_is_refused():
  with pytest.raises(ValueError, match=r'no --coordinator_address.*process_id'):
    parallel.start(num_processes=2)


@contextlib.contextmanager
def mounted(folder, *options):
  result = subprocess.run(
    ['mount', *options, str(folder)], capture_output=True, text=True
  )
  if result.returncode:
    pytest.skip(f'this machine mounts nothing: {result.stderr}')
  try:
    yield
  finally:
    subprocess.run(['umount', '-l', str(folder)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason='only root mounts a small disk')
def test_a_full_disk_is_named(digits_dir, tmp_path):
  workdir = tmp_path / 'run'
  workdir.mkdir()
  flags = flags_of(digits_dir, workdir, epochs=1000)
  flags.append('--config.train.keep_checkpoints=100')
  with mounted(workdir, '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs'):
    codes, _, errors = finish(start(flags), timeout=60)
    assert codes == [1], errors
    (line,) = errors[0].splitlines()
    assert re.search('error: .*No space left on device.*free some space', line)
    # The checkpoints from before are intact.
    found = checkpoint.verify(str(workdir))
    assert found and all(entry.fault is None for entry in found)
