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

GLYPHS = small.ROOT.parent / 'shared' / 'data' / 'glyphs100.npz'


def train_on(config, workdir):
  train.train(config, str(workdir), devices=jax.devices()[:1])
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_loaders_and_dispatches_train_alike(digits_dir, tmp_path):
  options = {
    'resident': {},
    'stream': {'data__loader': 'stream', 'data__num_workers': 0},
    # Five steps an epoch, logged every two: chunks of 2, 2, 1 and so on.
    'scan': {'train__steps_per_dispatch': 4},
  }
  logs = {}
  for name, changes in options.items():
    config = small.digits_config(digits_dir, train__num_epochs=1, **changes)
    logs[name] = train_on(config, tmp_path / name)
  assert [entry['step'] for entry in logs['resident']] == [2, 4]
  for name in ('stream', 'scan'):
    for ours, expected in zip(logs[name], logs['resident'], strict=True):
      assert ours == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_chunks_end_where_something_is_due():
  chunks = setup.split_steps(3, 14, 4, (5, 6))
  ends = [(steps.start, steps.stop) for steps in chunks]
  assert ends == [(3, 5), (5, 6), (6, 10), (10, 12), (12, 14)]
  assert setup.split_steps(4, 4, 2, (3,)) == []


def test_the_loader_is_chosen_by_size(digits_dir):
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


def test_an_unlabelled_split_is_joined(tmp_path):
  path = str(tmp_path / 'set.npz')
  images = np.zeros((6, 4, 4, 1), np.uint8)
  np.savez(
    path,
    train_images=images,
    train_labels=np.arange(6) % 2,
    unlabelled_images=images,
    unlabelled_labels=np.ones(6, int),
  )
  config = small.digits_config(path, data__name='npz', data__num_classes=0)
  config.unlock().data.unlabelled_split = 'unlabelled'
  source = inputs.training_source(config)
  assert len(source) == 12
  np.testing.assert_array_equal(
    sources.labels_of(source), [0, 1, 0, 1, 0, 1] + [-1] * 6
  )
  assert inputs.with_num_classes(config, source).data.num_classes == 2
  with pytest.raises(ValueError, match='num_classes must be the number of'):
    inputs.with_num_classes(config, [{'image': images[0], 'label': 0}])


@pytest.mark.skipif(not GLYPHS.exists(), reason='needs ../shared')
def test_fifty_thousand_glyphs_train_from_the_npz(tmp_path, monkeypatch):
  config = small.digits_config(
    str(GLYPHS),
    data__name='npz',
    data__num_classes=0,
    augment__size=32,
    model__embedding_dim=128,
    train__log_every_steps=1,
  )
  steps_per_epoch = []

  def few(config, steps):
    del config
    steps_per_epoch.append(steps)
    return 4

  monkeypatch.setattr(setup, 'count_steps', few)
  log = train_on(config, tmp_path / 'glyphs')
  assert steps_per_epoch == [50_000 // 256]
  assert [entry['step'] for entry in log] == [1, 2, 3, 4]
  assert all(np.isfinite(entry['loss']) for entry in log)
  labels = np.load(tmp_path / 'glyphs' / 'labels.npz')['labels']
  np.testing.assert_array_equal(np.bincount(labels[labels >= 0]), [50] * 100)


def striped(rng, label, side=20):
  """Noise with a bright band where the class has it."""
  pixels = rng.integers(0, 100, size=(side, side + 4, 3))
  pixels[4 * label : 4 * label + 4] += 150
  return pixels.astype(np.uint8)


def make_folder(root, *, train=24, test=8, classes=4):
  rng = np.random.default_rng(0)
  for split, count in (('train', train), ('test', test)):
    for index in range(count):
      label = index % classes
      folder = root / split / f'class{label}'
      folder.mkdir(parents=True, exist_ok=True)
      Image.fromarray(striped(rng, label)).save(folder / f'{index:02}.png')
  return root


def folder_config(root, **changes):
  options = {
    'data__name': 'folder',
    'data__num_classes': 0,
    'data__channels': 3,
    'data__label_fraction': 1.0,
    'augment__mean': (0.4,) * 3,
    'augment__std': (0.3,) * 3,
    'train__batch_size': 8,
    'train__num_epochs': 1,
    'train__log_every_steps': 1,
    'eval__batch_size': 16,
  }
  return small.digits_config(str(root), **(options | changes))


def test_a_run_on_crops_of_the_host_trains_resumes_and_is_evaluated(tmp_path):
  config = folder_config(
    make_folder(tmp_path / 'data'),
    data__host_crops=True,
    data__num_workers=0,
    train__num_epochs=2,
  )
  log = train_on(config, tmp_path / 'run')
  assert [entry['step'] for entry in log] == [1, 2, 3, 4, 5, 6]
  # What was cut out depends on the step alone: a part is made again equal.
  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '6')
  assert train_on(config, tmp_path / 'run') == log
  found = evaluate.evaluate(
    evaluate.Request(str(tmp_path / 'run'), devices=jax.devices()[:1])
  )
  result, arrays = found.complete, found.arrays
  # Images of 20 x 24 pixels were brought to the view's size.
  assert result['num_train'] == 24 and result['num_test'] == 8
  assert np.isfinite(arrays['embeddings']).all()
  assert 0 <= result['knn_top1'] <= 1


