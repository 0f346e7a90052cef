# ruff: noqa: D103
"""Prints the tables of docs/theory.md and docs/theory/, and draws its figure.

python -m docs.theory.tables --figure=docs/theory.png

Without --figure it only prints the tables. Everything is seeded.
"""

import argparse
import functools
import math

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use('agg')

from matplotlib import pyplot as plt
import numpy as np

from clop_jax import loss
from clop_jax import theory
from docs.theory import stationary

TAU = 0.5
MODELS = 'repulsion', 'symmetric', 'row_softmax', 'tangent', 'infonce'
# Okabe and Ito's colours, and a marker each.
STYLES = dict(
  zip(
    MODELS,
    [
      ('#0072B2', 'o'),
      ('#D55E00', 's'),
      ('#009E73', '^'),
      ('#CC79A7', 'D'),
      ('#000000', 'v'),
    ],
    strict=True,
  )
)


def table(title, header, rows):
  print(f'\n### {title}\n')
  print('| ' + ' | '.join(header) + ' |')
  print('|' + '---|' * len(header))
  for row in rows:
    print('| ' + ' | '.join(map(text, row)) + ' |')


def text(value):
  if isinstance(value, str):
    return value
  if value is None:
    return '-'
  if math.isinf(value):
    return 'none'
  return str(value) if isinstance(value, int) else f'{value:.4g}'


def both(model, k, dim, **arguments):
  """A cell with closed form and bisection."""
  steps = arguments.pop('steps')
  closed = theory.critical_learning_rate(model, k, dim, **arguments)
  # Rates beyond `upper` count as none.
  upper = 20.0 if math.isinf(closed) else max(20.0, 2 * closed)
  bisected = theory.bisect_critical_learning_rate(
    model, k, dim, steps=steps, upper=upper, **arguments
  )
  if math.isinf(closed) and math.isinf(bisected):
    return 'none'
  return f'{closed:.4f} / {bisected:.4f}'


def critical_rates():
  sizes = 5, 10, 100, 1000
  table(
    'Critical rates without a pull: closed form / bisection',
    ['model', *(f'k = {k}' for k in sizes)],
    [
      [m, *(both(m, k, 8, temperature=TAU, steps=40) for k in sizes)]
      for m in MODELS
    ],
  )


def opposite_views():
  sizes = 5, 10, 100, 1000
  rows = [
    [
      f'{tau:g}',
      *(
        stationary.opposite_views_critical_rate(k, temperature=tau)
        for k in sizes
      ),
    ]
    for tau in (0.1, 0.5, 1.0)
  ]
  table(
    "'infonce' onto a line with opposite views: closed form",
    ['tau', *(f'k = {k}' for k in sizes)],
    rows,
  )
  k, dim = 10, 14
  random = jax.random.normal(jax.random.key(0), (5, 2, k, dim))
  ends = jnp.zeros((2, k, dim)).at[:, :, 0].set(jnp.array([[1.0], [-1.0]]))
  starts = {'random': random, 'near the line': 1e-3 * random + ends}
  rates = 0.5, 0.6, 1.0, 2.0, 3.0, 10.0
  table(
    f'Its effective rank after 400 steps, k = {k}, tau = {TAU:g} (median of 5)',
    ['start', 'lambda', *(f'mu = {rate:g}' for rate in rates)],
    [
      [
        name,
        f'{weight:g}',
        *np.median(
          theory.simulate(
            'infonce',
            jnp.array(rates),
            start,
            steps=400,
            prototypes=np.eye(k, dim),
            clop_weight=weight,
            temperature=TAU,
          ).effective_rank,
          axis=1,
        ).tolist(),
      ]
      for name, start in starts.items()
      for weight in (0.0, 0.3, 1.0)
    ],
  )


