"""What a person can see of a run, read by TensorBoard's own reader and others'.

And that watching changes nothing of what is trained.
"""

from importlib import machinery
import io
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys

from etils import epath
import fsspec
import jax
import numpy as np
from PIL import Image
import pytest
from tensorboard.backend.event_processing import event_accumulator

from clop_jax import evaluate
from clop_jax import train
from clop_jax.data import augment
from clop_jax.data import loader
from clop_jax.experiment import build
from clop_jax.experiment import checkpoint
from clop_jax.experiment import inputs
from clop_jax.experiment import metrics_log
from clop_jax.experiment import workdir as workdir_lib
from clop_jax.runtime import parallel
from clop_jax.runtime import preemption
from clop_jax.study import cell
from clop_jax.tracking import collapse_alarm
from clop_jax.tracking import pictures
from clop_jax.tracking import tensorboard
from clop_jax.tracking import wandb as wandb_log
from clop_jax.tracking import watch
from tests import small
from tests.runtime import test_processes
from tests.experiment import test_workdir
from tests.commands.test_preview import cells

WATCHED = {
  'watch__images_every_epochs': 1,
  'watch__probe_every_epochs': 1,
  'watch__probe': 'both',
}


def run(config, workdir, **arguments):
  train.train(config, str(workdir), devices=jax.devices()[:1], **arguments)


def events_of(workdir, **options):
  """All events of a workdir, as TensorBoard has them."""
  reader = event_accumulator.EventAccumulator(
    str(workdir / 'tensorboard'),
    size_guidance={'images': 0, 'histograms': 0, 'scalars': 0, 'tensors': 0},
    **options,
  )
  return reader.Reload()


def lines_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def final_state(config, workdir):
  mesh = parallel.make_mesh(jax.devices()[:1])
  built = build.build(config, total_steps=10, steps_per_epoch=5)
  with checkpoint.Checkpoints(f'{workdir}/checkpoints', read_only=True) as c:
    return c.restore_latest(build.abstract_state(built, mesh))


def picture_of(event):
  image = Image.open(io.BytesIO(event.encoded_image_string))
  assert (image.width, image.height) == (event.width, event.height)
  return np.asarray(image.convert('RGB'))


@pytest.fixture(scope='module')
def watched(digits_dir, tmp_path_factory):
  """A config and its workdir, watched with all there is."""
  workdir = tmp_path_factory.mktemp('runs') / 'watched'
  config = small.digits_config(digits_dir, **WATCHED)
  run(config, workdir)
  return config, workdir


@pytest.fixture
def copy(watched, tmp_path):
  config, workdir = watched
  return config, shutil.copytree(workdir, tmp_path / 'copy')


def test_a_run_shorter_than_the_interval_has_pictures_at_its_end(
  digits_dir, tmp_path
):
  run(small.digits_config(digits_dir, watch__images_every_epochs=7), tmp_path)
  shown = events_of(tmp_path)
  for tag in shown.Tags()['images']:
    assert [event.step for event in shown.Images(tag)] == [10]
  assert len(shown.Tags()['images']) == 2


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
  events = events_of(workdir)
  lines = lines_of(workdir / 'metrics.jsonl')
  assert [line['step'] for line in lines] == [2, 4, 6, 8, 10]
  for name in set(lines[0]) - {'step'}:
    scalars = events.Scalars(f'train/{name}')
    assert [event.step for event in scalars] == [2, 4, 6, 8, 10]
    assert [event.value for event in scalars] == pytest.approx(
      [line[name] for line in lines], rel=1e-6
    )


def test_the_spectrum_is_that_of_unit_embeddings(watched):
  events = events_of(watched[1])
  spectra = events.Histograms('embeddings/singular_values')
  ranks = events.Scalars('embeddings/effective_rank')
  assert [event.step for event in spectra] == [5, 10]
  assert [event.step for event in ranks] == [5, 10]
  for event, rank in zip(spectra, ranks, strict=True):
    values = event.histogram_value
    assert values.num == sum(values.bucket) == 16  # the embeddings' dimension
    assert values.min >= 0 and values.max <= 1
    # The squares' sum is the mean square of a unit embedding.
    assert values.sum_squares == pytest.approx(1, abs=1e-5)
    assert 1 < rank.value < 16


