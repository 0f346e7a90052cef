import os
import subprocess
import sys

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest
import sklearn.datasets

from clop_jax import parallel
from clop_jax.data import labels as labels_lib
from clop_jax.data import loader
from clop_jax.data import sources

LABELS = st.lists(st.integers(-1, 4), min_size=1, max_size=60)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(LABELS, st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_keep_fraction_keeps_its_share_of_every_class(labels, fraction, seed):
  labels = np.array(labels)
  kept = labels_lib.keep_fraction(labels, fraction, seed=seed)
  assert kept.dtype == np.int32
  assert kept.shape == labels.shape
  # A label is kept or dropped, never changed; -1 stays -1.
  assert ((kept == labels) | (kept == -1)).all()
  for label in set(labels.tolist()) - {-1}:
    have, keep = np.sum(labels == label), np.sum(kept == label)
    if fraction == 0:
      assert keep == 0
    else:
      assert keep >= 1
      assert abs(keep - fraction * have) <= max(0.5, 1 - fraction * have) + 1e-9
  again = labels_lib.keep_fraction(labels, fraction, seed=seed)
  np.testing.assert_array_equal(again, kept)


def test_keep_fraction_of_one_and_zero():
  labels = np.array([2, 0, -1, 1, 1])
  everything = labels_lib.keep_fraction(labels, 1.0, seed=0)
  np.testing.assert_array_equal(everything, labels)
  nothing = labels_lib.keep_fraction(labels, 0.0, seed=0)
  np.testing.assert_array_equal(nothing, [-1] * 5)


def test_keep_fraction_differs_by_seed_and_is_random_within_a_class():
  labels = np.arange(200) % 4
  chosen = [
    labels_lib.keep_fraction(labels, 0.5, seed=seed) >= 0 for seed in range(40)
  ]
  assert len({c.tobytes() for c in chosen}) == 40
  # Each example is kept about half of the time.
  frequency = np.mean(chosen, axis=0)
  assert frequency.min() > 0.1
  assert frequency.max() < 0.9
  # The classes are drawn apart from each other.
  by_class = chosen[0].reshape(50, 4)
  assert (by_class[:, 0] != by_class[:, 1]).any()


def test_keep_fraction_of_a_class_does_not_depend_on_the_other_classes():
  labels = np.arange(60) % 3
  whole = labels_lib.keep_fraction(labels, 0.4, seed=5)
  alone = np.where(labels == 1, 1, -1)
  only = labels_lib.keep_fraction(alone, 0.4, seed=5)
  np.testing.assert_array_equal(only == 1, whole == 1)


@pytest.mark.parametrize('fraction', [-0.1, 1.1, float('nan')])
def test_keep_fraction_refuses_what_is_no_fraction(fraction):
  with pytest.raises(ValueError, match=r'label_fraction must be in \[0, 1\]'):
    labels_lib.keep_fraction(np.arange(3), fraction, seed=0)


@pytest.mark.parametrize(
  ('labels', 'message'),
  [
    ([0, 3, 4, 4], r'\[-1, num_classes=3\), got 3 at index 1 \(3 of 4 '),
    ([-1, 0, -2], r'got -2 at index 2 \(1 of 3 '),
  ],
)
def test_check_range_names_the_first_wrong_label(labels, message):
  with pytest.raises(ValueError, match=message):
    labels_lib.check_range(np.array(labels), 3)


def test_check_range_lets_classes_and_unlabelled_pass():
  labels_lib.check_range(np.array([-1, 0, 1, 2]), 3)


def test_counts_leave_the_unlabelled_out():
  counts = labels_lib.counts(np.array([-1, 2, 0, 2, -1]), 4)
  np.testing.assert_array_equal(counts, [1, 0, 2, 0])
  none = labels_lib.counts(np.array([-1, -1]), 2)
  np.testing.assert_array_equal(none, [0, 0])


def test_saved_labels_come_back_and_nothing_else_is_left(tmp_path):
  path = os.path.join(tmp_path, 'labels.npz')
  labels = np.array([3, -1, 0], np.int32)
  labels_lib.save(path, np.zeros(7, np.int32))
  labels_lib.save(path, labels)
  loaded = labels_lib.load(path)
  np.testing.assert_array_equal(loaded, labels)
  assert loaded.dtype == np.int32
  with np.load(path) as arrays:
    np.testing.assert_array_equal(arrays['labelled'], [True, False, True])
  assert os.listdir(tmp_path) == ['labels.npz']


def test_digits_equal_scikit_learns_and_are_split_by_class(digits_dir):
  digits = sklearn.datasets.load_digits()
  expected = np.round(digits.images * 255 / 16).astype(np.uint8)
  remaining = {}
  for image, label in zip(expected, digits.target, strict=True):
    entry = (image.tobytes(), int(label))
    remaining[entry] = remaining.get(entry, 0) + 1
  total = np.bincount(digits.target)
  for split, size in (('train', 1438), ('test', 359)):
    source = sources.load('digits', split, digits_dir)
    assert len(source) == size
    images, labels = loader.to_arrays(source)
    assert images.shape == (size, 8, 8, 1)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int32
    # Every example is one of scikit-learn's, and none is used twice.
    for image, label in zip(images, labels, strict=True):
      remaining[image.tobytes(), int(label)] -= 1
    share = 0.8 if split == 'train' else 0.2
    np.testing.assert_allclose(np.bincount(labels), share * total, atol=0.51)
    # Not sorted by class.
    assert (np.diff(labels) < 0).any()
  assert set(remaining.values()) == {0}


def test_digits_are_read_without_tensorflow(digits_dir):
  code = (
    'import sys\n'
    'from clop_jax.data import sources\n'
    f'source = sources.load("digits", "test", {digits_dir!r})\n'
    'assert source[0]["image"].shape == (8, 8, 1)\n'
    'print(len(source), "tensorflow" in sys.modules)\n'
  )
  result = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=False
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout.split() == ['359', 'False']


@pytest.mark.parametrize(
  ('name', 'split', 'message'),
  [
    ('mnist', 'train', r"data.name must be one of \['digits'\], got 'mnist'"),
    ('digits', 'val', r"one of \['train', 'test'\], got 'val'"),
  ],
)
def test_unknown_source_or_split_names_the_valid_ones(name, split, message):
  with pytest.raises(ValueError, match=message):
    sources.load(name, split)


def examples(count=4):
  return [
    {'image': np.full((2, 3, 1), i, np.uint8), 'label': i - 1}
    for i in range(count)
  ]


def test_to_arrays_keeps_the_order():
  images, labels = loader.to_arrays(examples())
  assert images.shape == (4, 2, 3, 1)
  np.testing.assert_array_equal(images[:, 0, 0, 0], [0, 1, 2, 3])
  np.testing.assert_array_equal(labels, [-1, 0, 1, 2])
  assert labels.dtype == np.int32


@pytest.mark.parametrize(
  ('image', 'message'),
  [
    (np.zeros((2, 3, 1), np.float32), r'got float32 \(2, 3, 1\) at index 2'),
    (np.zeros((2, 3), np.uint8), r'got uint8 \(2, 3\) at index 2'),
    (
      np.zeros((3, 2, 1), np.uint8),
      r'one shape, got \(2, 3, 1\) at index 0 and \(3, 2, 1\) at index 2',
    ),
  ],
)
def test_to_arrays_names_the_wrong_image(image, message):
  source = examples()
  source[2]['image'] = image
  with pytest.raises(ValueError, match=message):
    loader.to_arrays(source)


def test_to_arrays_refuses_an_empty_source():
  with pytest.raises(ValueError, match='no examples'):
    loader.to_arrays([])


def make_loader(devices=8, *, n=50, batch_size=16, seed=3):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, size=(n, 2, 2, 1)).astype(np.uint8)
  return loader.ResidentLoader(
    images,
    np.arange(n) % 7 - 1,
    batch_size=batch_size,
    seed=seed,
    mesh=parallel.make_mesh(jax.devices()[:devices]),
  )


