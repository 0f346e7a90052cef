"""Evaluation of frozen features: linear probe and k nearest neighbours.

Nothing here sees the parameters of the network, only its features.
`fingerprint` shows that the parameters did not change.
"""

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

# Version of the protocol, written into every result. It changes whenever the
# same weights could give another figure. 1: the next image took the place of
# one that cannot be decoded.
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
  """Yields the outputs of `apply` for each batch, and the labels of the batch.

  See `extract` for the arguments. All outputs have `batch_size` rows; those
  after the last label belong to no image.
  """
  parallel.check_batch_size(batch_size, mesh)
  for images, labels in batches:
    # The last batch is padded, so that there is one compilation. The copy is
    # needed: images may be shared memory that is freed while the devices read.
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
    apply: Jitted function from uint8 images to (features, embeddings), which
      every process has whole.
    batches: Batches `(images, labels)` of at most `batch_size` examples, with
      images `[batch, height, width, channels]` uint8. The labels can be any
      numbers, as the positions of the images.
    batch_size: Images per call of `apply`, a multiple of the devices.
    mesh: Mesh of the devices, see `parallel.make_mesh`.

  Returns:
    `(features [n, feature_dim], embeddings [n, dim], labels [n])` on the host,
    float32 and int32.

  Raises:
    ValueError: If the batch size does not fit the devices.
  """
  columns = ([], [], [])
  for outputs, labels in applied(
    apply, batches, batch_size=batch_size, mesh=mesh
  ):
    for column, output in zip(columns, outputs, strict=False):
      column.append(np.asarray(output, np.float32)[: len(labels)])
    columns[2].append(labels)
  features, embeddings, known = map(np.concatenate, columns)
  return features, embeddings, known


def linear_probe(
  train_features: np.ndarray,
  train_labels: np.ndarray,
  test_features: np.ndarray,
  test_labels: np.ndarray,
  *,
  num_classes: int,
  l2_strengths: Sequence[float],
  max_iterations: int = 200,
  hold_out: bool = True,
  seed: int = 0,
) -> dict[str, float | None]:
  r"""Measures frozen features by multinomial logistic regression, by L-BFGS.

  .. math:: \min_{W, b}
    \frac{1}{n} \sum_i -\log \mathrm{softmax}(W x_i + b)_{y_i} +
    \frac{\alpha}{2} \|W\|_F^2

  `x` is standardized by the mean and the deviation of the training features.
  `alpha` is the strength with the best top-1 on a held-out, stratified tenth of
  them (the larger one on a tie). The probe is then fitted on all of them.

  Args:
    train_features: Features `[n, feature_dim]`.
    train_labels: Labels `[n]` in `[0, num_classes)`.
    test_features: Features `[m, feature_dim]`.
    test_labels: Labels `[m]`.
    num_classes: Number of classes.
    l2_strengths: Candidates for `alpha`.
    max_iterations: Largest number of L-BFGS iterations.
    hold_out: False takes the largest strength, for too few examples to hold any
      out.
    seed: Seed of the held-out tenth.

  Returns:
    `top1` and `top5` in [0, 1] on the test features, `l2`, and `held_out_top1`
    (None without `hold_out`).

  Raises:
    ValueError: If a label is out of range, or no strength can be chosen because
      there is no candidate or no class of two examples.
    FloatingPointError: If the features are not finite.
  """
  if not l2_strengths:
    raise ValueError('l2_strengths must hold at least one strength, got none')
  _check_finite(train=train_features, test=test_features)
  _check_labels(num_classes, train=train_labels, test=test_labels)
  mean = train_features.mean(axis=0)
  deviation = train_features.std(axis=0)
  # A dead feature stays 0 instead of amplifying its rounding errors.
  scale = np.where(deviation > 1e-6, 1 / np.maximum(deviation, 1e-6), 0.0)
  train_x = jnp.asarray((train_features - mean) * scale, jnp.float32)
  test_x = jnp.asarray((test_features - mean) * scale, jnp.float32)
  train_y, test_y = jnp.asarray(train_labels), jnp.asarray(test_labels)

  held_out = stratified_tenth(np.asarray(train_labels), seed)
  fit = functools.partial(
    _fit, train_x, train_y, num_classes=num_classes, steps=max_iterations
  )
  fitting = jnp.asarray(~held_out, jnp.float32)
  if hold_out and not held_out.any():
    raise ValueError(
      'train_labels must have a class of two examples or more to hold one out'
    )
  best = (-1.0, max(l2_strengths))
  for strength in sorted(l2_strengths, reverse=True) if hold_out else ():
    params = fit(fitting, strength)
    (top1,) = _top_k(params, train_x[held_out], train_y[held_out], (1,))
    if top1 > best[0]:
      best = (top1, strength)
  params = fit(jnp.ones_like(fitting), best[1])
  top1, top5 = _top_k(params, test_x, test_y, (1, min(5, num_classes)))
  return {
    'top1': top1,
    'top5': top5,
    'l2': best[1],
    'held_out_top1': best[0] if hold_out else None,
  }


@functools.partial(jax.jit, static_argnames=('num_classes', 'steps'))
def _fit(x, y, weights, strength, *, num_classes, steps):
  """Returns the minimum of the objective; weights 0 and 1 select examples."""
  optimizer = optax.lbfgs()

  def objective(params):
    logits = jnp.matmul(x, params['w'], precision=_PRECISION) + params['b']
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
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


def _top_k(params, x, y, ks):
  logits = jnp.matmul(x, params['w'], precision=_PRECISION) + params['b']
  return top_k(logits, y, ks)


def top_k(
  logits: jax.Array, labels: jax.Array, ks: Sequence[int]
) -> list[float]:
  """Returns the share of examples with their label among the `k` best.

  Ties and NaN count as wrong.

  Args:
    logits: Logits `[n, num_classes]`.
    labels: Labels `[n]` in `[0, num_classes)`.
    ks: Values of `k`, each of which has a share.
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
  r"""Measures features by weighted nearest neighbours and cosine similarity.

  .. math:: \hat y = \arg\max_c \sum_{j \in N_k(x)}
    \exp(\cos(x, x_j) / T)\, [y_j = c]

  Args:
    bank_features: Features `[n, feature_dim]` of the neighbours.
    bank_labels: Labels `[n]` in `[0, num_classes)`.
    features: Features `[m, feature_dim]` to classify.
    labels: Labels `[m]`.
    num_classes: Number of classes.
    neighbours: Values of `k`, each at most `n` in effect.
    temperature: Temperature `T`.
    chunk_size: Rows of `features` at one time, to avoid an `n x m` matrix.

  Returns:
    Top-1 accuracy in [0, 1] for each `k`.

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
  # everything, over 40 times slower on a CPU at k = 200 of 50,000.
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
      # Not a ValueError: the training diverged.
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
