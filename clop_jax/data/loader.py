"""Batches: from a set that stays on the device, or streamed with Grain.

Both loaders have the same attributes and methods and, for one seed, the same
batches. The order of the data is a pure function of (seed, step): it knows
nothing of devices, processes or what ran before, so a run that resumes at any
step sees what an unbroken one would have seen.
"""

import collections
from collections.abc import Generator, Iterable
from concurrent import futures
import contextlib
import copy
import gc
import multiprocessing
from multiprocessing import resource_tracker
import os
import re
import signal
import sys
import threading
from typing import Protocol

import jax
from jax.sharding import Mesh
import numpy as np
import tqdm

from clop_jax.data import reader as reader_lib
from clop_jax.runtime import parallel

_LEAST_SHARED = 1 << 16  # bytes
_FEW_EXAMPLES = 2000  # read in less time than a bar takes to be looked at


class Loader(Protocol):
  """What training takes its batches from.

  Attributes:
    resident: what stays on the devices, the first argument of `unpack`.
    steps_per_epoch: full batches in an epoch; what is left over of one epoch's
      order is left out.
  """

  resident: dict
  steps_per_epoch: int

  def indices(self, step: int) -> np.ndarray:
    """The examples of the global batch of step `step` (from 0), in order."""

  def batches(self, chunks: Iterable[range]) -> Generator[dict, None, None]:
    """For each range of steps its global batches, `[steps, batch, ...]`.

    The ranges follow one another without a gap. Batches are split over the
    devices along their second axis.
    """

  def structure(self, steps: int) -> dict:
    """Shapes, dtypes and shardings of what `batches` gives for so many."""


class Order:
  """Which examples make the batch of a step.

  Attributes:
    steps_per_epoch: full batches in an epoch.
    batch_size: examples in the global batch.
  """

  def __init__(
    self,
    num_examples: int,
    *,
    batch_size: int,
    seed: int,
    chosen: np.ndarray | None = None,
  ):
    """Shuffles each epoch anew.

    Args:
      num_examples: of the data, or as many as are chosen.
      batch_size: at most as many.
      seed: of the order.
      chosen: `[num_examples]` numbers of the examples; None: all there are.

    Raises:
      ValueError: if the batch is larger than the data.
    """
    if batch_size > num_examples:
      raise ValueError(
        f'batch_size must be at most the {num_examples} examples, got '
        f'{batch_size}'
      )
    self.batch_size = batch_size
    self.steps_per_epoch = num_examples // batch_size
    self._num_examples, self._seed = num_examples, seed
    self._chosen = None if chosen is None else np.asarray(chosen, np.int32)
    # Steps come in order, so the same epoch is asked for many times; two of
    # them, because reading ahead crosses into the next one.
    self._epochs = collections.OrderedDict()

  def __getstate__(self):
    return self.__dict__ | {'_epochs': collections.OrderedDict()}

  def _epoch(self, epoch):
    order = self._epochs.get(epoch)
    if order is None:
      rng = np.random.default_rng([self._seed, epoch])
      order = rng.permutation(self._num_examples).astype(np.int32)
      if self._chosen is not None:
        order = self._chosen[order]
      self._epochs[epoch] = order
      while len(self._epochs) > 2:
        self._epochs.popitem(last=False)
    return order

  def indices(self, step: int) -> np.ndarray:
    """The global batch of step `step` (from 0): `[batch_size]` numbers."""
    epoch, position = divmod(step, self.steps_per_epoch)
    start = position * self.batch_size
    return self._epoch(epoch)[start : start + self.batch_size]


def read_all(reader: reader_lib.Reader) -> tuple[np.ndarray, np.ndarray]:
  """Reads everything, with a progress bar where a person looks on.

  Returns:
    `(images [n, height, width, channels] uint8, labels [n] int32)`.
  """
  images = np.empty((len(reader), *reader.shape), np.uint8)
  labels = np.empty(len(reader), np.int32)
  bar = tqdm.tqdm(
    total=len(reader),
    desc='reading images',
    disable=not sys.stderr.isatty() or len(reader) < _FEW_EXAMPLES,
  )
  # Pillow decodes without holding the interpreter's lock, so threads will do.
  with bar, futures.ThreadPoolExecutor() as pool:
    for start in range(0, len(reader), _FEW_EXAMPLES):
      indices = range(start, min(start + _FEW_EXAMPLES, len(reader)))
      examples = pool.map(lambda index: reader.example(0, index), indices)
      for index, example in zip(indices, examples, strict=True):
        images[index], labels[index] = example['image'], example['label']
      bar.update(len(indices))
  return images, labels


