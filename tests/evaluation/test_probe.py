import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.linear_model

from clop_jax.evaluation import probe
from clop_jax.runtime import parallel
from tests import small

K = 6


@functools.cache
def problem(n=300, dim=8, noise=1.6, seed=0):
  """Overlapping classes, one feature dead and one badly scaled."""
  rng = np.random.default_rng(seed)
  centres = 1.5 * rng.normal(size=(K, dim))
  y = rng.integers(0, K, size=2 * n)
  x = centres[y] + noise * rng.normal(size=(2 * n, dim))
  x[:, 0] = 3.25
  x[:, 1] = 1000 * x[:, 1] + 5000
  x = x.astype(np.float32)
  return x[:n], y[:n], x[n:], y[n:]


def standardized(train, test):
  train, test = train.astype(np.float64), test.astype(np.float64)
  mean, std = train.mean(axis=0), train.std(axis=0)
  std[std < 1e-6] = np.inf
  return (train - mean) / std, (test - mean) / std


def sklearn_probe(train, y, test, alpha):
  """Weights and probabilities of the same objective, in float64."""
  # sklearn: sum of the losses + |W|^2 / (2 C).
  model = sklearn.linear_model.LogisticRegression(
    C=1 / (alpha * len(y)), tol=1e-8, max_iter=5000
  ).fit(train, y)
  return model.coef_, model.predict_proba(test)


def top_k(scores, y, k):
  return np.mean(
    [label in row.argsort()[-k:] for row, label in zip(scores, y, strict=True)]
  )


def fit(train, y, weights, alpha):
  return probe._fit(
    jnp.asarray(train, jnp.float32),
    jnp.asarray(y),
    jnp.asarray(weights, jnp.float32),
    alpha,
    num_classes=K,
    steps=200,
  )


@pytest.mark.parametrize('alpha', [0.01, 0.1])
def test_probe_equals_sklearn(alpha):
  x, y, test, test_y = problem()
  train, standard_test = standardized(x, test)
  coef, expected = sklearn_probe(train, y, standard_test, alpha)
  params = fit(train, y, np.ones(len(y)), alpha)
  np.testing.assert_allclose(params['w'], coef.T, atol=2e-3)
  logits = jnp.asarray(standard_test) @ params['w'] + params['b']
  np.testing.assert_allclose(jax.nn.softmax(logits), expected, atol=2e-3)
  result = probe.linear_probe(
    x, y, test, test_y, num_classes=K, l2_strengths=[alpha]
  )
  for k in (1, 5):
    accuracy = top_k(expected, test_y, k)
    assert 0.4 < accuracy < 1
    # One example may sit on a boundary.
    assert result[f'top{k}'] == pytest.approx(accuracy, abs=1.5 / len(test_y))
  assert result['l2'] == alpha


def test_fit_uses_only_examples_of_weight_one():
  x, y, _, _ = problem()
  train, _ = standardized(x, x)
  kept = np.arange(len(y)) % 3 > 0
  coef, _ = sklearn_probe(train[kept], y[kept], train, 0.1)
  np.testing.assert_allclose(fit(train, y, kept, 0.1)['w'], coef.T, atol=2e-3)


@pytest.mark.parametrize('order', [1, -1])
def test_strength_is_the_best_one_on_the_held_out_tenth(order):
  strengths = [0.01, 0.1, 100.0][::order]
  call = functools.partial(probe.linear_probe, *problem(), num_classes=K)
  alone = {s: call(l2_strengths=[s])['held_out_top1'] for s in strengths}
  assert len(set(alone.values())) > 1
  result = call(l2_strengths=strengths)
  best = max(alone.values())
  assert result['held_out_top1'] == best
  # The larger one on a tie, in either order.
  assert result['l2'] == max(s for s in strengths if alone[s] == best)


def test_held_out_examples_are_not_fitted():
  # Labels are noise and there are more features than examples: a fitted example
  # is always right, another only by chance.
  rng = np.random.default_rng(0)
  x = rng.normal(size=(100, 200)).astype(np.float32)
  y = np.arange(100) % 5
  result = probe.linear_probe(
    x, y, x, y, num_classes=5, l2_strengths=[1e-4], max_iterations=50
  )
  assert result['top1'] == 1
  assert result['held_out_top1'] < 0.6