def shift_by_the_pull():
  problems = [('repulsion', 10), ('repulsion', 100), ('symmetric', 10)]
  table(
    'Critical rates with the pull: closed form / bisection (mean cosine 0.5)',
    ['lambda', *(f'{model}, k = {k}' for model, k in problems)],
    [
      [
        f'{weight:g}',
        *(
          both(model, k, k + 4, clop_weight=weight, steps=500)
          for model, k in problems
        ),
      ]
      for weight in (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.6, 1.0, 1.5)
    ],
  )
  correlations = 0.0, 0.01, 0.05, 0.2
  table(
    'The same for repulsion at k = 10 with outputs that move together',
    ['lambda', *(f'rho = {rho:g}' for rho in correlations)],
    [
      [
        f'{weight:g}',
        *(
          both(
            'repulsion',
            10,
            14,
            clop_weight=weight,
            correlation=rho,
            steps=500,
          )
          for rho in correlations
        ),
      ]
      for weight in (0.0, 0.3, 0.6, 1.0)
    ],
  )
  correlations = 0.0, 0.001, 0.01, 0.1
  table(
    'Batch size: critical rate of a mean loss over n embeddings, n mu_c',
    ['n', *(f'rho = {rho:g}' for rho in correlations)],
    [
      [
        n,
        *(
          n * theory.critical_learning_rate('repulsion', n, 8, correlation=rho)
          for rho in correlations
        ),
      ]
      for n in (32, 128, 512, 2048)
    ],
  )


def hessians():
  rows = []
  k, dim = 8, 4
  line = np.ones(dim) / 2
  for collinear in (False, True):
    signs = np.where(np.arange(k) % 2, -1 if collinear else 1, 1)
    z = np.broadcast_to(signs[:, None] * line, (2, k, dim))
    for tau in (0.5, 0.1):
      spectrum = stationary.hessian_spectrum(
        functools.partial(loss.nt_xent_loss, temperature=tau),
        jnp.asarray(z, jnp.float32),
      )
      values = stationary.nt_xent_hessian_eigenvalues(
        k, temperature=tau, collinear=collinear
      )
      expected = [
        value for value, n in values.values() for _ in range(n * (dim - 1))
      ]
      difference = np.abs(np.sort(expected) - np.asarray(spectrum)).max()
      rows.append(
        [
          'collinear' if collinear else 'equal',
          f'{tau:g}',
          *(
            f'{values[name][0]:.4g} ({values[name][1]})'
            if name in values
            else '-'
            for name in ('class', 'view', 'ends', 'common')
          ),
          f'{difference:.0e}',
        ]
      )
  table(
    f'Hessian of NT-Xent on one line: eigenvalue (times dim - 1), k = {k}',
    [
      'embeddings',
      'tau',
      'class',
      'view',
      'ends',
      'common',
      'largest difference to autodiff of the loss',
    ],
    rows,
  )


def remedies(k, dim):
  """Tuples of name, prototypes and distance."""
  orthonormal = np.eye(k, dim)
  etf = orthonormal - orthonormal.mean(0)
  etf /= np.linalg.norm(etf, axis=1, keepdims=True)
  repelling = functools.partial(theory.cosine_distance, repulsion=0.5)
  return [
    ('orthonormal (paper)', orthonormal, theory.cosine_distance),
    ('simplex ETF', etf, theory.cosine_distance),
    ('softmax, T = 0.1', orthonormal, theory.softmax_distance),
    ('repulsion r = 0.5', orthonormal, repelling),
    (
      'repulsion r = 1',
      orthonormal,
      functools.partial(theory.cosine_distance, repulsion=1.0),
    ),
    (
      'repulsion r = 2',
      orthonormal,
      functools.partial(theory.cosine_distance, repulsion=2.0),
    ),
  ]


