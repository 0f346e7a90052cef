"""TFDS builder of the 1,797 handwritten digits in scikit-learn."""

from collections.abc import Iterator
import io
from typing import ClassVar

import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from clop_jax.runtime import extras

_DESCRIPTION = """Handwritten digits of 43 people, 8x8 pixels of 17 grey levels.

The test split is a fifth of each class, chosen by a fixed seed."""

_CITATION = """E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten
Digits", UCI Machine Learning Repository, 1998."""

_TEST_SHARE = 0.2


class Digits(tfds.core.GeneratorBasedBuilder):
  """1,438 training and 359 test images, PNG bytes; needs no download."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES: ClassVar = {'1.0.0': 'All 1,797 images.'}

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=_DESCRIPTION,
      citation=_CITATION,
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(8, 8, 1), encoding_format='png'),
          'label': tfds.features.ClassLabel(num_classes=10),
        }
      ),
      supervised_keys=('image', 'label'),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing to download
    labels = _load().target
    in_test = np.zeros(labels.size, bool)
    rng = np.random.default_rng(0)
    for label in range(10):
      members = rng.permutation(np.flatnonzero(labels == label))
      in_test[members[: round(_TEST_SHARE * members.size)]] = True
    return {
      'train': self._generate_examples(np.flatnonzero(~in_test)),
      'test': self._generate_examples(np.flatnonzero(in_test)),
    }

  def _generate_examples(self, indices) -> Iterator[tuple[int, dict]]:
    digits = _load()
    for index in indices.tolist():
      # Grey levels are 0 to 16. TFDS would need TensorFlow to encode an array.
      pixels = np.round(digits.images[index] * (255 / 16)).astype(np.uint8)
      png = io.BytesIO()
      Image.fromarray(pixels).save(png, format='PNG')
      png.seek(0)
      yield index, {'image': png, 'label': int(digits.target[index])}


def _load():
  # Training on the prepared set does not need scikit-learn.
  extras.check('config.data.name=digits', 'report', 'sklearn')
  import sklearn.datasets

  return sklearn.datasets.load_digits()
