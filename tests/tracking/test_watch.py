"""Tests of a watched training, read by TensorBoard's own reader."""

import json
import re
import shutil
import types

import jax
import numpy as np
import pytest

from clop_jax import evaluate
from clop_jax import train
from clop_jax.data import augment
from clop_jax.data import loader
from clop_jax.experiment import build
from clop_jax.experiment import checkpoint
from clop_jax.experiment import inputs
from clop_jax.experiment import workdir as workdir_lib
from clop_jax.runtime import extras
from clop_jax.runtime import parallel
from clop_jax.runtime import preemption
from clop_jax.study import cell
from clop_jax.tracking import pictures
from clop_jax.tracking import watch
from tests import small
from tests.commands.test_preview import cells
from tests.runtime import test_processes
from tests.tracking import events

WATCHED = {
  'watch__images_every_epochs': 1,
  'watch__probe_every_epochs': 1,
  'watch__probe': 'both',
}


def run(config, workdir, **arguments):
  train.train(config, str(workdir), devices=jax.devices()[:1], **arguments)


def lines_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def final_state(config, workdir):
  mesh = parallel.make_mesh(jax.devices()[:1])
  built = build.build(config, total_steps=10, steps_per_epoch=5)
  with checkpoint.Checkpoints(f'{workdir}/checkpoints', read_only=True) as c:
    return c.restore_latest(build.abstract_state(built, mesh))


@pytest.fixture(scope='module')
def watched(digits_dir, tmp_path_factory):
  """A config and its workdir, with everything watched."""
  workdir = tmp_path_factory.mktemp('runs') / 'watched'
  config = small.digits_config(digits_dir, **WATCHED)
  run(config, workdir)
  return config, workdir


@pytest.fixture
def copy(watched, tmp_path):
  config, workdir = watched
  return config, shutil.copytree(workdir, tmp_path / 'copy')


def test_watching_changes_nothing_of_what_is_trained(
  watched, digits_dir, tmp_path
):
  config, workdir = watched
  plain = small.digits_config(digits_dir)
  run(plain, tmp_path / 'plain', watched=False)
  jax.tree.map(
    np.testing.assert_array_equal,
    final_state(config, workdir),
    final_state(plain, tmp_path / 'plain'),
  )
  logs = [w / 'metrics.jsonl' for w in (workdir, tmp_path / 'plain')]
  assert logs[0].read_bytes() == logs[1].read_bytes()
  names = {path.name for path in (tmp_path / 'plain').iterdir()}
  assert names == {'config.json', 'labels.npz', 'checkpoints'} | {
    'metrics.jsonl',
    '.lock',
  }


def test_tensorboard_has_every_number_of_the_log(watched):
  _, workdir = watched
  log = events.read(workdir)
  lines = lines_of(workdir / 'metrics.jsonl')
  assert [line['step'] for line in lines] == [2, 4, 6, 8, 10]
  for name in set(lines[0]) - {'step'}:
    scalars = log.Scalars(f'train/{name}')
    assert [event.step for event in scalars] == [2, 4, 6, 8, 10]
    assert [event.value for event in scalars] == pytest.approx(
      [line[name] for line in lines], rel=1e-6
    )


def test_the_spectrum_is_that_of_unit_embeddings(watched):
  log = events.read(watched[1])
  spectra = log.Histograms('embeddings/singular_values')
  ranks = log.Scalars('embeddings/effective_rank')
  assert [event.step for event in spectra] == [5, 10]
  assert [event.step for event in ranks] == [5, 10]
  for event, rank in zip(spectra, ranks, strict=True):
    values = event.histogram_value
    assert values.num == sum(values.bucket) == 16  # the embeddings' dimension
    assert values.min >= 0 and values.max <= 1
    # The squares' sum is the mean square of a unit embedding.
    assert values.sum_squares == pytest.approx(1, abs=1e-5)
    assert 1 < rank.value < 16


def test_the_views_are_those_of_the_step_before(watched):
  config, workdir = watched
  event = events.read(workdir).Images('pictures/views')[-1]
  assert event.step == 10
  shown = cells(events.picture(event), side=8, scale=12)
  source = inputs.training_source(config)
  order = loader.Order(len(source), batch_size=256, seed=config.seed)
  # Step 10 is the one that begins with state.step == 9.
  index = order.indices(9)[:16]
  images = np.stack([source[i]['image'] for i in index.tolist()])
  keys = augment.example_keys(build.training_key(config), 9, index)
  views = augment.two_views(
    keys, images.reshape(16, 8, 8, 1), build.recipe(config)
  )
  views = np.asarray(views) * config.augment.std[0] + config.augment.mean[0]
  views = 255 * np.clip(views, 0, 1)
  assert shown.shape[:2] == (4, 12)
  for position in range(16):
    row, column = divmod(position, 4)
    triple = shown[row, 3 * column : 3 * column + 3, :, :, :1]
    np.testing.assert_array_equal(triple[0], images[position].reshape(8, 8, 1))
    np.testing.assert_allclose(triple[1:], views[:, position], atol=1)


