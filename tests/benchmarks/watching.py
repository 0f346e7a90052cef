"""What watching costs a training: configs/digits.py with and without it.

python -m tests.benchmarks.watching --rounds=3

Each training is a process of its own, and they take turns (A B A B). Beside the
whole times stands what the training's own thread spends in watching, which a
busy machine does not change much; the programs that draw are compiled by
another thread, while the training step is.
"""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time

from tests import small

_OPTIONS = {
  'model__width_multiplier': 1.0,
  'model__embedding_dim': 128,
  'model__head_hidden_dim': 128,
  'train__batch_size': 128,
  'train__num_epochs': 20,
  'train__log_every_steps': 10,
  'train__checkpoint_every_epochs': 5,
  'watch__images_every_epochs': 10,
}


def train_once(watched: bool) -> dict[str, float]:
  """Trains, and gives seconds: `wall`, `cpu` and of `watching` the thread's."""
  import jax

  from clop_jax import train
  from clop_jax.tracking import watch

  spent = []

  def timed(owner, name):
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapper(*arguments, **keywords):
      if name == 'reached':
        jax.block_until_ready(arguments[2])  # the steps' own time
      began = time.thread_time()
      try:
        return function(*arguments, **keywords)
      finally:
        spent.append(time.thread_time() - began)

    setattr(owner, name, wrapper)

  for name in ('__init__', 'started', 'logged', 'reached', 'close'):
    timed(watch.Watch, name)
  config = small.digits_config(None, **_OPTIONS)
  began = time.perf_counter(), time.process_time()
  with tempfile.TemporaryDirectory() as folder:
    train.train(config, folder, watched=watched)
  return {
    'wall': time.perf_counter() - began[0],
    'cpu': time.process_time() - began[1],
    'watching': sum(spent),
  }


def main() -> None:
  """Prints the rounds, and the medians' ratio."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--one', choices=['with', 'without'])
  arguments = parser.parse_args()
  if arguments.one:
    print(json.dumps(train_once(arguments.one == 'with')))
    return
  found = {'with': [], 'without': []}
  for _ in range(arguments.rounds):
    for name, seconds in found.items():
      command = [sys.executable, '-m', 'tests.benchmarks.watching']
      output = subprocess.run(
        [*command, f'--one={name}'], capture_output=True, text=True, check=True
      ).stdout
      seconds.append(json.loads(output.splitlines()[-1]))
      shown = ', '.join(f'{k} {v:.2f} s' for k, v in seconds[-1].items())
      print(f'{name}: {shown}', flush=True)
  for kind in ('wall', 'cpu'):
    medians = [
      sorted(x[kind] for x in found[name])[arguments.rounds // 2]
      for name in ('with', 'without')
    ]
    print(f'{kind}: {medians[0] / medians[1]:.3f} of that without')


if __name__ == '__main__':
  main()