def epoch(data, number):
  steps = data.steps_per_epoch
  return np.stack([data.indices(number * steps + i) for i in range(steps)])


def test_every_example_comes_at_most_once_an_epoch():
  data = make_loader()
  assert data.steps_per_epoch == 3
  for number in range(3):
    order = epoch(data, number)
    assert order.shape == (3, 16)
    assert len(np.unique(order)) == 48
    assert order.min() >= 0
    assert order.max() < 50


def test_full_batch_has_every_example():
  order = epoch(make_loader(n=48), 2)
  np.testing.assert_array_equal(np.sort(order.ravel()), np.arange(48))


def test_epochs_and_seeds_differ_and_are_shuffled():
  data, other = make_loader(), make_loader(seed=4)
  orders = [epoch(data, 0), epoch(data, 1), epoch(data, 2), epoch(other, 0)]
  assert len({order.tobytes() for order in orders}) == 4
  # The two left out of an epoch are not always the same ones.
  left_out = [set(range(50)) - set(order.ravel()) for order in orders]
  assert any(left != left_out[0] for left in left_out)
  assert (np.diff(orders[0].ravel()) < 0).any()


def test_step_has_the_same_batch_after_a_restart_and_in_any_order():
  data = make_loader()
  straight = [data.indices(step) for step in range(12)]
  for step in (11, 0, 7, 4, 8):
    np.testing.assert_array_equal(make_loader().indices(step), straight[step])
    np.testing.assert_array_equal(data.indices(step), straight[step])


@pytest.mark.parametrize('devices', [1, 2, 8])
def test_order_does_not_depend_on_the_number_of_devices(devices):
  data, reference = make_loader(devices), make_loader(8)
  for step in (0, 2, 3, 10):
    batch = data.batch(step)
    expected = reference.indices(step)
    np.testing.assert_array_equal(batch['index'], expected)
    shards = batch['index'].addressable_shards
    assert [shard.data.shape for shard in shards] == [
      (16 // devices,)
    ] * devices


@pytest.mark.parametrize('devices', [1, 8])
def test_unpack_gathers_the_examples_own_rows(devices):
  data = make_loader(devices)
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, size=(50, 2, 2, 1)).astype(np.uint8)
  batch = jax.jit(loader.unpack)(data.resident, data.batch(4))
  index = data.indices(4)
  np.testing.assert_array_equal(batch['index'], index)
  np.testing.assert_array_equal(batch['image'], images[index])
  np.testing.assert_array_equal(batch['label'], index % 7 - 1)
  assert batch['image'].dtype == np.uint8
  assert batch['label'].dtype == np.int32
  for leaf in data.resident.values():
    assert len(leaf.addressable_shards) == devices
    assert leaf.is_fully_replicated


@pytest.mark.parametrize(
  ('batch_size', 'message'),
  [
    (12, 'positive multiple of the 8 devices, got 12; nearest: 8'),
    (0, 'positive multiple of the 8 devices, got 0; nearest: 8'),
    (-8, 'positive multiple of the 8 devices, got -8'),
    (56, 'batch_size must be at most the 50 examples, got 56'),
  ],
)
def test_batch_that_does_not_fit_is_refused(batch_size, message):
  with pytest.raises(ValueError, match=message):
    make_loader(batch_size=batch_size)
