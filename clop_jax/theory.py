r"""Idealized dynamics of collapse, and their critical learning rates.

There is no network: `k` unit vectors, one per class (times views), move freely
on the sphere by projected gradient descent,

.. math:: z_i \leftarrow \frac{z_i - \mu \sum_j K_{ij}\, g_j}
                              {\|z_i - \mu \sum_j K_{ij}\, g_j\|},
  \qquad K = (1 - \rho) I + \rho\, 1 1^\top, \qquad
  g_j = \partial_j L + \lambda\, \partial_j d(z_j, c_j)

with the learning rate `mu`, a repulsion `L` (the model), a distance `d` to the
prototypes with weight `lambda`, and the correlation `rho` of the vectors'
motion: 0 for free vectors, 1 for a network whose outputs only move together.
A loss that is a mean over `n` vectors divides `mu` by `n`.

Each model is defined by the gradient that one vector feels:

* 'repulsion': the mean pairwise cosine, each pair in one gradient,
  `g_i = mean_{j != i} z_j`.
* 'symmetric': each pair in both gradients, twice 'repulsion'.
* 'tangent': 'repulsion' with all of `g_i` projected on the tangent space.
* 'row_softmax': `log sum_{j != i} exp(z_i . z_j / tau)`, others held fixed,
  `g_i = sum_j softmax_j(z_i . z_j / tau) z_j / tau`.
* 'infonce': NT-Xent of two or more views with all its gradients, times `n`.

The functions share these arguments: `model` (one of the names above),
`num_classes` (`k`), `clop_weight` (`lambda`), `temperature` (`tau`, of
'row_softmax' and 'infonce') and `correlation` (`rho`, in [0, 1]). Embeddings
count as collapsed if the mean cosine between classes exceeds 0.5. An invalid
argument raises a `ValueError`.
"""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from clop_jax import arguments
from clop_jax import collapse
from clop_jax import linalg
from clop_jax import loss

_PRECISION = lax.Precision.HIGHEST
# Mean cosine between classes above which embeddings count as collapsed.
_LEVEL = 0.5
_MODELS = ('repulsion', 'symmetric', 'tangent', 'row_softmax', 'infonce')


@arguments.in_default_modes
def cosine_distance(embedding, label, prototypes, *, repulsion: float = 0.0):
  """Returns the distance 'cosine' of `loss.clop_loss` for one embedding.

  Args:
    embedding: `[dim]`, unit.
    label: Integer scalar in `[0, k)`.
    prototypes: `[k, dim]`, unit rows.
    repulsion: Weight of the repulsion from the other prototypes.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import theory
    >>> print(theory.cosine_distance(jnp.ones(4) / 2, 0, jnp.eye(4)))
    0.5
  """
  repulsion = arguments.number('repulsion', repulsion, dtype=embedding.dtype)
  return loss.prototype_distances(
    embedding, label, prototypes, repulsion=repulsion
  )


@arguments.in_default_modes
def softmax_distance(embedding, label, prototypes, *, temperature: float = 0.1):
  """Returns the distance 'softmax', see `cosine_distance`."""
  temperature = arguments.number(
    'temperature', temperature, above=0, dtype=embedding.dtype
  )
  return loss.prototype_distances(
    embedding, label, prototypes, distance='softmax', temperature=temperature
  )


class Outcome(NamedTuple):
  """Final states of simulations. Every field is `[rates, starts]`.

  Attributes:
    mean_cosine: Mean cosine between embeddings of different classes.
    effective_rank: Effective rank of all embeddings, not centred.
    clop_loss: Mean of `1 - z . c_y`, NaN without prototypes.
    collapsed: True where `mean_cosine` exceeds 0.5.
  """

  mean_cosine: jax.Array
  effective_rank: jax.Array
  clop_loss: jax.Array
  collapsed: jax.Array


