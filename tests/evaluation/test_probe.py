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


@pytest.mark.parametrize('alpha', [0.01, 0.1])
def test_weights_and_probabilities_equal_sklearn(alpha):
  x, y, test, _ = problem()
  train, test = standardized(x, test)
  coef, expected = sklearn_probe(train, y, test, alpha)
  params = probe._fit(
    jnp.asarray(train, jnp.float32),
    jnp.asarray(y),
    jnp.ones(len(y)),
    alpha,
    num_classes=K,
    steps=200,
  )
  np.testing.assert_allclose(params['w'], coef.T, atol=2e-3)
  got = jax.nn.softmax(jnp.asarray(test) @ params['w'] + params['b'])
  np.testing.assert_allclose(got, expected, atol=2e-3)


def test_fit_sees_only_the_examples_of_weight_one():
  x, y, _, _ = problem()
  train, _ = standardized(x, x)
  kept = np.arange(len(y)) % 3 > 0
  coef, _ = sklearn_probe(train[kept], y[kept], train, 0.1)
  params = probe._fit(
    jnp.asarray(train, jnp.float32),
    jnp.asarray(y),
    jnp.asarray(kept, jnp.float32),
    0.1,
    num_classes=K,
    steps=200,
  )
  np.testing.assert_allclose(params['w'], coef.T, atol=2e-3)


@pytest.mark.parametrize('alpha', [0.01, 0.1])
def test_accuracies_equal_sklearn(alpha):
  x, y, test, test_y = problem()
  result = probe.linear_probe(
    x, y, test, test_y, num_classes=K, l2_strengths=[alpha]
  )
  _, probabilities = sklearn_probe(*_train_test(), alpha)
  # One example may sit on a boundary.
  atol = 1.5 / len(test_y)
  for k in (1, 5):
    expected = top_k(probabilities, test_y, k)
    assert 0.4 < expected < 1
    np.testing.assert_allclose(result[f'top{k}'], expected, atol=atol)
  assert result['l2'] == alpha


def _train_test():
  x, y, test, _ = problem()
  train, test = standardized(x, test)
  return train, y, test


@pytest.mark.parametrize('order', [1, -1])
def test_strength_is_the_best_one_on_the_held_out_tenth(order):
  x, y, test, test_y = problem()
  strengths = [0.01, 0.1, 100.0][::order]
  call = functools.partial(
    probe.linear_probe, x, y, test, test_y, num_classes=K
  )
  alone = {s: call(l2_strengths=[s])['held_out_top1'] for s in strengths}
  assert len(set(alone.values())) > 1
  result = call(l2_strengths=strengths)
  best = max(alone.values())
  assert result['held_out_top1'] == best
  # The larger one on a tie, whatever the order they are given in.
  assert result['l2'] == max(s for s in strengths if alone[s] == best)


def test_held_out_accuracy_is_of_examples_that_were_not_fitted():
  # Labels are noise and there are more features than examples: a fitted
  # example is always right, another only by chance.
  rng = np.random.default_rng(0)
  x = rng.normal(size=(200, 400)).astype(np.float32)
  y = np.arange(200) % 5
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


def test_probe_is_the_same_at_each_call_and_standardizes_by_itself():
  x, y, test, test_y = problem()
  call = functools.partial(
    probe.linear_probe, num_classes=K, l2_strengths=[0.1]
  )
  first = call(x, y, test, test_y)
  assert call(x, y, test, test_y) == first
  # The scale and origin of a feature do not matter.
  shift, scale = np.arange(8.0), 2.0 ** np.arange(8)
  moved = call((x - shift) * scale, y, (test - shift) * scale, test_y)
  np.testing.assert_allclose(moved['top1'], first['top1'], atol=0.005)


def test_top5_counts_the_five_best():
  scores = np.random.default_rng(0).normal(size=(100, 9)).astype(np.float32)
  y = np.arange(100) % 9
  params = {'w': jnp.eye(9), 'b': jnp.zeros(9)}
  ours = probe._top_k(params, jnp.asarray(scores), jnp.asarray(y), (1, 2, 5))
  expected = [top_k(scores, y, k) for k in (1, 2, 5)]
  np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_ties_count_against():
  params = {'w': jnp.zeros((3, 7)), 'b': jnp.zeros(7)}
  x, y = jnp.ones((14, 3)), jnp.arange(14) % 7
  assert probe._top_k(params, x, y, (1, 5, 7)) == [0, 0, 1]
  # A tie of two is wrong at 1 and right at 2.
  params['b'] = jnp.array([1.0, 1.0, 0, 0, 0, 0, 0])
  (top1, top2) = probe._top_k(params, x[:2], y[:2], (1, 2))
  assert (top1, top2) == (0, 1)


def test_probe_of_nan_is_never_right():
  params = {'w': jnp.full((3, 7), jnp.nan), 'b': jnp.zeros(7)}
  x, y = jnp.ones((14, 3)), jnp.arange(14) % 7
  assert probe._top_k(params, x, y, (1, 5)) == [0, 0]


@pytest.mark.parametrize(
  ('strengths', 'message'),
  [
    ([0.01], 'a class of two examples or more'),
    ([], 'l2_strengths must hold at least one'),
  ],
)
def test_no_strength_is_made_up_where_none_can_be_chosen(strengths, message):
  # One example a class: none can be held out.
  x, y = np.eye(3, dtype=np.float32), np.arange(3)
  with pytest.raises(ValueError, match=message):
    probe.linear_probe(x, y, x, y, num_classes=3, l2_strengths=strengths)


