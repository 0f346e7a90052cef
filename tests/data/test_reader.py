import pickle

import numpy as np
import pytest

from clop_jax.data import images
from clop_jax.data import reader


class Examples(list):
  """A source with names and, if asked for, corrupt images."""

  corrupt = frozenset()

  def __getitem__(self, index):
    if index in self.corrupt:
      raise images.CorruptImageError(f'file {index} cannot be decoded; remove')
    return super().__getitem__(index)

  def name_of(self, index):
    return f'file {index}'


def source(count=5, shape=(4, 6, 1), seed=0):
  rng = np.random.default_rng(seed)
  return Examples(
    {'image': rng.integers(0, 256, size=shape).astype(np.uint8), 'label': i}
    for i in range(count)
  )


LABELS = np.array([0, -1, 1, 1, 0])


def test_reader_gives_the_labels_that_training_sees():
  data = source()
  read = reader.Reader(data, LABELS, channels=1)
  assert len(read) == 5
  assert read.shape == (4, 6, 1)
  for index in range(5):
    example = read.example(7, index)
    np.testing.assert_array_equal(example['image'], data[index]['image'])
    assert example['label'] == LABELS[index]
    assert example['index'] == index
    assert example['label'].dtype == example['index'].dtype == np.int32


def test_images_are_brought_to_one_size():
  data = source()
  data[2]['image'] = np.zeros((9, 5, 1), np.uint8)
  message = r'\(4, 6, 1\) of file 0 and \(9, 5, 1\) of file 2; '
  with pytest.raises(ValueError, match=message):
    reader.Reader(data, LABELS, channels=1)
  # Named are the files that were read, not those whose place they take.
  data.corrupt = {0}
  message = r'\(4, 6, 1\) of file 1 and \(9, 5, 1\) of file 2; '
  with pytest.raises(ValueError, match=message):
    reader.Reader(data, LABELS, channels=1, skip_corrupt=True)
  data.corrupt = frozenset()
  read = reader.Reader(data, LABELS, channels=1, size=3)
  assert read.shape == (3, 3, 1)
  assert read.example(0, 2)['image'].shape == (3, 3, 1)


def test_grey_images_are_repeated_over_three_channels_and_it_is_said_once(
  capsys, monkeypatch
):
  monkeypatch.setattr(reader, '_noted_grey', set())
  data = source(100)
  data[0]['image'] = np.zeros((4, 6, 3), np.uint8)
  read = reader.Reader(data, np.zeros(100), channels=3)
  np.testing.assert_array_equal(
    read.example(0, 5)['image'], np.repeat(data[5]['image'], 3, axis=-1)
  )
  output = capsys.readouterr().out
  assert output.count('note: grey images (file 3, ...) are repeated') == 1
  # Not again by another reader, nor by every worker.
  reader.Reader(data, np.zeros(100), channels=3)
  monkeypatch.setattr(reader, '_noted_grey', set())
  read = reader.Reader(data, np.zeros(100), channels=3)
  capsys.readouterr()
  copied = pickle.dumps(read)
  monkeypatch.setattr(reader, '_noted_grey', set())  # as in another process
  pickle.loads(copied).example(0, 5)
  assert not capsys.readouterr().out


def test_grey_images_that_the_start_does_not_see_are_told_by_who_reads_them(
  capsys, monkeypatch
):
  monkeypatch.setattr(reader, '_noted_grey', set())
  data = source(100, shape=(4, 6, 3))
  for index in (1, 2):  # not among the 32 that the reader looks at
    data[index]['image'] = np.zeros((4, 6, 1), np.uint8)
  copied = pickle.dumps(reader.Reader(data, np.zeros(100), channels=3))
  assert not capsys.readouterr().out
  for _ in range(2):
    monkeypatch.setattr(reader, '_noted_grey', set())  # as in another process
    worker = pickle.loads(copied)
    worker.example(0, 5)
    assert not capsys.readouterr().out
    for index in (1, 2, 1):
      worker.example(0, index)
    output = capsys.readouterr().out
    assert output == (
      'note: grey images (file 1, ...) are repeated over 3 channels\n'
    )


