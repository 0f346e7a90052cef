"""Evaluation of frozen features: linear probe and k nearest neighbours."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import functools
import hashlib

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from clop_jax import linalg
from clop_jax.runtime import parallel

# Written into every result. Increase it whenever the same weights could give
# other numbers. In version 1 the next image replaced a corrupt one.
PROTOCOL_VERSION = 2

_PRECISION = lax.Precision.HIGHEST


def fingerprint(tree) -> str:
  """Returns the SHA-256 of names, shapes, dtypes and bytes of all arrays."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    array = np.asarray(leaf)
    digest.update(f'{jax.tree_util.keystr(path)}{array.shape}'.encode())
    digest.update(f'{array.dtype}'.encode())
    digest.update(array.tobytes())
  return digest.hexdigest()


def applied(
  apply: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
  batches: Iterable[tuple[np.ndarray, np.ndarray]],
  *,
  batch_size: int,
  mesh: Mesh,
) -> Iterator[tuple[tuple[jax.Array, jax.Array], np.ndarray]]:
  """Yields the outputs of `apply` and the labels for each batch.

  The arguments are those of `extract`. All outputs have `batch_size` rows, of
  which those after the last label are padding.
  """
  parallel.check_batch_size(batch_size, mesh)
  for images, labels in batches:
    # Padding avoids a second compilation. The copy is needed: images may be
    # shared memory that is freed while the devices read.
    images = np.pad(images, [(0, batch_size - len(images))] + [(0, 0)] * 3)
    yield apply(parallel.shard(mesh, images)), labels


