"""From a config to batches, and whole trainings on them."""

import json
import shutil

import jax
import numpy as np
from PIL import Image
import pytest

from clop_jax import evaluate
from clop_jax import train
from clop_jax.data import arrays
from clop_jax.data import loader
from clop_jax.data import sources
from clop_jax.experiment import inputs
from clop_jax.experiment import setup
from clop_jax.runtime import parallel
from tests import small


def log_of(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def train_on(config, workdir, **arguments):
  train.train(config, str(workdir), devices=jax.devices()[:1], **arguments)
  return log_of(workdir)


def test_stream_with_long_dispatches_trains_like_the_resident_loader(
  digits_dir, digits_run, tmp_path
):
  config = small.digits_config(
    digits_dir,
    data__loader='stream',
    data__num_workers=0,
    # Five steps an epoch, logged every two: chunks of 2, 2, 1 and so on.
    train__steps_per_dispatch=4,
  )
  ours, expected = train_on(config, tmp_path / 'run'), log_of(digits_run)
  assert [x['step'] for x in ours] == [x['step'] for x in expected]
  # Rounding differs in a loop, and grows with every step.
  for i in range(2):
    assert ours[i] == pytest.approx(expected[i], rel=1e-4, abs=1e-5)


def test_dispatches_end_at_logged_and_saved_steps():
  config = small.digits_config('unused', train__steps_per_dispatch=4)
  run = setup.plan(
    config,
    parallel.make_mesh(jax.devices()[:1]),
    num_examples=1438,
    image_shape=(8, 8, 1),
  )
  ends = [(steps.start, steps.stop) for steps in run.chunks(3)]
  assert ends == [(3, 4), (4, 5), (5, 6), (6, 8), (8, 10)]
  assert run.chunks(10) == []


def test_loader_depends_on_the_size_of_the_set(digits_dir):
  config = small.digits_config(digits_dir).unlock()
  source = arrays.Arrays(np.zeros((64, 8, 8, 1), np.uint8), np.arange(64) % 10)
  reader = inputs.training_reader(config, source, source.labels)
  assert inputs.is_resident(config, reader)
  config.data.resident_limit_gib = 64 * 64 / 2**30
  assert inputs.is_resident(config, reader)
  config.data.resident_limit_gib = 63 * 64 / 2**30
  assert not inputs.is_resident(config, reader)
  config.data.loader = 'resident'
  assert inputs.is_resident(config, reader)
  config.data.host_crops = True
  with pytest.raises(ValueError, match=r'host_crops=True .*cannot keep'):
    inputs.is_resident(config, reader)
  config.data.loader, config.train.batch_size = 'auto', 32
  config.data.num_workers = 0
  mesh = parallel.make_mesh(jax.devices()[:1])
  reader = inputs.training_reader(config, source, source.labels)
  made = inputs.training_loader(config, reader, mesh)
  assert isinstance(made, loader.StreamLoader)
  assert made.structure(1)['image'].shape == (1, 32, 2, 8, 8, 1)


IMAGES = np.zeros((6, 8, 8, 1), np.uint8)


def npz_config(folder, changes=(), **splits):
  """Returns a config for an npz file with the labels of some splits."""
  path = folder / 'set.npz'
  content = {'train_images': IMAGES, 'train_labels': np.arange(6) % 2}
  for split, labels in splits.items():
    content[f'{split}_images'] = IMAGES[: 6 if labels is None else len(labels)]
    if labels is not None:
      content[f'{split}_labels'] = np.array(labels)
  np.savez(path, **content)
  options = {
    'data__name': 'npz',
    'data__num_classes': 2,
    'data__label_fraction': 1.0,
    'train__batch_size': 2,
  }
  return small.digits_config(str(path), **options | dict(changes))


def test_unlabelled_split_is_appended(tmp_path):
  config = npz_config(
    tmp_path, {'data__num_classes': 0}, unlabelled=[1] * 6
  ).unlock()
  config.data.unlabelled_split = 'unlabelled'
  source = inputs.training_source(config)
  expected = [0, 1, 0, 1, 0, 1] + [-1] * 6
  np.testing.assert_array_equal(sources.labels_of(source), expected)
  assert inputs.with_num_classes(config, source).data.num_classes == 2
  with pytest.raises(ValueError, match=r'num_classes must be set.*got 0'):
    inputs.with_num_classes(config, [{'image': IMAGES[0], 'label': 0}])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'data__test_split': 'nowhere'}, "test_split='nowhere'"),
    ({'data__test_split': 'bad'}, r"'bad'.*got 9 at index 1"),
    ({'data__test_split': 'free'}, 'no labelled example to evaluate with'),
    ({'eval__crop_share': 3.0}, r'crop_share.*got 3'),
  ],
)
def test_invalid_test_split_is_refused_before_training(
  changes, message, tmp_path
):
  config = npz_config(tmp_path, changes, bad=[0, 9], free=None, test=[0, 1])
  with pytest.raises(ValueError, match=message):
    train.train(config, str(tmp_path / 'run'), devices=jax.devices()[:1])
  assert not (tmp_path / 'run').exists()