def test_corrupt_image_that_the_start_sees_is_not_told_again_by_workers(capsys):
  data = source()
  data.corrupt = {1}
  read = reader.Reader(data, LABELS, channels=1, skip_corrupt=True)
  assert capsys.readouterr().err.count('file 1') == 1
  pickle.loads(pickle.dumps(read)).example(0, 1)
  assert not capsys.readouterr().err


@pytest.mark.parametrize(
  ('image', 'message'),
  [
    (np.zeros((4, 6, 3), np.uint8), 'file 3: the image has 3 channels'),
    (np.zeros((4, 6, 1), np.int32), 'file 3: images must be uint8'),
    (np.zeros((4, 6), np.uint8), r'got uint8 \(4, 6\)'),
    (np.zeros((0, 5, 1), np.uint8), 'file 3: .* got height 0 and width 5'),
  ],
)
def test_image_that_does_not_fit_is_named_at_the_start(image, message):
  data = source()
  data[3]['image'] = image
  with pytest.raises(ValueError, match=message):
    reader.Reader(data, LABELS, channels=1)


def test_channels_and_emptiness_are_checked():
  with pytest.raises(ValueError, match='channels must be 1 or 3, got 4'):
    reader.Reader(source(), LABELS, channels=4)
  with pytest.raises(ValueError, match='no examples'):
    reader.Reader(Examples(), np.zeros(0), channels=1)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'size': 0}, r'config.data.image_size .* must be a whole number .* got 0'),
    ({'crops': {'size': 0}}, 'config.augment.size must be a whole number'),
    ({'crops': {'crop_area': 0.5}}, r'augment.crop_area must be .*, got 0.5;'),
    ({'crops': {'crop_aspect': (0, 1)}}, r'augment.crop_aspect must be two'),
  ],
)
def test_impossible_sizes_and_crops_are_named_at_the_start(options, message):
  crops = {'size': 4, 'crop_area': (0.1, 0.9), 'crop_aspect': (0.8, 1.2)}
  if 'crops' in options:
    options = {'crops': crops | options['crops']}
  with pytest.raises(ValueError, match=message):
    reader.Reader(source(), LABELS, channels=1, **options)


def test_corrupt_image_stops_unless_it_may_be_skipped(capsys):
  data = source()
  data.corrupt = {1, 4}
  with pytest.raises(images.CorruptImageError, match='file 1 cannot'):
    reader.Reader(data, LABELS, channels=1)
  read = reader.Reader(data, LABELS, channels=1, skip_corrupt=True)
  # The next one takes its place, with its label; after the last the first.
  for index, other in ((1, 2), (4, 0)):
    example = read.example(0, index)
    np.testing.assert_array_equal(example['image'], data[other]['image'])
    assert example['label'] == LABELS[other]
    assert example['index'] == index
  errors = capsys.readouterr().err
  assert errors.count('warning: file 1 cannot be decoded; the next one') == 1
  assert errors.count('file 4') == 1
  data.corrupt = set(range(5))
  with pytest.raises(ValueError, match='no image of the source can be decoded'):
    reader.Reader(data, LABELS, channels=1, skip_corrupt=True)


def test_crops_depend_on_seed_step_and_example_alone():
  def make(seed=3):
    crops = {'size': 4, 'crop_area': (0.1, 0.9), 'crop_aspect': (0.8, 1.2)}
    return reader.Reader(
      source(shape=(20, 30, 3)), LABELS, channels=3, crops=crops, seed=seed
    )

  read = make()
  assert read.shape == (2, 4, 4, 3)
  first = read.example(5, 2)['image']
  assert first.shape == read.shape
  np.testing.assert_array_equal(make().example(5, 2)['image'], first)
  assert (first[0] != first[1]).any()
  for other in (
    read.example(6, 2),
    read.example(5, 3),
    make(seed=4).example(5, 2),
  ):
    assert (other['image'] != first).any()


def test_center_crop_shows_the_middle_share():
  data = source(shape=(8, 8, 1))
  read = reader.Reader(data, LABELS, channels=1, size=4, share=0.5)
  np.testing.assert_array_equal(
    read.example(0, 0)['image'], data[0]['image'][2:6, 2:6]
  )
