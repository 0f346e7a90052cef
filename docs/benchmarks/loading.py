"""Input: batches from the resident set, and JPEG files read by processes."""

from collections.abc import Iterator
import functools
import itertools
import multiprocessing
from multiprocessing import pool
import os
import pathlib
import tempfile

import jax
import numpy as np
from PIL import Image

from clop_jax.data import folder
from clop_jax.data import loader
from clop_jax.data import reader
from clop_jax.runtime import parallel
from docs.benchmarks import contest
from docs.benchmarks import steps

SIZE, BATCH = 64, 128
PROCESSES = len(os.sched_getaffinity(0))


def contests(suite: str, small: bool) -> Iterator[contest.Contest]:
  """Yields a step with and without its input, and both readers of JPEG."""
  count = 1 if small else 3 * steps.STEPS[suite]
  network, batch = steps.BATCHES['small' if small else suite][0]
  step = functools.partial(steps.ours, network, batch, small=small, steps=count)
  yield contest.Contest(
    'input',
    f'{network}, batch {batch:,}: order, transfer and gather',
    {
      'batches from the resident set': step,
      'a constant batch': functools.partial(step, resident=False),
    },
    images=count * batch,
    turns=steps.TURNS[suite],
  )
  batches, files, size = (2, 4, 8) if small else (60, BATCH, SIZE)
  processes = 0 if small else PROCESSES
  read = functools.partial(_reader, batches, files, size, processes)
  yield contest.Contest(
    'input',
    f'JPEG of 160-320 px to {size} px, {processes} processes',
    {
      'ours, streaming loader': functools.partial(read, _stream),
      'Pillow, pool': functools.partial(read, _pool),
    },
    images=batches * files,
    turns=5,
  )


def _make_jpegs(root, count):
  """Writes smooth images with some noise."""
  rng = np.random.default_rng(0)
  for index in range(count):
    size = tuple(int(x) for x in rng.integers(160, 320, size=2))
    coarse = rng.integers(0, 256, (8, 8, 3), np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    noise = rng.normal(scale=8, size=(*size[::-1], 3))
    pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
    path = pathlib.Path(root, 'train', str(index % 10), f'{index}.jpg')
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=90)


def _reader(batches, batch, size, processes, make):
  """A contestant that reads batches without the start of its processes."""
  root = tempfile.TemporaryDirectory(prefix='clop_jax_jpeg_')
  _make_jpegs(root.name, 2 * batch if batch < 10 else 4000)
  source = folder.Folder('train', root.name)
  stream, close = make(source, batch, size, processes)
  # Past the batches that are read ahead while the processes start.
  jax.block_until_ready(list(itertools.islice(stream, 4 * processes + 1)))

  def run():
    for images in itertools.islice(stream, batches):
      jax.block_until_ready(images)

  def end():
    close()
    root.cleanup()

  return contest.Program(run, close=end)


def _stream(source, batch, size, processes):
  data = loader.StreamLoader(
    reader.Reader(source, source.labels, channels=3, size=size),
    batch_size=batch,
    seed=0,
    mesh=parallel.make_mesh(jax.devices()[:1]),
    num_workers=processes,
  )
  # Never reaches the end, where some workers have nothing left to do.
  stream = data.batches([range(i, i + 1) for i in range(100_000)])
  return stream, stream.close


def _pool(source, batch, size, processes):
  rng = np.random.default_rng(0)
  work = (
    ([source.paths[i] for i in rng.integers(len(source), size=batch)], size)
    for _ in itertools.count()
  )
  # Not forked, because XLA's threads would not survive.
  spawn = multiprocessing.get_context('spawn')
  readers = spawn.Pool(processes) if processes else pool.ThreadPool(1)
  pending = [readers.apply_async(plain_pillow, next(work)) for _ in range(8)]

  def stream():
    while True:
      pending.append(readers.apply_async(plain_pillow, next(work)))
      yield pending.pop(0).get()

  return stream(), readers.terminate


def plain_pillow(paths, size):
  """Returns one batch, read without this library."""
  pixels = []
  for path in paths:
    with Image.open(path) as image:
      image = image.convert('RGB')
      side = min(image.size)
      left, top = (image.width - side) / 2, (image.height - side) / 2
      box = (left, top, left + side, top + side)
      image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
      pixels.append(np.asarray(image))
  return np.stack(pixels)
