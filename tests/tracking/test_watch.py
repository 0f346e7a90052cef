"""Tests of a watched training, read by TensorBoard's own reader."""

import json
import re
import shutil
import types

import jax
import numpy as np
import pytest

from clop_jax import evaluate
from clop_jax.data import augment
from clop_jax.data import loader
from clop_jax.experiment import build
from clop_jax.experiment import checkpoint
from clop_jax.experiment import inputs
from clop_jax.runtime import extras
from clop_jax.runtime import parallel
from clop_jax.runtime import preemption
from clop_jax.tracking import contact_sheet
from clop_jax.tracking import watch
from tests import small
from tests.commands.test_preview import cells
from tests.runtime import test_processes
from tests.tracking import events


def lines_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def values(log, tag):
  return [(event.step, event.value) for event in log.Scalars(tag)]


def final_state(config, workdir):
  mesh = parallel.make_mesh(jax.devices()[:1])
  built = build.build(config, total_steps=10, steps_per_epoch=5)
  with checkpoint.Checkpoints(f'{workdir}/checkpoints', read_only=True) as c:
    return c.restore_latest(build.abstract_state(built, mesh))


@pytest.fixture(scope='module')
def watched(digits_dir, tmp_path_factory, run):
  """A config with everything watched, and its workdir."""
  workdir = tmp_path_factory.mktemp('runs') / 'watched'
  config = small.digits_config(
    digits_dir,
    watch__images_every_epochs=1,
    watch__probe_every_epochs=1,
    watch__probe='both',
  )
  run(config, workdir)
  return config, workdir


def test_watching_does_not_change_the_training(
  watched, digits_dir, tmp_path, run
):
  config, workdir = watched
  plain = small.digits_config(digits_dir)
  run(plain, tmp_path, watched=False)
  jax.tree.map(
    np.testing.assert_array_equal,
    final_state(config, workdir),
    final_state(plain, tmp_path),
  )
  logs = [folder / 'metrics.jsonl' for folder in (workdir, tmp_path)]
  assert logs[0].read_bytes() == logs[1].read_bytes()
  assert {path.name for path in tmp_path.iterdir()} == {
    *['config.json', 'labels.npz', 'checkpoints', 'metrics.jsonl', '.lock']
  }


def test_tensorboard_has_every_number_of_the_log(watched):
  _, workdir = watched
  log = events.read(workdir)
  lines = lines_of(workdir / 'metrics.jsonl')
  assert [line['step'] for line in lines] == [2, 4, 6, 8, 10]
  for name in set(lines[0]) - {'step'}:
    assert values(log, f'train/{name}') == [
      (line['step'], pytest.approx(line[name], rel=1e-6)) for line in lines
    ]


def test_the_spectrum_is_that_of_unit_embeddings(watched):
  log = events.read(watched[1])
  spectra = log.Histograms('embeddings/singular_values')
  ranks = log.Scalars('embeddings/effective_rank')
  assert [event.step for event in spectra] == [5, 10]
  for event, rank in zip(spectra, ranks, strict=True):
    histogram = event.histogram_value
    assert histogram.num == sum(histogram.bucket) == 16  # the dimension
    assert histogram.min >= 0 and histogram.max <= 1
    # This is the mean square of a unit embedding.
    assert histogram.sum_squares == pytest.approx(1, abs=1e-5)
    assert 1 < rank.value < 16


def test_the_views_are_those_of_the_last_step(watched):
  config, workdir = watched
  event = events.read(workdir).Images('pictures/views')[-1]
  assert event.step == 10
  shown = cells(events.picture(event), side=8, scale=12)
  source = inputs.training_source(config)
  order = loader.Order(len(source), batch_size=256, seed=config.seed)
  # Step 10 begins with state.step == 9.
  index = order.indices(9)[:16]
  images = np.stack([source[i]['image'] for i in index.tolist()])
  keys = augment.example_keys(build.training_key(config), 9, index)
  views = augment.two_views(
    keys, images.reshape(16, 8, 8, 1), build.recipe(config)
  )
  views = np.asarray(views) * config.augment.std[0] + config.augment.mean[0]
  views = 255 * np.clip(views, 0, 1)
  triples = shown.reshape(16, 3, 8, 8, 3)[..., :1]
  np.testing.assert_array_equal(triples[:, 0], images.reshape(16, 8, 8, 1))
  for view in range(2):
    np.testing.assert_allclose(triples[:, 1 + view], views[view], atol=1)


