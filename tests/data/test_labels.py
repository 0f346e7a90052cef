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
def test_keep_fraction_keeps_its_share_of_every_class(labels, fraction, seed):
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


def test_keep_fraction_of_one_and_zero():
  labels = np.array([2, 0, -1, 1, 1])
  everything = labels_lib.keep_fraction(labels, 1.0, seed=0)
  np.testing.assert_array_equal(everything, labels)
  nothing = labels_lib.keep_fraction(labels, 0.0, seed=0)
  np.testing.assert_array_equal(nothing, [-1] * 5)


def test_keep_fraction_differs_by_seed_and_is_random_within_a_class():
  labels = np.arange(200) % 4
  chosen = [
    labels_lib.keep_fraction(labels, 0.5, seed=seed) >= 0 for seed in range(40)
  ]
  assert len({c.tobytes() for c in chosen}) == 40
  # Each example is kept about half of the time.
  frequency = np.mean(chosen, axis=0)
  assert frequency.min() > 0.1
  assert frequency.max() < 0.9
  # The classes are drawn apart from each other.
  by_class = chosen[0].reshape(50, 4)
  assert (by_class[:, 0] != by_class[:, 1]).any()


def test_counts_leave_the_unlabelled_out():
  counts = labels_lib.counts(np.array([-1, 2, 0, 2, -1]), 4)
  np.testing.assert_array_equal(counts, [1, 0, 2, 0])
  none = labels_lib.counts(np.array([-1, -1]), 2)
  np.testing.assert_array_equal(none, [0, 0])


def test_packed_labels_come_back():
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
def test_keep_count_keeps_so_many_of_every_class(labels, count, seed):
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
def test_class_fractions_keep_each_class_its_own_share(labels, fractions, seed):
  # Every class has an example; one without is refused.
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
def test_long_tail_falls_geometrically_by_the_factor(num_classes, factor):
  fractions = labels_lib.long_tail_fractions(num_classes, factor)
  values = [fractions[label] for label in range(num_classes)]
  assert values[0] == 1
  assert values[-1] == pytest.approx(1 / factor)
  steps = np.array(values[1:]) / values[:-1]
  np.testing.assert_allclose(steps, steps[0], rtol=1e-9)


def test_long_tail_of_one_class_and_of_no_imbalance():
  assert labels_lib.long_tail_fractions(1, 10.0) == {0: 1.0}
  flat = labels_lib.long_tail_fractions(4, 1.0)
  assert flat == dict.fromkeys(range(4), 1.0)


@BY_EXAMPLES
@given(
  LABELS,
  st.floats(0, 1),
  st.sampled_from(['symmetric', 'asymmetric']),
  SEEDS,
)
def test_noise_makes_its_share_of_every_class_wrong(labels, rate, kind, seed):
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


def test_symmetric_noise_draws_every_other_class_alike():
  labels = np.full(8000, 2)
  noisy = labels_lib.add_noise(
    labels, 1.0, kind='symmetric', classes=range(5), seed=0
  )
  counts = np.bincount(noisy, minlength=5)
  assert counts[2] == 0
  # Five standard errors of a binomial.
  np.testing.assert_allclose(counts[[0, 1, 3, 4]], 2000, atol=195)


def test_noise_never_gives_a_label_of_a_class_that_is_to_have_none():
  for kind in ('symmetric', 'asymmetric'):
    noisy = apply(
      unlabelled_classes=(1,), label_noise=0.5, label_noise_kind=kind
    )
    per_class = labels_lib.counts(noisy, 4)
    assert per_class[1] == 0 and (per_class[[0, 2, 3]] > 0).all()
    assert per_class.sum() == 300
  # The next class of those that there are.
  next_ones = labels_lib.add_noise(
    np.array([0, 2, 3]), 1.0, kind='asymmetric', classes=(0, 2, 3), seed=0
  )
  np.testing.assert_array_equal(next_ones, [2, 3, 0])


def test_noise_does_not_fall_on_the_examples_that_were_kept_first():
  labels = np.zeros(1000, int)
  kept = labels_lib.keep_fraction(labels, 0.5, seed=0)
  noisy = labels_lib.add_noise(
    labels, 0.5, kind='asymmetric', classes=range(2), seed=0
  )
  both = np.mean((kept == 0) & (noisy == 1))
  assert both == pytest.approx(0.25, abs=0.05)


BALANCED = np.arange(400) % 4


def apply(labels=BALANCED, num_classes=4, seed=0, **policies):
  return labels_lib.apply(
    labels, num_classes=num_classes, seed=seed, **policies
  )


def test_apply_of_a_fraction_is_keep_fraction():
  np.testing.assert_array_equal(apply(), BALANCED)
  expected = labels_lib.keep_fraction(BALANCED, 0.1, seed=3)
  np.testing.assert_array_equal(apply(label_fraction=0.1, seed=3), expected)