def test_a_probe_is_what_the_evaluation_measures(watched):
  _, workdir = watched
  lines = lines_of(workdir / 'probe.jsonl')
  assert [line['step'] for line in lines] == [5, 10]
  request = evaluate.Request(str(workdir), devices=jax.devices()[:1])
  result = evaluate.evaluate(request).complete
  assert result['step'] == 10
  names = set(lines[1]) - {'step'}
  assert {'knn_top1', 'knn200_top1', 'linear_top1', 'linear_top5'} <= names
  log = events.read(workdir)
  for name in names:
    assert lines[1][name] == pytest.approx(result[name], abs=1e-6), name
    last = log.Scalars(f'probe/{name}')[-1]
    assert (last.step, last.value) == (10, pytest.approx(result[name]))


def test_a_probe_with_nothing_to_choose_by_does_not_end_the_training(tmp_path):
  # One image a class: no strength can be chosen, and there is no accuracy that
  # it was chosen by.
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
    model__embedding_dim=16,
    eval__knn_neighbours=(1,),
    watch__probe_every_epochs=1,
    watch__probe='linear',
  )
  run(config, tmp_path / 'run')
  lines = lines_of(tmp_path / 'run' / 'probe.jsonl')
  assert [line['step'] for line in lines] == [1, 2]
  for line in lines:
    assert line['linear_held_out_top1'] is None
    assert 0 <= line['linear_top1'] <= 1
  log = events.read(tmp_path / 'run')
  tags = log.Tags()['scalars']
  assert 'probe/linear_top1' in tags
  assert 'probe/linear_held_out_top1' not in tags


def test_resuming_leaves_every_step_once(copy, watched):
  config, workdir = copy
  shutil.rmtree(workdir / 'checkpoints' / '10')
  # Of a host whose clock is ahead; files are read in the order of their names.
  (old,) = (workdir / 'tensorboard').iterdir()
  old.rename(old.with_name('events.out.tfevents.9000000000.elsewhere'))
  run(config, workdir)
  assert len(list((workdir / 'tensorboard').iterdir())) == 2
  log = events.read(workdir)
  expected = events.read(watched[1])
  for name in ('train/loss', 'probe/knn_top1', 'embeddings/effective_rank'):
    assert [(e.step, e.value) for e in log.Scalars(name)] == [
      (e.step, e.value) for e in expected.Scalars(name)
    ]
  assert [e.step for e in log.Images('pictures/views')] == [5, 10]
  assert [e.step for e in log.Histograms('embeddings/singular_values')] == [
    5,
    10,
  ]
  for name in ('probe.jsonl', 'metrics.jsonl'):
    assert (workdir / name).read_text() == (watched[1] / name).read_text()
  # They are there twice, and hidden.
  every = events.read(workdir, purge_orphaned_data=False)
  steps = [e.step for e in every.Scalars('train/loss')]
  assert steps == [2, 4, 6, 8, 10, 6, 8, 10]


