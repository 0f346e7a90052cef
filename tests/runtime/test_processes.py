"""Real processes over loopback: the same numbers, and nothing lost."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest

from clop_jax import evaluate
from clop_jax import train
from clop_jax.data import loader
from clop_jax.experiment import checkpoint
from clop_jax.experiment import metrics_log
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

# Twenty steps of the real step; only the first quarter of each batch, which is
# all on process 0, is labelled.
_STEPS = """
import sys
from absl import flags
import numpy as np
import sklearn.datasets
from clop_jax import cli, parallel

flags.DEFINE_string('digits_dir', None, '')
flags.DEFINE_string('out', None, '')

def main():
  import jax
  from clop_jax.experiment import build
  from clop_jax.data import loader
  from tests import small
  config = small.digits_config(
    flags.FLAGS.digits_dir,
    train__batch_size=64,
    loss__block_size=32,
    optimizer__name='sgd',
    optimizer__momentum=0.0,
    optimizer__weight_decay=0.0,
    optimizer__warmup_epochs=0.0,
  )
  mesh = parallel.make_mesh()
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
  losses, norms, order = [], [], []
  for i, batch in enumerate(data.batches([range(i, i + 1) for i in range(20)])):
    if mesh.size > len(mesh.local_devices) and i == 0:
      assert not batch['index'].is_fully_addressable
    order.append([
      [s.index[1].start or 0, np.asarray(s.data)[0].tolist()]
      for s in batch['index'].addressable_shards
    ])
    state, metrics = program(state, data.resident, batch, key)
    losses.append(float(metrics['loss']))
    if i == 0:
      one = jax.device_get(state.params)
  # Plain SGD: the first update is the gradient times the rate.
  rate = config.optimizer.learning_rate * 64 / 256
  gradient = jax.tree.map(lambda a, b: (a - b) / rate, begin, one)
  arrays = {'losses': losses, 'order': np.concatenate(
    [np.concatenate([row for _, row in sorted(step)]) for step in order]
  )}
  for name, tree in (('gradient', gradient), ('params', state.params)):
    leaves = jax.tree.leaves(jax.device_get(tree))
    arrays[name] = np.concatenate([np.ravel(x) for x in leaves])
  np.savez(f'{flags.FLAGS.out}.{jax.process_index()}.npz', **arrays)