def test_the_pictures_can_be_looked_at(watched):
  events = events_of(watched[1])
  for event in events.Images('pictures/embeddings'):
    picture = picture_of(event)
    assert picture.shape[1] > picture.shape[0] > 300
    colours = np.unique(picture.reshape(-1, 3), axis=0)
    # Paper, lines and text, bars, and the other colours of the classes.
    assert len(colours) > 6


def test_the_views_are_those_of_the_step_before(watched):
  config, workdir = watched
  event = events_of(workdir).Images('pictures/views')[-1]
  assert event.step == 10
  shown = cells(picture_of(event), side=8, scale=12)
  source = inputs.training_source(config)
  order = loader.Order(len(source), batch_size=256, seed=config.seed)
  # Step 10 is the one that begins with state.step == 9.
  index = order.indices(9)[:16]
  images = np.stack([source[i]['image'] for i in index.tolist()])
  keys = augment.example_keys(build.training_key(config), 9, index)
  views = augment.two_views(
    keys, images.reshape(16, 8, 8, 1), **config.augment.to_dict()
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
  events = events_of(workdir)
  for name in names:
    assert lines[1][name] == pytest.approx(result[name], abs=1e-6), name
    last = events.Scalars(f'probe/{name}')[-1]
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
  events = events_of(tmp_path / 'run')
  tags = events.Tags()['scalars']
  assert 'probe/linear_top1' in tags
  assert 'probe/linear_held_out_top1' not in tags


def test_going_on_leaves_every_step_once(copy, watched):
  config, workdir = copy
  shutil.rmtree(workdir / 'checkpoints' / '10')
  # Of a host whose clock is ahead; files are read in the order of their names.
  (old,) = (workdir / 'tensorboard').iterdir()
  old.rename(old.with_name('events.out.tfevents.9000000000.elsewhere'))
  run(config, workdir)
  assert len(list((workdir / 'tensorboard').iterdir())) == 2
  events = events_of(workdir)
  expected = events_of(watched[1])
  for name in ('train/loss', 'probe/knn_top1', 'embeddings/effective_rank'):
    assert [(e.step, e.value) for e in events.Scalars(name)] == [
      (e.step, e.value) for e in expected.Scalars(name)
    ]
  assert [e.step for e in events.Images('pictures/views')] == [5, 10]
  assert [e.step for e in events.Histograms('embeddings/singular_values')] == [
    5,
    10,
  ]
  for name in ('probe.jsonl', 'metrics.jsonl'):
    assert (workdir / name).read_text() == (watched[1] / name).read_text()
  # They are there twice, and hidden.
  every = events_of(workdir, purge_orphaned_data=False)
  steps = [e.step for e in every.Scalars('train/loss')]
  assert steps == [2, 4, 6, 8, 10, 6, 8, 10]


def test_the_probe_of_a_run_that_was_told_to_end_is_made_up_for(copy, watched):
  config, workdir = copy
  shutil.rmtree(workdir / 'checkpoints' / '10')
  (workdir / 'probe.jsonl').unlink()
  run(config, workdir)
  assert lines_of(workdir / 'probe.jsonl') == lines_of(
    watched[1] / 'probe.jsonl'
  )


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
  workdir = tmp_path / 'run'
  workdir.mkdir()
  (workdir / 'tensorboard').write_text('in the way')
  config = small.digits_config(digits_dir, train__num_epochs=1)
  message = (
    r"TensorBoard's events cannot be written to .*run/tensorboard \(.*\); make "
    'it writable, or pass --config.watch.tensorboard=false'
  )
  with pytest.raises(OSError, match=message) as caught:
    run(config, workdir)
  assert str(caught.value).startswith('TensorBoard')
  # Nothing was begun.
  assert [path.name for path in workdir.iterdir()] == ['tensorboard']
  # The way out, in the workdir that another value of it has made.
  config.unlock().watch.tensorboard = False
  run(config.lock(), workdir)
  assert (workdir / 'checkpoints' / '5').exists()
  assert (workdir / 'tensorboard').read_text() == 'in the way'


def test_a_disk_that_fills_up_is_an_error_where_it_happens(tmp_path):
  file = tensorboard.EventFile(str(tmp_path), start=0)
  file._records.close()
  with open('/dev/full', 'wb', buffering=0) as full:
    file._records._writer = full
    with pytest.raises(OSError, match='No space left'):
      file.scalars(1, {'a': 1.0})


@pytest.fixture
def collapse(monkeypatch):
  """A training whose embeddings have an effective rank of 2, it seems."""
  floats = metrics_log.to_floats
  monkeypatch.setattr(
    metrics_log, 'to_floats', lambda x: floats(x) | {'effective_rank': 2.0}
  )


@pytest.mark.usefixtures('collapse')
def test_a_collapse_is_told_of_once_and_in_tensorboard(
  digits_dir, tmp_path, capsys
):
  config = small.digits_config(
    digits_dir, watch__collapse_share=0.5, watch__collapse_patience=3
  )
  run(config, tmp_path)
  errors = capsys.readouterr().err
  assert errors.count('the embeddings are collapsing') == 1
  expected = (
    'their effective rank is 2.00 at step 6, and on all 3 logged '
    'steps since 2 it was below 5.00, that is 0.5 of min(num_classes=10, '
    'dim=16, 2 * batch=512); lower config.optimizer.learning_rate or raise '
    'config.loss.clop_weight, 1 now, but not to 3 or more\n'
  )
  assert expected in errors
  (event,) = events_of(tmp_path).Tensors('warning/text_summary')
  assert event.step == 6
  assert expected.strip() in event.tensor_proto.string_val[0].decode()


@pytest.mark.usefixtures('collapse')
@pytest.mark.parametrize(('patience', 'told_at'), [(2, []), (3, [6])])
def test_a_run_that_goes_on_remembers_what_it_was_told_before(
  patience, told_at, digits_dir, tmp_path, capsys
):
  config = small.digits_config(
    digits_dir, watch__collapse_share=0.5, watch__collapse_patience=patience
  )
  run(config, tmp_path)
  shutil.rmtree(tmp_path / 'checkpoints' / '10')
  capsys.readouterr()
  run(config, tmp_path)  # from step 5: steps 2 and 4 are in the log
  errors = capsys.readouterr().err
  steps = re.findall(r'their effective rank is 2.00 at step (\d+)', errors)
  assert [int(step) for step in steps] == told_at
  assert not told_at or 'on all 3 logged steps since 2' in errors


def alarm_of(**changes):
  options = {'num_classes': 10, 'dim': 128, 'batch_size': 64}
  options |= {'share': 0.5, 'patience': 2}
  options |= {'clop_weight': 1.0, 'contrastive': 'nt_xent'}
  return collapse_alarm.CollapseAlarm(**options | changes)


def hear(ranks, **changes):
  alarm = alarm_of(**changes)
  told = [alarm.hear(step, rank) for step, rank in enumerate(ranks)]
  return [step for step, text in enumerate(told) if text is not None]


@pytest.mark.parametrize(
  ('weight', 'contrastive', 'advice'),
  [
    (
      0,
      'nt_xent',
      'lower config.optimizer.learning_rate or raise config.loss.clop_weight, '
      '0 now, but not to 3 or more',
    ),
    (
      3,
      'supcon',
      'lower config.loss.clop_weight, 3 now (3 and more can collapse by '
      'themselves), or set config.loss.clop_after_epochs=1, or lower '
      'config.optimizer.learning_rate',
    ),
    # A loss of this size needs weights of another order.
    (
      10,
      'vicreg',
      'lower config.optimizer.learning_rate or raise config.loss.clop_weight',
    ),
    (1, 'none', 'lower config.optimizer.learning_rate'),
  ],
)
def test_the_way_out_of_a_collapse_goes_by_the_weight(
  weight, contrastive, advice
):
  alarm = alarm_of(patience=1, clop_weight=weight, contrastive=contrastive)
  assert alarm.hear(1, 2.0).split('); ', 1)[1] == advice


def test_the_alarm_counts_steps_in_a_row_and_starts_anew_after_a_recovery():
  assert hear([4, 6, 4, 6, 4]) == []
  assert hear([4, 4, 4, 4, 4]) == [1]
  assert hear([4, 4, 6, 4, 4]) == [1, 4]
  assert hear([5, 5, 5]) == []  # at the bound
  # A rank that nobody knows says nothing either way.
  assert hear([4, math.nan, 4, math.nan]) == [2]
  assert hear([0, 0, 0], share=0) == []


def test_the_alarm_expects_no_more_than_there_can_be():
  assert hear([9, 9], dim=16, num_classes=20) == []
  assert hear([7, 7], dim=16, num_classes=20) == [1]
  assert hear([7, 7], batch_size=4, num_classes=20) == []
  assert hear([3, 3], batch_size=4, num_classes=20) == [1]


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'watch__images_every_epochs': -1},
      r'watch\.images_every_epochs.*got -1',
    ),
    (
      {'watch__probe_every_epochs': -2},
      r'watch\.probe_every_epochs.*got -2',
    ),
    (
      {'watch__probe': 'svm'},
      r"watch.probe must be one of \['knn', 'linear', 'both'\], got 'svm'",
    ),
    (
      {'watch__collapse_share': 1.5},
      r'watch\.collapse_share.*got 1\.5',
    ),
    (
      {'watch__collapse_patience': 0},
      r'watch\.collapse_patience.*got 0',
    ),
    (
      {'watch__probe_every_epochs': 1, 'data__test_split': ''},
      'probe_every_epochs=1 needs a test split, and config.data.test_split is '
      'empty; set it to 0 and evaluate afterwards',
    ),
    (
      {'watch__probe_every_epochs': 1, 'eval__batch_size': 0},
      r'eval\.batch_size.*got 0',
    ),
  ],
)
def test_a_wrong_field_is_refused_before_anything_is_written(
  changes, message, digits_dir, tmp_path
):
  config = small.digits_config(digits_dir, **changes)
  with pytest.raises(ValueError, match=message):
    run(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_a_probe_of_a_source_of_ones_own_is_refused(digits_dir, tmp_path):
  config = small.digits_config(digits_dir, watch__probe_every_epochs=1)
  source = inputs.training_source(config)
  message = 'needs a test split, and a source of your own comes without one'
  with pytest.raises(ValueError, match=message):
    run(config, tmp_path / 'run', source=source)
  assert not (tmp_path / 'run').exists()


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
    watch__images_every_epochs=1,
    watch__probe_every_epochs=1,
  )
  run(config, tmp_path)
  events = events_of(tmp_path)
  (sheet,) = events.Images('pictures/views')
  assert sheet.step == 5
  assert cells(picture_of(sheet), side=8, scale=12).shape[:2] == (4, 12)
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
  """Of what draws, which fail."""
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
  events = events_of(tmp_path)
  assert events.Tags()['images'] == []
  for tag in ('train/loss', 'probe/knn_top1'):
    assert events.Scalars(tag)[-1].step == 10
  assert events.Tensors('warning/text_summary')[0].step == 5


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
  events = events_of(tmp_path / 'pair')
  for name in ('pictures/views', 'pictures/embeddings'):
    assert [event.step for event in events.Images(name)] == [5]
  (line,) = lines_of(tmp_path / 'pair' / 'probe.jsonl')
  assert line['step'] == 5 and 0 < line['knn_top1'] < 1