@arguments.in_default_modes
def simulate(
  model: str,
  learning_rates: jax.Array,
  starts: jax.Array,
  *,
  steps: int = 200,
  prototypes: jax.Array | None = None,
  clop_weight: float = 0.0,
  distance: Callable[..., jax.Array] = cosine_distance,
  temperature: float = 1.0,
  correlation: float = 0.0,
) -> Outcome:
  """Simulates a model at every learning rate from every start.

  Args:
    model: Name of the model.
    learning_rates: `[rates]` learning rates mu.
    starts: `[starts, views, k, dim]`, normalized inside. Embedding `i` of every
      view belongs to class `i`. All arithmetic has its dtype.
    steps: Number of steps.
    prototypes: `[k, dim]`, or None if `clop_weight` is 0.
    clop_weight: Weight of the distance to the prototypes.
    distance: Function `(embedding [dim], label, prototypes) -> scalar`.
    temperature: Softmax temperature.
    correlation: Correlation of the vectors' motion.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from clop_jax import theory
    >>> starts = jax.random.normal(jax.random.key(0), (1, 1, 10, 16))
    >>> rates = jnp.array([2.0, 3.0])  # critical: 2 * 9 / 8 = 2.25
    >>> print(theory.simulate('repulsion', rates, starts).collapsed[:, 0])
    [False  True]
  """
  numbers = _check(model, clop_weight, temperature, correlation)
  starts = jnp.asarray(starts)
  rates = jnp.asarray(learning_rates, starts.dtype)
  if rates.ndim != 1:
    raise ValueError(
      f'learning_rates must have shape [rates], got {rates.shape}'
    )
  views = 2 if model == 'infonce' else 1
  if starts.ndim != 4 or starts.shape[1] < views or starts.shape[2] < 2:
    raise ValueError(
      f'starts must have shape [starts, views, k, dim] with at least {views} '
      f'views and two classes for {model!r}, got {starts.shape}'
    )
  if prototypes is None:
    if clop_weight:
      raise ValueError(f'prototypes is None, but clop_weight={clop_weight}')
  elif jnp.shape(prototypes) != starts.shape[2:]:
    raise ValueError(
      f'prototypes must have shape [k, dim]={list(starts.shape[2:])} to fit '
      f'starts, got {jnp.shape(prototypes)}'
    )
  else:
    prototypes = jnp.asarray(prototypes, starts.dtype)
  return _outcomes(model, steps, distance, rates, starts, prototypes, numbers)


@arguments.in_default_modes
def mean_pairwise_cosine(embeddings: jax.Array) -> jax.Array:
  """Mean cosine between different classes, for unit `[views, k, dim]`."""
  views, k, _ = embeddings.shape
  sums = jnp.sum(embeddings, axis=0)
  products = jnp.sum(jnp.sum(sums, axis=0) ** 2) - jnp.sum(sums**2)
  return products / (views**2 * k * (k - 1))


