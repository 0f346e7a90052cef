"""Speed of two-view augmentation, on the device against Pillow on two cores.

python -m tests.benchmarks.augment

The CIFAR recipe on uint8 32x32x3 images. Pillow works one image at a time in
two processes, which are handed the images in chunks and give uint8 back (a
quarter of float32's traffic); the parent normalizes. Rates are of turns
A B A B; machines are noisy, so trust the ratio.
"""

import functools
import multiprocessing
import random
import statistics
import time

import jax
import numpy as np
from PIL import Image

from clop_jax.data import augment
from tests.benchmarks import pillow_views

BATCH, SIZE, PROCESSES, TURNS, BAR = 512, 32, 2, 25, 5.0
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


def pillow_chunk(seed, images):
  rng = random.Random(seed)  # NumPy's is slow for one number at a time
  pictures = [Image.fromarray(image) for image in images]
  return np.stack(
    [
      [
        np.asarray(pillow_views.view(picture, SIZE, rng))
        for picture in pictures
      ]
      for _ in range(2)
    ]
  )


def pillow_two_views(pool, seed, images):
  chunks = np.split(images, 2 * PROCESSES)
  seeds = [seed * len(chunks) + i for i in range(len(chunks))]
  views = pool.starmap(pillow_chunk, zip(seeds, chunks, strict=True), 1)
  views = np.concatenate(views, axis=1)
  scale = 1 / (255 * np.array(STD, np.float32))
  shift = np.array(MEAN, np.float32) / np.array(STD, np.float32)
  return views * scale - shift


def main():
  rng = np.random.default_rng(0)
  # Smooth colours plus noise.
  coarse = rng.integers(0, 256, (BATCH, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
  noise = rng.normal(scale=20, size=coarse.shape)
  images = np.clip(coarse + noise, 0, 255).astype(np.uint8)
  recipe = {'size': SIZE, 'mean': MEAN, 'std': STD}

  def make(step, images):
    keys = augment.example_keys(jax.random.key(0), step, np.arange(BATCH))
    return augment.two_views(keys, images, **recipe)

  # Not forked, which XLA's threads would not survive.
  pool = multiprocessing.get_context('spawn').Pool(PROCESSES)
  began = time.perf_counter()
  program = jax.jit(make).lower(0, images).compile()
  compile_seconds = time.perf_counter() - began
  contenders = {
    'ours': lambda i: jax.block_until_ready(program(i, images)),
    'pillow': functools.partial(pillow_two_views, pool, images=images),
  }
  rates = {name: [] for name in contenders}
  for turn in range(TURNS + 1):
    for name, contender in contenders.items():
      began = time.perf_counter()
      views = contender(turn)
      rates[name].append(BATCH / (time.perf_counter() - began))
      assert views.shape == (2, BATCH, SIZE, SIZE, 3)
  pool.terminate()
  # The first turn pays for cold caches.
  medians = {k: statistics.median(v[1:]) for k, v in rates.items()}
  print(
    f'Two views of {BATCH} images {SIZE}x{SIZE}x3, CIFAR recipe, '
    f'{jax.devices()[0].device_kind}, jax {jax.__version__}, '
    f'compiled in {compile_seconds:.1f} s'
  )
  for name in contenders:
    spread = max(rates[name][1:]) / min(rates[name][1:])
    print(f'{name:8} {medians[name]:8.0f} images/s (max/min {spread:.2f})')
  print(f'ours / pillow: {medians["ours"] / medians["pillow"]:.2f} (bar {BAR})')


if __name__ == '__main__':
  main()
