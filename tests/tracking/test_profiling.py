import gzip
import json
import re

import jax
import numpy as np
import pytest

from clop_jax import train
from clop_jax.experiment import build
from clop_jax.experiment import checkpoint
from clop_jax.runtime import parallel
from clop_jax.tracking import breakdown
from clop_jax.tracking import profiling
from tests import small

HLO = """HloModule jit_steps, is_scheduled=true

%fused (p.0: f32[8,8]) -> f32[8] {
  %p.0 = f32[8,8]{1,0} parameter(0)
  %convert.3 = f32[8,8]{1,0} convert(%p.0)
  ROOT %reduce.1 = f32[8]{0} reduce(%convert.3, %p.0), to_apply=%sum
}

%body (p.1: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p.1 = (s32[], f32[8,8]{1,0}) parameter(0)
  %gather.1 = f32[8,8]{1,0} gather(%p.1), metadata={op_name="jit(steps)/x/gather"}
  ROOT %add.1 = (s32[], f32[8,8]{1,0:T(8,128)}) add(%gather.1), metadata={op_name="jit(steps)/optimizer/add"}
}

ENTRY %main (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0), metadata={op_name="state.params[\\'a\\']"}
  %conv.1 = f32[8,8]{1,0} convolution(%a), metadata={op_name="jit(steps)/jvp(networks)/ResNet/conv1/conv_general_dilated"}
  %conv.2 = f32[8,8]{1,0} convolution(%a), metadata={op_name="jit(steps)/networks/dense/dot_general"}
  %fusion.1 = f32[8]{0} fusion(%conv.1), kind=kLoop, calls=%fused, metadata={op_name="jit(steps)/transpose(jvp(networks))/bn/reduce_sum"}
  %wgrad.1 = f32[8,8]{1,0} custom-call(%conv.1, %fusion.1), custom_call_target="__cudnn$convBackwardFilter"
  %copy.1 = f32[8,8]{1,0} copy(%conv.1)
  %copy.2 = f32[8,8]{1,0} copy(%a)
  %dot.1 = f32[8,8]{1,0} dot(%copy.1), metadata={op_name="jit(steps)/transpose(jvp(losses))/dot_general"}
  %xor.1 = u32[8]{0} xor(%a), metadata={op_name="jit(steps)/jvp(augmentation)/vmap(jit(_threefry_split))/xor"}
  %svd.1 = (f32[8,8]{1,0}, /*index=1*/f32[8]{0}) custom-call(%a), custom_call_target="lapack_sgesdd_ffi", metadata={op_name="jit(steps)/diagnostics/cond/branch_1_fun/svd"}
  %all-reduce.1 = f32[8]{0} all-reduce(%fusion.1), to_apply=%sum, metadata={op_name="jit(steps)/gradients/psum"}
  ROOT %while.1 = (s32[], f32[8,8]{1,0}) while(%a), condition=%c, body=%body, metadata={op_name="jit(steps)/prototypes/while"}
}
"""  # noqa: E501 (as XLA prints it)
PROGRAM = breakdown.read_program(HLO)
STATS = ('hlo_op', 'hlo_module', 'program_id', '_p', '_c', 'device_ordinal')


def trace(plane, lines):
  """A trace of one plane; events are (name, start, end, stats), in ns."""
  names, rows = [], []
  for line, events in lines.items():
    rows.append(f'lines {{ name: "{line}" timestamp_ns: 1000')
    for name, start, end, stats in events:
      names.append(name)
      rows.append(
        f'events {{ metadata_id: {len(names)} offset_ps: {start * 1000} '
        f'duration_ps: {(end - start) * 1000}'
      )
      for key, value in stats.items():
        kind = 'str' if isinstance(value, str) else 'int64'
        rows.append(
          f'stats {{ metadata_id: {STATS.index(key) + 1} '
          f'{kind}_value: {json.dumps(value)} }}'
        )
      rows.append('}')
    rows.append('}')
  for table, entries in (('event', names), ('stat', STATS)):
    rows += [
      f'{table}_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}'
      for i, name in enumerate(entries, 1)
    ]
  text = f'planes {{ name: "{plane}" {" ".join(rows)} }}'
  return jax.profiler.ProfileData.from_text_proto(text)