@pytest.mark.parametrize(
  ('policies', 'per_class'),
  [
    ({'labels_per_class': 7}, [7, 7, 7, 7]),
    ({'imbalance_factor': 8.0}, [100, 50, 25, 12]),
    ({'imbalance_factor': 8.0, 'label_fraction': 0.1}, [10, 5, 2, 1]),
    ({'class_fractions': {0: 0.6, 1: 0.23}}, [60, 23, 100, 100]),
    ({'class_fractions': {'2': 0}, 'labels_per_class': 5}, [5, 5, 0, 5]),
    ({'unlabelled_classes': (0, 3), 'label_fraction': 0.2}, [0, 20, 20, 0]),
    # The next class takes what a class loses.
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
def test_apply_puts_policies_one_after_the_other(policies, per_class):
  labels = apply(**policies)
  np.testing.assert_array_equal(labels_lib.counts(labels, 4), per_class)
  np.testing.assert_array_equal(apply(**policies), labels)
  if per_class != [100] * 4:
    assert (apply(seed=1, **policies) != labels).any()


@pytest.mark.parametrize(
  ('policies', 'message'),
  [
    *(
      ({'label_fraction': x}, rf'label_fraction .*{x}')
      for x in (-0.1, 2.0, np.nan)
    ),
    ({'labels_per_class': -1}, 'labels_per_class .*-1'),
    (
      {'labels_per_class': 3, 'label_fraction': 0.1},
      'label_fraction=0.1 .*labels_per_class=3',
    ),
    *(
      ({'imbalance_factor': x}, f'imbalance_factor .*{x}')
      for x in (0.5, np.inf, np.nan)
    ),
    *(
      ({'class_fractions': {1: x}}, f'class_fractions .*{x} .*class 1')
      for x in (np.nan, 1.5)
    ),
    *(
      ({'class_fractions': {x: 0.5}}, rf'class_fractions .*4\), got {x!r}')
      for x in (4, -1, '4', 'a', '', '1.5')
    ),
    *(
      ({'unlabelled_classes': (x,)}, f'unlabelled_classes .*{x!r}')
      for x in (7, -1, 'a', 1.5)
    ),
    (
      {'class_fractions': {0: 0.5, '1': 0.5}, 'unlabelled_classes': (2, 1)},
      'class_fractions .*unlabelled_classes .*class 1',
    ),
    *(({'label_noise': x}, f'label_noise .*{x}') for x in (-0.1, 1.5)),
    ({'label_noise_kind': 'pairs'}, "label_noise_kind .*'pairs'"),
    ({'labels': [0, 1, 3, 3]}, r'class 2 .*1 of the 4 classes'),
    (
      {'labels': [0, 3, 4, 4], 'num_classes': 3},
      'num_classes=3.* 3 at index 1',
    ),
    ({'labels': [-1, 0, -2]}, 'got -2 at index 2'),
    ({'labels': [-1], 'num_classes': -1}, 'num_classes .*-1'),
    ({'labels': [0] * 3, 'num_classes': 1, 'label_noise': 0.5}, 'second class'),
  ],
)
def test_wrong_policies_are_named(policies, message):
  policies['labels'] = np.asarray(policies.get('labels', BALANCED))
  with pytest.raises(ValueError, match=message):
    apply(**policies)


def test_nothing_labelled_is_allowed():
  for labels, policies in (
    (np.full(5, -1), {}),
    (BALANCED, {'label_fraction': 0.0}),
    (BALANCED, {'unlabelled_classes': (0, 1, 2, 3)}),
  ):
    assert (apply(labels, **policies) == -1).all()


def test_summary_tells_what_the_policies_did():
  # 10, 6, 4 and 2 are kept, of which 2, 1, 1 and 0 move on by one class.
  after = apply(
    imbalance_factor=4.0,
    label_fraction=0.1,
    label_noise=0.2,
    label_noise_kind='asymmetric',
  )
  assert labels_lib.summary(BALANCED, after, 4).splitlines() == [
    '400 examples, 22 labelled (5.5%); per class: 8 7 4 3',
    '4 of 4 classes have labels: 3 to 8 each, median 5.5',
    '4 labels made wrong (18.2%)',
  ]


def test_summary_names_the_classes_without_a_label():
  after = apply(unlabelled_classes=(1, 3), label_fraction=0.1)
  assert labels_lib.summary(BALANCED, after, 4).splitlines() == [
    '400 examples, 20 labelled (5.0%); per class: 10 0 10 0',
    '2 of 4 classes have labels: 10 to 10 each, median 10',
    'classes without a label: 1, 3',
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


def test_summary_of_no_label():
  assert labels_lib.summary(BALANCED, np.full(400, -1), 4) == (
    '400 examples, 0 labelled (0.0%)'
  )


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
def test_choice_within_a_class_depends_on_the_seed_alone(name):
  labels = np.arange(60) % 3
  policy = POLICIES[name]
  whole = policy(labels, 5)
  alone = policy(np.where(labels == 1, 1, -1), 5)
  np.testing.assert_array_equal(alone[labels == 1], whole[labels == 1])
  np.testing.assert_array_equal(policy(labels, 5), whole)
  np.testing.assert_array_equal(labels, np.arange(60) % 3)
  results = {policy(labels, seed).tobytes() for seed in range(20)}
  assert len(results) == 20


def test_keep_fraction_chooses_what_it_always_chose():
  kept = labels_lib.keep_fraction(np.arange(30) % 3, 0.3, seed=7)
  expected = np.full(30, -1)
  for label in range(3):
    members = np.arange(label, 30, 3)
    rng = np.random.default_rng([7, label])
    expected[rng.permutation(members)[:3]] = label
  np.testing.assert_array_equal(kept, expected)
  # As chosen when it was the only policy.
  np.testing.assert_array_equal(
    np.flatnonzero(kept >= 0), [0, 1, 5, 11, 17, 21, 24, 25, 28]
  )


@pytest.mark.parametrize(
  'policies',
  [
    {'class_fractions': {0: 0.5}, 'label_fraction': 0.5},
    {'class_fractions': {0: 0.5}, 'labels_per_class': 2},
    {'imbalance_factor': 2.0, 'class_fractions': {1: 0.5}},
    {'imbalance_factor': 2.0, 'label_fraction': 0.5},
    {'imbalance_factor': 2.0, 'labels_per_class': 2},
  ],
)
def test_policies_in_a_row_do_not_favour_an_example(policies):
  # With one stream for all, the second choice follows from the first one, and
  # an example of a class is kept up to 1.6 times as often as another.
  label = 1 if 'imbalance_factor' in policies else 0
  labels = np.repeat([0, 1], 8)
  runs = 2000
  frequency = np.zeros(8)
  for seed in range(runs):
    kept = apply(labels, num_classes=2, seed=seed, **policies)
    frequency += kept[labels == label] == label
  # Two of the eight are kept; five standard errors.
  atol = 5 * np.sqrt(0.25 * 0.75 / runs)
  np.testing.assert_allclose(frequency / runs, 0.25, atol=atol)


def test_noise_after_a_choice_does_not_favour_an_example():
  labels = np.repeat([0, 1], 8)
  frequency = np.zeros(8)
  for seed in range(2000):
    noisy = apply(
      labels, num_classes=2, seed=seed, label_fraction=0.5, label_noise=0.5
    )
    frequency += noisy[:8] == 1
  atol = 5 * np.sqrt(0.25 * 0.75 / 2000)
  np.testing.assert_allclose(frequency / 2000, 0.25, atol=atol)


def test_apply_is_the_policies_in_the_documented_order():
  # Dropping a class does not change the others' place in the tail.
  tail = [100, 50, 25, 0]
  only_tail = apply(unlabelled_classes=(3,), imbalance_factor=8.0)
  np.testing.assert_array_equal(labels_lib.counts(only_tail, 4), tail)
  expected = labels_lib.keep_class_fractions(only_tail, {1: 0.5}, seed=0)
  expected = labels_lib.keep_fraction(expected, 0.4, seed=0)
  np.testing.assert_array_equal(labels_lib.counts(expected, 4), [40, 10, 10, 0])
  expected = labels_lib.add_noise(
    expected, 0.5, kind='symmetric', classes=range(3), seed=0
  )
  actual = apply(
    unlabelled_classes=(3,),
    imbalance_factor=8.0,
    class_fractions={1: 0.5},
    label_fraction=0.4,
    label_noise=0.5,
  )
  np.testing.assert_array_equal(actual, expected)
  assert np.sum((actual >= 0) & (actual != BALANCED)) == 30


@BY_EXAMPLES
@given(
  LABELS,
  st.sets(st.integers(0, 4), max_size=4),
  st.floats(1, 100),
  st.one_of(st.integers(1, 6), st.floats(0.01, 1)),
  SEEDS,
)
def test_apply_keeps_the_rounded_share_of_every_class(
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


def test_a_class_that_nobody_has_labelled_may_be_named_unlabelled():
  labels = np.array([0, 1, -1, 3])
  np.testing.assert_array_equal(
    apply(labels, unlabelled_classes=(2, 3)), [0, 1, -1, -1]
  )


def test_classes_may_be_named_where_nothing_is_labelled():
  nothing = np.full(5, -1)
  kept = apply(
    nothing,
    unlabelled_classes=(1,),
    class_fractions={2: 0.5},
    imbalance_factor=5.0,
    labels_per_class=3,
    label_noise=0.5,
  )
  np.testing.assert_array_equal(kept, nothing)
