"""Batches of a data set that stays on the devices, or is streamed with Grain.

The two loaders have the same methods and, for one seed, serve the same batches.
The order of the examples is a pure function of (seed, step). It does not depend
on devices or processes, so a run that resumes at any step sees the batches of
an uninterrupted run.
"""

import collections
from collections.abc import Generator, Iterable
from concurrent import futures
import copy
import functools
import gc
import multiprocessing
from multiprocessing import resource_tracker
import os
import re
import signal
import sys
import threading

import jax
from jax.sharding import Mesh
import numpy as np
import tqdm

from clop_jax.data import reader as reader_lib
from clop_jax.runtime import parallel

_MIN_SHARED_BYTES = 1 << 16
_PART = 100  # examples that a thread reads at a time


class Order:
  """The examples of each batch; every epoch is shuffled anew.

  Attributes:
    steps_per_epoch: Number of full batches in an epoch. An incomplete last
      batch is dropped.
    batch_size: Number of examples in the global batch.
  """

  def __init__(
    self,
    num_examples: int,
    *,
    batch_size: int,
    seed: int,
    chosen: np.ndarray | None = None,
  ):
    """Orders `num_examples` examples, or those with the indices `chosen`.

    Raises:
      ValueError: If there are fewer examples than a batch needs.
    """
    if batch_size > num_examples:
      raise ValueError(
        f'batch_size must be at most the {num_examples} examples, got '
        f'{batch_size}'
      )
    self.batch_size = batch_size
    self.steps_per_epoch = num_examples // batch_size
    self._num_examples, self._seed, self._chosen = num_examples, seed, chosen

  def indices(self, step: int) -> np.ndarray:
    """Returns the indices `[batch_size]` int32 of the batch of a step."""
    epoch, position = divmod(step, self.steps_per_epoch)
    start = position * self.batch_size
    order = _permutation(self._seed, epoch, self._num_examples)
    batch = order[start : start + self.batch_size]
    if self._chosen is not None:
      batch = np.asarray(self._chosen, np.int32)[batch]
    return batch


# Two epochs, because reading ahead crosses into the next one.
@functools.lru_cache(maxsize=2)
def _permutation(seed, epoch, size):
  rng = np.random.default_rng([seed, epoch])
  return rng.permutation(size).astype(np.int32)


class Loader:
  """Base of the loaders: batches of shuffled examples, split over the devices.

  The global batch size must be a multiple of the devices and at most the number
  of examples, otherwise the loaders raise a ValueError. It may be None if only
  `among` is used.

  Attributes:
    resident: Arrays that stay on the devices, the first argument of `unpack`.
    steps_per_epoch: Number of full batches in an epoch.
  """

  _image_shape: tuple[int, ...] | None = None  # None if batches are indices

  def __init__(
    self, num_examples: int, *, batch_size: int | None, seed: int, mesh: Mesh
  ):
    """Orders the examples."""
    self.resident: dict = {}
    self._mesh = mesh
    if batch_size is not None:
      parallel.check_batch_size(batch_size, mesh)
    self._set_order(Order(num_examples, batch_size=batch_size or 1, seed=seed))

  def _set_order(self, order):
    self._order, self.indices = order, order.indices
    self.steps_per_epoch = order.steps_per_epoch

  def among(self, chosen: np.ndarray, *, batch_size: int, seed: int):
    """Returns a loader of the examples with some indices, of the same data."""
    parallel.check_batch_size(batch_size, self._mesh)
    other = copy.copy(self)
    other._set_order(
      Order(len(chosen), batch_size=batch_size, seed=seed, chosen=chosen)
    )
    return other

  def batches(self, chunks: Iterable[range]) -> Generator[dict, None, None]:
    """Yields the global batches `[steps, batch, ...]` of each range of steps.

    The ranges must follow one another without a gap. The second axis of the
    batches is split over the devices.
    """
    raise NotImplementedError

  def structure(self, steps: int) -> dict:
    """Returns shapes, dtypes and shardings of the batches of N steps."""
    types: dict = {'index': ((), np.int32)}
    if self._image_shape is not None:
      types |= {'image': (self._image_shape, np.uint8), 'label': ((), np.int32)}
    sharding = parallel.split(self._mesh, axis=1)
    leading = steps, self._order.batch_size
    return {
      name: jax.ShapeDtypeStruct((*leading, *shape), dtype, sharding=sharding)
      for name, (shape, dtype) in types.items()
    }