def op(name, start, end, **stats):
  known = {'hlo_op': name, 'hlo_module': 'jit_steps'}
  return name, start, end, known | stats


def broken_down(data, wall_ns, num_steps=1, programs=(PROGRAM,)):
  """Parts and kinds in nanoseconds a step, without zeros."""
  result = breakdown.break_down(
    breakdown.read_events(data),
    programs,
    wall_ns=wall_ns,
    num_steps=num_steps,
  )
  for shares in (result.parts, result.kinds):
    assert sum(shares.values()) == pytest.approx(result.wall)
  return [
    {k: round(v * 1e6, 3) for k, v in shares.items() if v > 1e-12}
    for shares in (result.parts, result.kinds)
  ]


@pytest.mark.parametrize(
  ('name', 'part', 'kind'),
  [
    ('conv.1', 'networks forward', 'convolution'),
    ('conv.2', 'networks forward', 'matrix product'),
    ('fusion.1', 'networks backward', 'reduction'),
    ('wgrad.1', 'networks backward', 'convolution'),  # by its last operand
    ('copy.1', 'networks forward', 'copy, transpose, layout'),
    ('copy.2', 'other', 'copy, transpose, layout'),
    ('dot.1', 'losses', 'matrix product'),
    ('xor.1', 'augmentation', 'random numbers, sort'),
    ('svd.1', 'diagnostics', 'decompositions'),
    ('all-reduce.1', 'networks backward', 'collectives'),
    ('while.1', 'prototypes', 'loops'),
    ('gather.1', 'other', 'gather, scatter'),
    ('add.1', 'optimizer', 'elementwise, batch norm'),
    ('all_reduce_1', 'networks backward', 'collectives'),  # as kernels' names
  ],
)
def test_an_operation_has_the_part_of_its_scope_and_the_kind_of_its_code(
  name, part, kind
):
  assert PROGRAM.module == 'jit_steps'
  assert PROGRAM.ops[name] == (part, kind)


def test_streams_of_a_gpu_share_what_they_do_at_the_same_time():
  data = trace(
    '/device:GPU:0',
    {
      'Stream #1(Compute)': [
        op('conv.1', 0, 100),
        op('wgrad.1', 100, 160),
        ('sm90_xmma_gemm_f32', 160, 170, {}),
        ('never_heard_of_it', 170, 175, {}),
      ],
      # Not told to be an operation, but a kernel of its name.
      'Stream #2(Comm)': [('all_reduce_1', 140, 160, {})],
      'Host Offload': [op('conv.1', 0, 1000)],
    },
  )
  parts, kinds = broken_down(data, wall_ns=400, num_steps=2)
  assert parts == {
    'networks forward': 50,
    'networks backward': 30,
    'other': 7.5,
    'host, idle': 112.5,
  }
  assert kinds == {
    'convolution': 75,
    'collectives': 5,
    'matrix product': 5,
    'other': 2.5,
    'host, idle': 112.5,
  }


def test_a_loop_of_a_tpu_is_not_counted_beside_what_runs_in_it():
  steps = '%{0} = f32[8] {1}(%a)'.format
  data = trace(
    '/device:TPU:0',
    {
      'XLA Modules': [('jit_steps(17)', 0, 100, {})],
      'XLA Ops': [
        (steps('while.1', 'while'), 0, 100, {}),
        (steps('add.1', 'add'), 10, 40, {}),
        (steps('gather.1', 'gather'), 40, 90, {}),
        # Unknown, and yet it encloses.
        (steps('custom.9', 'custom'), 100, 130, {}),
        (steps('conv.2', 'fusion'), 110, 115, {}),
      ],
    },
  )
  parts, kinds = broken_down(data, wall_ns=130)
  assert parts == {
    'prototypes': 20,
    'optimizer': 30,
    'other': 75,
    'networks forward': 5,
  }
  assert kinds['loops'] == 20 and kinds['gather, scatter'] == 50