def collapsed_points():
  k, dim = 10, 14
  mean = jnp.asarray(np.eye(k, dim).sum(0) / math.sqrt(k), jnp.float32)
  rows = []
  for name, prototypes, distance in remedies(k, dim):
    c = jnp.asarray(prototypes, jnp.float32)
    potential = functools.partial(
      stationary.common_potential, prototypes=c, distance=distance
    )
    cells = [name]
    for point in (mean, -mean):
      spectrum = np.asarray(stationary.hessian_spectrum(potential, point))
      inside, outside = spectrum[-1], spectrum[0]
      if abs(inside) < abs(outside):
        inside, outside = outside, inside
      cells += [
        float(potential(point)),
        f'{inside + 0.0:.3f}, {outside + 0.0:.3f}',
      ]
    # The force on one embedding along its own class.
    force = jax.grad(distance)(mean, 0, c)
    force = force - jnp.dot(force, mean) * mean
    cells.append(float(jnp.linalg.norm(force)))
    rows.append(cells)
  table(
    f"What embeddings feel at the prototypes' mean, k = {k} (autodiff)",
    [
      'distance',
      'V at the mean',
      'Hessian (classes, outside)',
      'V at its antipode',
      'Hessian there',
      "an embedding's own force",
    ],
    rows,
  )
  correlations = 0.0, 0.5, 0.9, 0.99
  noise = np.random.default_rng(0).normal(size=(k, dim))
  compared = remedies(k, dim)  # once: each distance is compiled
  for model in ('repulsion', 'tangent'):
    rows = []
    for weight in (1.0, 5.0):
      for name, prototypes, distance in compared:
        cells = [f'{weight:g}', name]
        for rho in correlations:
          outcome = theory.simulate(
            model,
            jnp.array([0.05 / (1 + rho * (k - 1))]),
            jnp.asarray((np.asarray(mean) + 1e-3 * noise)[None, None]),
            steps=3000,
            prototypes=prototypes,
            clop_weight=weight,
            distance=distance,
            correlation=rho,
          )
          cells.append(
            f'{float(outcome.mean_cosine[0, 0]):.2f}, '
            f'{float(outcome.effective_rank[0, 0]):.1f}'
          )
        rows.append(cells)
    table(
      f"'{model}', started at the mean: mean cosine, effective rank after "
      f'3,000 steps of mu kappa = 0.05, k = {k}',
      ['lambda', 'distance', *(f'rho = {rho:g}' for rho in correlations)],
      rows,
    )
  rows = []
  for weight in (1.0, 3.0, 5.0):
    rows.append(
      [
        f'{weight:g}',
        *(
          '{:.2f}, {:.3f}'.format(
            *stationary.pull_equilibrium(k, weight, correlation=rho)
          )
          for rho in (0.0, 0.5, 0.9, 0.99, 0.9999)
        ),
      ]
    )
  table(
    f"'repulsion' with CLOP: mean cosine, CLOP loss at equilibrium, k = {k} "
    f'(sqrt(k) = {math.sqrt(k):.2f}, 1 - 1/sqrt(k) = {1 - k**-0.5:.3f})',
    ['lambda', *(f'rho = {r:g}' for r in (0.0, 0.5, 0.9, 0.99, 0.9999))],
    rows,
  )


# The search for sqrt(2) + O(1/k). A variant is a step on embeddings `z`
# `[k, dim]` and a memory, in float64. Its loss has no tangent projection unless
# it says so. Variants with two towers have one in each half of the rows.


def unit(z):
  return z / np.linalg.norm(z, axis=-1, keepdims=True)


def repulsion(z):
  return (z.sum(0) - z) / (len(z) - 1)


def squared_cosines(z):
  # sum_{j != i} (z_i . z_j) z_j without the matrix of all pairs.
  return 2 * (z @ (z.T @ z) - z) / (len(z) - 1)


def root_mean_square(z):
  k = len(z)
  mean_square = (((z.T @ z) ** 2).sum() - k) / (k * (k - 1))
  return squared_cosines(z) / 2 / math.sqrt(mean_square)


def log_sum_exp_of_all_pairs(z):
  weights = np.exp(z @ z.T - 1)
  np.fill_diagonal(weights, 0.0)
  return 2 * len(z) * weights @ z / weights.sum()


def gaussian_potential(z):
  return 4 * (z.sum(0) - len(z) * z) / (len(z) - 1)


def tangent(z, gradient):
  return gradient - (gradient * z).sum(-1, keepdims=True) * z


def projected(gradient):
  return lambda z, memory, mu: (unit(z - mu * gradient(z)), memory)


def momentum(beta, nesterov):
  def step(z, memory, mu):
    gradient = repulsion(z)
    memory = gradient if memory is None else beta * memory + gradient
    ahead = gradient + beta * memory if nesterov else memory
    return unit(z - mu * ahead), memory

  return step


def stale(z, memory, mu):
  return unit(z - mu * repulsion(z if memory is None else memory)), z


def momentum_encoder(z, memory, mu):
  memory = z if memory is None else unit((memory + z) / 2)
  return unit(z - mu * repulsion(memory)), memory


def optimistic(z, memory, mu):
  gradient = repulsion(z)
  memory = gradient if memory is None else memory
  return unit(z - mu * (2 * gradient - memory)), gradient


