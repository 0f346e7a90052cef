r"""The idealised dynamics of collapse, and their critical learning rates.

No network: `k` unit vectors, one a class (times views), move freely on the
sphere by projected gradient descent,

.. math:: z_i \leftarrow \frac{z_i - \mu \sum_j K_{ij}\, g_j}
                              {\|z_i - \mu \sum_j K_{ij}\, g_j\|},
  \qquad K = (1 - \rho) I + \rho\, 1 1^\top, \qquad
  g_j = \partial_j L + \lambda\, \partial_j d(z_j, c_j)

with the learning rate `mu`, a repulsion `L` (the model), a distance `d` to the
prototypes with weight `lambda`, and the correlation `rho` of the vectors'
motion: 0 is free vectors, 1 is a network whose outputs only move together. `K`
is the simplest kernel with both; it multiplies the common mode (the mean of the
vectors) by `kappa = 1 + rho (k - 1)` and all differences by `1 - rho`. A loss
that is a mean over `n` vectors divides `mu` by `n`.

The models, each as the gradient that one vector feels; cosines are products of
unit vectors, and their gradients are not projected unless it is said:

* 'repulsion': the mean pairwise cosine, each pair in one gradient,
  `g_i = mean_{j != i} z_j`.
* 'symmetric': each pair in both gradients, twice that.
* 'tangent': as 'repulsion', and all of `g_i` projected on the tangent space.
* 'row_softmax': `tau log sum_{j != i} exp(z_i . z_j / tau)` over tau, with the
  other vectors held fixed, `g_i = sum_j softmax_j(z_i . z_j / tau) z_j / tau`.
* 'infonce': NT-Xent of two or more views with all its gradients, times `n`.
"""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from clop_jax import arguments

_PRECISION = lax.Precision.HIGHEST


@arguments.in_default_modes
def cosine_distance(
  embedding: jax.Array,
  label: jax.Array,
  prototypes: jax.Array,
  *,
  repulsion: float = 0.0,
) -> jax.Array:
  r"""CLOP's distance, with a repulsion from the other prototypes if wanted.

  .. math:: d(z, y) = 1 - z \cdot c_y +
    \frac{r}{k - 1} \sum_{j \ne y} z \cdot c_j

  With orthonormal prototypes and `r = 1` its force is `k/(k-1)` times the
  prototype less the prototypes' mean: that of a simplex ETF, times
  `sqrt(k/(k-1))`.

  Args:
    embedding: `[dim]`, unit.
    label: integer scalar in `[0, k)`.
    prototypes: `[k, dim]`, unit rows.
    repulsion: r.

  Returns:
    A scalar.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import theory
    >>> mean = jnp.ones(4) / 2
    >>> print(theory.cosine_distance(mean, 0, jnp.eye(4)))  # 1 - 1/sqrt(4)
    0.5
    >>> print(theory.cosine_distance(mean, 0, jnp.eye(4), repulsion=1.0))
    1.0

  Reference:
    CLOP, arXiv 2403.18699, the loss of one labelled embedding.
  """
  cosines = jnp.matmul(prototypes, embedding, precision=_PRECISION)
  repulsion = arguments.number('repulsion', repulsion, dtype=cosines.dtype)
  others = jnp.sum(cosines) - cosines[label]
  return 1 - cosines[label] + repulsion / (cosines.size - 1) * others


@arguments.in_default_modes
def softmax_distance(
  embedding: jax.Array,
  label: jax.Array,
  prototypes: jax.Array,
  *,
  temperature: float = 0.1,
) -> jax.Array:
  r"""Cross-entropy over the prototypes.

  .. math:: d(z, y) = -\frac{z \cdot c_y}{T} +
    \log \sum_j \exp \frac{z \cdot c_j}{T}

  Args:
    embedding: `[dim]`, unit.
    label: integer scalar in `[0, k)`.
    prototypes: `[k, dim]`, unit rows.
    temperature: T.

  Returns:
    A scalar.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import theory
    >>> mean = jnp.ones(4) / 2
    >>> print(theory.softmax_distance(mean, 0, jnp.eye(4)).round(4))  # log 4
    1.3863

  Reference:
    NormFace, arXiv 1704.06369, section 3.3, with fixed prototypes.
  """
  cosines = jnp.matmul(prototypes, embedding, precision=_PRECISION)
  logits = cosines / arguments.number(
    'temperature', temperature, above=0, dtype=cosines.dtype
  )
  return jax.nn.logsumexp(logits) - logits[label]