cli.run(main, lambda: None)
"""


@pytest.fixture(scope='module')
def single_device(digits_dir, tmp_path_factory):
  """What one process with one device computes."""
  out = tmp_path_factory.mktemp('steps') / 'one'
  return run_steps(digits_dir, out, 1, 1)[0]


def run_steps(digits_dir, out, processes, devices):
  arguments = ['-c', _STEPS, f'--digits_dir={digits_dir}', f'--out={out}']
  started = start(arguments, processes=processes, devices=devices)
  codes, _, errors = finish(started)
  assert codes == [0] * processes, errors
  return [dict(np.load(f'{out}.{i}.npz')) for i in range(processes)]


@pytest.mark.parametrize(('processes', 'devices'), [(1, 4), (2, 2), (4, 1)])
def test_processes_and_devices_do_not_change_the_numbers(
  processes, devices, single_device, digits_dir, tmp_path
):
  results = run_steps(digits_dir, tmp_path / 'out', processes, devices)
  for result in results:
    for name in ('losses', 'gradient', 'params'):
      scale = abs(single_device[name]).max()
      np.testing.assert_allclose(
        result[name], single_device[name], rtol=1e-4, atol=1e-4 * scale
      )
  # It trains, so equal numbers are not those of nothing happening.
  losses = single_device['losses']
  assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1
  # Row by row the processes have the batches of one device.
  rows = [result['order'].reshape(20, -1) for result in results]
  together = np.concatenate(rows, axis=1)
  np.testing.assert_array_equal(
    together, single_device['order'].reshape(20, -1)
  )


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
    restored, fault = checkpoints._read(
      step,
      checkpoint.ocp.args.StandardRestore(fallback_sharding=checkpoint._here()),
    )
  assert fault is None
  return jax.tree.map(np.asarray, restored['state'])


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


@pytest.fixture(scope='module')
def unbroken_pair(digits_dir, tmp_path_factory):
  """Two processes of two devices, never stopped: 30 steps."""
  workdir = tmp_path_factory.mktemp('runs') / 'pair'
  started = start(flags_of(digits_dir, workdir), processes=2, devices=2)
  codes, outputs, errors = finish(started)
  assert codes == [0, 0], errors
  # Only one of them talks.
  assert 'step 30/30: loss' in outputs[0]
  assert 'step' not in outputs[1]
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


def test_five_kills_cost_nothing_but_time(digits_dir, unbroken, tmp_path):
  flags, done = flags_of(digits_dir, tmp_path), 0
  for i in range(5):
    started = start(flags)
    # Every other one while a checkpoint is being written, and those between a
    # few steps further than the last.
    if i % 2:
      kill_when(lambda: is_saving(tmp_path), started[0])
    else:
      target = done + 2 + i % 3
      kill_when(
        lambda target=target: (
          logged_step(tmp_path) >= target and not is_saving(tmp_path)
        ),
        started[0],
      )
    codes, _, errors = finish(started)
    assert codes == [-signal.SIGKILL], errors
    done = logged_step(tmp_path)
  codes, _, errors = finish(start(flags))
  assert codes == [0], errors
  assert_same_end(tmp_path, unbroken, 30)


def test_sigterm_saves_and_the_same_command_goes_on(
  digits_dir, unbroken, tmp_path
):
  flags = flags_of(digits_dir, tmp_path)
  started = start(flags)
  # In the middle of an epoch, where no checkpoint is due.
  wait_until(lambda: logged_step(tmp_path) >= 7, started)
  started[0].send_signal(signal.SIGTERM)
  codes, outputs, errors = finish(started)
  assert codes == [75], errors
  assert not errors[0]
  last = outputs[0].splitlines()[-1]
  step = int(last.split('saved step ')[1].split()[0])
  assert last.endswith('rerun the same command to resume')
  saved = checkpoint.verify(str(tmp_path))[-1]
  assert (saved.step, saved.fault) == (step, None) and step < 30
  codes, outputs, errors = finish(start(flags))
  assert codes == [0], errors
  assert f'going on from step {step} of 30' in outputs[0]
  assert_same_end(tmp_path, unbroken, 30)


def test_a_second_sigterm_ends_at_once_without_harm(
  digits_dir, unbroken, tmp_path
):
  flags = flags_of(digits_dir, tmp_path)
  started = start(flags)
  wait_until(lambda: logged_step(tmp_path) >= 7, started)
  started[0].send_signal(signal.SIGTERM)
  began = time.monotonic()
  while started[0].poll() is None and time.monotonic() - began < 20:
    started[0].send_signal(signal.SIGTERM)
    time.sleep(0.001)
  codes, _, errors = finish(started)
  assert codes == [75], errors
  assert time.monotonic() - began < 10
  # Whatever was being written, what is there is whole.
  assert all(found.fault is None for found in checkpoint.verify(str(tmp_path)))
  codes, _, errors = finish(start(flags))
  assert codes == [0], errors
  assert_same_end(tmp_path, unbroken, 30)


def test_sigterm_before_the_first_step_leaves_a_run_to_begin(
  digits_dir, tmp_path
):
  started = start(flags_of(digits_dir, tmp_path))
  # Compiling, most of the time.
  wait_until((tmp_path / 'labels.npz').exists, started)
  started[0].send_signal(signal.SIGTERM)
  codes, _, errors = finish(started)
  assert codes == [75] and errors == ['']
  assert not checkpoint.verify(str(tmp_path)) and not logged_step(tmp_path)


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
    (signal.SIGINT, 130),
    (signal.SIGKILL, -signal.SIGKILL),
  ],
)
def test_a_signal_to_a_streaming_run_leaves_nothing_behind(
  sent, code, digits_dir, unbroken, tmp_path
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
  if sent == signal.SIGINT:
    assert errors == ['error: interrupted\n']
  if sent == signal.SIGTERM:
    assert errors == ['']
    codes, _, errors = finish(start(flags))
    assert codes == [0], errors
    assert_same_end(tmp_path, unbroken, 30)


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


def test_sigterm_to_one_of_two_stops_both_which_go_on_together(
  digits_dir, unbroken_pair, tmp_path
):
  flags = flags_of(digits_dir, tmp_path)
  started = start(flags, processes=2, devices=2)
  wait_until(lambda: logged_step(tmp_path) >= 7, started)
  began = time.monotonic()
  started[1].send_signal(signal.SIGTERM)
  codes, outputs, errors = finish(started)
  assert codes == [75, 75], errors
  assert time.monotonic() - began < 30
  assert 'saved step' in outputs[0] and not outputs[1].strip().endswith('there')
  codes, _, errors = finish(start(flags, processes=2, devices=2))
  assert codes == [0, 0], errors
  assert_same_end(tmp_path, unbroken_pair, 30)


@pytest.mark.parametrize(
  ('lost', 'number', 'message'),
  [
    (0, signal.SIGKILL, 'process 0 has ended'),
    (1, signal.SIGKILL, 'process 1 has ended'),
    (1, signal.SIGSTOP, 'process 1 has given no sign for 20 s'),
  ],
)
def test_a_lost_peer_ends_the_others_in_bounded_time(
  lost, number, message, digits_dir, tmp_path
):
  flags = flags_of(digits_dir, tmp_path, epochs=1000)
  # A busy machine can keep a process from giving signs.
  peer_timeout = 20 if number == signal.SIGSTOP else 60
  started = start(flags, processes=2, peer_timeout=peer_timeout)
  wait_until(lambda: logged_step(tmp_path) >= 7, started)
  began = time.monotonic()
  started[lost].send_signal(number)
  survivor = 1 - lost
  started[survivor].wait()
  seconds = time.monotonic() - began
  started[lost].kill()
  codes, _, errors = finish(started)
  assert seconds < peer_timeout + 20
  assert codes[survivor] == 1
  assert 'stack trace' not in errors[survivor]
  lines = [x for x in errors[survivor].splitlines() if x.startswith('error: ')]
  (line,) = lines
  assert line.startswith(f'error: process {survivor}: ')
  # The step's own error may come first where it is known at once.
  assert message in line or 'another process of this run has ended' in line
  # What was saved before is whole.
  found = checkpoint.verify(str(tmp_path))
  assert found and all(entry.fault is None for entry in found)


# Goes on with the training of a workdir; each process writes down the state it
# begins with, as each of its devices has it.
_WITNESSED = """
from absl import flags
from clop_jax import cli, train, workdir