def extragradient(z, memory, mu):
  return unit(z - mu * repulsion(unit(z - mu * repulsion(z)))), memory


def heun(z, memory, mu):
  ahead = unit(z - mu * repulsion(z))
  return unit(z - mu / 2 * (repulsion(z) + repulsion(ahead))), memory


def towers(in_turn):
  def step(z, memory, mu):
    u, v = np.split(z, 2)
    moved = unit(u - mu * repulsion(v))
    v = unit(v - mu * repulsion(moved if in_turn else u))
    return np.concatenate([moved, v]), memory

  return step


def one_by_one(z, memory, mu):
  z, total = z.copy(), z.sum(0)
  for i, row in enumerate(z):
    moved = unit(row - mu * (total - row) / (len(z) - 1))
    total, z[i] = total + moved - row, moved
  return z, memory


def geodesic(z, memory, mu):
  velocity = -mu * tangent(z, repulsion(z))
  angle = np.linalg.norm(velocity, axis=-1, keepdims=True)
  return unit(np.cos(angle) * z + np.sinc(angle / np.pi) * velocity), memory


def free(z, memory, mu):
  z = z - mu * repulsion(z)
  return z / np.abs(z).max(), memory  # one factor for all: the step is linear


def weak_positives(z, memory, mu):
  u, v = np.split(z, 2)
  gradient = repulsion(z) - 0.25 * np.concatenate([v, u])
  return unit(z - mu * gradient), memory


def weight_decay(decay):
  return lambda z, memory, mu: (
    unit(z - mu * (repulsion(z) + decay * z)),
    memory,
  )


VARIANTS = [
  ('mean cosine, each pair in one gradient', projected(repulsion)),
  ('each pair in both gradients', projected(lambda z: 2 * repulsion(z))),
  (
    'sum over pairs instead of the mean, times k',
    projected(lambda z: z.sum(0) - z),
  ),
  ('mean with the self pair', projected(lambda z: 0 * z + z.mean(0))),
  ('mean of squared cosines', projected(squared_cosines)),
  ('root mean square of the cosines', projected(root_mean_square)),
  ('length of the mean embedding', projected(lambda z: 0 * z + unit(z.sum(0)))),
  ('gradients of unit length', projected(lambda z: unit(repulsion(z)))),
  (
    'log-sum-exp over all pairs, temperature 1',
    projected(log_sum_exp_of_all_pairs),
  ),
  ('Gaussian potential, t = 2', projected(gaussian_potential)),
  (
    'tangent projection',
    projected(lambda z: tangent(z, repulsion(z))),
  ),
  ('geodesic step', geodesic),
  ('embeddings never renormalized', free),
  ('positives of weight 1/4, two views', weak_positives),
  ('two towers, at the same time', towers(in_turn=False)),
  ('two towers in turn', towers(in_turn=True)),
  ('embeddings one by one', one_by_one),
  ('heavy ball, beta = 0.5', momentum(0.5, nesterov=False)),
  ('heavy ball, beta = 0.9', momentum(0.9, nesterov=False)),
  ('Nesterov, beta = 0.5', momentum(0.5, nesterov=True)),
  ('Nesterov, beta = 0.9', momentum(0.9, nesterov=True)),
  ('negatives one step old (memory bank)', stale),
  ('negatives of a momentum encoder, 1/2', momentum_encoder),
  ('optimistic gradient', optimistic),
  ('extragradient', extragradient),
  ("Heun's step", heun),
  (
    '*artificial:* Nesterov, beta = 1/sqrt(2)',
    momentum(math.sqrt(0.5), nesterov=True),
  ),
  (
    '*artificial:* weight decay (sqrt(2) - 1)/2',
    weight_decay((math.sqrt(2) - 1) / 2),
  ),
]


def spread(z):
  """Squared distance from one line; each tower has its own."""
  z = unit(z)
  return (z * np.sign(z @ z[0])[:, None]).var(0).sum()


def variant_collapses(step, k, mu, steps=600):
  rng = np.random.default_rng(0)
  z = unit(np.eye(1, 6) + 1e-8 * rng.normal(size=(k, 6)))
  memory, early = None, 0.0
  for t in range(steps):
    z, memory = step(z, memory, mu)
    if t == steps // 2 - 1:
      early = spread(z)
  # Only late steps count: the other modes of variants with a memory dominate
  # first. An end above 1e-6 is no longer near collapse.
  end = spread(z)
  return end < 1e-26 or (end < early and end < 1e-6)


