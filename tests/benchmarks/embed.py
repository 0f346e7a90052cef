"""What embedding a folder costs beside the networks alone, and its memory.

python -m tests.benchmarks.embed --count=10000 --size=32 --depth=18

Makes so many PNG files and an untrained run, embeds the files, and takes turns
with the same jitted function on one constant batch. The rate of `embed` is that
of all files but as many as a second, smaller folder has: so neither start nor
compilation are in it. Memory is the process's resident set.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time

import jax
import numpy as np
from PIL import Image

import clop_jax
from clop_jax import embed
from clop_jax.experiment import build
from clop_jax.experiment import workdir as workdir_lib
from clop_jax.runtime import parallel
from tests import small

_BATCH = 256


def make_run(workdir: str, *, size: int, depth: int) -> None:
  """A run whose only checkpoint is that of step 0."""
  config = small.digits_config(
    None, augment__size=size, model__depth=depth, eval__batch_size=_BATCH
  )
  built = build.build(config, total_steps=1, steps_per_epoch=1)
  labels = np.zeros(10, np.int32)
  with (
    workdir_lib.claim(config, workdir, labels, labels),
    workdir_lib.open_checkpoints(config, workdir) as checkpoints,
  ):
    checkpoints.save(jax.jit(built.create_state)(), 0, {})
    checkpoints.wait()


def make_images(folder: str, *, count: int, size: int) -> None:
  """Files of noise, a thousand a folder."""
  rng = np.random.default_rng(0)
  for i in range(count):
    part = os.path.join(folder, f'{i // 1000:03}')
    os.makedirs(part, exist_ok=True)
    pixels = rng.integers(0, 256, (size, size), dtype=np.uint8)
    Image.fromarray(pixels).save(os.path.join(part, f'{i:06}.png'))


def constant_rate(run, size: int, seconds: float = 5.0) -> float:
  """Images a second of the networks alone."""
  images = np.zeros((_BATCH, size, size, 1), np.uint8)
  images = parallel.shard(run.mesh, images)
  jax.block_until_ready(run.apply(images))
  calls, began = 0, time.perf_counter()
  while time.perf_counter() - began < seconds:
    jax.block_until_ready(run.apply(images))
    calls += 1
  return calls * _BATCH / (time.perf_counter() - began)


def seconds(workdir: str, folder: str, out: str) -> float:
  """Of embedding all files of a folder, with start and compilation."""
  began = time.perf_counter()
  embed.embed(workdir, out, source=folder, batch_size=_BATCH, overwrite=True)
  return time.perf_counter() - began


def main() -> None:
  """Prints both rates of each turn, their ratio, and the memory."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--count', type=int, default=10_000)
  parser.add_argument('--size', type=int, default=32)
  parser.add_argument('--depth', type=int, default=18)
  parser.add_argument('--turns', type=int, default=3)
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as scratch:
    workdir, few, all_ = (f'{scratch}/{x}' for x in ('run', 'few', 'all'))
    count, size = arguments.count, arguments.size
    make_run(workdir, size=size, depth=arguments.depth)
    make_images(few, count=count // 4, size=size)
    make_images(all_, count=count, size=size)
    run = clop_jax.load(workdir)
    constant_rate(run, size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    ratios = []
    for _ in range(arguments.turns):
      alone = constant_rate(run, size)
      out = f'{scratch}/out.npz'
      spent = seconds(workdir, all_, out) - seconds(workdir, few, out)
      rate = (count - count // 4) / spent
      ratios.append(rate / alone)
      print(f'embed {rate:,.0f} images/s, networks alone {alone:,.0f}')
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
      f'ratio {statistics.median(ratios):.2f} (median of {arguments.turns}); '
      f'{count:,} images; at most {after:,.0f} MiB, {before:,.0f} '
      'of them before the first'
    )


if __name__ == '__main__':
  main()
