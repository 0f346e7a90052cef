"""Tests of the recorded trace."""

import gzip
import json

import jax
import numpy as np
import pytest

from clop_jax.runtime import parallel
from clop_jax.tracking import profiling
from tests import small


@pytest.fixture(scope='module')
def config(digits_dir):
  # 8 steps in 4 dispatches.
  return small.digits_config(
    digits_dir,
    train__batch_size=179,
    train__num_epochs=1,
    train__steps_per_dispatch=2,
    optimizer__warmup_epochs=0,
  )


def test_a_recorded_run_trains_as_an_unrecorded_one(
  config, tmp_path, capsys, run
):
  for name, steps in (('plain', None), ('recorded', 3)):
    run(config, tmp_path / name, profile_steps=steps)
  assert not (tmp_path / 'plain' / 'profile').exists()
  logs = [
    (tmp_path / name / 'metrics.jsonl').read_text()
    for name in ('plain', 'recorded')
  ]
  assert logs[0] == logs[1]

  profile = tmp_path / 'recorded' / 'profile'
  (line,) = [x for x in capsys.readouterr().out.splitlines() if 'xprof' in x]
  assert f'steps 3 to 6 are in {profile};' in line
  (folder,) = (profile / 'plugins' / 'profile').iterdir()
  with gzip.open(folder / 'perfetto_trace.json.gz') as file:
    events = json.load(file)['traceEvents']
  names = {event.get('name', '') for event in events}
  assert 'train' in names
  assert any(name.startswith('dot') for name in names)
  (path,) = folder.glob('*.xplane.pb')
  assert jax.profiler.ProfileData.from_file(str(path)).find_plane_with_name(
    '/host:CPU'
  )


@pytest.fixture
def traces(monkeypatch):
  """Replaces traces by a list of their starts and stops."""
  calls = []
  for name in ('start_trace', 'stop_trace'):
    monkeypatch.setattr(
      jax.profiler, name, lambda *_, name=name, **__: calls.append(name)
    )
  return calls


def profile(workdir, num_steps, ends, last=None):
  """Profiles a run whose dispatches end at these steps."""
  with profiling.Profiler(str(workdir), num_steps) as profiler:
    profiler.started(range(0, last or ends[-1]), None)
    for start, stop in zip([0, *ends], ends, strict=False):
      profiler.reached(range(start, stop), np.zeros(1))


@pytest.mark.parametrize(
  ('num_steps', 'recorded'),
  [(1, '3 to 4'), (3, '3 to 6'), (5, '3 to 7'), (6, '3 to 7')],
)
def test_dispatches_are_recorded_whole(
  num_steps, recorded, tmp_path, traces, capsys
):
  profile(tmp_path, num_steps, [2, 4, 6, 7])
  assert traces == ['start_trace', 'stop_trace']
  assert f'profile: steps {recorded} are' in capsys.readouterr().out


def test_the_only_dispatch_of_a_run_is_not_recorded(tmp_path, traces, capsys):
  profile(tmp_path, 3, [5])
  assert traces == []
  assert 'nothing is recorded' in capsys.readouterr().out


def test_the_other_processes_record_nothing(
  tmp_path, traces, capsys, monkeypatch
):
  monkeypatch.setattr(parallel, 'is_main', lambda: False)
  profile(tmp_path, 3, [2, 4, 6])
  assert traces == [] and capsys.readouterr().out == ''


def test_the_trace_survives_preemption(tmp_path):
  for attempt in 'ab':  # a second trace could not start during the first
    with pytest.raises(InterruptedError):
      _interrupted(tmp_path / attempt)
    assert list((tmp_path / attempt).glob('profile/plugins/profile/*/*.pb'))


def _interrupted(workdir):
  with profiling.Profiler(str(workdir), 3) as profiler:
    profiler.started(range(9), None)
    for step in range(2):
      profiler.reached(range(step, step + 1), np.zeros(1))
    raise InterruptedError


@pytest.mark.parametrize(
  ('steps', 'workdir', 'message'),
  [
    (0, 'new', '--profile.* 0'),
    (1, 'gs://bucket/run', '--workdir=gs://bucket/run'),
    (1, 'caf\udce9', r'--workdir=caf\\udce9'),
  ],
)
def test_bad_arguments_are_refused(steps, workdir, message):
  with pytest.raises(ValueError, match=message):
    profiling.Profiler(workdir, steps)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
  (tmp_path / 'profile').write_text('in the way')
  with pytest.raises(OSError, match=r'--profile=2: .*profile'):
    profiling.Profiler(str(tmp_path), 2)