def test_a_remote_folder_gets_the_whole_file(tmp_path):
  fsspec.register_implementation('s3', test_workdir.Bucket, clobber=True)
  folder = f's3://bucket/{tmp_path.name}/tensorboard'
  try:
    file = tensorboard.EventFile(folder, start=0)
    for step in range(3):
      file.scalars(step, {'train/loss': 2.0 * step})
    file.close()
    (remote,) = epath.Path(folder).iterdir()
    (tmp_path / 'tensorboard').mkdir()
    (tmp_path / 'tensorboard' / remote.name).write_bytes(remote.read_bytes())
  finally:
    test_workdir.Bucket.store.clear()
  scalars = events_of(tmp_path).Scalars('train/loss')
  assert [(e.step, e.value) for e in scalars] == [(0, 0), (1, 2), (2, 4)]


@pytest.mark.parametrize('spectrum', [np.r_[1.0, np.full(99, 1e-9)], [0.5]])
def test_the_histogram_of_a_collapse_has_few_bins(spectrum, tmp_path):
  file = tensorboard.EventFile(str(tmp_path / 'tensorboard'), start=0)
  file.histogram(3, 'values', np.asarray(spectrum))
  file.close()
  (event,) = events_of(tmp_path).Histograms('values')
  values = event.histogram_value
  assert len(values.bucket) <= 51 and sum(values.bucket) == len(spectrum)
  assert values.max == np.max(spectrum)


