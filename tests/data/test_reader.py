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


def test_reader_returns_the_labels_for_training():
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


def test_images_are_resized_to_one_shape():
  data = source()
  data[2]['image'] = np.zeros((9, 5, 1), np.uint8)
  message = r'\(4, 6, 1\) of file 0 and \(9, 5, 1\) of file 2; '
  with pytest.raises(ValueError, match=message):
    reader.Reader(data, LABELS, channels=1)
  # The error names the files that were read, not those that they replace.
  data.corrupt = {0}
  message = r'\(4, 6, 1\) of file 1 and \(9, 5, 1\) of file 2; '
  with pytest.raises(ValueError, match=message):
    reader.Reader(data, LABELS, channels=1, skip_corrupt=True)
  data.corrupt = frozenset()
  read = reader.Reader(data, LABELS, channels=1, size=3)
  assert read.shape == (3, 3, 1)
  assert read.example(0, 2)['image'].shape == (3, 3, 1)


def test_grey_images_are_repeated_and_reported_once(capsys):
  data = source(100)
  data[0]['image'] = np.zeros((4, 6, 3), np.uint8)
  for _ in range(2):
    read = reader.Reader(data, np.zeros(100), channels=3)
    np.testing.assert_array_equal(
      read.example(0, 5)['image'], np.repeat(data[5]['image'], 3, axis=-1)
    )
  assert capsys.readouterr().out.count('note: grey images') == 1


@pytest.mark.parametrize(
  ('image', 'options', 'message'),
  [
    (np.zeros((4, 6, 3), np.uint8), {}, 'file 3: .*3 channels'),
    (np.zeros((4, 6, 1), np.int32), {}, 'file 3: .*uint8.*int32'),
    (None, {'channels': 4}, 'channels.*4'),
    (None, {'size': 0}, 'image_size.*0'),
    (None, {'crops': {'size': 0}}, r'augment\.size.*0'),
    (None, {'crops': {'crop_area': 0.5}}, r'augment\.crop_area.*0\.5'),
    (None, {'crops': {'crop_aspect': (0, 1)}}, r'augment\.crop_aspect.*0, 1'),
  ],
)
def test_wrong_image_or_argument_is_named_at_the_start(image, options, message):
  data = source()
  if image is not None:
    data[3]['image'] = image
  crops = {'size': 4, 'crop_area': (0.1, 0.9), 'crop_aspect': (0.8, 1.2)}
  if 'crops' in options:
    options = {'crops': crops | options['crops']}
  with pytest.raises(ValueError, match=message):
    reader.Reader(data, LABELS, **{'channels': 1} | options)


def test_empty_source_is_named():
  with pytest.raises(ValueError, match='no examples'):
    reader.Reader(Examples(), np.zeros(0), channels=1)


def test_corrupt_image_is_an_error_unless_skipped(capsys):
  data = source()
  data.corrupt = {1, 4}
  with pytest.raises(images.CorruptImageError, match='file 1 cannot'):
    reader.Reader(data, LABELS, channels=1)
  read = reader.Reader(data, LABELS, channels=1, skip_corrupt=True)
  # The next one replaces it, with its label; the first follows the last.
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


def test_crops_depend_on_seed_step_and_example():
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


def test_share_selects_the_middle():
  data = source(shape=(8, 8, 1))
  read = reader.Reader(data, LABELS, channels=1, size=4, share=0.5)
  np.testing.assert_array_equal(
    read.example(0, 0)['image'], data[0]['image'][2:6, 2:6]
  )