def test_a_probe_equals_the_evaluation(watched):
  _, workdir = watched
  lines = lines_of(workdir / 'probe.jsonl')
  assert [line['step'] for line in lines] == [5, 10]
  request = evaluate.Request(str(workdir), devices=jax.devices()[:1])
  result = evaluate.evaluate(request).complete
  names = set(lines[1]) - {'step'}
  assert {'knn_top1', 'knn200_top1', 'linear_top1', 'linear_top5'} <= names
  log = events.read(workdir)
  for name in names:
    assert lines[1][name] == pytest.approx(result[name], abs=1e-6), name
    last = values(log, f'probe/{name}')[-1]
    assert last == (10, pytest.approx(result[name]))


def test_a_measure_that_does_not_exist_is_null(tmp_path, run):
  # With one image a class, no example is held out.
  rng = np.random.default_rng(0)
  arrays = {'train_labels': np.arange(16), 'test_labels': np.arange(16)}
  for split in ('train', 'test'):
    images = rng.integers(0, 256, (16, 8, 8, 1), np.uint8)
    arrays[f'{split}_images'] = images
  np.savez(tmp_path / 'one_each.npz', **arrays)
  config = small.digits_config(
    str(tmp_path / 'one_each.npz'),
    data__name='npz',
    data__num_classes=16,
    train__batch_size=16,
    train__num_epochs=1,
    eval__knn_neighbours=(1,),
    watch__probe_every_epochs=1,
    watch__probe='linear',
  )
  run(config, tmp_path / 'run')
  (line,) = lines_of(tmp_path / 'run' / 'probe.jsonl')
  assert line['linear_held_out_top1'] is None
  assert 0 <= line['linear_top1'] <= 1
  tags = events.read(tmp_path / 'run').Tags()['scalars']
  assert 'probe/linear_top1' in tags
  assert 'probe/linear_held_out_top1' not in tags


def test_a_resumed_run_shows_every_step_once(watched, tmp_path, run):
  config, workdir = watched
  copy = shutil.copytree(workdir, tmp_path / 'copy')
  shutil.rmtree(copy / 'checkpoints' / '10')
  # From a host whose clock is ahead; files are read in the order of names.
  (old,) = (copy / 'tensorboard').iterdir()
  old.rename(old.with_name('events.out.tfevents.9000000000.elsewhere'))
  run(config, copy)
  assert len(list((copy / 'tensorboard').iterdir())) == 2
  log, expected = events.read(copy), events.read(workdir)
  for tag in ('train/loss', 'probe/knn_top1', 'embeddings/effective_rank'):
    assert values(log, tag) == values(expected, tag)
  assert [event.step for event in log.Images('pictures/views')] == [5, 10]
  for name in ('probe.jsonl', 'metrics.jsonl'):
    assert (copy / name).read_text() == (workdir / name).read_text()
  every = events.read(copy, purge_orphaned_data=False)
  steps = [step for step, _ in values(every, 'train/loss')]
  assert steps == [2, 4, 6, 8, 10, 6, 8, 10]


def test_a_probe_prevented_by_preemption_is_made_up_for(
  digits_dir, tmp_path, monkeypatch, run
):
  config = small.digits_config(
    digits_dir,
    train__steps_per_dispatch=4,
    train__log_every_steps=10,
    train__checkpoint_every_epochs=2,
    watch__probe_every_epochs=1,  # of 5 steps; dispatches end at 4, 8 and 10
  )
  with monkeypatch.context() as patch:
    patch.setattr(
      preemption.Notice, 'reached', lambda self, steps: steps.stop == 8
    )
    with pytest.raises(preemption.PreemptionError, match='saved step 8 of 10'):
      run(config, tmp_path)
  assert lines_of(tmp_path / 'probe.jsonl') == []
  run(config, tmp_path)
  steps = [line['step'] for line in lines_of(tmp_path / 'probe.jsonl')]
  assert steps == [8, 10]