class ResidentLoader:
  """Keeps the whole set on every device as uint8; a batch is a gather in jit.

  A step calls `unpack(loader.resident, batch)` inside jit: what crosses to the
  device is a row of numbers. See `Loader`.
  """

  def __init__(
    self,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    batch_size: int | None,
    seed: int,
    mesh: Mesh,
  ):
    """Puts the set on the devices.

    Args:
      images: `[n, height, width, channels]` uint8.
      labels: `[n]` int32, -1 is unlabelled.
      batch_size: global batch size, a multiple of the devices, at most `n`.
        None: batches are asked for by `among` alone.
      seed: of the order.
      mesh: see `parallel.make_mesh`.

    Raises:
      ValueError: if the batch does not fit the devices or the data.
    """
    self._order = _order(len(images), batch_size, seed, mesh)
    self._mesh = mesh
    self.steps_per_epoch = self._order.steps_per_epoch
    self.indices = self._order.indices
    self.resident = parallel.replicate(
      mesh, {'image': images, 'label': labels.astype(np.int32)}
    )

  def among(
    self, chosen: np.ndarray, *, batch_size: int, seed: int
  ) -> 'ResidentLoader':
    """Serves some of the examples only; the set stays where it is.

    Args:
      chosen: their numbers.
      batch_size: as of the loader, at most as many as are chosen.
      seed: of the order.
    """
    return _among(self, chosen, batch_size, seed)

  def batches(self, chunks: Iterable[range]) -> Generator[dict, None, None]:
    """See `Loader.batches`."""
    for chunk in chunks:
      index = np.stack([self.indices(step) for step in chunk])
      yield parallel.shard(self._mesh, {'index': index}, axis=1)

  def structure(self, steps: int) -> dict:
    """See `Loader.structure`."""
    return _structure(self._mesh, steps, self._order.batch_size)


class StreamLoader:
  """Reads batches while the devices work, by Grain's worker processes.

  Each process reads its own devices' rows of the batch and no others. See
  `Loader`.
  """

  def __init__(
    self,
    reader: reader_lib.Reader,
    *,
    batch_size: int | None,
    seed: int,
    mesh: Mesh,
    num_workers: int,
    prefetch: int = 2,
  ):
    """Reads nothing yet.

    Args:
      reader: what to read with; it is copied to the workers.
      batch_size: global batch size, a multiple of the devices, at most the
        number of examples. None: batches are asked for by `among` alone.
      seed: of the order.
      mesh: see `parallel.make_mesh`.
      num_workers: worker processes; 0 reads with threads of this process. A
        script that uses workers must start under `if __name__ == '__main__':`.
      prefetch: batches that each worker, and the device, hold ready.

    Raises:
      ValueError: if the batch does not fit the devices or the data, or the
        other numbers are negative.
    """
    if num_workers < 0:
      raise ValueError(
        'config.data.num_workers must be at least 0, or -1 for one per core, '
        f'got {num_workers}'
      )
    if prefetch < 1:
      raise ValueError(
        f'config.data.prefetch must be at least 1, got {prefetch}'
      )
    self._reader, self._mesh = reader, mesh
    self._num_workers, self._prefetch = num_workers, prefetch
    self._order = _order(len(reader), batch_size, seed, mesh)
    self._rows = np.arange(0)
    if batch_size is not None:
      self._rows = parallel.local_rows(mesh, batch_size)
    self.steps_per_epoch = self._order.steps_per_epoch
    self.indices = self._order.indices
    self.resident = {}

  def among(
    self, chosen: np.ndarray, *, batch_size: int, seed: int
  ) -> 'StreamLoader':
    """See `ResidentLoader.among`: the same batches, of the same numbers."""
    other = _among(self, chosen, batch_size, seed)
    other._rows = parallel.local_rows(self._mesh, batch_size)
    return other

  def batches(self, chunks: Iterable[range]) -> Generator[dict, None, None]:
    """See `Loader.batches`."""
    chunks = list(chunks)
    if not chunks:
      return
    start, stop = chunks[0].start, chunks[-1].stop
    examples = _Examples(self._reader, self._order, self._rows, start, stop)
    host = _grain_batches(
      examples, len(self._rows), self._num_workers, self._prefetch
    )
    ready = collections.deque()
    try:
      for chunk in chunks:
        batch = _stacked([next(host) for _ in chunk])
        # The transfer is asynchronous: it runs while the devices compute.
        ready.append(parallel.shard_local(self._mesh, batch, axis=1))
        if len(ready) > self._prefetch:
          yield ready.popleft()
      while ready:
        yield ready.popleft()
    finally:
      host.close()

  def structure(self, steps: int) -> dict:
    """See `Loader.structure`."""
    size = self._order.batch_size
    return _structure(self._mesh, steps, size, self._reader.shape)