def variant_rate(step, k, upper=8.0):
  if not variant_collapses(step, k, upper):
    return math.inf
  low, high = 0.0, upper
  while high - low > 2e-4:
    middle = (low + high) / 2
    if variant_collapses(step, k, middle):
      high = middle
    else:
      low = middle
  return high if high > 1e-3 else 0.0


def stale_on_a_line(k):
  """The bisection without noise that turns the common direction.

  By symmetry `z_i = a e + b u_i` with `u` a simplex across `e`, so a step acts
  on `(a, b)`.
  """

  def collapses(mu):
    a = past_a = 1.0
    b = past_b = 1e-8
    early = 0.0
    for t in range(400):
      new_a, new_b = a - mu * past_a, b + mu / (k - 1) * past_b
      length = math.hypot(new_a, new_b)
      past_a, past_b, a, b = a, b, new_a / length, new_b / length
      if t == 199:
        early = b
    return b < early and b < 1e-3

  low, high = 1.0, 8.0
  while high - low > 1e-5:
    middle = (low + high) / 2
    low, high = (low, middle) if collapses(middle) else (middle, high)
  return high


def search():
  sizes = 10, 100, 1000
  rows = []
  for name, step in VARIANTS:
    slow = step is one_by_one or name.startswith('log-sum-exp')
    rows.append(
      [
        name,
        *(None if slow and k == 1000 else variant_rate(step, k) for k in sizes),
      ]
    )
  rows.append(
    [
      'negatives one step old, held on a fixed line',
      *(stale_on_a_line(k) for k in sizes),
    ]
  )
  rows.append(
    [
      '*formula* sqrt(2) (k-1)/(k-2)',
      *(math.sqrt(2) * (k - 1) / (k - 2) for k in sizes),
    ]
  )
  table(
    'Variants: critical rate by bisection near collapse (point or line)',
    ['variant', *(f'k = {k}' for k in sizes)],
    rows,
  )


def figure(path):
  k, dim = 10, 16
  rates = jnp.geomspace(0.1, 20, 47)
  key = jax.random.key(0)
  columns = (0.0, 'alone'), (0.3, 'CLOP, weight 0.3'), (1.0, 'CLOP, weight 1')
  drawing, axes = plt.subplots(
    1, 3, figsize=(11.5, 4), sharey=True, layout='constrained'
  )
  for axis, (weight, title) in zip(axes, columns, strict=True):
    for model in MODELS:
      views = 2 if model == 'infonce' else 1
      outcome = theory.simulate(
        model,
        rates,
        jax.random.normal(key, (5, views, k, dim)),
        steps=400,
        prototypes=np.eye(k, dim),
        clop_weight=weight,
        temperature=TAU,
      )
      colour, marker = STYLES[model]
      values = np.asarray(outcome.mean_cosine)
      axis.plot(
        rates,
        np.median(values, axis=1),
        color=colour,
        marker=marker,
        markersize=3.5,
        linewidth=1.2,
        label=model,
      )
      axis.fill_between(
        rates, values.min(1), values.max(1), color=colour, alpha=0.15, lw=0
      )
      critical = theory.critical_learning_rate(
        model, k, dim, clop_weight=weight, temperature=TAU
      )
      if math.isfinite(critical):
        axis.axvline(critical, color=colour, linestyle=':', linewidth=1.2)
    axis.set(xscale='log', title=title, xlabel='learning rate mu')
    axis.set_xticks([0.1, 1, 10], ['0.1', '1', '10'])
    axis.grid(alpha=0.25)
  axes[0].set_ylabel('mean cosine between classes after 400 steps')
  axes[0].legend(loc='upper left', fontsize=8, frameon=False)
  drawing.savefig(path, dpi=110)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--figure', help='path of the PNG')
  arguments = parser.parse_args()
  critical_rates()
  opposite_views()
  shift_by_the_pull()
  hessians()
  collapsed_points()
  search()
  if arguments.figure:
    figure(arguments.figure)


if __name__ == '__main__':
  main()
