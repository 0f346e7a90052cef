"""What reading costs: resident gathers, streamed JPEG, memory of a long stream.

python -m tests.benchmarks.loading [resident] [jpeg] [memory]

- resident: a ResNet-18 step at 32 px whose batch is gathered from the resident
  set, against the same step on a constant batch.
- jpeg: images/s of the streaming loader against a pool of as many processes
  that does the same with plain Pillow (decode, middle square, resize, stack).
- memory: of this process and its workers over 2,000 streamed batches.

Times are taken in turns A B A B; machines are noisy, so trust the ratio.
"""

import collections
import contextlib
import multiprocessing
import os
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import numpy as np
from PIL import Image
import sklearn.datasets

from clop_jax import defaults
from clop_jax.data import augment
from clop_jax.data import folder
from clop_jax.data import loader
from clop_jax.data import reader as reader_lib
from clop_jax.experiment import build
from clop_jax.runtime import parallel

SIZE, BATCH, TURNS = 64, 128, 5
PROCESSES = len(os.sched_getaffinity(0))


def resident():
  """Loading's share of a step."""
  config = defaults.get_config()
  config.model.depth = 18
  config.data.channels = 3
  config.augment.size = 32
  config.augment.mean = config.augment.std = (0.5,) * 3
  config.augment.crop_area = (0.08, 1.0)
  config.augment.saturation, config.augment.hue = 0.4, 0.1
  config.augment.grey_probability = 0.2
  batch_size = config.train.batch_size = (
    64 if jax.default_backend() == 'cpu' else 512
  )
  mesh = parallel.make_mesh(jax.devices()[:1])
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, size=(50_000, 32, 32, 3), dtype=np.uint8)
  data = loader.ResidentLoader(
    images,
    rng.integers(0, 10, size=50_000),
    batch_size=batch_size,
    seed=0,
    mesh=mesh,
  )
  run = build.build(config, total_steps=1000, steps_per_epoch=100)
  key = parallel.replicate(mesh, build.training_key(config))

  def gathered(state, resident, batch, key):
    batch = jax.tree.map(lambda x: x[0], batch)
    return run.step(state, loader.unpack(resident, batch), key)

  def constant(state, batch, key):
    return run.step(state, batch, key)

  gathered = parallel.map_step(gathered, mesh, batch_axes=(None, None, 1, None))
  constant = parallel.map_step(constant, mesh, batch_axes=(None, 0, None))
  batches = data.batches([range(i, i + 1) for i in range(10_000)])
  first = jax.tree.map(lambda x: x[0], next(batches))
  fixed = parallel.shard(
    mesh, jax.device_get(loader.unpack(data.resident, first))
  )
  states = [jax.jit(run.create_state)() for _ in range(2)]
  steps = 4 if jax.default_backend() == 'cpu' else 50
  seconds = {'gathered': [], 'constant': []}
  for _ in range(TURNS + 1):
    began = time.perf_counter()
    for _ in range(steps):
      states[0], metrics = gathered(
        states[0], data.resident, next(batches), key
      )
    jax.block_until_ready(metrics)
    seconds['gathered'].append((time.perf_counter() - began) / steps)
    began = time.perf_counter()
    for _ in range(steps):
      states[1], metrics = constant(states[1], fixed, key)
    jax.block_until_ready(metrics)
    seconds['constant'].append((time.perf_counter() - began) / steps)
  medians = {k: statistics.median(v[1:]) for k, v in seconds.items()}
  # The step on CPU is noisy by more than loading costs, so it is timed alone.
  gather = jax.jit(
    lambda resident, batch: loader.unpack(
      resident, jax.tree.map(lambda x: x[0], batch)
    )
  )
  jax.block_until_ready(gather(data.resident, next(batches)))
  began = time.perf_counter()
  for _ in range(200):
    jax.block_until_ready(gather(data.resident, next(batches)))
  alone = (time.perf_counter() - began) / 200
  recipe = build.recipe(config)

  @jax.jit
  def views(resident, batch, step):
    batch = loader.unpack(resident, jax.tree.map(lambda x: x[0], batch))
    keys = augment.example_keys(jax.random.key(0), step, batch['index'])
    return augment.two_views(keys, batch['image'], **recipe)

  jax.block_until_ready(views(data.resident, next(batches), 0))
  began = time.perf_counter()
  for step in range(50):
    made = views(data.resident, next(batches), step)
  jax.block_until_ready(made)
  viewed = (time.perf_counter() - began) / 50
  for name, values in seconds.items():
    print(
      f'{name:9} {medians[name] * 1e3:8.1f} ms a step of {batch_size}, '
      f'{batch_size / medians[name]:,.0f} images/s '
      f'(max/min {max(values[1:]) / min(values[1:]):.2f})'
    )
  print(f'loader and two views alone: {batch_size / viewed:,.0f} images/s')
  print(
    f'gathered / constant: {medians["gathered"] / medians["constant"]:.3f} '
    f'(bar 1.03); order, transfer and gather alone {alone * 1e3:.2f} ms, '
    f'{alone / medians["constant"]:.4f} of a step (bar 0.03)'
  )


