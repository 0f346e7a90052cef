"""Time and memory of NT-Xent, dense against blocked, in one run.

python -m tests.benchmarks.losses

Memory is the compiler's own analysis of the temporaries of value and gradient.
Times are medians of turns A B A B; machines are noisy, so trust the ratio.
"""

import statistics
import time

import jax

from clop_jax import loss

EMBEDDINGS, DIM, BLOCK_SIZE, TURNS = 8192, 128, 512, 9


def compiled(z, block_size):
  function = jax.jit(
    jax.value_and_grad(lambda z: loss.nt_xent_loss(z, block_size=block_size))
  )
  return function.lower(z).compile()


def main():
  z = jax.random.normal(jax.random.key(0), (2, EMBEDDINGS // 2, DIM))
  programs = {'dense': compiled(z, None), 'blocked': compiled(z, BLOCK_SIZE)}
  seconds = {name: [] for name in programs}
  for _ in range(TURNS + 1):
    for name, program in programs.items():
      began = time.perf_counter()
      jax.block_until_ready(program(z))
      seconds[name].append(time.perf_counter() - began)
  # The first turn pays for cold caches.
  medians = {k: statistics.median(v[1:]) for k, v in seconds.items()}
  memory = {
    k: p.memory_analysis().temp_size_in_bytes for k, p in programs.items()
  }
  print(
    f'NT-Xent, value and gradient, {EMBEDDINGS} embeddings of dim {DIM}, '
    f'{jax.devices()[0].device_kind}, jax {jax.__version__}'
  )
  for name in programs:
    spread = max(seconds[name][1:]) / min(seconds[name][1:])
    print(
      f'{name:8} {medians[name] * 1e3:8.1f} ms (max/min {spread:.2f}) '
      f'{memory[name] / 1e6:8.1f} MB of temporaries'
    )
  print(
    f'blocked / dense: time {medians["blocked"] / medians["dense"]:.2f} '
    f'(bar 1.20), memory {memory["blocked"] / memory["dense"]:.3f} (bar 0.25)'
  )


if __name__ == '__main__':
  main()