class AbstractLoader:
  """The shapes of a loader's data, for lowering a step without data.

  Attributes:
    resident: Shapes, dtypes and shardings of `Loader.resident`.
    steps_per_epoch: Full batches in an epoch.
  """

  def __init__(
    self,
    num_examples: int,
    shape: tuple[int, ...],
    *,
    batch_size: int,
    mesh: Mesh,
    resident: bool,
  ):
    """Allocates nothing.

    Args:
      num_examples: Number of training images.
      shape: Shape of one image, see `reader.Reader`.
      batch_size: Global batch size, a multiple of the devices, at most
        `num_examples`.
      mesh: Mesh of the devices, which need not be attached to this process.
      resident: True for the shapes of `ResidentLoader`, False for those of
        `StreamLoader`.

    Raises:
      ValueError: If the batch does not fit the devices or the data.
    """
    order = _order(num_examples, batch_size, 0, mesh)
    self.steps_per_epoch = order.steps_per_epoch
    self.resident = {}
    self._mesh, self._batch_size = mesh, batch_size
    self._shape = None if resident else shape
    if resident:
      sharding = parallel.replicated(mesh)
      self.resident = {
        'image': jax.ShapeDtypeStruct(
          (num_examples, *shape), np.uint8, sharding=sharding
        ),
        'label': jax.ShapeDtypeStruct(
          (num_examples,), np.int32, sharding=sharding
        ),
      }

  def structure(self, steps: int) -> dict:
    """See `Loader.structure`."""
    return _structure(self._mesh, steps, self._batch_size, self._shape)


def _structure(mesh, steps, batch_size, image_shape=None):
  """Shapes of `Loader.batches`; without an image shape, of indices."""
  types = {'index': ((), np.int32)}
  if image_shape is not None:
    types |= {'image': (image_shape, np.uint8), 'label': ((), np.int32)}
  sharding = parallel.split(mesh, axis=1)
  return {
    name: jax.ShapeDtypeStruct(
      (steps, batch_size, *shape), dtype, sharding=sharding
    )
    for name, (shape, dtype) in types.items()
  }


def _order(num_examples, batch_size, seed, mesh):
  if batch_size is None:
    return Order(num_examples, batch_size=1, seed=seed)
  parallel.check_batch_size(batch_size, mesh)
  return Order(num_examples, batch_size=batch_size, seed=seed)


def _among(data, chosen, batch_size, seed):
  """A copy of a loader that serves the chosen examples."""
  parallel.check_batch_size(batch_size, data._mesh)
  other = copy.copy(data)
  other._order = Order(
    len(chosen), batch_size=batch_size, seed=seed, chosen=chosen
  )
  other.steps_per_epoch = other._order.steps_per_epoch
  other.indices = other._order.indices
  return other


def _stacked(steps):
  """A leading axis over the steps; a copy of what may be shared memory."""
  return {name: np.stack([step[name] for step in steps]) for name in steps[0]}


class _Examples:
  """This process's examples of steps `start` to `stop`, one after the other."""

  def __init__(self, reader, order, rows, start, stop):
    self._reader, self._order, self._rows = reader, order, rows
    self._start, self._stop = start, stop

  def __len__(self):
    return (self._stop - self._start) * len(self._rows)

  def __getitem__(self, position):
    step, row = divmod(position, len(self._rows))
    step += self._start
    index = self._order.indices(step)[self._rows[row]]
    return self._reader.example(step, int(index))