class ResidentLoader(Loader):
  """Keeps the data set on every device as uint8; batches are indices.

  `unpack(loader.resident, batch)` gathers the examples inside jit.
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
    """Copies images `[n, height, width, channels]` uint8 and labels `[n]`."""
    super().__init__(len(images), batch_size=batch_size, seed=seed, mesh=mesh)
    self.resident = parallel.replicate(
      mesh, {'image': images, 'label': labels.astype(np.int32)}
    )

  def batches(self, chunks: Iterable[range]) -> Generator[dict, None, None]:
    for chunk in chunks:
      index = np.stack([self.indices(step) for step in chunk])
      yield parallel.shard(self._mesh, {'index': index}, axis=1)


class StreamLoader(Loader):
  """Reads batches with Grain's worker processes while the devices compute.

  Each JAX process reads only the rows of its own devices.
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
    """Stores the arguments; `batches` starts the workers.

    Args:
      reader: Reader of the examples, which is pickled for the workers.
      batch_size: Global batch size.
      seed: Seed of the order.
      mesh: Mesh of the devices.
      num_workers: Number of worker processes; 0 reads with threads of this
        process. A script that uses workers must start under
        `if __name__ == '__main__':`.
      prefetch: Number of batches that each worker, and the device, hold ready.
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
    super().__init__(len(reader), batch_size=batch_size, seed=seed, mesh=mesh)
    self._reader, self._image_shape = reader, reader.shape
    self._num_workers, self._prefetch = num_workers, prefetch

  def batches(self, chunks: Iterable[range]) -> Generator[dict, None, None]:
    chunks = list(chunks)
    if not chunks:
      return
    rows = parallel.local_rows(self._mesh, self._order.batch_size)
    steps = range(chunks[0].start, chunks[-1].stop)
    host = _grain_batches(
      functools.partial(_example, self._reader, self._order, rows, steps),
      len(steps) * len(rows),
      batch_size=len(rows),
      num_workers=self._num_workers,
      prefetch=self._prefetch,
    )
    ready = collections.deque()
    try:
      for chunk in chunks:
        # A copy, so that no worker's shared memory is kept.
        batch = jax.tree.map(
          lambda *x: np.stack(x), *[next(host) for _ in chunk]
        )
        # The transfer is asynchronous: it runs while the devices compute.
        ready.append(parallel.shard_local(self._mesh, batch, axis=1))
        if len(ready) > self._prefetch:
          yield ready.popleft()
      yield from ready
    finally:
      host.close()


class AbstractLoader(Loader):
  """Shapes of a loader's data, for lowering a step without data."""

  def __init__(
    self,
    num_examples: int,
    shape: tuple[int, ...],
    *,
    batch_size: int,
    mesh: Mesh,
    resident: bool,
  ):
    """Describes images of a shape for a mesh, which need not be attached."""
    super().__init__(num_examples, batch_size=batch_size, seed=0, mesh=mesh)
    if not resident:
      self._image_shape = shape
      return
    types = {'image': (shape, np.uint8), 'label': ((), np.int32)}
    self.resident = {
      name: jax.ShapeDtypeStruct(
        (num_examples, *one), dtype, sharding=parallel.replicated(mesh)
      )
      for name, (one, dtype) in types.items()
    }


def read_all(reader: reader_lib.Reader) -> tuple[np.ndarray, np.ndarray]:
  """Reads all examples, with a progress bar on a terminal.

  Returns:
    `(images, labels)`: `[n, height, width, channels]` uint8 and `[n]` int32.
  """
  images = np.empty((len(reader), *reader.shape), np.uint8)
  labels = np.empty(len(reader), np.int32)

  def read(start):
    for index in range(start, min(start + _PART, len(reader))):
      example = reader.example(0, index)
      images[index], labels[index] = example['image'], example['label']

  starts = range(0, len(reader), _PART)
  # Pillow decodes without the interpreter's lock, so threads suffice.
  with futures.ThreadPoolExecutor() as pool:
    for _ in tqdm.tqdm(
      pool.map(read, starts),
      'reading images',
      total=len(starts),
      unit_scale=_PART,
      delay=1,  # seconds; small sets need no bar
      disable=not sys.stderr.isatty(),
    ):
      pass
  return images, labels