def test_an_operation_of_a_cpu_lasts_until_other_threads_have_ended_it():
  data = trace(
    '/host:CPU',
    {
      'thread 1': [
        op('conv.1', 0, 10, _p=7, device_ordinal=0),
        op('dot.1', 60, 80, _p=8, device_ordinal=0),
        # A loop whose parts run in another thread.
        op('while.1', 100, 140, _p=9, device_ordinal=0),
      ],
      'thread 2': [
        ('end: conv.1', 79, 80, {'_c': 7}),
        ('ThreadpoolListener::Record', 0, 200, {}),
        op('add.1', 110, 130, _p=10, device_ordinal=0),
      ],
    },
  )
  parts, _ = broken_down(data, wall_ns=200)
  assert parts == {
    'networks forward': 70,
    'losses': 10,
    'prototypes': 20,
    'optimizer': 20,
    'host, idle': 80,
  }


def test_several_devices_count_as_their_mean():
  data = trace(
    '/host:CPU',
    {
      'thread 1': [op('conv.1', 0, 60, device_ordinal=0)],
      'thread 2': [op('conv.1', 0, 40, device_ordinal=1)],
    },
  )
  parts, _ = broken_down(data, wall_ns=100)
  assert parts == {'networks forward': 50, 'host, idle': 50}


def test_programs_of_one_name_are_told_apart_by_their_numbers():
  other = breakdown.read_program(HLO.replace('jvp(networks)', 'optimizer'))
  data = trace(
    '/device:GPU:0',
    {
      'Stream #1': [
        op('conv.1', 0, 10, program_id=31),
        op('conv.1', 10, 40, program_id=12),
        op('conv.1', 40, 45, program_id=31),
        ('conv.1', 45, 50, {'hlo_op': 'conv.1', 'hlo_module': 'jit_x'}),
      ]
    },
  )
  parts, _ = broken_down(data, wall_ns=50, programs=(PROGRAM, other))
  assert parts == {'networks forward': 15, 'optimizer': 30, 'other': 5}


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


def run(config, workdir, **arguments):
  train.train(config, str(workdir), devices=jax.devices()[:1], **arguments)