def test_a_run_on_sources_of_ones_own_is_evaluated_on_them(tmp_path):
  rng = np.random.default_rng(0)

  def own(count):
    labels = np.arange(count) % 4
    return [
      {'image': striped(rng, label), 'label': int(label)} for label in labels
    ]

  config = folder_config(
    tmp_path, data__image_size=8, train__num_epochs=8
  ).unlock()
  config.data.num_classes = 4
  workdir = tmp_path / 'run'
  device = jax.devices()[:1]
  train.train(config.lock(), str(workdir), source=own(40), devices=device)
  test = own(20)
  test[3] |= {'label': -1}
  given = {'train': own(40), 'test': test}
  found = evaluate.evaluate(
    evaluate.Request(str(workdir), given=given, devices=device)
  )
  result, arrays = found.complete, found.arrays
  assert (result['num_train'], result['num_test']) == (40, 19)
  expected = [entry['label'] for entry in test if entry['label'] >= 0]
  np.testing.assert_array_equal(arrays['labels'], expected)
  # The band's place is plain to see, also for a network of eight epochs.
  assert result['linear_top1'] > 0.5
  with pytest.raises(ValueError, match='no labelled example to evaluate'):
    given = {'train': test, 'test': sources.Unlabelled(test)}
    evaluate.evaluate(evaluate.Request(str(workdir), given=given))


def test_a_corrupt_image_stops_the_command_unless_it_may_be_skipped(tmp_path):
  root = make_folder(tmp_path / 'data', train=16)
  broken = root / 'train' / 'class1' / '05.png'
  broken.write_bytes(broken.read_bytes()[:60])
  arguments = [
    f'--config={small.ROOT}/configs/folder.py',
    f'--config.data.data_dir={root}',
    '--config.data.image_size=8',
    '--config.augment.size=8',
    '--config.model.depth=8',
    '--config.model.width_multiplier=0.25',
    '--config.train.batch_size=8',
    '--config.train.num_epochs=1',
  ]
  workdir = tmp_path / 'run'
  result = small.call('clop_jax.train', *arguments, f'--workdir={workdir}')
  assert result.returncode == 1
  (line,) = result.stderr.splitlines()
  assert line.startswith(f'error: {broken} cannot be decoded as an image (')
  assert 'set config.data.skip_corrupt=True' in line
  assert not workdir.exists()
  result = small.call(
    'clop_jax.train',
    *arguments,
    f'--workdir={workdir}',
    '--config.data.skip_corrupt=True',
  )
  assert result.returncode == 0, result.stderr
  (line,) = result.stderr.splitlines()
  assert line.startswith(f'warning: {broken} cannot be decoded')
  assert line.endswith('the next one takes its place')
  assert (workdir / 'checkpoints' / '2').is_dir()
  # Evaluation leaves it out, and nothing takes its place.
  broken = root / 'test' / 'class0' / '04.png'
  broken.write_bytes(broken.read_bytes()[:60])
  request = evaluate.Request(str(workdir), devices=jax.devices()[:1])
  arrays = evaluate.evaluate(request).arrays
  np.testing.assert_array_equal(arrays['labels'], [0, 1, 1, 2, 2, 3, 3])


def test_a_streamed_run_with_workers_leaves_nothing_on_stderr(tmp_path):
  root = make_folder(tmp_path / 'data')
  result = small.call(
    'clop_jax.train',
    f'--config={small.ROOT}/configs/folder.py',
    f'--config.data.data_dir={root}',
    f'--workdir={tmp_path / "run"}',
    '--config.data.loader=stream',
    '--config.data.num_workers=2',
    '--config.data.image_size=8',
    '--config.augment.size=8',
    '--config.model.depth=8',
    '--config.model.width_multiplier=0.25',
    '--config.train.batch_size=8',
    '--config.train.num_epochs=2',
  )
  assert result.returncode == 0
  assert not result.stderr


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'data__test_split': 'nowhere'}, r"test_split='nowhere': split must be"),
    (
      {'data__test_split': 'bad'},
      r"'bad': labels must be in .*got 9 at index 1",
    ),
    ({'data__test_split': 'free'}, 'has no labelled example to evaluate with'),
    ({'eval__crop_share': 3.0}, r'crop_share must.*got 3'),
  ],
)
def test_what_could_not_be_evaluated_is_refused_before_the_training(
  changes, message, tmp_path
):
  images = np.zeros((8, 8, 8, 1), np.uint8)
  path = tmp_path / 'set.npz'
  np.savez(
    path,
    train_images=images,
    train_labels=np.arange(8) % 2,
    bad_images=images[:2],
    bad_labels=np.array([0, 9]),
    free_images=images,
    test_images=images,
    test_labels=np.arange(8) % 2,
  )
  options = {
    'data__name': 'npz',
    'data__num_classes': 2,
    'data__label_fraction': 1.0,
    'train__batch_size': 8,
    'train__num_epochs': 1,
  }
  config = small.digits_config(str(path), **(options | changes))
  with pytest.raises(ValueError, match=message):
    train.train(config, str(tmp_path / 'run'), devices=jax.devices()[:1])
  assert not (tmp_path / 'run').exists()


def test_a_run_without_a_test_split_trains_and_says_why_it_has_no_figures(
  tmp_path,
):
  path = tmp_path / 'set.npz'
  np.savez(
    path,
    train_images=np.zeros((8, 8, 8, 1), np.uint8),
    train_labels=np.arange(8) % 2,
  )
  config = small.digits_config(
    str(path),
    data__name='npz',
    data__num_classes=2,
    data__label_fraction=1.0,
    data__test_split='',
    train__batch_size=8,
    train__num_epochs=1,
  )
  train.train(config, str(tmp_path / 'run'), devices=jax.devices()[:1])
  with pytest.raises(ValueError, match=r"test_split='': this run was trained"):
    evaluate.evaluate(evaluate.Request(str(tmp_path / 'run')))