def test_figures_are_drawn_without_a_display(tmp_path):
  # On the backend that would want one.
  code = """
import sys
import numpy as np
from clop_jax.evaluation import figures
rng = np.random.default_rng(0)
z = rng.normal(size=(30, 4))
figures.embedding_figure(
  sys.argv[1], ['a'], [z], np.arange(30) % 3, [np.ones(4)], [4.0]
)
assert 'matplotlib.pyplot' not in sys.modules
"""
  environment = os.environ | {'MPLBACKEND': 'TkAgg'}
  for name in ('DISPLAY', 'WAYLAND_DISPLAY'):
    environment.pop(name, None)
  path = tmp_path / 'figure.png'
  subprocess.run(
    [sys.executable, '-c', code, str(path)], env=environment, check=True
  )
  with Image.open(path) as image:
    assert image.width > image.height > 300


def wandb_records(path):
  """The records of a file of Weights & Biases, which is a log of LevelDB's."""
  from wandb.proto import wandb_internal_pb2

  data, block = path.read_bytes(), 1 << 15
  assert data[:4] == b':W&B'
  position, parts = 7, b''
  while position + 7 <= len(data):
    if block - position % block < 7:
      position += block - position % block
      continue
    length, kind = struct.unpack('<HB', data[position + 4 : position + 7])
    parts += data[position + 7 : position + 7 + length]
    position += 7 + length
    if kind in (1, 4):  # whole, or the last part
      yield wandb_internal_pb2.Record.FromString(parts)
      parts = b''