@pytest.fixture(scope='module')
def plain(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('plain')
  run(config, workdir)
  return workdir


def final_state(config, workdir):
  mesh = parallel.make_mesh(jax.devices()[:1])
  built = build.build(config, total_steps=8, steps_per_epoch=8)
  with checkpoint.Checkpoints(
    f'{workdir}/checkpoints', read_only=True
  ) as checkpoints:
    return checkpoints.restore_latest(build.abstract_state(built, mesh))


def shares(text):
  """The tables of a breakdown."""
  tables = text.split('\n\n')[1:]
  assert len(tables) == 2
  return [
    {
      name: float(share)
      for name, share in re.findall(r'^(\S.*?) +[\d.]+ +([\d.]+)%$', x, re.M)
    }
    for x in tables
  ]


def test_a_run_records_its_steps_and_ends_where_it_would_have(
  config, plain, tmp_path, capsys
):
  run(config, tmp_path, profile_steps=20)
  assert not (plain / 'profile').exists()
  text = (tmp_path / 'profile' / 'breakdown.txt').read_text()
  output = capsys.readouterr().out
  assert text in output and 'step 8/8: loss' in output
  assert text.startswith(
    'profile: 6 steps recorded, 3 to 8, in 3 dispatch(es) (--profile=20, but '
    'no more were left)\n'
  )
  parts, kinds = shares(text)
  for table in parts, kinds:
    assert sum(table.values()) == pytest.approx(100, abs=0.05 * len(table))
    assert list(table.values()) == sorted(table.values(), reverse=True)
    assert table['other'] < 10
  assert kinds['convolution'] > 1 and kinds['loops'] < kinds['convolution']
  assert set(parts) >= {
    'augmentation',
    'networks forward',
    'networks backward',
    'losses',
    'optimizer',
    'diagnostics',
  }

  (folder,) = (tmp_path / 'profile' / 'plugins' / 'profile').iterdir()
  with gzip.open(folder / 'perfetto_trace.json.gz') as file:
    events = json.load(file)['traceEvents']
  names = {event.get('name', '') for event in events}
  assert 'train' in names
  assert any(name.startswith('conv') for name in names)
  (path,) = folder.glob('*.xplane.pb')
  data = jax.profiler.ProfileData.from_file(str(path))
  host = data.find_plane_with_name('/host:CPU')
  names = {event.name for line in host.lines for event in line.events}
  assert not [name for name in names if 'compile' in name.lower()]

  jax.tree.map(
    np.testing.assert_array_equal,
    final_state(config, tmp_path),
    final_state(config, plain),
  )
  logs = [(w / 'metrics.jsonl').read_text() for w in (plain, tmp_path)]
  assert logs[0] == logs[1]


def test_a_trained_run_has_nothing_to_record(config, plain, capsys):
  run(config, plain, profile_steps=1)
  output = capsys.readouterr().out
  assert '--profile: nothing is recorded; no step is left of the run' in output
  assert not (plain / 'profile').exists()


@pytest.mark.parametrize(
  ('asked', 'recorded'),
  [
    (1, '2 steps recorded, 3 to 4, in 1 dispatch(es)\n'),
    (3, '4 steps recorded, 3 to 6, in 2 dispatch(es)\n'),
    (5, '5 steps recorded, 3 to 7, in 3 dispatch(es)\n'),
    (6, '5 steps recorded, 3 to 7, in 3 dispatch(es) (--profile=6, but'),
  ],
)
def test_dispatches_are_recorded_whole(asked, recorded, tmp_path, capsys):
  chunks = [range(2), range(2, 4), range(4, 6), range(6, 7)]
  compiled = jax.jit(lambda x: x @ x).lower(np.eye(4)).compile()
  recorder = profiling.Recorder(
    str(tmp_path), asked, chunks, lambda count: compiled
  )
  with recorder:
    for steps in chunks:
      state = compiled(np.eye(4))
      recorder.dispatched(steps, state)
      recorder.finished(steps, state)
  assert f'profile: {recorded}' in capsys.readouterr().out


def test_the_only_dispatch_of_a_run_is_not_recorded(tmp_path, capsys):
  recorder = profiling.Recorder(str(tmp_path), 3, [range(5, 10)], None)
  with recorder:
    recorder.dispatched(range(5, 10), None)
    recorder.finished(range(5, 10), None)
  assert 'nothing is recorded; only one dispatch' in capsys.readouterr().out
  assert not list(tmp_path.iterdir())


def test_a_run_that_is_told_to_end_ends_its_recording(tmp_path):
  chunks = [range(i, i + 1) for i in range(4)]
  for attempt in range(2):  # a second trace could not begin during the first
    recorder = profiling.Recorder(
      str(tmp_path / str(attempt)), 3, chunks, lambda count: None
    )
    with pytest.raises(InterruptedError), recorder:
      recorder.finished(chunks[0], np.zeros(1))
      raise InterruptedError


@pytest.mark.parametrize(
  ('steps', 'workdir', 'message'),
  [
    (0, 'new', '--profile must be at least 1 step, got 0'),
    (1, 'gs://bucket/run', 'local folders alone, got --workdir=gs://bucket'),
  ],
)
def test_what_cannot_be_recorded_is_refused(config, steps, workdir, message):
  with pytest.raises(ValueError, match=message):
    run(config, workdir, profile_steps=steps)
