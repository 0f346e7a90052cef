"""Stationary points of docs/theory/collapsed_points.md and their curvature."""

from collections.abc import Callable
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from clop_jax import arguments
from clop_jax import linalg
from clop_jax import theory

_PRECISION = jax.lax.Precision.HIGHEST


def opposite_views_critical_rate(
  num_classes: int, *, temperature: float = 1.0
) -> float:
  r"""Returns the rate above which 'infonce' can collapse onto a line.

  .. math:: \mu_c = \tau\, \frac{k - 1 + k\, e^{-2/\tau}}
                               {k - 2 - k\, e^{-2/\tau}}

  or infinity if the denominator is not positive. The two views of an example
  are at opposite ends of the line and swap ends at every step, so the effective
  rank is 1 and the mean cosine between classes 0. This state attracts
  embeddings close to it. Random starts reach it only at larger rates.

  Args:
    num_classes: Number of classes k, at least 3.
    temperature: Temperature tau, must be positive.
  """
  k = arguments.count('num_classes', num_classes, at_least=3)
  temperature = arguments.number('temperature', temperature, above=0)
  far = k * math.exp(-2 / temperature)
  if k - 2 <= far:
    return math.inf
  return temperature * (k - 1 + far) / (k - 2 - far)


class Equilibrium(NamedTuple):
  """State in which the pull and the repulsion balance.

  Attributes:
    mean_cosine: Mean cosine between embeddings of different classes.
    clop_loss: `1 - z_i . c_i`.
  """

  mean_cosine: float
  clop_loss: float


def pull_equilibrium(
  num_classes: int,
  clop_weight: float,
  *,
  correlation: float = 0.0,
  repulsion: float = 0.0,
) -> Equilibrium:
  r"""Returns the fixed point of 'repulsion' with CLOP at small learning rates.

  Embeddings are `z_i = s m + b (c_i - mean c)`, with `m` the unit vector along
  the mean of the orthonormal prototypes and `s^2 + b^2 (1 - 1/k) = 1`, where

  .. math:: \kappa \Big(\frac{\lambda (1 - r)}{s \sqrt k} - 1\Big)
    = (1 - \rho) \Big(\frac{1}{k-1} +
      \frac{\lambda (1 + r/(k-1))}{b}\Big)

  If embeddings move together (`rho` near 1), a weight of `sqrt(k)` or more
  moves all of them to the mean of the prototypes.

  Args:
    num_classes: Number of classes k, at least 2.
    clop_weight: Weight lambda of `cosine_distance`, at least 0.
    correlation: Correlation rho in [0, 1).
    repulsion: Repulsion r of `cosine_distance`.
  """
  k = arguments.count('num_classes', num_classes, at_least=2)
  if correlation == 1:
    raise ValueError('correlation must be below 1 for differences, got 1')
  common, own = 1 + correlation * (k - 1), 1 - correlation
  pull_common = clop_weight * (1 - repulsion) / math.sqrt(k)
  pull_own = clop_weight * (1 + repulsion / (k - 1))

  def state(angle):
    return math.cos(angle), math.sin(angle) / math.sqrt(1 - 1 / k)

  low, high = 0.0, math.pi
  while high - low > 1e-12:
    middle = (low + high) / 2
    s, b = state(middle)
    # The force on `s` minus the one on `b`, times s.
    force = common * (pull_common - s) - own * s * (1 / (k - 1) + pull_own / b)
    low, high = (middle, high) if force < 0 else (low, middle)
  s, b = state((low + high) / 2)
  return Equilibrium(1 - b**2, 1 - s / math.sqrt(k) - b * (1 - 1 / k))


def common_potential(
  direction: jax.Array,
  prototypes: jax.Array,
  *,
  distance: Callable[..., jax.Array] = theory.cosine_distance,
) -> jax.Array:
  r"""Returns the mean distance over classes of embeddings that are all equal.

  .. math:: V(z) = \frac{1}{k} \sum_y d(z, y)

  Args:
    direction: `[dim]`, unit, the position of all embeddings.
    prototypes: `[k, dim]`.
    distance: As for `theory.simulate`.
  """
  labels = jnp.arange(prototypes.shape[0])
  distances = jax.vmap(distance, in_axes=(None, 0, None))
  return jnp.mean(distances(direction, labels, prototypes))