def in_order(
  reader: reader_lib.Reader, *, batch_size: int, num_workers: int = 0
) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
  """Reads all examples once, in order.

  Yields:
    `(images, positions)`, `[batch_size or less, height, width, channels]` uint8
    and `[batch_size or less]` int32, the positions of the images in the source.
    A corrupt image that the reader skips is left out.
  """
  start = 0
  for batch in _grain_batches(
    _Straight(reader), batch_size, num_workers, prefetch=2
  ):
    # Positions are kept, and must not keep a worker's shared memory.
    images, positions = batch['image'], np.array(batch['position'])
    own = positions == np.arange(start, start + len(positions))
    start += len(positions)
    if own.all():
      yield images, positions
    elif own.any():
      yield images[own], positions[own]


class _Straight:
  """The examples of a reader as a sequence."""

  def __init__(self, reader):
    self._reader = reader

  def __len__(self):
    return len(self._reader)

  def __getitem__(self, index):
    image, position = self._reader.read(index)
    return {'image': image, 'position': np.int32(position)}


def _grain_batches(examples, batch_size, num_workers, prefetch):
  """Batches of a sequence of examples, as dictionaries of arrays."""
  # Takes two seconds, which only those who stream should pay.
  from absl import flags
  import grain

  if not flags.FLAGS.is_parsed():
    # Grain reads its flags also where no command has parsed any.
    flags.FLAGS.mark_as_parsed()
  dataset = grain.MapDataset.source(examples).batch(batch_size)
  threads = grain.ReadOptions(
    # With workers each batch is one process's work.
    num_threads=0 if num_workers else prefetch,
    prefetch_buffer_size=0 if num_workers else prefetch,
  )
  iterator = dataset.to_iter_dataset(threads)
  if num_workers:
    options = grain.MultiprocessingOptions(
      num_workers=num_workers, per_worker_buffer_size=prefetch
    )
    # A page of shared memory for each small array costs more than its copy, and
    # Grain sometimes gives one back only when the process ends, with a warning.
    small = grain.experimental.DatasetOptions(min_shm_size=_LEAST_SHARED)
    iterator = grain.experimental.WithOptionsIterDataset(iterator, small)
    iterator = iterator.mp_prefetch(options, worker_init_fn=_begin_worker)
  iterator = iter(iterator)
  try:
    with _signals_blocked():
      # This starts the workers.
      first = next(iterator, None)
    if first is not None:
      yield first
    del first  # it is shared memory
    yield from iterator
  except RuntimeError as error:
    death = _death_of_worker(error)
    if death is None:
      raise
    raise death from error
  finally:
    iterator.close()
    if num_workers:
      # The iterator is a cycle of references and holds the workers' last
      # batches, in shared memory that somebody has to give back.
      del iterator
      gc.collect()


@contextlib.contextmanager
def _signals_blocked():
  """Processes and threads that are started here get no SIGTERM and no SIGINT.

  A new process inherits the blocked signals of the thread that starts it, long
  before it can run `_begin_worker`.
  """
  # Otherwise the first worker starts it, and it unblocks both signals.
  resource_tracker.ensure_running()
  before = signal.pthread_sigmask(
    signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT)
  )
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(index, count):
  """Makes a worker end when the main process does, and at no other time."""
  del index, count
  # Schedulers and terminals send these to all processes at the same time, and
  # the main one needs its data to save, or ends the workers itself.
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
  parent = multiprocessing.parent_process()
  if parent is None:
    return  # called outside of a worker
  parent.join()
  # The tracker of multiprocessing then frees what memory is still shared.
  os._exit(1)


def _death_of_worker(error):
  """Describes the end of a worker that Grain reports; None: another error."""
  code = re.search(r'Worker process was .* exit code (-?\d+)', str(error))
  if code is None:
    return None
  number = int(code[1])
  how = f'ended with exit code {number}; see its messages above'
  if number == -signal.SIGKILL:
    how = (
      'was killed (SIGKILL), most often because memory has run out: lower '
      'config.data.num_workers or config.data.prefetch, or use more memory, '
      'and run the same command again'
    )
  elif number < 0:
    how = f'was ended by signal {-number} ({signal.strsignal(-number)})'
  return ChildProcessError(f'a worker process that reads images {how}')


def unpack(
  resident: dict[str, jax.Array], batch: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """A shard's examples; call it inside jit.

  Args:
    resident: `Loader.resident`.
    batch: a shard of one step of `Loader.batches`.

  Returns:
    `{'image', 'label', 'index'}`, each with a leading `[batch]`.
  """
  if 'image' in batch:
    return batch
  index = batch['index']
  return {
    'image': resident['image'][index],
    'label': resident['label'][index],
    'index': index,
  }