@arguments.in_default_modes
def critical_learning_rate(
  model: str,
  num_classes: int,
  dim: int,
  *,
  clop_weight: float = 0.0,
  temperature: float = 1.0,
  correlation: float = 0.0,
) -> float:
  r"""Returns the learning rate above which collapse attracts (closed form).

  .. math:: \mu_c = \frac{2 / h}{\kappa - (1 - \rho) \Big(\frac{1}{k-1} +
      \frac{\lambda}{h \sqrt{1 - \ell}}\Big)}, \qquad
    \kappa = 1 + \rho (k - 1), \qquad \ell = 0.5

  or infinity if the denominator is not positive. `h` is 1 for 'repulsion', 2
  for 'symmetric' and 1/tau for 'row_softmax'. For 'tangent' and 'infonce' equal
  embeddings always repel, and the result is infinity. docs/theory.md derives
  the formula.

  Args:
    model: Name of the model.
    num_classes: Number of classes k, at least 3.
    dim: Dimension, at least 2. With `clop_weight` it must exceed `num_classes`.
    clop_weight: Weight of `cosine_distance` to orthonormal prototypes.
    temperature: Softmax temperature.
    correlation: Correlation of the vectors' motion, below 1.

  Returns:
    The critical rate, or `math.inf` if there is none.

  Raises:
    ValueError: If there is no closed form, or the pull is too strong for it
      (use `bisect_critical_learning_rate`).

  Example:
    >>> from clop_jax import theory
    >>> print(theory.critical_learning_rate('repulsion', 10, 128))
    2.25

  Reference:
    CLOP, arXiv 2403.18699, whose bound is sqrt(2) + O(1/k):
    docs/theory/published_bound.md.
  """
  _check(model, clop_weight, temperature, correlation)
  _check_sizes(num_classes, dim, clop_weight)
  if correlation == 1:
    raise ValueError(
      'correlation must be below 1, got 1: embeddings that only move together '
      'never come closer'
    )
  k, own = num_classes, 1 - correlation
  problem = f'{model!r} with {clop_weight=}, {correlation=}, {dim=}, {k=}'
  advice = 'use bisect_critical_learning_rate'
  tangential = model in ('tangent', 'infonce')
  if clop_weight and (correlation if tangential else dim == k):
    raise ValueError(f'{problem} has no closed form: {advice}')
  if tangential:
    return math.inf
  h = {'repulsion': 1.0, 'symmetric': 2.0}.get(model, 1 / temperature)
  common = 1 + correlation * (k - 1)
  pull = clop_weight / h
  rate = common - own * (1 / (k - 1) + pull / math.sqrt(1 - _LEVEL))
  if rate <= 0:
    return math.inf
  mu = 2 / rate  # times h
  along_mean = mu * common * pull / (2 * math.sqrt(k) * (mu * common - 1))
  if clop_weight and along_mean**2 > _LEVEL + (1 - _LEVEL) / k:
    raise ValueError(
      f'{problem}: the pull is too strong for the closed form, the embeddings '
      f'collapse to the mean of the prototypes; {advice}'
    )
  return mu / h


@arguments.in_default_modes
def bisect_critical_learning_rate(
  model: str,
  num_classes: int,
  dim: int,
  *,
  clop_weight: float = 0.0,
  temperature: float = 1.0,
  correlation: float = 0.0,
  steps: int = 100,
  upper: float = 20.0,
) -> float:
  """Returns the critical learning rate by bisection on the simulation.

  It starts near collapse: one direction (across all prototypes, if possible)
  plus noise of 1e-3. Without prototypes, a rate is too large if the embeddings
  end closer to their mean than they began. With prototypes, it is too large if
  they end collapsed.

  Args:
    model: Name of the model. 'infonce' has two views.
    num_classes: Number of classes k, at least 3.
    dim: Dimension, at least 2, and at least `num_classes` with `clop_weight`.
    clop_weight: Weight of `cosine_distance` to orthonormal prototypes.
    temperature: Softmax temperature.
    correlation: Correlation of the vectors' motion.
    steps: Number of steps of each simulation.
    upper: Largest rate to try.

  Returns:
    The critical rate, or `math.inf` if `upper` does not collapse.

  Example:
    >>> from clop_jax import theory
    >>> rate = theory.bisect_critical_learning_rate('repulsion', 10, 16)
    >>> print(f'{rate:.3f}')
    2.250
  """
  numbers = _check(model, clop_weight, temperature, correlation)
  _check_sizes(num_classes, dim, clop_weight)
  views = 2 if model == 'infonce' else 1
  noise = jax.random.normal(jax.random.key(0), (views, num_classes, dim))
  start = linalg.normalize(jnp.zeros(dim).at[-1].set(1.0) + 1e-3 * noise)
  prototypes = jnp.eye(num_classes, dim) if clop_weight else None

  def collapses(rate):
    end = _run(model, steps, cosine_distance, rate, start, prototypes, numbers)
    if clop_weight:
      return bool(mean_pairwise_cosine(end) > _LEVEL)
    before, after = (jnp.sum(jnp.var(z, axis=(0, 1))) for z in (start, end))
    return bool(after < before)

  if not collapses(upper):
    return math.inf
  low, high = 0.0, upper
  while high - low > 1e-5:
    middle = (low + high) / 2
    low, high = (low, middle) if collapses(middle) else (middle, high)
  return (low + high) / 2