def common_hessian_eigenvalues(
  num_classes: int,
  distance: str = 'cosine',
  *,
  repulsion: float = 0.0,
  temperature: float = 0.1,
) -> dict[str, float]:
  r"""Curvature of `common_potential` at the mean of orthonormal prototypes.

  .. math:: \text{cosine: } \frac{1 - r}{\sqrt k} \text{ in every direction;}
    \qquad \text{softmax: } \frac{1}{k T^2} \text{ among the classes, 0 outside}

  Positive values attract embeddings that move together. At the antipode of the
  mean the sign changes for the cosine, but not for the softmax.

  Args:
    num_classes: Number of classes k, at least 2.
    distance: 'cosine' or 'softmax'.
    repulsion: Repulsion r of the cosine distance.
    temperature: Temperature T of the softmax distance.

  Returns:
    `{'class': eigenvalue, 'outside': eigenvalue}` for the `k - 1` directions
    among the prototypes and the `dim - k` across them all.
  """
  if distance == 'cosine':
    inside = outside = (1 - repulsion) / math.sqrt(num_classes)
  else:
    inside, outside = 1 / (num_classes * temperature**2), 0.0
  return {'class': inside, 'outside': outside}


def hessian_spectrum(
  loss: Callable[[jax.Array], jax.Array], embeddings: jax.Array
) -> jax.Array:
  r"""Eigenvalues of a loss's Riemannian Hessian on a product of spheres.

  .. math:: \nabla^2_t\, L\Big(\frac{z_i + B_i t_i}{\|z_i + B_i t_i\|}\Big)
    \Big|_{t = 0}

  with `B_i` an orthonormal basis of the tangent space at `z_i`. Normalizing is
  a second-order retraction, so this is the Riemannian Hessian at every point.
  Gradient descent leaves a stationary point along negative eigenvalues.

  Args:
    loss: Function of embeddings of that shape, to a scalar.
    embeddings: `[..., dim]`, normalized inside, `dim` at least 2.

  Returns:
    `[n (dim - 1)]` eigenvalues, smallest first.

  Reference:
    Absil, Mahony and Sepulchre, "Optimization algorithms on matrix manifolds"
    (2008), proposition 5.5.5.
  """
  embeddings = jnp.asarray(embeddings)
  dim = embeddings.shape[-1]
  rows = linalg.normalize(embeddings.reshape(-1, dim))
  # The first column of a complete QR factor is the row, up to its sign.
  bases = jnp.linalg.qr(rows[:, :, None], mode='complete')[0][:, :, 1:]

  def pulled_back(t):
    moved = rows + jnp.einsum('ndt,nt->nd', bases, t, precision=_PRECISION)
    return loss(linalg.normalize(moved).reshape(embeddings.shape))

  t = jnp.zeros((rows.shape[0], dim - 1), rows.dtype)
  hessian = jax.jit(jax.hessian(pulled_back))(t).reshape(t.size, t.size)
  return jnp.linalg.eigvalsh(hessian)


def nt_xent_hessian_eigenvalues(
  num_examples: int,
  *,
  temperature: float = 0.5,
  views: int = 2,
  collinear: bool = False,
) -> dict[str, tuple[float, int]]:
  r"""Eigenvalues of NT-Xent's Hessian where all embeddings are on one line.

  With `n = V k` embeddings, `V` views of each of `k` examples,

  .. math:: \text{class: } -\frac{2 x}{n \tau}, \quad
    \text{view: } \frac{2}{n \tau} \Big(\frac{V}{V - 1} - x\Big), \quad
    \text{ends: } \frac{2 w_-}{\tau}, \quad \text{common: } 0

  with `x = n/(n-1)` for equal embeddings. Collinear ones have half of the
  examples at each end, and `x = n (w_+ - w_-) / 2`, where `w_+` and `w_-` are
  the softmax weights of an embedding on the same and on the other end.

  Args:
    num_examples: Number of examples k, at least 2; at least 4 and even if
      collinear.
    temperature: Temperature tau.
    views: Number of views V, at least 2.
    collinear: True for half of the examples at the other end.

  Returns:
    `(eigenvalue, multiplicity)` for each kind of motion: 'common' (all
    together), 'class' (examples of one end apart), 'view' (views of an example
    apart) and, if collinear, 'ends' (one end against the other). Multiplicities
    are for each of the `dim - 1` tangent directions.
  """
  k = arguments.count('num_examples', num_examples, at_least=2 + 2 * collinear)
  if collinear and k % 2:
    raise ValueError(f'num_examples must be even if collinear, got {k}')
  n = k * arguments.count('views', views, at_least=2)
  scale = 2 / (n * temperature)
  if collinear:
    # Relative to an embedding on the same end, to avoid an overflow.
    other = math.exp(-2 / temperature)
    partition = n / 2 - 1 + n / 2 * other
    x = n / 2 * (1 - other) / partition
    ends = {'ends': (2 * other / (partition * temperature), 1)}
  else:
    x, ends = n / (n - 1), {}
  return {
    'common': (0.0, 1),
    'class': (-scale * x, k - 1 - len(ends)),
    'view': (scale * (views / (views - 1) - x), k * (views - 1)),
    **ends,
  }