def make_jpegs(root, count):
  """Crops of two real photographs."""
  photographs = sklearn.datasets.load_sample_images().images
  rng = np.random.default_rng(0)
  for index in range(count):
    photograph = photographs[index % len(photographs)]
    height, width = rng.integers(160, 320, size=2)
    top = rng.integers(0, photograph.shape[0] - height)
    left = rng.integers(0, photograph.shape[1] - width)
    path = pathlib.Path(root, 'train', str(index % 10), f'{index}.jpg')
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photograph[top : top + height, left : left + width]).save(
      path, quality=90
    )
  return folder.Folder('train', root)


def plain_pillow(paths):
  """One batch as somebody would write it."""
  pixels = []
  for path in paths:
    with Image.open(path) as image:
      image = image.convert('RGB')
      side = min(image.size)
      left, top = (image.width - side) / 2, (image.height - side) / 2
      box = (left, top, left + side, top + side)
      image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
      pixels.append(np.asarray(image))
  return np.stack(pixels)


def make_stream(source):
  reader = reader_lib.Reader(source, source.labels, channels=3, size=SIZE)
  return loader.StreamLoader(
    reader,
    batch_size=BATCH,
    seed=0,
    mesh=parallel.make_mesh(jax.devices()[:1]),
    num_workers=PROCESSES,
  )


def jpeg():
  """Throughput of decoding."""
  batches = 60
  with tempfile.TemporaryDirectory() as root:
    source = make_jpegs(root, 4000)
    data = make_stream(source)
    # Past what was read ahead while workers started, and short of the end, when
    # some have nothing left to do.
    warm = 4 * PROCESSES
    total = batches + 2 * warm

    def rate(stream):
      for position, batch in enumerate(stream):
        jax.block_until_ready(batch)
        if position == warm - 1:
          began = time.perf_counter()
        if position == warm + batches - 1:
          return batches * BATCH / (time.perf_counter() - began)

    ours, theirs = [], []
    pool = multiprocessing.get_context('spawn').Pool(PROCESSES)
    with pool:
      for turn in range(TURNS):
        steps = range(turn * total, (turn + 1) * total)
        chunks = [range(step, step + 1) for step in steps]
        with contextlib.closing(data.batches(chunks)) as stream:
          ours.append(rate(stream))
        work = [[source.paths[i] for i in data.indices(step)] for step in steps]
        results = pool.imap(plain_pillow, work)
        theirs.append(rate(results))
        collections.deque(results, maxlen=0)  # none is left for the next turn
  a, b = statistics.median(ours), statistics.median(theirs)
  print(
    f'JPEG of 160-320 px to {SIZE} px, {PROCESSES} processes: streaming loader '
    f'{a:,.0f} images/s (max/min {max(ours) / min(ours):.2f}), plain Pillow '
    f'{b:,.0f} ({max(theirs) / min(theirs):.2f}); ratio {a / b:.2f} (bar 0.90)'
  )


def family_mebibytes():
  """Proportional set size of this process and its children, MiB."""
  own = os.getpid()
  total = 0
  for path in pathlib.Path('/proc').iterdir():
    if not path.name.isdigit():
      continue
    with contextlib.suppress(OSError, ValueError):
      parent = int((path / 'stat').read_text().rsplit(')', 1)[1].split()[1])
      if int(path.name) == own or parent == own:
        rollup = (path / 'smaps_rollup').read_text()
        total += int(rollup.split('Pss:')[1].split()[0])
  return total / 1024


def memory():
  """Growth over a long stream."""
  batches, marks = 2000, (200, 650, 1100, 1550, 2000)
  with tempfile.TemporaryDirectory() as root:
    data = make_stream(make_jpegs(root, 1000))
    taken = []
    chunks = [range(i, i + 1) for i in range(batches)]
    with contextlib.closing(data.batches(chunks)) as stream:
      for position, batch in enumerate(stream, 1):
        jax.block_until_ready(batch)
        # The stream's last batches come after its workers have ended.
        if position in marks or position == batches - 20:
          taken.append((position, family_mebibytes()))
  print(
    f'memory of {1 + PROCESSES} processes: '
    + ', '.join(f'{mib:,.0f} MiB at batch {n:,}' for n, mib in taken)
  )
  growth = taken[-2][1] / taken[0][1]
  print(f'batch {taken[-2][0]:,} / batch {taken[0][0]}: {growth:.3f} (bar 1.0)')


def main():
  """Runs what was named, or all."""
  parts = {'resident': resident, 'jpeg': jpeg, 'memory': memory}
  print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}')
  for name in sys.argv[1:] or parts:
    parts[name]()


if __name__ == '__main__':
  main()