@pytest.mark.usefixtures('collapse')
def test_weights_and_biases_get_what_tensorboard_gets(
  digits_dir, tmp_path, monkeypatch
):
  pytest.importorskip('wandb')
  monkeypatch.delenv('WANDB_PROJECT', raising=False)
  config = small.digits_config(
    digits_dir,
    train__num_epochs=1,
    watch__tensorboard=False,
    watch__images_every_epochs=1,
    watch__collapse_share=0.5,
    watch__collapse_patience=1,
  )
  workdir = tmp_path / 'run'
  run(config, workdir, wandb='offline')
  assert not (workdir / 'tensorboard').exists()
  (file,) = workdir.glob('wandb/offline-run-*/*.wandb')
  records = list(wandb_records(file))
  (begun,) = [r.run for r in records if r.WhichOneof('record_type') == 'run']
  assert (begun.project, begun.run_group) == ('clop_jax', 'run')
  history = {}
  for record in records:
    if record.WhichOneof('record_type') == 'history':
      items = record.history.item
      values = {
        '/'.join(item.nested_key) or item.key: json.loads(item.value_json)
        for item in items
      }
      history[record.history.step.num] = values
  lines = lines_of(workdir / 'metrics.jsonl')
  assert [line['step'] for line in lines] == [2, 4]
  for line in lines:
    for name in set(line) - {'step'}:
      assert history[line['step']][f'train/{name}'] == line[name]
  assert history[5]['embeddings/singular_values/_type'] == 'histogram'
  names = ('pictures/views', 'pictures/embeddings')
  for name in names:
    picture = file.parent / 'files' / history[5][f'{name}/path']
    with Image.open(picture) as image:
      assert image.width > image.height > 300
  (alert,) = [r.alert for r in records if r.HasField('alert')]
  assert 'the embeddings are collapsing' in alert.text


def test_without_the_library_the_way_to_it_is_named(monkeypatch):
  message = r"--wandb=offline needs .*: pip install 'clop-jax\[wandb\]'"
  monkeypatch.setattr(wandb_log.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=message):
    wandb_log.check('offline')


def test_a_folder_named_wandb_is_not_the_library(tmp_path, monkeypatch):
  (tmp_path / 'wandb').mkdir()
  found = machinery.PathFinder.find_spec('wandb', [str(tmp_path)])
  assert found is not None
  monkeypatch.setattr(wandb_log.importlib.util, 'find_spec', lambda _: found)
  with pytest.raises(ValueError, match='pip install'):
    wandb_log.check('online')


def test_another_mode_is_refused():
  with pytest.raises(ValueError, match=r"\['offline', 'online'\], got 'on'"):
    wandb_log.check('on')


def test_weights_and_biases_without_a_key_name_the_way_out(
  tmp_path, monkeypatch
):
  pytest.importorskip('wandb')
  monkeypatch.delenv('WANDB_API_KEY', raising=False)
  monkeypatch.setenv('HOME', str(tmp_path))
  message = '--wandb=online: .*; --wandb=offline writes files to send later'
  with pytest.raises(OSError, match=message):
    wandb_log.WandbLog(str(tmp_path), {}, mode='online', start=0)
