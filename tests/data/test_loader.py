import contextlib
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from clop_jax.data import arrays
from clop_jax.data import images as images_lib
from clop_jax.data import loader
from clop_jax.data import reader as reader_lib
from clop_jax.runtime import parallel
from tests import small

CHUNKS = [range(3), range(3, 4), range(4, 8)]


def make_images(n=50, size=2):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, size=(n, size, size, 1)).astype(np.uint8)


def make_reader(n=50, size=2, **options):
  labels = np.arange(n) % 7 - 1
  source = arrays.Arrays(make_images(n, size), labels)
  return reader_lib.Reader(source, labels, channels=1, **options)


def make_loader(
  devices=8,
  *,
  kind='resident',
  n=50,
  size=2,
  batch_size=16,
  seed=3,
  num_workers=0,
):
  mesh = parallel.make_mesh(jax.devices()[:devices])
  shared = {'batch_size': batch_size, 'seed': seed, 'mesh': mesh}
  reader = make_reader(n, size)
  if kind == 'resident':
    return loader.ResidentLoader(*loader.read_all(reader), **shared)
  return loader.StreamLoader(reader, num_workers=num_workers, **shared)


def take(data, chunks=CHUNKS):
  """Unpacked global batches, `[steps, batch, ...]` each, on the host."""
  with contextlib.closing(data.batches(chunks)) as batches:
    for batch in batches:
      steps = [
        loader.unpack(data.resident, {k: v[i] for k, v in batch.items()})
        for i in range(len(batch['index']))
      ]
      yield jax.tree.map(lambda *x: np.stack(x), *steps)


def test_read_all_keeps_the_order():
  images, labels = loader.read_all(make_reader(n=230))
  np.testing.assert_array_equal(images, make_images(n=230))
  np.testing.assert_array_equal(labels, np.arange(230) % 7 - 1)
  assert labels.dtype == np.int32


def epoch(data, number):
  steps = data.steps_per_epoch
  return np.stack([data.indices(number * steps + i) for i in range(steps)])


def test_example_is_served_at_most_once_per_epoch():
  data, other = make_loader(), make_loader(seed=4)
  orders = [epoch(data, 0), epoch(data, 1), epoch(data, 2), epoch(other, 0)]
  for order in orders:
    assert order.shape == (3, 16)
    assert len(np.unique(order)) == 48
    assert order.min() >= 0
    assert order.max() < 50
    assert (np.diff(order.ravel()) < 0).any()
  assert len({order.tobytes() for order in orders}) == 4
  # Not always the same two are dropped.
  dropped = [set(range(50)) - set(order.ravel()) for order in orders]
  assert any(some != dropped[0] for some in dropped)


def test_batch_depends_on_seed_and_step_alone():
  data = make_loader()
  straight = [data.indices(step) for step in range(12)]
  for step in (11, 0, 7, 4, 8):
    np.testing.assert_array_equal(make_loader().indices(step), straight[step])
    np.testing.assert_array_equal(data.indices(step), straight[step])


@pytest.mark.parametrize('kind', ['resident', 'stream'])
@pytest.mark.parametrize('devices', [1, 2, 8])
def test_batches_are_the_same_on_any_number_of_devices(kind, devices):
  data = make_loader(devices, kind=kind)
  for chunk, batch in zip(CHUNKS, take(data), strict=True):
    index = np.stack([data.indices(step) for step in chunk])
    np.testing.assert_array_equal(batch['index'], index)
    np.testing.assert_array_equal(batch['image'], make_images()[index])
    np.testing.assert_array_equal(batch['label'], index % 7 - 1)
    assert batch['image'].dtype == np.uint8
    assert batch['label'].dtype == batch['index'].dtype == np.int32
  for leaf in data.resident.values():
    assert len(leaf.addressable_shards) == devices
    assert leaf.is_fully_replicated


@pytest.mark.parametrize('kind', ['resident', 'stream'])
def test_structure_matches_the_batches(kind):
  data = make_loader(kind=kind)
  abstract = loader.AbstractLoader(
    50,
    (2, 2, 1),
    batch_size=16,
    mesh=parallel.make_mesh(),
    resident=kind == 'resident',
  )
  assert abstract.structure(2) == data.structure(2)
  assert abstract.resident == jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    data.resident,
  )
  with contextlib.closing(data.batches(CHUNKS)) as batches:
    for chunk, batch in zip(CHUNKS, batches, strict=True):
      structure = data.structure(len(chunk))
      assert structure.keys() == batch.keys()
      for name, expected in structure.items():
        leaf = batch[name]
        assert leaf.shape == expected.shape
        assert leaf.dtype == expected.dtype
        assert leaf.sharding == expected.sharding
        assert leaf.addressable_shards[0].data.shape[:2] == (len(chunk), 2)


# Large batches come through shared memory.
@pytest.mark.parametrize(('num_workers', 'size'), [(0, 2), (2, 128)])
def test_streamed_batches_equal_resident_ones(num_workers, size):
  resident = make_loader(n=64, size=size)
  stream = make_loader(n=64, size=size, kind='stream', num_workers=num_workers)
  # Over more than one epoch of four steps.
  for a, b in zip(take(resident), take(stream), strict=True):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_stream_resumes_at_any_step():
  data = make_loader(kind='stream')
  *_, last = take(data)
  (resumed,) = take(data, [range(4, 8)])
  jax.tree.map(np.testing.assert_array_equal, resumed, last)
  assert not list(take(data, []))


class Failing:
  """Calls functions for some of its examples."""

  labels = np.zeros(40, np.int32)

  def __init__(self):
    self.calls = {}

  def __len__(self):
    return 40

  def __getitem__(self, index):
    self.calls.get(index, int)()
    return {'image': np.zeros((2, 2, 1), np.uint8), 'label': 0}