class Outcome(NamedTuple):
  """Where simulations ended; every field is `[rates, starts]`.

  Attributes:
    mean_cosine: mean cosine between embeddings of different classes.
    effective_rank: of all embeddings, not centred.
    clop_loss: mean of `1 - z . c_y`; NaN without prototypes.
    collapsed: whether `mean_cosine` is above the level.
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
  level: float = 0.5,
) -> Outcome:
  r"""Runs a model at every learning rate from every start, in one program.

  The step is that at the head of this module.

  Args:
    model: 'repulsion', 'symmetric', 'tangent', 'row_softmax' or 'infonce'.
    learning_rates: `[rates]`, mu.
    starts: `[starts, views, k, dim]`, normalized inside; class `i` is at `i` in
      every view. float32 or float64, which is the precision of all arithmetic.
    steps: number of steps.
    prototypes: `[k, dim]`, or None where `clop_weight` is 0.
    clop_weight: lambda.
    distance: `(embedding [dim], label, prototypes) -> scalar`.
    temperature: tau of 'row_softmax' and 'infonce'.
    correlation: rho in [0, 1].
    level: the mean cosine above which an outcome is called collapsed.

  Returns:
    An `Outcome`.

  Raises:
    ValueError: if the model, a shape or a number is not as above.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from clop_jax import theory
    >>> starts = jax.random.normal(jax.random.key(0), (1, 1, 10, 16))
    >>> rates = jnp.array([2.0, 3.0])  # critical: 2 * 9 / 8 = 2.25
    >>> print(theory.simulate('repulsion', rates, starts).collapsed[:, 0])
    [False  True]

  Reference:
    CLOP, arXiv 2403.18699, the collapse at large learning rates.
  """
  _check_model(model)
  _check_numbers(
    clop_weight=clop_weight,
    temperature=temperature,
    correlation=correlation,
    level=level,
  )
  learning_rates, starts = jnp.asarray(learning_rates), jnp.asarray(starts)
  if learning_rates.ndim != 1:
    raise ValueError(
      f'learning_rates must have shape [rates], got {learning_rates.shape}'
    )
  views = 2 if model == 'infonce' else 1
  if starts.ndim != 4 or starts.shape[1] < views or starts.shape[2] < 2:
    raise ValueError(
      f'starts must have shape [starts, views, k, dim] with at least {views} '
      f'views and two classes for {model!r}, got {starts.shape}'
    )
  if prototypes is None:
    if clop_weight:
      raise ValueError(
        f'prototypes must be given where clop_weight is not 0, got None at '
        f'clop_weight={clop_weight}'
      )
  elif jnp.shape(prototypes) != starts.shape[2:]:
    raise ValueError(
      f'prototypes must have shape [k, dim]={list(starts.shape[2:])} to fit '
      f'starts, got {jnp.shape(prototypes)}'
    )
  else:
    prototypes = jnp.asarray(prototypes, starts.dtype)

  mean_cosine, rank, clop_loss = _run_all(
    model,
    steps,
    distance,
    learning_rates.astype(starts.dtype),
    starts,
    prototypes,
    clop_weight,
    temperature,
    correlation,
  )
  return Outcome(mean_cosine, rank, clop_loss, mean_cosine > level)


@arguments.in_default_modes
def mean_pairwise_cosine(embeddings: jax.Array) -> jax.Array:
  r"""Mean cosine between embeddings of different classes.

  .. math:: \frac{\|\sum_i s_i\|^2 - \sum_i \|s_i\|^2}{V^2\, k (k - 1)},
    \qquad s_i = \sum_v z_{v,i}

  Args:
    embeddings: `[views, k, dim]`, unit.

  Returns:
    A scalar: 1 if all are equal, `-1/(k-1)` for a simplex ETF.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import theory
    >>> print(theory.mean_pairwise_cosine(jnp.array([[[1., 0.], [-1., 0.]]])))
    -1.0
  """
  views, k, _ = embeddings.shape
  sums = jnp.sum(embeddings, axis=0)
  squared = jnp.sum(jnp.sum(sums, axis=0) ** 2) - jnp.sum(sums**2)
  return squared / (views**2 * k * (k - 1))


@arguments.in_default_modes
def critical_learning_rate(
  model: str,
  num_classes: int,
  dim: int,
  *,
  clop_weight: float = 0.0,
  temperature: float = 1.0,
  correlation: float = 0.0,
  level: float = 0.5,
) -> float:
  r"""The learning rate from which collapse attracts, in closed form.

  .. math:: \mu_c = \frac{2 / h}{\kappa - (1 - \rho) \Big(\frac{1}{k-1} +
      \frac{\lambda}{h \sqrt{1 - \ell}}\Big)}, \qquad
    \kappa = 1 + \rho (k - 1)

  or infinity where the denominator is not positive. `h` is 1 for 'repulsion', 2
  for 'symmetric' and 1/tau for 'row_softmax'. Along the common direction a step
  multiplies by `1 - h mu kappa`, across it by `1 + h mu (1-rho) / (k-1)`, and
  collapse attracts where the first is the larger: `2 (k-1) / (k-2)` for
  'repulsion' alone. The pull adds `mu (1-rho) lambda` times the own prototype's
  difference from the mean, so the collapsed embeddings lie at
  `+-a e + s m + b (c_i - mean c)`, `e` across all prototypes and `m` along
  their mean, with mean cosine `1 - b^2`, where

  .. math:: b = \frac{\mu (1 - \rho) \lambda}
                     {h \mu \kappa - 2 - h \mu (1 - \rho) / (k - 1)}.

  Collapse then sets in gradually, and the critical rate is where the mean
  cosine comes to the level. 'tangent' and 'infonce' have no critical rate: the
  common direction is multiplied by 1 and class differences by more at every
  rate, so the collapsed point always repels, and the result is infinity
  ('infonce' has another collapse, `opposite_views_critical_rate`).

  Args:
    model: as for `simulate`.
    num_classes: k, at least 3.
    dim: at least 2; above `num_classes` with a pull (there must be a direction
      across all prototypes). The rate does not depend on it otherwise.
    clop_weight: lambda, the weight of `cosine_distance` to orthonormal
      prototypes.
    temperature: tau of 'row_softmax'.
    correlation: rho in [0, 1).
    level: the mean cosine that counts as collapsed where there is a pull; any
      without one.

  Returns:
    The critical rate, `math.inf` where there is none.

  Raises:
    ValueError: if an argument is not as above, or the pull is so strong that
      the embeddings do not have the form above (use
      `bisect_critical_learning_rate`).

  Example:
    >>> from clop_jax import theory
    >>> print(theory.critical_learning_rate('repulsion', 10, 128))
    2.25
    >>> print(theory.critical_learning_rate('tangent', 10, 128))
    inf
    >>> print(
    ...   theory.critical_learning_rate('repulsion', 10, 128, clop_weight=1.0)
    ... )
    inf

  Reference:
    CLOP, arXiv 2403.18699, whose bound is sqrt(2) + O(1/k): docs/theory.md.
  """
  _check_problem(
    model, num_classes, dim, clop_weight, temperature, correlation, level
  )
  if correlation == 1:
    raise ValueError(
      'correlation must be below 1: embeddings that only move together do not '
      'come closer, got 1'
    )
  if model in ('tangent', 'infonce'):
    if clop_weight and correlation:
      raise ValueError(
        f'clop_weight and correlation must not both be set for {model!r}, got '
        f'{clop_weight} and {correlation}: use bisect_critical_learning_rate'
      )
    return math.inf
  if clop_weight and dim == num_classes:
    raise ValueError(
      f'dim must be above num_classes={num_classes} with a pull, got {dim}: '
      'use bisect_critical_learning_rate'
    )
  strength = {
    'repulsion': 1.0,
    'symmetric': 2.0,
    'row_softmax': 1 / temperature,
  }
  h = strength[model]
  k, own = num_classes, 1 - correlation
  common = 1 + correlation * (k - 1)
  pull = clop_weight / h
  rate = common - own * (1 / (k - 1) + pull / math.sqrt(1 - level))
  if rate <= 0:
    return math.inf
  mu = 2 / rate  # times h
  along_mean = mu * common * pull / (2 * math.sqrt(k) * (mu * common - 1))
  if clop_weight and along_mean**2 > level + (1 - level) / k:
    raise ValueError(
      f'clop_weight={clop_weight} is too strong for the closed form at '
      f'num_classes={k}, correlation={correlation}: the embeddings collapse '
      "towards the prototypes' mean; use bisect_critical_learning_rate"
    )
  return mu / h


@arguments.in_default_modes
def opposite_views_critical_rate(
  num_classes: int, *, temperature: float = 1.0
) -> float:
  r"""The rate from which 'infonce' of two views can collapse onto a line.

  .. math:: \mu_c = \tau\, \frac{k - 1 + k\, e^{-2/\tau}}
                               {k - 2 - k\, e^{-2/\tau}}

  or infinity where the denominator is not positive. Embeddings are at `+-e`,
  the two views of an example at opposite ends, and change ends at every step:
  the effective rank is 1, the mean cosine between classes 0. With `w` the
  softmax's weight of an embedding at the same end and `q` the signed sum of all
  weights, a step multiplies by `1 - 2 mu (1 + q) / tau` along the line and at
  most by `1 + 2 mu (1 + w) / tau` across it. The state attracts from its
  neighbourhood; a random start comes to it at larger rates only.

  Args:
    num_classes: k, at least 3.
    temperature: tau.

  Returns:
    The critical rate, `math.inf` where there is none.

  Raises:
    ValueError: if an argument is not as above.

  Example:
    >>> from clop_jax import theory
    >>> rate = theory.opposite_views_critical_rate(10, temperature=0.5)
    >>> print(f'{rate:.3f}')
    0.587

  Reference:
    CLOP, arXiv 2403.18699: collinear embeddings; docs/theory.md.
  """
  if num_classes < 3:
    raise ValueError(f'num_classes must be at least 3, got {num_classes}')
  _check_numbers(temperature=temperature)
  k, far = num_classes, num_classes * math.exp(-2 / temperature)
  return (
    temperature * (k - 1 + far) / (k - 2 - far) if k - 2 > far else math.inf
  )


@arguments.in_default_modes
def bisect_critical_learning_rate(
  model: str,
  num_classes: int,
  dim: int,
  *,
  clop_weight: float = 0.0,
  temperature: float = 1.0,
  correlation: float = 0.0,
  level: float = 0.5,
  steps: int = 100,
  upper: float = 20.0,
  tolerance: float = 1e-5,
) -> float:
  r"""The same by bisection on the simulation, knowing nothing of the formula.

  It starts near collapse, at one direction plus noise of 1e-3 (across all
  prototypes, where there is room). Without a pull a rate is beyond the critical
  one if the embeddings end closer to their mean than they began: there every
  difference grows or shrinks by one factor a step, so few steps tell, and the
  dimension does not matter. With a pull they settle, and a rate is beyond it if
  their mean cosine ends above the level. (From a random start the crossing is
  the same but slow to see.)

  Args:
    model: as for `simulate`; 'infonce' has two views.
    num_classes: k, at least 3.
    dim: at least 2; at least `num_classes` with a pull.
    clop_weight: lambda, as for `critical_learning_rate`.
    temperature: tau of 'row_softmax' and 'infonce'.
    correlation: rho in [0, 1].
    level: as for `critical_learning_rate`.
    steps: of each simulation.
    upper: the largest rate looked at.
    tolerance: width of the last interval.

  Returns:
    The critical rate; `math.inf` if `upper` does not collapse.

  Raises:
    ValueError: if an argument is not as above.

  Example:
    >>> from clop_jax import theory
    >>> rate = theory.bisect_critical_learning_rate('repulsion', 10, 16)
    >>> print(f'{rate:.3f}')
    2.250
  """
  _check_problem(
    model, num_classes, dim, clop_weight, temperature, correlation, level
  )
  views = 2 if model == 'infonce' else 1
  noise = jax.random.normal(jax.random.key(0), (views, num_classes, dim))
  start = _normalize(jnp.zeros(dim).at[-1].set(1.0) + 1e-3 * noise)
  prototypes = jnp.eye(num_classes, dim) if clop_weight else None

  def collapses(learning_rate):
    end = _run(
      model,
      steps,
      cosine_distance,
      start,
      prototypes,
      learning_rate,
      clop_weight,
      temperature,
      correlation,
    )
    if clop_weight:
      return bool(mean_pairwise_cosine(end) > level)
    return bool(_spread(end) < _spread(start))

  if not collapses(upper):
    return math.inf
  low, high = 0.0, upper
  while high - low > tolerance:
    middle = (low + high) / 2
    low, high = (low, middle) if collapses(middle) else (middle, high)
  return (low + high) / 2


class Equilibrium(NamedTuple):
  """Where the pull and the repulsion balance.

  Attributes:
    mean_cosine: between embeddings of different classes.
    clop_loss: `1 - z_i . c_i`.
  """

  mean_cosine: float
  clop_loss: float


@arguments.in_default_modes
def pull_equilibrium(
  num_classes: int,
  clop_weight: float,
  *,
  correlation: float = 0.0,
  repulsion: float = 0.0,
) -> Equilibrium:
  r"""The fixed point of 'repulsion' with CLOP, at small learning rates.

  Embeddings are `z_i = s m + b (c_i - mean c)`, `m` the unit vector along the
  mean of the orthonormal prototypes, `s^2 + b^2 (1 - 1/k) = 1`, and the fixed
  point has

  .. math:: \kappa \Big(\frac{\lambda (1 - r)}{s \sqrt k} - 1\Big)
    = (1 - \rho) \Big(\frac{1}{k-1} +
      \frac{\lambda (1 + r/(k-1))}{b}\Big)

  at every learning rate. Where embeddings move freely, more weight takes them
  to their prototypes. Where they move together (`rho` towards 1), `s` goes to
  `lambda (1-r) / sqrt(k)`: a weight of `sqrt(k)` or more takes all of them to
  the prototypes' mean, with CLOP loss `1 - 1/sqrt(k)`.

  Args:
    num_classes: k, at least 2.
    clop_weight: lambda, at least 0, of `cosine_distance`.
    correlation: rho in [0, 1).
    repulsion: r of `cosine_distance`.

  Returns:
    An `Equilibrium`.

  Raises:
    ValueError: if an argument is not as above.

  Example:
    >>> from clop_jax import theory
    >>> for correlation in 0.0, 0.99:
    ...   state = theory.pull_equilibrium(10, 5.0, correlation=correlation)
    ...   print(f'{state.mean_cosine:.2f} {state.clop_loss:.2f}')
    -0.03 0.00
    1.00 0.68

  Reference:
    CLOP, arXiv 2403.18699, has the loss; docs/theory.md the derivation.
  """
  k = num_classes
  if k < 2:
    raise ValueError(f'num_classes must be at least 2, got {k}')
  _check_numbers(clop_weight=clop_weight, correlation=correlation)
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
    # What drives `s` less what drives `b`, times s: negative below the root.
    force = common * (pull_common - s) - own * s * (1 / (k - 1) + pull_own / b)
    low, high = (middle, high) if force < 0 else (low, middle)
  s, b = state((low + high) / 2)
  return Equilibrium(1 - b**2, 1 - s / math.sqrt(k) - b * (1 - 1 / k))


@arguments.in_default_modes
def common_potential(
  direction: jax.Array,
  prototypes: jax.Array,
  *,
  distance: Callable[..., jax.Array] = cosine_distance,
) -> jax.Array:
  r"""What collapsed embeddings feel together: the mean distance over classes.

  .. math:: V(z) = \frac{1}{k} \sum_y d(z, y)

  With `cosine_distance` it is `1 - (1 - r) z . m / sqrt(k)`, `m` the unit
  vector along the prototypes' mean; with a simplex ETF it is 1 everywhere.

  Args:
    direction: `[dim]`, unit: where all embeddings are.
    prototypes: `[k, dim]`.
    distance: as for `simulate`.

  Returns:
    A scalar.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import theory
    >>> print(theory.common_potential(jnp.ones(4) / 2, jnp.eye(4)))
    0.5
  """
  labels = jnp.arange(prototypes.shape[0])
  return jnp.mean(
    jax.vmap(lambda label: distance(direction, label, prototypes))(labels)
  )


@arguments.in_default_modes
def common_hessian_eigenvalues(
  num_classes: int,
  distance: str = 'cosine',
  *,
  repulsion: float = 0.0,
  temperature: float = 0.1,
) -> dict[str, float]:
  r"""Curvature of `common_potential` at the orthonormal prototypes' mean.

  .. math:: \text{cosine: } \frac{1 - r}{\sqrt k} \text{ in every direction;}
    \qquad \text{softmax: } \frac{1}{k T^2} \text{ among the classes, 0 outside}

  Positive attracts embeddings that move together. At the mean's antipode the
  cosine's are the opposite, the softmax's are the same.

  Args:
    num_classes: k, at least 2.
    distance: 'cosine' or 'softmax', the functions `..._distance`.
    repulsion: r of the cosine distance.
    temperature: T of the softmax distance.

  Returns:
    `{'class': eigenvalue, 'outside': eigenvalue}`: of the `k - 1` directions
    among the prototypes, and of the `dim - k` across them all.

  Raises:
    ValueError: if an argument is not as above.

  Example:
    >>> from clop_jax import theory
    >>> print(theory.common_hessian_eigenvalues(4))
    {'class': 0.5, 'outside': 0.5}
  """
  if num_classes < 2:
    raise ValueError(f'num_classes must be at least 2, got {num_classes}')
  _check_numbers(temperature=temperature)
  if distance == 'cosine':
    inside = outside = (1 - repulsion) / math.sqrt(num_classes)
  elif distance == 'softmax':
    inside, outside = 1 / (num_classes * temperature**2), 0.0
  else:
    raise ValueError(
      f"distance must be one of ['cosine', 'softmax'], got {distance!r}"
    )
  return {'class': inside, 'outside': outside}


@arguments.in_default_modes
def hessian_spectrum(
  loss: Callable[[jax.Array], jax.Array], embeddings: jax.Array
) -> jax.Array:
  r"""Eigenvalues of a loss's Riemannian Hessian on a product of spheres.

  .. math:: \nabla^2_t\, L\Big(\frac{z_i + B_i t_i}{\|z_i + B_i t_i\|}\Big)
    \Big|_{t = 0}

  with `B_i` an orthonormal basis of the tangent space at `z_i`. Normalizing is
  a retraction of second order, so this is the Riemannian Hessian at every
  point. Negative eigenvalues are directions in which gradient descent leaves a
  stationary point.

  Args:
    loss: of embeddings of that shape, to a scalar.
    embeddings: `[..., dim]`, normalized inside. The Hessian is a square matrix
      of `n (dim - 1)` rows.

  Returns:
    `[n (dim - 1)]` eigenvalues, smallest first.

  Raises:
    ValueError: if `dim` is below 2.

  Example:
    >>> import jax.numpy as jnp
    >>> from clop_jax import theory
    >>> north = jnp.array([0.0, 0.0, 1.0])
    >>> print(theory.hessian_spectrum(lambda z: z[2], north))
    [-1. -1.]

  Reference:
    Absil, Mahony and Sepulchre, "Optimization algorithms on matrix manifolds"
    (2008), proposition 5.5.5.
  """
  embeddings = jnp.asarray(embeddings)
  if embeddings.ndim < 1 or embeddings.shape[-1] < 2:
    raise ValueError(
      'embeddings must have shape [..., dim] with dim at least 2, got '
      f'{embeddings.shape}'
    )
  dim = embeddings.shape[-1]
  rows = _normalize(embeddings.reshape(-1, dim))
  # The first column of a complete QR factor is the row, up to its sign.
  bases = jnp.linalg.qr(rows[:, :, None], mode='complete')[0][:, :, 1:]

  def pulled_back(t):
    moved = rows + jnp.einsum('ndt,nt->nd', bases, t, precision=_PRECISION)
    return loss(_normalize(moved).reshape(embeddings.shape))

  t = jnp.zeros((rows.shape[0], dim - 1), rows.dtype)
  # Compiled whole: quicker than operation by operation.
  hessian = jax.jit(jax.hessian(pulled_back))(t).reshape(t.size, t.size)
  return jnp.linalg.eigvalsh(hessian)


@arguments.in_default_modes
def nt_xent_hessian_eigenvalues(
  num_examples: int,
  *,
  temperature: float = 0.5,
  views: int = 2,
  collinear: bool = False,
) -> dict[str, tuple[float, int]]:
  r"""Eigenvalues of NT-Xent's Hessian where all embeddings are on one line.

  Equal and collinear embeddings are stationary: every cosine is at its extreme.
  With `n = V k` embeddings, `V` views of each of `k` examples,

  .. math:: \text{class: } -\frac{2 x}{n \tau}, \quad
    \text{view: } \frac{2}{n \tau} \Big(\frac{V}{V - 1} - x\Big), \quad
    \text{ends: } \frac{2 w_-}{\tau}, \quad \text{common: } 0

  with `x = n/(n-1)` for equal embeddings. Collinear ones have half of the
  examples at each end, and `x = n (w_+ - w_-) / 2`, where `w_+` and `w_-` are
  the softmax's weights of an embedding on the same and on the other end. The
  unstable directions are 'class': the examples of an end move apart, their
  views together.

  Args:
    num_examples: k, at least 2; at least 4 and even if collinear.
    temperature: tau.
    views: V, at least 2.
    collinear: half of the examples at the other end, rather than all equal.

  Returns:
    For each kind of motion its eigenvalue and its multiplicity, the latter for
    each of the `dim - 1` tangent directions: 'common' (all together), 'class'
    (examples of one end apart), 'view' (views of an example apart) and, if
    collinear, 'ends' (one end against the other).

  Raises:
    ValueError: if an argument is not as above.

  Example:
    >>> from clop_jax import theory
    >>> print(theory.nt_xent_hessian_eigenvalues(2, temperature=1.0)['class'])
    (-0.6666666666666666, 1)

  Reference:
    CLOP, arXiv 2403.18699: equal and collinear embeddings are stationary.
  """
  k, n = num_examples, views * num_examples
  if views < 2:
    raise ValueError(f'views must be at least 2, got {views}')
  if collinear and (k < 4 or k % 2):
    raise ValueError(
      f'num_examples must be even and at least 4 if collinear, got {k}'
    )
  if k < 2:
    raise ValueError(f'num_examples must be at least 2, got {k}')
  _check_numbers(temperature=temperature)
  scale = 2 / (n * temperature)
  if collinear:
    # Both weights relative to an embedding on the same end: no overflow.
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


def _repulsion(z, temperature):
  del temperature
  return (jnp.sum(z, axis=(0, 1)) - z) / (z.shape[0] * z.shape[1] - 1)


def _symmetric(z, temperature):
  return 2 * _repulsion(z, temperature)


def _row_softmax(z, temperature):
  rows = z.reshape(-1, z.shape[-1])
  weights = _softmax_weights(rows, temperature)
  mean = jnp.matmul(weights, rows, precision=_PRECISION)
  return mean.reshape(z.shape) / temperature


def _infonce(z, temperature):
  rows = z.reshape(-1, z.shape[-1])
  weights = _softmax_weights(rows, temperature)
  # A pair is in the softmax of both of its ends, and positive for both.
  negatives = jnp.matmul(weights + weights.T, rows, precision=_PRECISION)
  positives = (jnp.sum(z, axis=0) - z) / (z.shape[0] - 1)
  return (negatives.reshape(z.shape) - 2 * positives) / temperature


def _softmax_weights(rows, temperature):
  logits = jnp.matmul(rows, rows.T, precision=_PRECISION) / temperature
  itself = jnp.eye(rows.shape[0], dtype=bool)
  return jax.nn.softmax(jnp.where(itself, -jnp.inf, logits), axis=1)


_GRADIENTS = {
  'repulsion': _repulsion,
  'symmetric': _symmetric,
  'tangent': _repulsion,
  'row_softmax': _row_softmax,
  'infonce': _infonce,
}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
  model,
  steps,
  distance,
  start,
  prototypes,
  learning_rate,
  clop_weight,
  temperature,
  correlation,
):
  """The embeddings `[views, k, dim]` after all steps."""

  def pull(z):
    labels = jnp.arange(z.shape[1])
    gradient = jax.vmap(jax.grad(distance), in_axes=(0, 0, None))
    return jax.vmap(gradient, in_axes=(0, None, None))(z, labels, prototypes)

  def step(_, z):
    gradient = _GRADIENTS[model](z, temperature)
    if prototypes is not None:
      gradient += clop_weight * pull(z)
    if model == 'tangent':
      gradient -= jnp.sum(gradient * z, axis=-1, keepdims=True) * z
    together = jnp.sum(gradient, axis=(0, 1))
    gradient = (1 - correlation) * gradient + correlation * together
    return _normalize(z - learning_rate * gradient)

  return lax.fori_loop(0, steps, step, _normalize(start))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run_all(
  model,
  steps,
  distance,
  learning_rates,
  starts,
  prototypes,
  clop_weight,
  temperature,
  correlation,
):
  """What `simulate` measures, each `[rates, starts]`."""

  def run(learning_rate, start):
    end = _run(
      model,
      steps,
      distance,
      start,
      prototypes,
      learning_rate,
      clop_weight,
      temperature,
      correlation,
    )
    rank = _effective_rank(end.reshape(-1, end.shape[-1]))
    if prototypes is None:
      return mean_pairwise_cosine(end), rank, jnp.full((), jnp.nan, end.dtype)
    clop_loss = 1 - jnp.mean(jnp.sum(end * prototypes, axis=-1))
    return mean_pairwise_cosine(end), rank, clop_loss

  over_starts = jax.vmap(run, in_axes=(None, 0))
  return jax.vmap(over_starts, in_axes=(0, None))(learning_rates, starts)


def _normalize(x):
  squared = jnp.sum(x**2, axis=-1, keepdims=True)
  is_zero = squared == 0.0
  return x * jnp.where(is_zero, 0.0, lax.rsqrt(jnp.where(is_zero, 1, squared)))


def _spread(embeddings):
  return jnp.sum(jnp.var(embeddings, axis=(0, 1)))


def _effective_rank(rows):
  spectrum = jnp.linalg.svd(rows, compute_uv=False)
  p = spectrum / jnp.sum(spectrum)
  return jnp.exp(-jnp.sum(p * jnp.log(jnp.where(p == 0.0, 1.0, p))))


def _check_model(model):
  if model not in _GRADIENTS:
    raise ValueError(f'model must be one of {list(_GRADIENTS)}, got {model!r}')


def _check_numbers(
  *, clop_weight=0.0, temperature=1.0, correlation=0.0, level=0.5
):
  if not 0 <= clop_weight < math.inf:
    raise ValueError(f'clop_weight must be at least 0, got {clop_weight}')
  if not 0 < temperature < math.inf:
    raise ValueError(f'temperature must be above 0, got {temperature}')
  if not 0 <= correlation <= 1:
    raise ValueError(f'correlation must be in [0, 1], got {correlation}')
  if not 0 < level < 1:
    raise ValueError(f'level must be in (0, 1), got {level}')


def _check_problem(
  model, num_classes, dim, clop_weight, temperature, correlation, level
):
  _check_model(model)
  if num_classes < 3:
    raise ValueError(
      'num_classes must be at least 3 (two vectors that repel each other have '
      f'no critical rate), got {num_classes}'
    )
  _check_numbers(
    clop_weight=clop_weight,
    temperature=temperature,
    correlation=correlation,
    level=level,
  )
  if clop_weight and dim < num_classes:
    raise ValueError(
      f'dim must be at least num_classes={num_classes} for orthonormal '
      f'prototypes, got {dim}'
    )
  if dim < 2:
    raise ValueError(f'dim must be at least 2, got {dim}')