def in_order(
  reader: reader_lib.Reader, *, batch_size: int, num_workers: int = 0
) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
  """Reads all examples once, in order.

  Yields:
    `(images, positions)`: up to `batch_size` images
    `[batch, height, width, channels]` uint8 and their positions `[batch]` int32
    in the source. Corrupt images that the reader skips are missing.
  """
  batches = _grain_batches(
    functools.partial(_whole, reader),
    len(reader),
    batch_size=batch_size,
    num_workers=num_workers,
    prefetch=2,
  )
  start = 0
  for images, positions in batches:
    # Where the reader skips an image it returns the next one.
    intact = positions == np.arange(start, start + len(positions))
    start += len(positions)
    if intact.any():
      yield images[intact], positions[intact]


def _example(reader, order, rows, steps, position):
  """Reads an example of this process's rows of some steps."""
  step, row = divmod(position, len(rows))
  step += steps.start
  return reader.example(step, int(order.indices(step)[rows[row]]))


def _whole(reader, index):
  image, position = reader.read(index)
  return image, np.int32(position)


def _grain_batches(read, count, *, batch_size, num_workers, prefetch):
  """Yields batches of `read(0)`, ..., `read(count - 1)`, read ahead."""
  # Importing Grain takes two seconds, which resident data need not pay.
  from absl import flags
  import grain

  if not flags.FLAGS.is_parsed():
    # Grain reads its flags even if no command has parsed any.
    flags.FLAGS.mark_as_parsed()
  dataset = grain.MapDataset.range(count).map(read).batch(batch_size)
  # With workers, each batch is read by one process without threads.
  threads = 0 if num_workers else prefetch
  iterator = dataset.to_iter_dataset(
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
  )
  if num_workers:
    # Shared memory costs more than a copy for small arrays, and Grain sometimes
    # releases it only at exit, with a warning.
    small = grain.experimental.DatasetOptions(min_shm_size=_MIN_SHARED_BYTES)
    iterator = grain.experimental.WithOptionsIterDataset(iterator, small)
    iterator = iterator.mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=num_workers, per_worker_buffer_size=prefetch
      ),
      worker_init_fn=_start_worker,
    )
  iterator = iter(iterator)
  # A new process inherits the blocked signals, long before `_start_worker`. The
  # first process would start the tracker, which unblocks them.
  resource_tracker.ensure_running()
  stops = (signal.SIGTERM, signal.SIGINT)
  try:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    try:
      first = next(iterator, None)  # starts the workers
    finally:
      signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if first is not None:
      yield first
    del first  # it is shared memory
    yield from iterator
  except RuntimeError as error:
    code = re.search(r'Worker process was .* exit code (-?\d+)', str(error))
    if code is None:
      raise
    raise ChildProcessError(_explain_exit(int(code[1]))) from error
  finally:
    iterator.close()
    if num_workers:
      # The iterator is in a cycle of references and holds shared memory.
      del iterator
      gc.collect()


def _start_worker(index, count):
  """Makes a worker exit with the main process, and at no other time."""
  del index, count
  # Schedulers and terminals send these to all processes at once. The main
  # process needs the workers until it has saved, and stops them itself.
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  signal.signal(signal.SIGINT, signal.SIG_IGN)

  def exit_with_parent():
    multiprocessing.parent_process().join()
    # The resource tracker then releases the shared memory.
    os._exit(1)

  threading.Thread(target=exit_with_parent, daemon=True).start()


def _explain_exit(code):
  if code == -signal.SIGKILL:
    return (
      'a worker process that reads images was killed (SIGKILL), usually '
      'because memory ran out; lower config.data.num_workers or '
      'config.data.prefetch, then rerun the same command'
    )
  return (
    f'a worker process that reads images died with exit code {code}; see its '
    'messages above'
  )


def unpack(
  resident: dict[str, jax.Array], batch: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """Returns the examples of a shard of a batch; call it inside jit.

  Args:
    resident: `Loader.resident`.
    batch: Shard of one step of `Loader.batches`.

  Returns:
    `image`, `label` and `index`, each with a leading axis `[batch]`.
  """
  if 'image' in batch:
    return batch
  index = batch['index']
  return {
    'image': resident['image'][index],
    'label': resident['label'][index],
    'index': index,
  }
