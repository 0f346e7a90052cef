"""Runs trained in one program: each as if it had been trained alone."""

import json
import shutil

from flax import linen as nn
import jax
import numpy as np
import pytest

from clop_jax import evaluate
from clop_jax import train
from clop_jax.experiment import build
from clop_jax.experiment import checkpoint
from clop_jax.runtime import parallel
from clop_jax.study import ensemble
from tests import small

DEVICES = jax.devices()[:1]


def configs_of(digits_dir, *changes):
  # Labels that depend on the seed, and steps that log nothing.
  return [
    small.digits_config(
      digits_dir,
      **{'train__num_epochs': 2, 'data__label_noise': 0.2} | change,
    )
    for change in changes
  ]


def together(configs, workdirs):
  reported = {}
  ensemble.train_together(
    configs,
    [str(w) for w in workdirs],
    diverged=lambda number, error: reported.update({number: str(error)}),
    devices=DEVICES,
  )
  return reported


def state_of(config, workdir):
  mesh = parallel.make_mesh(DEVICES)
  run = build.build(config, total_steps=10, steps_per_epoch=5)
  with checkpoint.Checkpoints(f'{workdir}/checkpoints', read_only=True) as c:
    return c.restore_latest(build.abstract_state(run, mesh))


def log_of(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def assert_close(one, other):
  """Up to the order of sums, leaf by leaf."""
  paths = jax.tree_util.tree_leaves_with_path(one)
  for (path, a), b in zip(paths, jax.tree.leaves(other), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-6)
    assert error < 1e-4, (jax.tree_util.keystr(path), error)


@pytest.fixture(scope='module', autouse=True)
def smooth():
  """Networks without kinks.

  Where a ReLU's input is within rounding of 0, the order of a sum turns its
  gradient: of 24 seeds ten left themselves by 1e-3 and more (JAX 0.10). With a
  smooth function all of twelve agreed to 6e-6.
  """
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(nn, 'relu', nn.softplus)
    yield


@pytest.fixture(scope='module')
def trio(digits_dir, tmp_path_factory):
  """Three configs, their workdirs trained together, and trained alone.

  At small learning rates: at large ones a run leaves itself as far behind when
  its first parameters are changed by 1e-7.
  """
  configs = configs_of(
    digits_dir,
    {'seed': 0, 'optimizer__learning_rate': 0.01, 'loss__clop_weight': 0.0},
    {'seed': 1, 'optimizer__learning_rate': 0.02, 'loss__clop_weight': 1.0},
    {'seed': 2, 'optimizer__learning_rate': 0.005, 'loss__clop_weight': 2.0},
  )
  folder = tmp_path_factory.mktemp('runs')
  both = [folder / 'together' / str(c.seed) for c in configs]
  alone = [folder / 'alone' / str(c.seed) for c in configs]
  assert together(configs, both) == {}
  for config, workdir in zip(configs, alone, strict=True):
    train.train(config, str(workdir), devices=DEVICES, watched=False)
  return configs, both, alone


def test_each_run_equals_the_one_trained_alone(trio):
  states = []
  for config, both, alone in zip(*trio, strict=True):
    states.append(state_of(config, both))
    assert_close(states[-1], state_of(config, alone))
    assert int(states[-1].step) == 10
    names = [{p.name for p in w.iterdir()} for w in (both, alone)]
    assert names[0] == names[1]
    for name in ('config.json', 'labels.npz'):
      assert (both / name).read_bytes() == (alone / name).read_bytes()
    lines = [log_of(both), log_of(alone)]
    for one, other in zip(*lines, strict=True):
      assert one.keys() == other.keys()
      for name, value in one.items():
        assert value == pytest.approx(other[name], rel=1e-3, abs=1e-4), name
    steps = [
      sorted(p.name for p in (w / 'checkpoints').iterdir())
      for w in (both, alone)
    ]
    assert steps[0] == steps[1] == ['10', '5']
  # And they are three: one run's numbers for all would make them alike.
  kernels = [jax.tree.leaves(state.params)[-1] for state in states]
  for one, other in ((0, 1), (1, 2), (0, 2)):
    assert not np.allclose(kernels[one], kernels[other], rtol=1e-2)


def test_they_can_be_evaluated_and_gone_on_with_alone(trio, tmp_path):
  config, workdir = trio[0][1], shutil.copytree(trio[1][1], tmp_path / 'run')
  request = evaluate.Request(str(workdir), devices=DEVICES)
  result = evaluate.evaluate(request).complete
  assert result['step'] == 10 and 0 < result['linear_top1'] <= 1
  shutil.rmtree(workdir / 'checkpoints' / '10')
  train.train(config, str(workdir), devices=DEVICES)
  assert_close(state_of(config, workdir), state_of(config, trio[2][1]))


def test_they_go_on_from_the_last_step_that_all_have(trio, tmp_path, capsys):
  configs, both, _ = trio
  workdirs = [shutil.copytree(w, tmp_path / str(i)) for i, w in enumerate(both)]
  before = [state_of(c, w) for c, w in zip(configs, both, strict=True)]
  # Stopped when the others had saved step 10.
  shutil.rmtree(workdirs[1] / 'checkpoints' / '10')
  assert together(configs, workdirs) == {}
  assert '3 runs together from step 5 of 10' in capsys.readouterr().out
  for config, workdir, expected in zip(configs, workdirs, before, strict=True):
    after = jax.tree.leaves(state_of(config, workdir))
    for a, b in zip(after, jax.tree.leaves(expected), strict=True):
      np.testing.assert_array_equal(a, b)
    assert [line['step'] for line in log_of(workdir)] == [2, 4, 6, 8, 10]


def test_one_that_diverges_is_told_of_and_the_others_go_on(
  digits_dir, tmp_path
):
  # As many as above: the program is in the compilation cache.
  configs = configs_of(
    digits_dir, {'optimizer__learning_rate': 1e30}, {'seed': 1}, {'seed': 2}
  )
  workdirs = [tmp_path / name for name in ('bad', 'good', 'other')]
  reported = together(configs, workdirs)
  assert list(reported) == [0]
  assert 'the loss is nan at step 2' in reported[0]
  assert not (workdirs[0] / 'checkpoints' / '10').exists()
  assert int(state_of(configs[1], workdirs[1]).step) == 10
  assert [line['step'] for line in log_of(workdirs[1])] == [2, 4, 6, 8, 10]


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'train__batch_size': 128}, 'alone .* train.batch_size is 256 there and'),
    ({'data__loader': 'stream'}, 'config.data.loader must keep the images'),
  ],
)
def test_what_cannot_train_together_is_refused(
  digits_dir, tmp_path, change, message
):
  first = change if 'data__loader' in change else {}
  configs = configs_of(digits_dir, first, change | {'seed': 1})
  with pytest.raises(ValueError, match=message):
    together(configs, [tmp_path / 'a', tmp_path / 'b'])
  assert not list(tmp_path.iterdir())