def test_held_out_tenth_is_stratified_and_never_a_whole_class():
  labels = np.repeat([0, 1, 2, 3], [100, 47, 2, 1])
  chosen = probe.stratified_tenth(labels, 0)
  counts = np.bincount(labels[chosen], minlength=4)
  np.testing.assert_array_equal(counts, [10, 5, 1, 0])
  np.testing.assert_array_equal(probe.stratified_tenth(labels, 0), chosen)
  assert (probe.stratified_tenth(labels, 1) != chosen).any()


def test_scale_and_origin_of_features_do_not_matter():
  x, y, test, test_y = problem()
  call = functools.partial(
    probe.linear_probe, num_classes=K, l2_strengths=[0.1]
  )
  shift, scale = np.arange(8.0), 2.0 ** np.arange(8)
  moved = call((x - shift) * scale, y, (test - shift) * scale, test_y)
  expected = call(x, y, test, test_y)['top1']
  np.testing.assert_allclose(moved['top1'], expected, atol=0.005)


def test_one_example_per_class_uses_the_largest_strength():
  x, y = np.eye(3, dtype=np.float32), np.arange(3)
  result = probe.linear_probe(
    x, y, x, y, num_classes=3, l2_strengths=[0.01, 0.1, 0.02]
  )
  assert (result['l2'], result['held_out_top1']) == (0.1, None)


def test_top_k_equals_a_plain_loop():
  scores = np.random.default_rng(0).normal(size=(100, 9)).astype(np.float32)
  y, ks = np.arange(100) % 9, (1, 2, 5)
  expected = [top_k(scores, y, k) for k in ks]
  np.testing.assert_allclose(probe.top_k(scores, y, ks), expected, rtol=1e-6)


def test_ties_and_nan_are_wrong():
  y = np.arange(14) % 7
  assert probe.top_k(np.zeros((14, 7)), y, (1, 5, 7)) == [0, 0, 1]
  assert probe.top_k(np.full((14, 7), np.nan), y, (1, 5)) == [0, 0]
  # A tie of two is wrong for k = 1 and right for k = 2.
  logits = np.array([[1.0, 1, 0, 0, 0, 0, 0]] * 2)
  assert probe.top_k(logits, y[:2], (1, 2)) == [0, 1]


@functools.cache
def knn_problem():
  rng = np.random.default_rng(1)
  centres = rng.normal(size=(K, 5))
  y = rng.integers(0, K, size=150)
  x = (centres[y] + rng.normal(size=(150, 5))).astype(np.float32)
  # Lengths must not matter.
  x *= rng.uniform(0.1, 10, size=(150, 1)).astype(np.float32)
  return x[:97], y[:97], x[97:], y[97:]


linear = functools.partial(
  probe.linear_probe, num_classes=K, l2_strengths=[0.1]
)
knn = functools.partial(probe.knn, num_classes=K)


@pytest.mark.parametrize(
  ('measure', 'position', 'value', 'kind', 'message'),
  [
    (linear, 1, K, ValueError, rf'train_labels .*\[0, {K}\).* {K} at index 7'),
    (linear, 1, -1, ValueError, 'train_labels .* -1 at index 7'),
    (linear, 3, K + 3, ValueError, f'test_labels .* {K + 3} at index 7'),
    (knn, 1, -1, ValueError, 'bank_labels .* -1 at index 7'),
    (knn, 3, -1, ValueError, 'test_labels .* -1 at index 7'),
    # Training diverged.
    (linear, 0, np.nan, FloatingPointError, 'train_features'),
    (linear, 0, np.inf, FloatingPointError, 'train_features'),
    (linear, 2, np.nan, FloatingPointError, 'test_features'),
    (knn, 0, np.nan, FloatingPointError, 'bank_features'),
  ],
)
def test_wrong_labels_and_features(measure, position, value, kind, message):
  arrays = [np.array(array) for array in knn_problem()]
  arrays[position][7] = value
  with pytest.raises(kind, match=message):
    measure(*arrays)