def extract(
  apply: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
  batches: Iterable[tuple[np.ndarray, np.ndarray]],
  *,
  batch_size: int,
  mesh: Mesh,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns features, embeddings and labels of all images.

  Args:
    apply: Jitted function from uint8 images to replicated (features,
      embeddings).
    batches: Batches `(images, labels)` of at most `batch_size` examples. Images
      are uint8 `[batch, height, width, channels]`, labels any numbers.
    batch_size: Images per call of `apply`, a multiple of the devices.
    mesh: Mesh of the devices.

  Returns:
    `(features [n, feature_dim], embeddings [n, dim], labels [n])` on the host.
  """
  columns = ([], [], [])
  for outputs, labels in applied(
    apply, batches, batch_size=batch_size, mesh=mesh
  ):
    for column, output in zip(columns, outputs, strict=False):
      column.append(np.asarray(output, np.float32)[: len(labels)])
    columns[2].append(labels)
  features, embeddings, labels = map(np.concatenate, columns)
  return features, embeddings, labels


def linear_probe(
  train_features: np.ndarray,
  train_labels: np.ndarray,
  test_features: np.ndarray,
  test_labels: np.ndarray,
  *,
  num_classes: int,
  l2_strengths: Sequence[float],
  max_iterations: int = 200,
  seed: int = 0,
) -> dict[str, float | None]:
  r"""Returns the accuracy of a multinomial logistic regression, by L-BFGS.

  .. math:: \min_{W, b}
    \frac{1}{n} \sum_i -\log \mathrm{softmax}(W x_i + b)_{y_i} +
    \frac{\alpha}{2} \|W\|_F^2

  Features `[n, feature_dim]` are standardized by the mean and deviation of the
  training features. The strength `alpha` has the best top-1 on a held-out,
  stratified tenth of them (the larger one on a tie). The probe is then fitted
  on all of them. If no class has two examples, none can be held out, and the
  largest strength is used.

  Returns:
    `top1` and `top5` in [0, 1] on the test features, `l2`, and `held_out_top1`
    (None if none could be held out).

  Raises:
    ValueError: If a label is out of range.
    FloatingPointError: If the features are not finite.
  """
  _check_finite(train=train_features, test=test_features)
  _check_labels(num_classes, train=train_labels, test=test_labels)
  mean = train_features.mean(axis=0)
  deviation = train_features.std(axis=0)
  # A dead feature stays 0 instead of amplifying its rounding errors.
  scale = np.where(deviation > 1e-6, 1 / np.maximum(deviation, 1e-6), 0.0)
  train_x = jnp.asarray((train_features - mean) * scale, jnp.float32)
  test_x = jnp.asarray((test_features - mean) * scale, jnp.float32)
  train_y, test_y = jnp.asarray(train_labels), jnp.asarray(test_labels)
  fit = functools.partial(
    _fit, train_x, train_y, num_classes=num_classes, steps=max_iterations
  )

  held_out = stratified_tenth(np.asarray(train_labels), seed)
  fitting = jnp.asarray(~held_out, jnp.float32)
  best, best_top1 = max(l2_strengths), None
  if held_out.any():
    top1_of = {}
    for strength in sorted(l2_strengths, reverse=True):
      params = fit(fitting, strength)
      (top1_of[strength],) = top_k(
        _logits(params, train_x[held_out]), train_y[held_out], (1,)
      )
    best = max(top1_of, key=top1_of.__getitem__)
    best_top1 = top1_of[best]
  params = fit(jnp.ones_like(fitting), best)
  top1, top5 = top_k(_logits(params, test_x), test_y, (1, min(5, num_classes)))
  return {'top1': top1, 'top5': top5, 'l2': best, 'held_out_top1': best_top1}


def _logits(params, x):
  return jnp.matmul(x, params['w'], precision=_PRECISION) + params['b']


@functools.partial(jax.jit, static_argnames=('num_classes', 'steps'))
def _fit(x, y, weights, strength, *, num_classes, steps):
  """Returns the minimum of the objective; weights 0 and 1 select examples."""
  optimizer = optax.lbfgs()

  def objective(params):
    losses = optax.softmax_cross_entropy_with_integer_labels(
      _logits(params, x), y
    )
    mean = jnp.sum(losses * weights) / jnp.sum(weights)
    return mean + 0.5 * strength * jnp.sum(jnp.square(params['w']))

  value_and_grad = optax.value_and_grad_from_state(objective)
  params = {
    'w': jnp.zeros((x.shape[1], num_classes)),
    'b': jnp.zeros(num_classes),
  }

  def proceed(carry):
    _, _, step, gradient_norm = carry
    return (step < steps) & (gradient_norm > 1e-5)

  def iterate(carry):
    params, opt_state, step, _ = carry
    value, gradient = value_and_grad(params, state=opt_state)
    updates, opt_state = optimizer.update(
      gradient,
      opt_state,
      params,
      value=value,
      grad=gradient,
      value_fn=objective,
    )
    params = optax.apply_updates(params, updates)
    return params, opt_state, step + 1, optax.tree.norm(gradient)

  start = (params, optimizer.init(params), 0, jnp.float32(jnp.inf))
  return lax.while_loop(proceed, iterate, start)[0]


def top_k(
  logits: jax.Array, labels: jax.Array, ks: Sequence[int]
) -> list[float]:
  """Returns the share of examples whose label is among the `k` best, per `k`.

  Ties and NaN count as wrong.
  """
  own = jnp.take_along_axis(logits, labels[:, None], axis=1)
  others = jnp.sum(~(logits < own), axis=1) - 1
  return [float(jnp.mean(others < k)) for k in ks]


def stratified_tenth(labels: np.ndarray, seed: int) -> np.ndarray:
  """Returns a mask `[n]` of a tenth of each class: at least one, never all."""
  rng = np.random.default_rng(seed)
  chosen = np.zeros(labels.size, bool)
  for label in np.unique(labels):
    members = rng.permutation(np.flatnonzero(labels == label))
    count = min(max(1, round(members.size / 10)), members.size - 1)
    chosen[members[:count]] = True
  return chosen


def knn(
  bank_features: np.ndarray,
  bank_labels: np.ndarray,
  features: np.ndarray,
  labels: np.ndarray,
  *,
  num_classes: int,
  neighbours: Sequence[int] = (20, 200),
  temperature: float = 0.1,
  chunk_size: int = 1024,
) -> dict[int, float]:
  r"""Returns the accuracy of weighted nearest neighbours for each `k`.

  .. math:: \hat y = \arg\max_c \sum_{j \in N_k(x)}
    \exp(\cos(x, x_j) / T)\, [y_j = c]

  `N_k` are the `k` nearest rows of `bank_features` `[n, feature_dim]` by cosine
  similarity. At most `chunk_size` features are compared with them at a time.

  Raises:
    ValueError: If a label is out of range.
    FloatingPointError: If the features are not finite.

  Reference:
    Wu et al., "Unsupervised feature learning via non-parametric instance
    discrimination", arXiv 1805.01978, section 3.4.
  """
  _check_finite(bank=bank_features, test=features)
  _check_labels(num_classes, bank=bank_labels, test=labels)
  bank = linalg.normalize(jnp.asarray(bank_features))
  bank_y = jnp.asarray(bank_labels)
  ks = tuple(min(k, len(bank_labels)) for k in neighbours)
  correct = np.zeros(len(ks))
  for start in range(0, len(features), chunk_size):
    chunk = features[start : start + chunk_size]
    padding = chunk_size - len(chunk) if start else 0
    x = np.pad(chunk, [(0, padding), (0, 0)])
    predictions = _nearest(bank, bank_y, x, ks, num_classes, temperature)
    truth = labels[start : start + chunk_size]
    correct += (np.asarray(predictions)[:, : len(chunk)] == truth).sum(axis=1)
  return {
    k: float(c / len(labels)) for k, c in zip(neighbours, correct, strict=True)
  }


@functools.partial(jax.jit, static_argnums=(3, 4))
def _nearest(bank, bank_labels, x, ks, num_classes, temperature):
  """Returns the predicted classes `[len(ks), rows]`."""
  cosines = jnp.matmul(linalg.normalize(x), bank.T, precision=_PRECISION)
  # Without the barrier XLA merges the slices below into the search and sorts
  # everything: 40 times slower on a CPU at k = 200 of 50,000.
  nearest, index = lax.optimization_barrier(lax.top_k(cosines, max(ks)))
  # Relative to the nearest one, as exp(1 / T) may overflow.
  votes = jnp.exp((nearest - nearest[:, :1]) / temperature)
  voters = jnp.arange(len(votes), dtype=index.dtype)[:, None]
  classes = bank_labels[index]

  def predict(k):
    # One-hot votes would take `k` times the memory.
    totals = jnp.zeros((len(votes), num_classes), votes.dtype)
    totals = totals.at[voters, classes[:, :k]].add(votes[:, :k])
    return jnp.argmax(totals, axis=-1)

  return jnp.stack([predict(k) for k in ks])


def _check_finite(**splits):
  for name, x in splits.items():
    if not np.isfinite(x).all():
      # Not a ValueError, because training diverged.
      raise FloatingPointError(
        f'{name}_features must be finite, got NaN or infinity'
      )


def _check_labels(num_classes, **splits):
  for name, labels in splits.items():
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
      raise ValueError(
        f'{name}_labels must be in [0, {num_classes}), got '
        f'{labels[wrong[0]]} at index {wrong[0]}'
      )
