"""Images from a known subspace per class, the smallest data that can collapse.

Reference: the synthetic experiments of arXiv 2403.18699.
"""

import numpy as np

from clop_jax import arguments

_SPLITS = ('train', 'test')


class Synthetic:
  r"""Grey images, drawn from a subspace of each class and noise.

  .. math:: x = 0.5 + 0.15
    \left(p\, \frac{B_y a}{\|B_y a\|} + \sigma\, \epsilon\right),
    \quad a \sim N(0, I_d),\ \epsilon \sim N(0, I_{p^2})

  with `p` the image's side and `B_y` the orthonormal basis of class `y`,
  orthogonal to those of the other classes. `x` is rounded to 256 levels.

  Attributes:
    bases: Bases `[num_classes, size * size, subspace_dim]` float64.
    labels: Labels `[n]` int32, with the same number of each class.
    num_classes: Number of classes.
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
      split: 'train', or 'test' (a fifth as many, from the same subspaces).
      num_classes: Number of classes.
      num_examples: Number of training images.
      size: Height and width of an image, pixels.
      subspace_dim: Dimension of each class's subspace.
      noise: Standard deviation of the noise, relative to the signal.
      seed: Seed of the subspaces and images.

    Raises:
      ValueError: If the split is unknown, a number is out of range, or the
        subspaces do not fit into the pixels.
    """
    if split not in _SPLITS:
      raise ValueError(f'split must be one of {list(_SPLITS)}, got {split!r}')
    counts = {
      'num_classes': num_classes,
      'num_examples': num_examples,
      'size': size,
      'subspace_dim': subspace_dim,
    }
    field = 'config.data.options.'
    for name, count in counts.items():
      arguments.count(field + name, count)
    arguments.number(field + 'noise', noise, at_least=0)
    arguments.count(field + 'seed', seed, at_least=0)
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
    # The signal's standard deviation is 1, so three of them fit into the range.
    pixels = np.clip(np.round(255 * (0.5 + 0.15 * signal)), 0, 255)
    self._images = pixels.astype(np.uint8).reshape(count, size, size, 1)

  def __len__(self):
    return len(self.labels)

  def __getitem__(self, index):
    return {'image': self._images[index], 'label': int(self.labels[index])}
