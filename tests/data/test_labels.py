import io

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from clop_jax.data import labels as labels_lib

LABELS = st.lists(st.integers(-1, 4), min_size=1, max_size=60)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(LABELS, st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_keep_fraction_keeps_a_share_of_each_class(labels, fraction, seed):
  labels = np.array(labels)
  kept = labels_lib.keep_fraction(labels, fraction, seed=seed)
  assert kept.dtype == np.int32
  assert kept.shape == labels.shape
  # A label is kept or dropped, never changed; -1 stays -1.
  assert ((kept == labels) | (kept == -1)).all()
  for label in set(labels.tolist()) - {-1}:
    have, keep = np.sum(labels == label), np.sum(kept == label)
    if fraction == 0:
      assert keep == 0
    else:
      assert keep >= 1
      assert abs(keep - fraction * have) <= max(0.5, 1 - fraction * have) + 1e-9
  again = labels_lib.keep_fraction(labels, fraction, seed=seed)
  np.testing.assert_array_equal(again, kept)


def test_keep_fraction_is_random_within_a_class():
  labels = np.arange(200) % 4
  chosen = [
    labels_lib.keep_fraction(labels, 0.5, seed=seed) >= 0 for seed in range(40)
  ]
  assert len({c.tobytes() for c in chosen}) == 40
  # Each example is kept about half of the time.
  frequency = np.mean(chosen, axis=0)
  assert frequency.min() > 0.1
  assert frequency.max() < 0.9
  # The classes are drawn independently.
  by_class = chosen[0].reshape(50, 4)
  assert (by_class[:, 0] != by_class[:, 1]).any()


def test_packed_labels_can_be_read():
  labels = np.array([3, -1, 0], np.int32)
  data = labels_lib.pack(labels, np.array([3, 1, 0]))
  with np.load(io.BytesIO(data)) as arrays:
    np.testing.assert_array_equal(arrays['labels'], labels)
    assert arrays['labels'].dtype == np.int32
    np.testing.assert_array_equal(arrays['labelled'], [True, False, True])
    np.testing.assert_array_equal(arrays['true_labels'], [3, 1, 0])
    assert set(arrays) == {'labels', 'labelled', 'true_labels'}


SEEDS = st.integers(0, 2**32 - 1)
BY_EXAMPLES = settings(deadline=None, max_examples=60, derandomize=True)


def size_of(labels, label):
  return int(np.sum(labels == label))


@BY_EXAMPLES
@given(LABELS, st.integers(0, 8), SEEDS)
def test_keep_count_keeps_n_of_each_class(labels, count, seed):
  labels = np.array(labels)
  kept = labels_lib.keep_count(labels, count, seed=seed)
  assert ((kept == labels) | (kept == -1)).all()
  for label in range(5):
    assert size_of(kept, label) == min(count, size_of(labels, label))


@BY_EXAMPLES
@given(
  LABELS,
  st.dictionaries(st.integers(0, 4), st.floats(0, 1), max_size=5),
  SEEDS,
)
def test_class_fractions_keep_a_share_of_each_class(labels, fractions, seed):
  # Every class has an example; otherwise it is an error.
  labels = np.array([*labels, *range(5)])
  kept = labels_lib.keep_class_fractions(labels, fractions, seed=seed)
  assert ((kept == labels) | (kept == -1)).all()
  for label in range(5):
    have, keep = size_of(labels, label), size_of(kept, label)
    fraction = fractions.get(label, 1.0)
    if fraction == 0:
      assert keep == 0
    else:
      assert keep == max(1, round(fraction * have))


@BY_EXAMPLES
@given(st.integers(2, 50), st.floats(1, 500))
def test_long_tail_falls_exponentially_by_the_factor(num_classes, factor):
  fractions = labels_lib.long_tail_fractions(num_classes, factor)
  values = [fractions[label] for label in range(num_classes)]
  assert values[0] == 1
  assert values[-1] == pytest.approx(1 / factor)
  steps = np.array(values[1:]) / values[:-1]
  np.testing.assert_allclose(steps, steps[0], rtol=1e-9)


@BY_EXAMPLES
@given(
  LABELS,
  st.floats(0, 1),
  st.sampled_from(['symmetric', 'asymmetric']),
  SEEDS,
)
def test_noise_makes_a_share_of_each_class_wrong(labels, rate, kind, seed):
  labels = np.array(labels)
  noisy = labels_lib.add_noise(
    labels, rate, kind=kind, classes=range(5), seed=seed
  )
  np.testing.assert_array_equal(noisy == -1, labels == -1)
  labels_lib.check_range(noisy, 5)
  for label in range(5):
    members = labels == label
    wrong = members & (noisy != label)
    assert wrong.sum() == round(rate * members.sum())
    if kind == 'asymmetric':
      assert (noisy[wrong] == (label + 1) % 5).all()


def test_symmetric_noise_draws_other_classes_uniformly():
  labels = np.full(8000, 2)
  noisy = labels_lib.add_noise(
    labels, 1.0, kind='symmetric', classes=range(5), seed=0
  )
  counts = np.bincount(noisy, minlength=5)
  assert counts[2] == 0
  # Five standard errors of a binomial.
  np.testing.assert_allclose(counts[[0, 1, 3, 4]], 2000, atol=195)


def test_noise_does_not_label_unlabelled_classes():
  for kind in ('symmetric', 'asymmetric'):
    noisy = apply(
      unlabelled_classes=(1,), label_noise=0.5, label_noise_kind=kind
    )
    per_class = labels_lib.counts(noisy, 4)
    assert per_class[1] == 0 and (per_class[[0, 2, 3]] > 0).all()
    assert per_class.sum() == 300
  # Asymmetric noise skips classes without labels.
  next_ones = labels_lib.add_noise(
    np.array([0, 2, 3]), 1.0, kind='asymmetric', classes=(0, 2, 3), seed=0
  )
  np.testing.assert_array_equal(next_ones, [2, 3, 0])


BALANCED = np.arange(400) % 4


def apply(labels=BALANCED, num_classes=4, seed=0, **policies):
  return labels_lib.apply(
    labels, num_classes=num_classes, seed=seed, **policies
  )


@pytest.mark.parametrize(
  ('policies', 'per_class'),
  [
    ({'labels_per_class': 7}, [7, 7, 7, 7]),
    ({'imbalance_factor': 8.0}, [100, 50, 25, 12]),
    ({'imbalance_factor': 8.0, 'label_fraction': 0.1}, [10, 5, 2, 1]),
    ({'class_fractions': {0: 0.6, 1: 0.23}}, [60, 23, 100, 100]),
    ({'class_fractions': {'2': 0}, 'labels_per_class': 5}, [5, 5, 0, 5]),
    ({'unlabelled_classes': (0, 3), 'label_fraction': 0.2}, [0, 20, 20, 0]),
    # The next class gains what a class loses.
    (
      {
        'class_fractions': {0: 0.5},
        'label_noise': 0.2,
        'label_noise_kind': 'asymmetric',
      },
      [60, 90, 100, 100],
    ),
  ],
)
def test_policies_apply_in_order(policies, per_class):
  labels = apply(**policies)
  np.testing.assert_array_equal(labels_lib.counts(labels, 4), per_class)
  np.testing.assert_array_equal(apply(**policies), labels)
  if per_class != [100] * 4:
    assert (apply(seed=1, **policies) != labels).any()


@pytest.mark.parametrize(
  ('policies', 'message'),
  [
    ({'label_fraction': 2.0}, r'label_fraction.*2\.0'),
    ({'label_fraction': np.nan}, 'label_fraction.*nan'),
    ({'labels_per_class': -1}, 'labels_per_class.*-1'),
    (
      {'labels_per_class': 3, 'label_fraction': 0.1},
      'label_fraction=0.1.*labels_per_class=3',
    ),
    ({'imbalance_factor': 0.5}, r'imbalance_factor.*0\.5'),
    ({'imbalance_factor': np.inf}, 'imbalance_factor.*inf'),
    ({'class_fractions': {1: 1.5}}, r'class_fractions.*1\.5.*class 1'),
    *(
      ({'class_fractions': {x: 0.5}}, rf'class_fractions.*4\).*{x!r}')
      for x in (4, -1, '4', 'a', '', '1.5')
    ),
    ({'unlabelled_classes': (1.5,)}, r'unlabelled_classes.*1\.5'),
    (
      {'class_fractions': {0: 0.5, '1': 0.5}, 'unlabelled_classes': (2, 1)},
      'class_fractions.*unlabelled_classes.*class 1',
    ),
    ({'label_noise': 1.5}, r'label_noise.*1\.5'),
    ({'label_noise_kind': 'pairs'}, "label_noise_kind.*'pairs'"),
    ({'labels': [0, 1, 3, 3]}, 'class 2.*1 of the 4 classes'),
    (
      {'labels': [0, 3, 4, 4], 'num_classes': 3},
      'num_classes=3.*3 at index 1',
    ),
    ({'labels': [-1, 0, -2]}, '-2 at index 2'),
    ({'labels': [-1], 'num_classes': -1}, 'num_classes.*-1'),
    ({'labels': [0] * 3, 'num_classes': 1, 'label_noise': 0.5}, r'noise=0\.5'),
  ],
)
def test_wrong_policies_are_named(policies, message):
  policies['labels'] = np.asarray(policies.get('labels', BALANCED))
  with pytest.raises(ValueError, match=message):
    apply(**policies)


@pytest.mark.parametrize(
  ('labels', 'policies'),
  [
    (BALANCED, {'label_fraction': 0.0}),
    (BALANCED, {'unlabelled_classes': (0, 1, 2, 3)}),
    (
      np.full(5, -1),
      {
        'unlabelled_classes': (1,),
        'class_fractions': {2: 0.5},
        'imbalance_factor': 5.0,
        'labels_per_class': 3,
        'label_noise': 0.5,
      },
    ),
  ],
)
def test_all_labels_may_be_missing(labels, policies):
  kept = apply(labels, **policies)
  assert (kept == -1).all()
  summary = labels_lib.summary(labels, kept, 4)
  assert summary.endswith(' examples, 0 labelled (0.0%)')


def test_summary_reports_labels_and_noise():
  # 10, 6, 4 and 2 are kept. 2, 1, 1 and 0 of them become the next class.
  after = apply(
    imbalance_factor=4.0,
    label_fraction=0.1,
    label_noise=0.2,
    label_noise_kind='asymmetric',
  )
  assert labels_lib.summary(BALANCED, after, 4).splitlines() == [
    '400 examples, 22 labelled (5.5%); per class: 8 7 4 3',
    '4 of 4 classes have labels: 3 to 8 each, median 5.5',
    '4 wrong labels (18.2%)',
  ]


def test_summary_of_many_classes_is_short():
  labels = np.arange(3000) % 100
  after = labels_lib.apply(
    labels,
    num_classes=100,
    imbalance_factor=10.0,
    unlabelled_classes=range(80, 100),
    seed=0,
  )
  lines = labels_lib.summary(labels, after, 100).splitlines()
  assert 'per class' not in lines[0]
  assert lines[1].startswith('80 of 100 classes have labels: 5 to 30 each, ')
  assert lines[2] == (
    'classes without a label: 80, 81, 82, 83, 84, 85, 86, 87, 88, 89, ...'
  )
  assert len(lines) == 3


POLICIES = {
  'fraction': lambda x, seed: labels_lib.keep_fraction(x, 0.4, seed=seed),
  'count': lambda x, seed: labels_lib.keep_count(x, 8, seed=seed),
  'class fractions': lambda x, seed: labels_lib.keep_class_fractions(
    x, {1: 0.4}, seed=seed
  ),
  'symmetric': lambda x, seed: labels_lib.add_noise(
    x, 0.4, kind='symmetric', classes=range(3), seed=seed
  ),
  'asymmetric': lambda x, seed: labels_lib.add_noise(
    x, 0.4, kind='asymmetric', classes=range(3), seed=seed
  ),
  'long tail': lambda x, seed: labels_lib.keep_class_fractions(
    x, {1: labels_lib.long_tail_fractions(3, 10.0)[1]}, seed=seed
  ),
}


@pytest.mark.parametrize('name', POLICIES)
def test_choice_within_a_class_depends_on_seed_and_class(name):
  labels = np.arange(60) % 3
  policy = POLICIES[name]
  whole = policy(labels, 5)
  alone = policy(np.where(labels == 1, 1, -1), 5)
  np.testing.assert_array_equal(alone[labels == 1], whole[labels == 1])
  np.testing.assert_array_equal(policy(labels, 5), whole)
  np.testing.assert_array_equal(labels, np.arange(60) % 3)
  results = {policy(labels, seed).tobytes() for seed in range(20)}
  assert len(results) == 20


def test_keep_fraction_choice_is_stable():
  kept = labels_lib.keep_fraction(np.arange(30) % 3, 0.3, seed=7)
  expected = np.full(30, -1)
  for label in range(3):
    members = np.arange(label, 30, 3)
    rng = np.random.default_rng([7, label])
    expected[rng.permutation(members)[:3]] = label
  np.testing.assert_array_equal(kept, expected)


@pytest.mark.parametrize(
  'policies',
  [
    {'class_fractions': {0: 0.5}, 'label_fraction': 0.5},
    {'imbalance_factor': 2.0, 'label_fraction': 0.5},
    {'imbalance_factor': 2.0, 'labels_per_class': 2},
  ],
)
def test_combined_policies_do_not_favour_an_example(policies):
  # With one stream for all policies, some examples would be kept 1.6 times as
  # often as others of their class.
  label = 1 if 'imbalance_factor' in policies else 0
  labels = np.repeat([0, 1], 8)
  runs = 1000
  frequency = np.zeros(8)
  for seed in range(runs):
    kept = apply(labels, num_classes=2, seed=seed, **policies)
    frequency += kept[labels == label] == label
  # Two of the eight are kept; five standard errors.
  atol = 5 * np.sqrt(0.25 * 0.75 / runs)
  np.testing.assert_allclose(frequency / runs, 0.25, atol=atol)


def test_noise_does_not_favour_a_kept_example():
  labels = np.repeat([0, 1], 8)
  frequency = np.zeros(8)
  for seed in range(1000):
    noisy = apply(
      labels, num_classes=2, seed=seed, label_fraction=0.5, label_noise=0.5
    )
    frequency += noisy[:8] == 1
  atol = 5 * np.sqrt(0.25 * 0.75 / 1000)
  np.testing.assert_allclose(frequency / 1000, 0.25, atol=atol)


@BY_EXAMPLES
@given(
  LABELS,
  st.sets(st.integers(0, 4), max_size=4),
  st.floats(1, 100),
  st.one_of(st.integers(1, 6), st.floats(0.01, 1)),
  SEEDS,
)
def test_apply_keeps_a_rounded_share_of_each_class(
  labels, dropped, factor, amount, seed
):
  labels = np.array([*labels, *range(5)])
  name = 'labels_per_class' if isinstance(amount, int) else 'label_fraction'
  kept = apply(
    labels,
    num_classes=5,
    seed=seed,
    unlabelled_classes=tuple(dropped),
    imbalance_factor=factor,
    **{name: amount},
  )
  assert ((kept == labels) | (kept == -1)).all()
  for label in range(5):
    size = max(1, round(factor ** (-label / 4) * size_of(labels, label)))
    if name == 'labels_per_class':
      size = min(size, amount)
    else:
      size = max(1, round(amount * size))
    assert size_of(kept, label) == (0 if label in dropped else size)


def test_class_without_labels_may_be_unlabelled():
  labels = np.array([0, 1, -1, 3])
  np.testing.assert_array_equal(
    apply(labels, unlabelled_classes=(2, 3)), [0, 1, -1, -1]
  )
