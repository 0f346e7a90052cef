"""The contact sheet shows the images and views of the first training step."""

import re

import numpy as np
from PIL import Image
import pytest

from clop_jax import preview
from clop_jax.data import augment
from clop_jax.data import images as images_lib
from clop_jax.data import loader
from clop_jax.experiment import build
from tests import small

GAP = 2
BETWEEN = 10  # additional gap between triples


def config_of(path, **changes):
  options = {
    'data__name': 'npz',
    'data__num_classes': 0,
    'data__channels': 3,
    'augment__size': 6,
    'augment__mean': (0.4, 0.5, 0.6),
    'augment__std': (0.2, 0.3, 0.25),
    'train__batch_size': 8,
  }
  return small.digits_config(str(path), **(options | changes))


@pytest.fixture
def npz(tmp_path):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, size=(20, 6, 6, 3)).astype(np.uint8)
  path = tmp_path / 'set.npz'
  np.savez(path, train_images=images, train_labels=np.arange(20) % 2)
  return path, images


def cells(sheet, *, side, scale):
  """Returns the images of a sheet, `[rows, columns, side, side, 3]`."""
  step = side * scale + GAP
  rows = sheet.shape[0] // step
  triples = (sheet.shape[1] - GAP + BETWEEN) // (3 * step + BETWEEN)
  width = triples * (3 * step + BETWEEN) - BETWEEN + GAP
  assert sheet.shape[:2] == (rows * step + GAP, width)
  tops = [GAP + i * step for i in range(rows)]
  lefts = [GAP + j * step + BETWEEN * (j // 3) for j in range(3 * triples)]
  for left in lefts[3::3]:
    assert (sheet[:, left - BETWEEN - GAP : left] == 255).all()
  return np.stack(
    [
      [
        sheet[top:, left:][: step - GAP, : step - GAP][::scale, ::scale]
        for left in lefts
      ]
      for top in tops
    ]
  )


def test_sheet_shows_the_first_batch_and_its_views(npz):
  path, images = npz
  config = config_of(path)
  sheet = preview.draw(config, count=8)
  triples = cells(sheet, side=6, scale=16).reshape(8, 3, 6, 6, 3)
  index = loader.Order(20, batch_size=8, seed=config.seed).indices(0)
  np.testing.assert_array_equal(triples[:, 0], images[index])
  keys = augment.example_keys(build.training_key(config), 0, index)
  views = augment.two_views(keys, images[index], build.recipe(config))
  std, mean = np.array((0.2, 0.3, 0.25)), np.array((0.4, 0.5, 0.6))
  pixels = 255 * (np.asarray(views) * std + mean)
  for view in range(2):
    # Pixels are rounded.
    assert abs(triples[:, 1 + view] - pixels[view]).max() < 0.51


def test_sheet_has_full_rows_and_at_most_the_images(npz):
  path, _ = npz
  config = config_of(path, train__batch_size=64)
  for count, shape in ((3, (1, 9)), (7, (1, 12)), (99, (5, 12))):
    sheet = preview.draw(config, count=count)
    assert cells(sheet, side=6, scale=16).shape[:2] == shape


def test_host_crops_are_those_of_training(tmp_path):
  rng = np.random.default_rng(0)
  for index in range(4):
    folder = tmp_path / 'train' / 'ab'[index % 2]
    folder.mkdir(parents=True, exist_ok=True)
    picture = rng.integers(0, 256, size=(20, 30, 3)).astype(np.uint8)
    Image.fromarray(picture).save(folder / f'{index}.png')
  config = config_of(
    tmp_path,
    data__name='folder',
    data__host_crops=True,
    augment__jitter_probability=0.0,
    train__batch_size=4,
  )
  sheet = preview.draw(config, count=4)
  triples = cells(sheet, side=6, scale=16).reshape(4, 3, 6, 6, 3)
  paths = sorted(tmp_path.glob('train/*/*'))
  index = loader.Order(4, batch_size=4, seed=config.seed).indices(0)
  for i, triple in zip(index, triples, strict=True):
    with Image.open(paths[i]) as picture:
      middle = images_lib.center_crop(picture.convert('RGB'), 6)
      np.testing.assert_array_equal(triple[0], middle)
      crops = images_lib.random_crops(
        picture.convert('RGB'),
        6,
        count=2,
        crop_area=config.augment.crop_area,
        crop_aspect=config.augment.crop_aspect,
        rng=np.random.default_rng([config.seed, 0, i]),
      )
    # No flip and no jitter: the crops are the views.
    np.testing.assert_allclose(triple[1:], crops, atol=1)


def test_command_writes_a_png(tmp_path, capsys):
  path = tmp_path / 'grey.npz'
  np.savez(path, train_images=np.zeros((40, 32, 32), np.uint8))
  arguments = [
    f'--config={small.ROOT}/configs/npz.py',
    f'--config.data.data_dir={path}',
    '--config.data.channels=3',
    '--config.data.num_classes=2',
    '--config.augment.mean=(.1,.1,.1)',
    '--config.augment.std=(.2,.2,.2)',
  ]
  out = tmp_path / 'new folder' / 'sheet.png'
  small.command(preview, *arguments, f'--out={out}')
  assert capsys.readouterr().out.count('note: grey images') == 1
  with Image.open(out) as sheet:
    assert sheet.size == (12 * 98 + 3 * BETWEEN + GAP, 8 * 98 + GAP)
  for argument, message in (
    ('--count=-1', '--count must be at least 1, got -1'),
    ('--config.data.label_fraction=7', 'label_fraction.* 7'),
    (f'--out={tmp_path}', f'--out must be .*{tmp_path}'),
  ):
    line = small.refused(preview, *arguments, argument)
    assert re.search(message, line)