flags.DEFINE_string('workdir', None, '')
flags.DEFINE_string('out', None, '')

def main():
  import jax
  import numpy as np
  run = train._run

  def witnessed(program, state, *arguments, **keywords):
    arrays = {
      jax.tree_util.keystr(path, simple=True, separator='/'):
        np.stack([shard.data for shard in x.addressable_shards])
      for path, x in jax.tree_util.tree_leaves_with_path(state)
    }
    np.savez(f'{flags.FLAGS.out}.{jax.process_index()}.npz', **arrays)
    run(program, state, *arguments, **keywords)

  train._run = witnessed
  folder = flags.FLAGS.workdir
  train.train(workdir.load_config(folder), folder)

cli.run(main, lambda: None)
"""


def sigterm_after(step, monkeypatch):
  """This process gets SIGTERM while that step is logged."""
  write = metrics_log.MetricsLog.write

  def write_and_signal(log, done, metrics):
    write(log, done, metrics)
    if done == step:
      signal.raise_signal(signal.SIGTERM)

  monkeypatch.setattr(metrics_log.MetricsLog, 'write', write_and_signal)


def test_two_processes_go_on_from_eight_devices_and_one_evaluates_them(
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
  assert 'going on from step 22 of 30' in outputs[0].splitlines()
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
  one = jax.devices()[:1]
  request = evaluate.Request(str(ours), devices=one)
  result = evaluate.evaluate(request).complete
  assert result['step'] == 30 and result['knn_top1'] > 0.5
  # And two processes evaluate together, with the same figures.
  command = ['-m', 'clop_jax.evaluate', f'--workdir={ours}']
  codes, outputs, errors = finish(start(command, processes=2))
  assert codes == [0, 0], errors
  together = json.loads((ours / 'eval.json').read_text())
  assert together['knn_top1'] == pytest.approx(result['knn_top1'], abs=0.01)
  assert together['parameters_sha256'] == result['parameters_sha256']
  assert 'linear top-1' in outputs[0] and 'linear top-1' not in outputs[1]


def test_two_processes_embed_what_one_does(digits_run, tmp_path):
  found = {}
  for processes in (1, 2):
    path = tmp_path / f'{processes}.npz'
    command = ['-m', 'clop_jax.embed', f'--workdir={digits_run}']
    started = start(
      [*command, f'--out={path}'], processes=processes, devices=2 // processes
    )
    codes, outputs, errors = finish(started)
    assert codes == [0] * processes, errors
    assert f'{path}: 359 images in ' in outputs[0]
    assert not any('images in' in output for output in outputs[1:])
    with np.load(path) as file:
      found[processes] = dict(file)
  assert os.listdir(tmp_path) == ['1.npz', '2.npz']
  assert found[1].keys() == found[2].keys()
  for name, one in found[1].items():
    both = found[2][name]
    assert one.dtype == both.dtype and one.shape == both.shape
    if one.dtype == np.float32:
      np.testing.assert_allclose(both, one, rtol=1e-4, atol=1e-5)
    else:
      np.testing.assert_array_equal(both, one)


def test_two_processes_fine_tune_as_one_does(digits_run, tmp_path):
  workdir = shutil.copytree(digits_run, tmp_path / 'run')
  shutil.rmtree(workdir / 'evaluations', ignore_errors=True)
  command = ['-m', 'clop_jax.evaluate', f'--workdir={workdir}']
  options = ['--mode=finetune', '--label_fraction=0.5']
  overrides = {'eval.finetune_epochs': 1, 'eval.finetune_min_steps': 12}
  options += [f'--config.{name}={value}' for name, value in overrides.items()]
  started = start([*command, *options], processes=2, devices=1)
  codes, outputs, errors = finish(started)
  assert codes == [0, 0], errors
  assert '| run | 10   | digits |' in outputs[0]
  assert '| run |' not in outputs[1]
  (line,) = errors[1].splitlines()
  assert line.startswith('process 1 of 2: waiting for process 0 at 127.0.0.1:')
  (path,) = (workdir / 'evaluations').iterdir()
  both = json.loads(path.read_text())
  assert both['device'].startswith('2 x ')
  request = evaluate.Request(
    str(workdir),
    modes=('finetune',),
    fractions=(0.5,),
    overrides=overrides,
    devices=jax.devices()[:2],
  )
  (one,) = evaluate.evaluate(request).measurements
  # A batch and its augmentation do not depend on who has the examples.
  for name in ('finetune_learning_rate', 'finetune_steps', 'num_labels'):
    assert both[name] == one[name]
  assert both['parameters_sha256'] == one['parameters_sha256']
  for name in ('finetune_top1', 'finetune_held_out_top1'):
    assert both[name] == pytest.approx(one[name], abs=0.01)
  assert both['finetune_top1'] > 0.15


def test_the_second_run_in_a_workdir_is_refused(digits_dir, tmp_path):
  flags = flags_of(digits_dir, tmp_path, epochs=1000)
  first = start(flags)
  wait_until(lambda: logged_step(tmp_path) >= 1, first)
  codes, _, errors = finish(start(flags))
  assert codes == [1]
  (line,) = errors[0].splitlines()
  assert f'--workdir={tmp_path} is in use by another run (process ' in line
  assert f'process {first[0].pid} on ' in line
  assert first[0].poll() is None
  first[0].kill()
  finish(first)
  # A dead run's claim is free.
  again = start(flags)
  wait_until(lambda: logged_step(tmp_path) >= 6, again)
  again[0].kill()
  finish(again)


@pytest.mark.parametrize('process_id', [0, 1])
def test_processes_that_do_not_come_end_the_wait_in_one_line(process_id):
  flags = [
    *('-m', 'clop_jax.evaluate', '--workdir=nowhere'),
    f'--coordinator_address=localhost:{free_port()}',
    *('--num_processes=2', f'--process_id={process_id}'),
    '--join_timeout_seconds=1',
  ]
  process = forked.Process(flags, environment=small.environment(1))
  codes, outputs, errors = finish([process])
  assert codes == [1] and not outputs[0]
  notice, line = errors[0].splitlines()
  assert notice.startswith(f'process {process_id} of 2: waiting for ')
  assert line.startswith(f'error: process {process_id}: ')
  assert '--join_timeout_seconds' in line


def test_what_only_some_processes_are_told_is_refused(digits_dir, tmp_path):
  flags = [*flags_of(digits_dir, tmp_path), '--num_processes=2']
  codes, _, errors = finish(start(flags))
  assert codes == [1]
  (line,) = errors[0].splitlines()
  assert 'got no --coordinator_address and no --process_id; give all' in line


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


def assert_save_failed(started, reason, advice, workdir):
  """It ends with a line, and the checkpoints from before are whole."""
  codes, _, errors = finish(started, timeout=60)
  assert codes == [1], errors
  lines = errors[0].splitlines()
  assert len(lines) == 1, errors[0][:3000]
  assert lines[0].startswith('error: ') and reason in lines[0]
  assert lines[0].endswith(f'{advice} and run the same command again')
  found = checkpoint.verify(str(workdir))
  assert found and all(entry.fault is None for entry in found)


@pytest.mark.skipif(os.geteuid() != 0, reason='only root mounts a small disk')
def test_a_full_disk_is_named(digits_dir, tmp_path):
  workdir = tmp_path / 'run'
  workdir.mkdir()
  flags = flags_of(digits_dir, workdir, epochs=1000)
  flags.append('--config.train.keep_checkpoints=100')
  with mounted(workdir, '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs'):
    assert_save_failed(
      start(flags), 'No space left on device', 'free some space', workdir
    )


@pytest.mark.skipif(os.geteuid() != 0, reason='only root mounts a folder')
def test_checkpoints_that_turn_read_only_are_named(digits_dir, tmp_path):
  started = start(flags_of(digits_dir, tmp_path, epochs=1000))
  wait_until(lambda: logged_step(tmp_path) >= 7, started)
  folder = tmp_path / 'checkpoints'
  with mounted(folder, '--bind', '-o', 'ro', str(folder)):
    assert_save_failed(
      started, 'Read-only file system', 'make the folder writable', tmp_path
    )


# --- what one process has read ----------------------------------------------

_FROM_MAIN = """
import numpy as np
from clop_jax import cli, parallel

def main():
  import jax
  read = {'kernel': np.full(3, 1.5 + jax.process_index(), np.float32)}
  placed = parallel.replicate(parallel.make_mesh(), parallel.from_main(read))
  for shard in placed['kernel'].addressable_shards:
    print(np.asarray(shard.data).tolist())

cli.run(main, lambda: None)
"""


def test_every_process_starts_from_what_the_main_one_has_read():
  codes, outputs, errors = finish(
    start(['-c', _FROM_MAIN], processes=2, devices=2)
  )
  assert codes == [0, 0], errors
  for output in outputs:
    # Among what Gloo says.
    lines = [line for line in output.splitlines() if line.startswith('[1.5')]
    assert lines == ['[1.5, 1.5, 1.5]'] * 2, output
