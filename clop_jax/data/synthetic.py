"""Classes in known subspaces with noise: the smallest thing that can collapse.

Reference: the synthetic experiments of arXiv 2403.18699.
"""

import math
import numbers

import numpy as np

_SPLITS = ('train', 'test')


class Synthetic:
  r"""Grey images whose pixels are drawn from one subspace for each class.

  .. math:: x = 0.5 + 0.15
    \left(p\, \frac{B_y a}{\|B_y a\|} + \sigma\, \epsilon\right),
    \quad a \sim N(0, I_d),\ \epsilon \sim N(0, I_{p^2})

  with `p` the image's side and `B_y` the orthonormal basis of class `y`,
  orthogonal to those of the other classes; `x` is rounded to 256 levels.

  Attributes:
    bases: `[num_classes, size * size, subspace_dim]` float64.
    labels: `[n]` int32, equally many of each class.
    num_classes: number of classes.
  """

  def __init__(
    self,
    split: str,
    *,
    num_classes: int = 10,
    num_examples: int = 2000,
    size: int = 8,
    subspace_dim: int = 2,
    noise: float = 0.3,
    seed: int = 0,
  ):
    """Draws the images.

    Args:
      split: 'train', or 'test' (a fifth as many, of the same subspaces).
      num_classes: number of classes.
      num_examples: of the training split.
      size: side of an image, pixels.
      subspace_dim: directions of each class.
      noise: deviation, relative to the signal's.
      seed: of everything.

    Raises:
      ValueError: for an unknown split, a number out of its range, or subspaces
        that do not fit.
    """
    if split not in _SPLITS:
      raise ValueError(f'split must be one of {list(_SPLITS)}, got {split!r}')
    counts = {
      'num_classes': num_classes,
      'num_examples': num_examples,
      'size': size,
      'subspace_dim': subspace_dim,
    }
    for name, count in counts.items():
      _check(name, count, least=1, kind=numbers.Integral)
    _check('noise', noise, least=0, kind=numbers.Real)
    _check('seed', seed, least=0, kind=numbers.Integral)
    if num_classes * subspace_dim > size * size:
      raise ValueError(
        f'{num_classes} orthogonal subspaces of {subspace_dim} directions do '
        f'not fit into size * size = {size * size} pixels; enlarge size in '
        'config.data.options'
      )
    rng = np.random.default_rng(seed)
    gaussian = rng.normal(size=(size * size, num_classes * subspace_dim))
    basis, _ = np.linalg.qr(gaussian)
    self.bases = basis.reshape(size * size, num_classes, subspace_dim)
    self.bases = self.bases.transpose(1, 0, 2)
    self.num_classes = num_classes
    count = num_examples if split == 'train' else num_examples // 5
    rng = np.random.default_rng([seed, _SPLITS.index(split) + 1])
    self.labels = rng.permutation(np.arange(count) % num_classes)
    self.labels = self.labels.astype(np.int32)
    signal = np.einsum(
      'npd,nd->np',
      self.bases[self.labels],
      rng.normal(size=(count, subspace_dim)),
    )
    signal *= size / np.linalg.norm(signal, axis=1, keepdims=True)
    signal += noise * rng.normal(size=signal.shape)
    # The signal's deviation is 1, so five deviations either way stay visible.
    pixels = np.clip(np.round(255 * (0.5 + 0.15 * signal)), 0, 255)
    self._images = pixels.astype(np.uint8).reshape(count, size, size, 1)

  def __len__(self):
    return len(self.labels)

  def __getitem__(self, index):
    return {'image': self._images[index], 'label': int(self.labels[index])}


def _check(name, value, *, least, kind):
  if not isinstance(value, kind) or not least <= value < math.inf:
    what = 'an integer' if kind is numbers.Integral else 'a number'
    raise ValueError(
      f'config.data.options.{name} must be {what} >= {least}, got {value!r}'
    )