def _gradient(model, z, temperature):
  """Gradient of the model's repulsion at `z` `[views, k, dim]`."""
  if model not in ('row_softmax', 'infonce'):
    mean = (jnp.sum(z, axis=(0, 1)) - z) / (z.shape[0] * z.shape[1] - 1)
    return 2 * mean if model == 'symmetric' else mean
  rows = z.reshape(-1, z.shape[-1])
  logits = jnp.matmul(rows, rows.T, precision=_PRECISION) / temperature
  itself = jnp.eye(rows.shape[0], dtype=bool)
  weights = jax.nn.softmax(jnp.where(itself, -jnp.inf, logits), axis=1)
  positives = 0.0
  if model == 'infonce':
    # A pair is in the softmax of both ends, and positive for both.
    weights = weights + weights.T
    positives = 2 * (jnp.sum(z, axis=0) - z) / (z.shape[0] - 1)
  negatives = jnp.matmul(weights, rows, precision=_PRECISION).reshape(z.shape)
  return (negatives - positives) / temperature


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(model, steps, distance, rate, start, prototypes, numbers):
  """Returns the embeddings `[views, k, dim]` after all steps."""
  clop_weight, temperature, correlation = numbers
  labels = jnp.arange(start.shape[1])
  pull = jax.vmap(jax.grad(distance), in_axes=(0, 0, None))
  pull = jax.vmap(pull, in_axes=(0, None, None))

  def step(_, z):
    gradient = _gradient(model, z, temperature)
    if prototypes is not None:
      gradient += clop_weight * pull(z, labels, prototypes)
    if model == 'tangent':
      gradient -= jnp.sum(gradient * z, axis=-1, keepdims=True) * z
    together = jnp.sum(gradient, axis=(0, 1))
    gradient = (1 - correlation) * gradient + correlation * together
    return linalg.normalize(z - rate * gradient)

  return lax.fori_loop(0, steps, step, linalg.normalize(start))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _outcomes(model, steps, distance, rates, starts, prototypes, numbers):
  def outcome(rate, start):
    end = _run(model, steps, distance, rate, start, prototypes, numbers)
    spectrum = linalg.singular_values(end.reshape(-1, end.shape[-1]))
    clop_loss = jnp.full((), jnp.nan, end.dtype)
    if prototypes is not None:
      clop_loss = 1 - jnp.mean(jnp.sum(end * prototypes, axis=-1))
    rank = collapse.effective_rank_of_spectrum(spectrum)
    cosine = mean_pairwise_cosine(end)
    return Outcome(cosine, rank, clop_loss, cosine > _LEVEL)

  over_starts = jax.vmap(outcome, in_axes=(None, 0))
  return jax.vmap(over_starts, in_axes=(0, None))(rates, starts)


def _check(model, clop_weight, temperature, correlation):
  """Returns the numbers that `_run` takes, or raises a ValueError."""
  if model not in _MODELS:
    raise ValueError(f'model must be one of {list(_MODELS)}, got {model!r}')
  return (
    arguments.number('clop_weight', clop_weight, at_least=0),
    arguments.number('temperature', temperature, above=0),
    arguments.number('correlation', correlation, at_least=0, at_most=1),
  )


def _check_sizes(num_classes, dim, clop_weight):
  # Two vectors that repel each other have no critical rate.
  arguments.count('num_classes', num_classes, at_least=3)
  arguments.count('dim', dim, at_least=2)
  if clop_weight and dim < num_classes:
    raise ValueError(
      f'dim must be at least num_classes={num_classes} for orthonormal '
      f'prototypes, got {dim}'
    )