def test_an_unwritable_tensorboard_folder_is_refused_first(
  digits_dir, tmp_path, run
):
  (tmp_path / 'tensorboard').write_text('in the way')
  with pytest.raises(OSError, match=r'watch\.tensorboard.*/tensorboard'):
    run(small.digits_config(digits_dir), tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ['tensorboard']


@pytest.mark.usefixtures('collapse')
def test_a_collapse_is_reported_once(digits_dir, tmp_path, capsys, run):
  config = small.digits_config(
    digits_dir, watch__collapse_share=0.5, watch__collapse_patience=2
  )
  run(config, tmp_path)
  (warning,) = re.findall('collapsing: .*', capsys.readouterr().err)
  assert re.search(
    r' 2\.00 at step 4, .* since 2 .*below 5\.00.* 2 \* batch=512\); lower',
    warning,
  )
  (event,) = events.read(tmp_path).Tensors('warning/text_summary')
  assert event.step == 4
  assert b'collapsing' in event.tensor_proto.string_val[0]
  # A resumed run remembers the steps of the log.
  shutil.rmtree(tmp_path / 'checkpoints' / '10')
  run(config, tmp_path)
  assert 'collapsing' not in capsys.readouterr().err


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'data__test_split': ''}, r'=1 needs a test split.*data\.test_split'),
    ({'eval__batch_size': 0}, r'eval\.batch_size.*0'),
    (None, '=1 needs a test split.*custom source'),
  ],
)
def test_a_probe_without_its_data_is_refused(
  changes, message, digits_dir, tmp_path, run
):
  config = small.digits_config(
    digits_dir, watch__probe_every_epochs=1, **changes or {}
  )
  source = inputs.training_source(config) if changes is None else None
  with pytest.raises(ValueError, match=message):
    run(config, tmp_path / 'run', source=source)
  assert not (tmp_path / 'run').exists()


def test_a_missing_package_is_refused_with_its_extra(
  digits_dir, tmp_path, monkeypatch
):
  config = small.digits_config(digits_dir, watch__images_every_epochs=1)
  data = types.SimpleNamespace(steps_per_epoch=5)
  setup = types.SimpleNamespace(
    config=config, data=data, experiment=None, mesh=parallel.make_mesh()
  )
  monkeypatch.setattr(extras, 'is_installed', lambda name: name != 'matplotlib')
  with pytest.raises(ValueError, match=r'images_every_epochs=1.*\[track\]'):
    watch.Watch(setup, str(tmp_path))


def test_streamed_crops_can_be_watched(digits_dir, tmp_path, run):
  config = small.digits_config(
    digits_dir,
    data__loader='stream',
    data__num_workers=0,
    data__host_crops=True,
    train__num_epochs=1,
    watch__images_every_epochs=7,  # longer than the run: at its end
  )
  run(config, tmp_path)
  (sheet,) = events.read(tmp_path).Images('pictures/views')
  assert sheet.step == 5
  assert cells(events.picture(sheet), side=8, scale=12).shape[:2] == (4, 12)


@pytest.mark.parametrize(
  ('steps', 'every', 'passed'),
  [
    (range(2, 6), 5, True),
    (range(4, 5), 5, True),
    (range(5, 9), 5, False),
    (range(0, 20), 0, False),
  ],
)
def test_intervals_end_within_a_dispatch(steps, every, passed):
  assert watch._passed(steps, every) == passed


def test_failing_pictures_do_not_end_the_training(
  digits_dir, tmp_path, capsys, monkeypatch, run
):
  def fail(*_):
    raise RuntimeError('no room for it\nand much more')

  monkeypatch.setattr(contact_sheet.Sheets, 'draw', fail)
  config = small.digits_config(digits_dir, watch__images_every_epochs=1)
  run(config, tmp_path)
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('warning: ') and line.endswith(': no room for it')
  log = events.read(tmp_path)
  assert log.Tags()['images'] == []
  assert log.Scalars('train/loss')[-1].step == 10
  assert log.Tensors('warning/text_summary')[0].step == 5


def test_one_of_two_processes_writes(digits_dir, tmp_path):
  arguments = [
    *test_processes.flags_of(digits_dir, tmp_path / 'pair', epochs=1),
    '--config.watch.images_every_epochs=1',
    '--config.watch.probe_every_epochs=1',
  ]
  started = test_processes.start(arguments, processes=2)
  codes, outputs, errors = test_processes.finish(started)
  assert codes == [0, 0], errors
  assert 'step 5: knn_top1 0.' in outputs[0]
  assert 'knn' not in outputs[1]
  assert len(list((tmp_path / 'pair' / 'tensorboard').iterdir())) == 1
  log = events.read(tmp_path / 'pair')
  for name in ('pictures/views', 'pictures/embeddings'):
    assert [event.step for event in log.Images(name)] == [5]
  (line,) = lines_of(tmp_path / 'pair' / 'probe.jsonl')
  assert line['step'] == 5 and 0 < line['knn_top1'] < 1