@pytest.mark.parametrize(
  ('position', 'value', 'message'),
  [
    (1, K, rf'train_labels must be in \[0, {K}\), got {K} at index 7'),
    (1, -1, 'train_labels must be in .*, got -1 at index 7'),
    (3, K + 3, rf'test_labels must be in .*, got {K + 3} at index 7'),
  ],
)
def test_labels_out_of_range_are_refused(position, value, message):
  arrays = [np.array(array) for array in problem()]
  arrays[position][7] = value
  with pytest.raises(ValueError, match=message):
    probe.linear_probe(*arrays, num_classes=K, l2_strengths=[0.1])


@pytest.mark.parametrize(
  ('position', 'value', 'name'),
  [(0, np.nan, 'train'), (0, np.inf, 'train'), (2, np.nan, 'test')],
)
def test_features_that_are_not_finite_count_as_a_diverged_run(
  position, value, name
):
  arrays = [np.array(array) for array in problem()]
  arrays[position][7] = value
  with pytest.raises(FloatingPointError, match=f'{name}_features must be fin'):
    probe.linear_probe(*arrays, num_classes=K, l2_strengths=[0.1])


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


@functools.cache
def knn_problem():
  rng = np.random.default_rng(1)
  centres = rng.normal(size=(K, 5))
  y = rng.integers(0, K, size=150)
  x = (centres[y] + rng.normal(size=(150, 5))).astype(np.float32)
  # Lengths must not matter.
  x *= rng.uniform(0.1, 10, size=(150, 1)).astype(np.float32)
  return x[:97], y[:97], x[97:], y[97:]


@pytest.mark.parametrize('chunk_size', [10, 53, 1024])
def test_knn_equals_a_plain_loop(chunk_size):
  arrays = knn_problem()
  neighbours = (1, 7, 20, 97, 500)
  ours = probe.knn(
    *arrays, num_classes=K, neighbours=neighbours, chunk_size=chunk_size
  )
  expected = {k: np_knn(*arrays, k, 0.1) for k in neighbours}
  assert ours == pytest.approx(expected)
  assert len(set(expected.values())) > 2


def test_knn_weighs_by_temperature_and_does_not_overflow():
  bank, bank_y, x, y = knn_problem()
  for temperature in (10.0, 0.001):
    ours = probe.knn(
      bank,
      bank_y,
      x,
      y,
      num_classes=K,
      neighbours=(40,),
      temperature=temperature,
    )
    if temperature == 10.0:
      expected = np_knn(bank, bank_y, x, y, 40, temperature)
    else:
      expected = np_knn(bank, bank_y, x, y, 1, 0.1)  # the nearest one decides
    assert ours[40] == pytest.approx(expected)


def test_knn_of_many_classes_takes_little_memory():
  # One-hot votes would take 1,024 * 200 * 21,841 numbers, 17.9 GB.
  shapes = [
    jax.ShapeDtypeStruct((20_000, 32), jnp.float32),
    jax.ShapeDtypeStruct((20_000,), jnp.int32),
    jax.ShapeDtypeStruct((1024, 32), jnp.float32),
  ]
  compiled = probe._nearest.lower(*shapes, (20, 200), 21_841, 0.1).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 2**30


def test_knn_default_neighbours_beyond_the_bank_are_reported_as_asked():
  arrays = knn_problem()
  assert set(probe.knn(*arrays, num_classes=K)) == {20, 200}


@pytest.mark.parametrize(('position', 'name'), [(1, 'bank'), (3, 'test')])
def test_knn_refuses_labels_out_of_range(position, name):
  arrays = [np.array(array) for array in knn_problem()]
  arrays[position][3] = -1
  with pytest.raises(
    ValueError, match=f'{name}_labels must be .*, got -1 at index 3'
  ):
    probe.knn(*arrays, num_classes=K)


def test_knn_refuses_features_that_are_not_finite():
  arrays = [np.array(array) for array in knn_problem()]
  arrays[0][3] = np.nan
  with pytest.raises(FloatingPointError, match='finite'):
    probe.knn(*arrays, num_classes=K)


def test_fingerprint_sees_every_change():
  tree = {'a': {'w': np.arange(6.0, dtype=np.float32)}, 'b': np.zeros(2)}

  def changed(**leaves):
    return {**tree, **leaves}

  nudged = tree['a']['w'].copy()
  nudged[4] = np.nextafter(nudged[4], np.float32(9))
  others = [
    changed(a={'w': nudged}),
    changed(a={'w': tree['a']['w'].reshape(2, 3)}),
    changed(a={'w': tree['a']['w'].view(np.int32)}),
    changed(a={'v': tree['a']['w']}),
    changed(b=np.array([0.0, -0.0])),
    changed(c=np.zeros(1)),
    {'a': tree['a']},
  ]
  prints = [probe.fingerprint(other) for other in [tree, *others]]
  assert len(set(prints)) == len(prints)
  assert all(len(digest) == 64 for digest in prints)


def test_fingerprint_does_not_care_where_the_arrays_are():
  tree = {'w': np.arange(6.0, dtype=np.float32)}
  expected = probe.fingerprint(tree)
  assert probe.fingerprint({'w': tree['w'].copy()}) == expected
  assert probe.fingerprint({'w': jnp.asarray(tree['w'])}) == expected
  mesh = parallel.make_mesh()
  assert probe.fingerprint(parallel.replicate(mesh, tree)) == expected


@pytest.mark.parametrize('devices', [1, 8])
@pytest.mark.parametrize('n', [21, 16, 3])
def test_extract_gives_each_image_its_own_row(devices, n):
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


def test_extract_refuses_a_batch_that_does_not_fit_the_devices():
  small.need_devices(8)
  with pytest.raises(ValueError, match='multiple of the 8 devices, got 12'):
    probe.extract(None, [], batch_size=12, mesh=parallel.make_mesh())