def test_a_probe_due_within_a_dispatch_is_made_up_for_at_its_end(
  digits_dir, tmp_path, monkeypatch
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


def test_a_tensorboard_folder_that_cannot_be_written_to_is_named(
  digits_dir, tmp_path
):
  (tmp_path / 'tensorboard').write_text('in the way')
  config = small.digits_config(digits_dir)
  with pytest.raises(OSError, match=r'watch\.tensorboard.*/tensorboard'):
    run(config, tmp_path)
  # Nothing was begun.
  assert [path.name for path in tmp_path.iterdir()] == ['tensorboard']


@pytest.mark.usefixtures('collapse')
def test_a_collapse_is_reported_once(digits_dir, tmp_path, capsys):
  config = small.digits_config(
    digits_dir, watch__collapse_share=0.5, watch__collapse_patience=2
  )

  def warned():
    run(config, tmp_path)
    errors = capsys.readouterr().err
    return re.findall(
      r'collapsing: .* 2\.00 at step (\d+), .* since (\d+) .*below 5\.00.* '
      r'2 \* batch=512\); lower',
      errors,
    )

  assert warned() == [('4', '2')]
  (event,) = events.read(tmp_path).Tensors('warning/text_summary')
  assert event.step == 4
  assert b'collapsing' in event.tensor_proto.string_val[0]
  # A run that resumes at step 5 remembers steps 2 and 4 of the log.
  for patience, expected in ((2, []), (3, [('6', '2')])):
    shutil.rmtree(tmp_path / 'checkpoints' / '10')
    config.watch.collapse_patience = patience
    assert warned() == expected


@pytest.mark.parametrize(
  ('changes', 'own_source', 'message'),
  [
    (
      {'data__test_split': ''},
      False,
      r'=1 needs a test split.*data\.test_split',
    ),
    ({'eval__batch_size': 0}, False, r'eval\.batch_size.*0'),
    ({}, True, '=1 needs a test split.*source of your own'),
  ],
)
def test_a_probe_without_its_data_is_refused(
  changes, own_source, message, digits_dir, tmp_path
):
  config = small.digits_config(
    digits_dir, watch__probe_every_epochs=1, **changes
  )
  source = inputs.training_source(config) if own_source else None
  with pytest.raises(ValueError, match=message):
    run(config, tmp_path / 'run', source=source)
  assert not (tmp_path / 'run').exists()


def test_a_missing_library_is_refused_with_its_extra(
  digits_dir, tmp_path, monkeypatch
):
  config = small.digits_config(digits_dir, watch__images_every_epochs=1)
  data = types.SimpleNamespace(steps_per_epoch=5)
  setup = types.SimpleNamespace(config=config, data=data)
  monkeypatch.setattr(extras, 'is_installed', lambda name: name != 'matplotlib')
  with pytest.raises(ValueError, match=r'images_every_epochs=1.*\[track\]'):
    watch.Watch(setup, str(tmp_path))


def test_a_study_refuses_a_probe_that_it_would_not_make(digits_dir):
  config = small.digits_config(digits_dir, watch__probe_every_epochs=1)
  _, fault = cell.check({'a': workdir_lib.to_json(config)})
  assert 'cell a: config.watch.probe_every_epochs must be 0: the cells' in fault


def test_streamed_crops_can_be_watched(digits_dir, tmp_path):
  config = small.digits_config(
    digits_dir,
    data__loader='stream',
    data__num_workers=0,
    data__host_crops=True,
    train__num_epochs=1,
    watch__images_every_epochs=7,  # longer than the run: at its end
    watch__probe_every_epochs=1,
  )
  run(config, tmp_path)
  log = events.read(tmp_path)
  (sheet,) = log.Images('pictures/views')
  assert sheet.step == 5
  assert cells(events.picture(sheet), side=8, scale=12).shape[:2] == (4, 12)
  (line,) = lines_of(tmp_path / 'probe.jsonl')
  assert line['step'] == 5 and 0 < line['knn_top1'] < 1
  assert 'linear_top1' not in line


def test_what_is_due_within_a_dispatch_comes_at_its_end():
  assert watch._passed(range(2, 6), 5)
  assert watch._passed(range(4, 5), 5)
  assert not watch._passed(range(5, 9), 5)
  assert watch._passed(range(0, 20), 5)
  assert not watch._passed(range(0, 20), 0)


@pytest.fixture
def compilations(monkeypatch):
  """Lists attempts to compile what draws; all of them fail."""
  begun = []

  def fail(drawing):
    begun.append(drawing)
    raise RuntimeError('no room for it\nand much more')

  monkeypatch.setattr(pictures.Pictures, '_compile', fail)
  return begun


def test_what_cannot_be_compiled_ends_the_pictures_and_not_the_training(
  compilations, digits_dir, tmp_path, capsys
):
  run(
    small.digits_config(
      digits_dir,
      watch__images_every_epochs=1,
      watch__probe_every_epochs=1,
    ),
    tmp_path,
  )
  assert len(compilations) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line == (
    'warning: no pictures: what draws them cannot be compiled (RuntimeError: '
    'no room for it)'
  )
  log = events.read(tmp_path)
  assert log.Tags()['images'] == []
  for tag in ('train/loss', 'probe/knn_top1'):
    assert log.Scalars(tag)[-1].step == 10
  assert log.Tensors('warning/text_summary')[0].step == 5


def test_nothing_is_compiled_for_pictures_that_will_not_be(
  compilations, watched, digits_dir, tmp_path, monkeypatch
):
  config, workdir = watched
  with (
    workdir_lib.locked(tmp_path / 'used'),
    pytest.raises(ValueError, match='is in use by another run'),
  ):
    run(config, tmp_path / 'used')
  run(config, workdir)  # already trained
  assert compilations == []
  config = small.digits_config(
    digits_dir, watch__images_every_epochs=2, train__num_epochs=3
  )
  with monkeypatch.context() as patch:
    patch.setattr(
      preemption.Notice, 'reached', lambda self, steps: steps.stop == 12
    )
    with pytest.raises(preemption.PreemptionError, match='saved step 12'):
      run(config, tmp_path / 'stopped')  # after the pictures of step 10
  assert len(compilations) == 1
  run(config, tmp_path / 'stopped')
  assert len(compilations) == 1


def test_two_processes_write_one_of_each(digits_dir, tmp_path):
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