def take_failing(calls):
  source = Failing()
  reader = reader_lib.Reader(source, source.labels, channels=1)
  source.calls = calls
  data = loader.StreamLoader(
    reader, batch_size=8, seed=0, mesh=parallel.make_mesh(), num_workers=1
  )
  return list(take(data, [range(i, i + 1) for i in range(5)]))


def corrupt():
  raise images_lib.CorruptImageError('train/6.png cannot be decoded')


def stop():
  # Blocked from the start, long before Grain calls a function of ours.
  signals = {signal.SIGTERM, signal.SIGINT}
  assert signals <= signal.pthread_sigmask(signal.SIG_BLOCK, ())
  # Blocked signals wait, and would end the process if it did not ignore them.
  signal.pthread_sigmask(signal.SIG_SETMASK, ())
  for number in signals:
    os.kill(os.getpid(), number)


def kill():
  os.kill(os.getpid(), signal.SIGKILL)


def test_corrupt_image_in_a_worker_is_named():
  with pytest.raises(ValueError, match=r'train/6\.png cannot be decoded'):
    take_failing({6: corrupt})


def test_worker_dies_by_no_signal_but_sigkill():
  order = loader.Order(40, batch_size=8, seed=0)
  calls = {int(order.indices(0)[0]): stop, int(order.indices(4)[-1]): kill}
  with pytest.raises(ChildProcessError, match=r'SIGKILL.*data\.num_workers'):
    take_failing(calls)


def test_in_order_reads_every_image_once():
  read = make_reader()
  batches = list(loader.in_order(read, batch_size=16))
  images, positions = zip(*batches, strict=True)
  assert [len(batch) for batch in images] == [16, 16, 16, 2]
  np.testing.assert_array_equal(np.concatenate(images), make_images())
  np.testing.assert_array_equal(np.concatenate(positions), np.arange(50))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'batch_size': 12}, 'batch_size.*8 devices.*12'),
    ({'batch_size': -8}, 'batch_size.*-8'),
    ({'batch_size': 56}, 'batch_size.*50 examples.*56'),
    ({'num_workers': -2}, 'num_workers.*-2'),
    ({'prefetch': 0}, 'prefetch.*0'),
  ],
)
def test_wrong_numbers_are_named(options, message):
  options = {'batch_size': 8, 'num_workers': 0} | options
  with pytest.raises(ValueError, match=message):
    loader.StreamLoader(
      make_reader(), seed=0, mesh=parallel.make_mesh(), **options
    )


_PROCESS = """
import json, sys
import jax
jax.distributed.initialize(
  f'127.0.0.1:{sys.argv[1]}', 2, int(sys.argv[2]),
  coordinator_bind_address=f'127.0.0.1:{sys.argv[1]}',
)
import numpy as np
from clop_jax.runtime import parallel
from clop_jax.data import arrays, loader, reader

read = []

class Watched(arrays.Arrays):
  def __getitem__(self, index):
    read.append(int(index))
    return super().__getitem__(index)

images = np.arange(64, dtype=np.uint8)[:, None, None, None]
source = Watched(images.repeat(4, 1).repeat(4, 2), np.arange(64) % 5)
reader = reader.Reader(source, source.labels, channels=1)
mesh = parallel.make_mesh()
assert mesh.size == 4 and len(mesh.local_devices) == 2
data = loader.StreamLoader(
  reader, batch_size=16, seed=3, mesh=mesh, num_workers=0
)
read.clear()
seen = []
for batch in data.batches([range(0, 2), range(2, 4)]):
  assert batch['index'].shape == (2, 16)
  for shard, image in zip(
    batch['index'].addressable_shards, batch['image'].addressable_shards
  ):
    np.testing.assert_array_equal(image.data[..., 0, 0, 0], shard.data)
    columns = shard.index[1]
    seen.append([columns.start, np.asarray(shard.data).tolist()])
print(json.dumps([read, seen]))
"""


def test_two_processes_read_disjoint_halves_of_the_batches():
  port = '47381'
  environment = small.environment(devices=2)
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', _PROCESS, port, str(rank)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=environment,
    )
    for rank in range(2)
  ]
  outputs = [process.communicate(timeout=120) for process in processes]
  for process, (_, errors) in zip(processes, outputs, strict=True):
    assert process.returncode == 0, errors
  results = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
  read = [set(indices) for indices, _ in results]
  assert not read[0] & read[1]
  assert read[0] | read[1] == set(range(64))
  assert [len(indices) for indices, _ in results] == [32, 32]
  # Put together they are the batches of one process, row by row.
  one = make_loader(n=64)
  expected = np.stack([one.indices(step) for step in range(4)])
  together = np.full((4, 16), -1)
  for _, seen in results:
    for position, (start, rows) in enumerate(seen):
      first = 2 * (position // 2)
      together[first : first + 2, start : start + 4] = rows
  np.testing.assert_array_equal(together, expected)


@pytest.mark.parametrize('devices', [1, 2])
def test_both_loaders_serve_the_same_chosen_examples(devices):
  chosen = np.array([3, 5, 8, 13, 21, 34, 44, 5])  # one of them twice
  taken = []
  for kind in ('resident', 'stream'):
    data = make_loader(devices, kind=kind)
    some = data.among(chosen, batch_size=4, seed=1)
    assert some.steps_per_epoch == 2
    assert data.steps_per_epoch == 3  # the loader itself is unchanged
    taken.append(list(take(some, [range(2), range(2, 4)])))
    index = taken[-1][0]['index']
    np.testing.assert_array_equal(np.sort(index.ravel()), np.sort(chosen))
    np.testing.assert_array_equal(taken[-1][0]['image'], make_images()[index])
  jax.tree.map(np.testing.assert_array_equal, *taken)