def np_knn(bank, bank_y, x, y, k, temperature):
  """Accuracy by a loop over examples, float64."""
  bank = bank.astype(np.float64)
  bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
  right = 0
  for row, label in zip(x.astype(np.float64), y, strict=True):
    cosines = bank @ row / np.linalg.norm(row)
    votes = np.zeros(K)
    for index in np.argsort(-cosines)[:k]:
      votes[bank_y[index]] += np.exp(cosines[index] / temperature)
    right += votes.argmax() == label
  return right / len(y)


@pytest.mark.parametrize('chunk_size', [10, 1024])
def test_knn_equals_a_plain_loop(chunk_size):
  arrays = knn_problem()
  ks = (1, 7, 20, 97, 500)  # 500 is more than there are
  accuracies = knn(*arrays, neighbours=ks, chunk_size=chunk_size)
  expected = {k: np_knn(*arrays, k, 0.1) for k in ks}
  assert accuracies == pytest.approx(expected)
  assert len(set(expected.values())) > 2


# At a low temperature the nearest one decides, and exp(1 / T) overflows.
@pytest.mark.parametrize(('temperature', 'k'), [(10.0, 40), (0.001, 1)])
def test_knn_weighs_by_temperature(temperature, k):
  arrays = knn_problem()
  accuracies = knn(*arrays, neighbours=(40,), temperature=temperature)
  expected = np_knn(*arrays, k, max(temperature, 0.1))
  assert accuracies[40] == pytest.approx(expected)


def test_knn_of_many_classes_takes_little_memory():
  # One-hot votes would take 1,024 * 200 * 21,841 numbers, 17.9 GB.
  shapes = [
    jax.ShapeDtypeStruct((20_000, 32), jnp.float32),
    jax.ShapeDtypeStruct((20_000,), jnp.int32),
    jax.ShapeDtypeStruct((1024, 32), jnp.float32),
  ]
  compiled = probe._nearest.lower(*shapes, (20, 200), 21_841, 0.1).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 2**30


def test_fingerprint_sees_every_change_but_not_the_place():
  w, b = np.arange(6, dtype=np.float32), np.zeros(2)
  nudged = w.copy()
  nudged[4] = np.nextafter(nudged[4], np.float32(9))
  trees = [
    {'a': {'w': w}, 'b': b},
    {'a': {'w': nudged}, 'b': b},
    {'a': {'w': w.reshape(2, 3)}, 'b': b},
    {'a': {'w': w.view(np.int32)}, 'b': b},
    {'a': {'v': w}, 'b': b},
    {'a': {'w': w}, 'b': np.array([0.0, -0.0])},
    {'a': {'w': w}, 'b': b, 'c': b},
    {'a': {'w': w}},
  ]
  assert len({probe.fingerprint(tree) for tree in trees}) == len(trees)
  on_devices = parallel.replicate(parallel.make_mesh(), {'w': w})
  assert probe.fingerprint(on_devices) == probe.fingerprint({'w': w})


@pytest.mark.parametrize('devices', [1, 8])
@pytest.mark.parametrize('n', [21, 16, 3])
def test_extract_returns_the_row_of_each_image(devices, n):
  small.need_devices(devices)
  mesh = parallel.make_mesh(jax.devices()[:devices])
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, size=(n, 2, 2, 1)).astype(np.uint8)
  seen = []

  @jax.jit
  def apply(batch):
    seen.append(batch.shape)
    x = batch.astype(jnp.float32).reshape(len(batch), -1)
    return x, 2 * x[:, :1]

  own = np.arange(n, dtype=np.int32)
  batches = zip(np.split(images, [8, 16]), np.split(own, [8, 16]), strict=True)
  features, embeddings, labels = probe.extract(
    apply, batches, batch_size=8, mesh=mesh
  )
  np.testing.assert_array_equal(labels, own)
  expected = images.reshape(n, -1).astype(np.float32)
  np.testing.assert_array_equal(features, expected)
  np.testing.assert_array_equal(embeddings, 2 * expected[:, :1])
  assert features.dtype == embeddings.dtype == np.float32
  assert seen == [(8, 2, 2, 1)]  # one compilation