def test_run_without_a_test_split_cannot_be_evaluated(tmp_path):
  config = npz_config(tmp_path, {'data__test_split': ''})
  inputs.check_evaluation(config)
  with pytest.raises(ValueError, match=r"test_split='': this run was trained"):
    inputs.labelled_source(config, 'test')


def striped(rng, label, side=20):
  """Returns noise with a bright band at a place that depends on the class."""
  pixels = rng.integers(0, 100, size=(side, side + 4, 3))
  pixels[4 * label : 4 * label + 4] += 150
  return pixels.astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
  """A folder of 16 training and 8 test images of 4 classes."""
  rng = np.random.default_rng(0)
  for split, count in (('train', 16), ('test', 8)):
    for index in range(count):
      label = index % 4
      path = tmp_path / 'data' / split / f'class{label}'
      path.mkdir(parents=True, exist_ok=True)
      Image.fromarray(striped(rng, label)).save(path / f'{index:02}.png')
  return tmp_path / 'data'


def folder_config(root, **changes):
  options = {
    'data__name': 'folder',
    'data__num_classes': 0,
    'data__channels': 3,
    'data__label_fraction': 1.0,
    'data__num_workers': 0,
    'augment__mean': (0.4,) * 3,
    'augment__std': (0.3,) * 3,
    'train__batch_size': 8,
    'train__log_every_steps': 1,
    'eval__batch_size': 16,
  }
  return small.digits_config(str(root), **(options | changes))


def evaluated(workdir, **options):
  request = evaluate.Request(str(workdir), devices=jax.devices()[:1], **options)
  return evaluate.evaluate(request)


def test_run_on_host_crops_resumes_exactly_and_is_evaluated(folder, tmp_path):
  config = folder_config(folder, data__host_crops=True)
  log = train_on(config, tmp_path / 'run')
  assert [entry['step'] for entry in log] == [1, 2, 3, 4]
  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '4')
  assert train_on(config, tmp_path / 'run') == log
  found = evaluated(tmp_path / 'run')
  result = found.complete
  assert (result['num_train'], result['num_test']) == (16, 8)
  assert np.isfinite(found.arrays['embeddings']).all()


def test_run_on_given_sources_is_evaluated_on_given_sources(tmp_path):
  rng = np.random.default_rng(0)

  def given(count):
    labels = np.arange(count) % 4
    return [
      {'image': striped(rng, label), 'label': int(label)} for label in labels
    ]

  config = folder_config(tmp_path, data__image_size=8, data__num_classes=4)
  train_on(config, tmp_path / 'run', source=given(16))
  test = given(8)
  test[3] |= {'label': -1}
  found = evaluated(tmp_path / 'run', given={'train': given(16), 'test': test})
  result = found.complete
  assert (result['num_train'], result['num_test']) == (16, 7)
  np.testing.assert_array_equal(found.arrays['labels'], [0, 1, 2, 0, 1, 2, 3])
  unlabelled = sources.Unlabelled(test)
  with pytest.raises(ValueError, match='no labelled example to evaluate'):
    evaluated(tmp_path / 'run', given={'train': test, 'test': unlabelled})


@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')
def test_corrupt_image_stops_a_command_unless_it_may_be_skipped(
  folder, tmp_path, capfd
):
  broken = folder / 'train' / 'class1' / '05.png'
  broken.write_bytes(broken.read_bytes()[:60])
  workdir = tmp_path / 'run'
  arguments = [
    f'--config={small.ROOT}/configs/folder.py',
    f'--workdir={workdir}',
    f'--config.data.data_dir={folder}',
    '--config.data.image_size=8',
    '--config.augment.size=8',
    '--config.model.name=resnet8',
    '--config.model.width_multiplier=0.25',
    '--config.train.batch_size=8',
    '--config.train.num_epochs=1',
    '--config.watch.images_every_epochs=0',
  ]
  line = small.refused(train, *arguments)
  assert line.startswith(f'error: {broken} cannot be decoded as an image (')
  assert 'set config.data.skip_corrupt=True' in line
  assert not workdir.exists()
  capfd.readouterr()
  small.command(train, *arguments, '--config.data.skip_corrupt=True')
  (line,) = capfd.readouterr().err.splitlines()
  assert line.startswith(f'warning: {broken} cannot be decoded')
  assert (workdir / 'checkpoints' / '2').is_dir()
