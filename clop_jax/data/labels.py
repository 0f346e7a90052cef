"""Which examples keep their label, and which labels are wrong on purpose.

Labels are int32, -1 is unlabelled. Every choice depends on its seed and class
alone: what happens to one class does not change what happens to another.
"""

from collections.abc import Mapping, Sequence, Set
import io

import numpy as np

UNLABELLED = -1

_NOISE_KINDS = ('symmetric', 'asymmetric')

# Each policy draws from a stream of its own, [seed, class, purpose]: with a
# shared one the second policy's choice would follow from the first one's.
# `keep_fraction` has [seed, class]. The purpose stands last and is never 0, as
# numpy seeds [1, 2, 0] and [1, 2] alike.
_NOISE, _COUNT, _CLASS_FRACTIONS, _LONG_TAIL = [1], [2], [3], [4]


def check_range(labels: np.ndarray, num_classes: int) -> None:
  """Refuses labels that are no class and not -1.

  Raises:
    ValueError: naming the first wrong label and its index; or if there is no
      class.
  """
  if num_classes < 1:
    raise ValueError(
      f'config.data.num_classes must be at least 1, got {num_classes}'
    )
  wrong = np.flatnonzero((labels < UNLABELLED) | (labels >= num_classes))
  if wrong.size:
    first = labels[wrong[0]]
    way_out = (
      'set config.data.num_classes to the number of classes'
      if first >= num_classes
      else 'unlabelled is -1'
    )
    raise ValueError(
      f'labels must be in [-1, config.data.num_classes={num_classes}), got '
      f'{first} at index {wrong[0]} ({wrong.size} of {labels.size} labels are '
      f'wrong); {way_out}'
    )


def apply(
  labels: np.ndarray,
  *,
  num_classes: int,
  unlabelled_classes: Sequence[int] = (),
  imbalance_factor: float = 1.0,
  class_fractions: str = '',
  label_fraction: float = 1.0,
  labels_per_class: int | None = None,
  label_noise: float = 0.0,
  label_noise_kind: str = 'symmetric',
  seed: int,
) -> np.ndarray:
  """The labels that training sees: the policies, in the order of arguments.

  Args:
    labels: `[n]` integers, -1 is unlabelled already.
    num_classes: number of classes.
    unlabelled_classes: see `drop_classes`.
    imbalance_factor: see `long_tail_fractions`.
    class_fractions: see `parse_class_fractions`.
    label_fraction: see `keep_fraction`.
    labels_per_class: see `keep_count`; None keeps by the fraction.
    label_noise: see `add_noise`.
    label_noise_kind: likewise.
    seed: of every choice.

  Returns:
    `[n]` int32.

  Raises:
    ValueError: for a label out of range, a class without any example, a policy
      that makes no sense, or fewer labelled examples than classes.
  """
  check_range(labels, num_classes)
  if labels_per_class is not None and label_fraction != 1:
    raise ValueError(
      f'label_fraction={label_fraction} and labels_per_class='
      f'{labels_per_class} exclude each other; leave one of them out'
    )
  for label in unlabelled_classes:
    if not isinstance(label, (int, np.integer)):
      raise ValueError(
        f'unlabelled_classes must be integers, as (3, 7), got {label!r}'
      )
    _check_class('unlabelled_classes', label, num_classes)
  kept = drop_classes(labels, unlabelled_classes)
  before = counts(labels, num_classes)
  # An open set has classes that nobody has labelled yet.
  empty = np.setdiff1d(np.flatnonzero(before == 0), unlabelled_classes)
  if empty.size and before.any():
    raise ValueError(
      f'class {empty[0]} has no labelled example ({empty.size} of the '
      f'{num_classes} classes have none); label some, name the classes that '
      'are to have none in unlabelled_classes, or set data.num_classes to the '
      'classes that there are'
    )
  tail = long_tail_fractions(num_classes, imbalance_factor)
  kept = _keep_shares(kept, tail, seed, _LONG_TAIL)
  fractions = parse_class_fractions(class_fractions)
  for label in fractions:
    _check_class('class_fractions', label, num_classes)
    if label in unlabelled_classes:
      raise ValueError(
        f'class_fractions={class_fractions!r} and unlabelled_classes='
        f'{tuple(unlabelled_classes)} both name class {label}; leave it out of '
        'one of them'
      )
  kept = keep_class_fractions(kept, fractions, seed=seed)
  if labels_per_class is None:
    kept = keep_fraction(kept, label_fraction, seed=seed)
  else:
    kept = keep_count(kept, labels_per_class, seed=seed)
  # Classes that were emptied on purpose need no example.
  emptied = {*map(int, unlabelled_classes)}
  emptied |= {label for label, fraction in fractions.items() if not fraction}
  check_enough(kept, num_classes, emptied=emptied)
  # Nobody takes an example for a class that nobody labels.
  confused = [c for c in range(num_classes) if c not in emptied]
  return add_noise(
    kept, label_noise, kind=label_noise_kind, classes=confused, seed=seed
  )


def check_enough(
  labels: np.ndarray, num_classes: int, *, emptied: Set[int] = frozenset()
) -> None:
  """Refuses some labelled examples that are fewer than the classes.

  Args:
    labels: `[n]` integers; nothing labelled at all passes.
    num_classes: number of classes.
    emptied: classes that are to have no label.

  Raises:
    ValueError: if there are too few.
  """
  labelled = int(np.sum(labels != UNLABELLED))
  wanted = num_classes - len(emptied)
  if 0 < labelled < wanted:
    raise ValueError(
      f'{labelled} labelled examples are fewer than the {wanted} classes that '
      'should have some; raise label_fraction or labels_per_class, or name '
      'the classes that are to have none in unlabelled_classes'
    )


def keep_fraction(
  labels: np.ndarray, fraction: float, *, seed: int
) -> np.ndarray:
  """Keeps the labels of a random fraction of each class.

  Args:
    labels: `[n]` integers, -1 is unlabelled already.
    fraction: in [0, 1], of each class's labelled examples, rounded; at least
      one example of each class unless it is 0.
    seed: of the choice; the choice depends on nothing else.

  Returns:
    `[n]` int32, -1 where the label is not kept.

  Raises:
    ValueError: if the fraction is not in [0, 1].
  """
  if not 0 <= fraction <= 1:
    raise ValueError(f'label_fraction must be in [0, 1], got {fraction}')
  return _keep(labels, lambda label, size: _share(fraction, size), seed, [])


def keep_count(labels: np.ndarray, count: int, *, seed: int) -> np.ndarray:
  """Keeps `count` labels of each class, all of a class that has fewer.

  Args:
    labels: `[n]` integers, -1 is unlabelled already.
    count: of examples in each class.
    seed: of the choice.

  Returns:
    `[n]` int32, -1 where the label is not kept.

  Raises:
    ValueError: if the count is negative.
  """
  if count < 0:
    raise ValueError(f'labels_per_class must be at least 0, got {count}')
  return _keep(labels, lambda label, size: count, seed, _COUNT)


def keep_class_fractions(
  labels: np.ndarray, fractions: Mapping[int, float], *, seed: int
) -> np.ndarray:
  """Keeps the labels of a fraction of each class of its own.

  Args:
    labels: `[n]` integers, -1 is unlabelled already.
    fractions: class to fraction in [0, 1], as in `keep_fraction`; classes that
      are not in it keep all their labels.
    seed: of the choice.

  Returns:
    `[n]` int32, -1 where the label is not kept.

  Raises:
    ValueError: if a fraction is not in [0, 1], or no example has its class
      (unless nothing is labelled at all).
  """
  for label, fraction in fractions.items():
    if not 0 <= fraction <= 1:
      raise ValueError(
        f'class_fractions must be in [0, 1], got {fraction} for class {label}'
      )
  _check_present(fractions, labels)
  return _keep_shares(labels, fractions, seed, _CLASS_FRACTIONS)


def _check_present(classes, labels):
  present = {*np.unique(labels[labels != UNLABELLED]).tolist()}
  for label in classes:
    # -1 is in the labels and is no class.
    if label < 0 or (present and label not in present):
      raise ValueError(
        f'class_fractions must name classes that have labels, got {label}, '
        'which no example has; leave it out'
      )


def _keep_shares(labels, fractions, seed, purpose):
  def count_of(label, size):
    return _share(fractions.get(label, 1.0), size)

  return _keep(labels, count_of, seed, purpose)


def _share(fraction, size):
  return max(round(fraction * size), 1) if fraction > 0 else 0


def _keep(labels, count_of, seed, purpose):
  """Keeps `count_of(class, its size)` random labels of each class."""
  kept = np.full(labels.shape, UNLABELLED, np.int32)
  for label in np.unique(labels[labels != UNLABELLED]).tolist():
    members = np.flatnonzero(labels == label)
    rng = np.random.default_rng([seed, label, *purpose])
    kept[rng.permutation(members)[: count_of(label, members.size)]] = label
  return kept


def parse_class_fractions(text: str) -> dict[int, float]:
  """Fractions of classes as people write them.

  >>> parse_class_fractions('0:0.6, 1:0.23')
  {0: 0.6, 1: 0.23}

  Args:
    text: `class:fraction` with commas between; may be empty.

  Returns:
    Class to fraction; whether they make sense is for `keep_class_fractions`.

  Raises:
    ValueError: naming the part that is not `class:fraction`, or that comes
      twice.
  """
  fractions = {}
  for part in filter(None, map(str.strip, text.split(','))):
    label, _, fraction = part.partition(':')
    try:
      key, value = int(label), float(fraction)
    except ValueError as error:
      raise ValueError(
        f"class_fractions must be as in '0:0.6,1:0.23', got {part!r} in "
        f'{text!r}'
      ) from error
    if key in fractions:
      raise ValueError(
        f'class_fractions={text!r} has class {key} twice, the second time in '
        f"{part!r}; name each class once, as in '0:0.6,1:0.23'"
      )
    fractions[key] = value
  return fractions


def long_tail_fractions(
  num_classes: int, imbalance_factor: float
) -> dict[int, float]:
  r"""Fractions that fall exponentially from the first class to the last.

  .. math:: f_c = \mathrm{factor}^{-c / (k - 1)}

  Args:
    num_classes: k.
    imbalance_factor: first class's fraction over the last one's, at least 1.

  Returns:
    Class to fraction, from 1 to `1 / imbalance_factor`.

  Raises:
    ValueError: if the factor is below 1 or infinite.

  Reference:
    Cui et al., arXiv 1901.05555, section 5.1.
  """
  if not 1 <= imbalance_factor < np.inf:
    raise ValueError(
      f'imbalance_factor must be at least 1 and finite, got {imbalance_factor}'
    )
  last = max(num_classes - 1, 1)
  return {c: float(imbalance_factor ** (-c / last)) for c in range(num_classes)}


def drop_classes(labels: np.ndarray, classes: Sequence[int]) -> np.ndarray:
  """Takes all labels from some classes.

  Args:
    labels: `[n]` integers, -1 is unlabelled already.
    classes: those that lose their labels, if they have any.

  Returns:
    `[n]` int32.
  """
  dropped = np.isin(labels, list(classes))
  return np.where(dropped, UNLABELLED, labels).astype(np.int32)


def _check_class(name, label, num_classes):
  if not 0 <= label < num_classes:
    raise ValueError(
      f'{name} must name classes in [0, {num_classes}), got {label}'
    )


def add_noise(
  labels: np.ndarray,
  rate: float,
  *,
  kind: str,
  classes: Sequence[int],
  seed: int,
) -> np.ndarray:
  """Makes a share of each class's labels wrong.

  Args:
    labels: `[n]` integers, -1 stays -1.
    rate: in [0, 1], of each class's labelled examples, rounded.
    kind: 'symmetric' gives a uniformly drawn other class, 'asymmetric' the next
      one (the first after the last).
    classes: those that are confused with one another, ascending; all that have
      labels are among them.
    seed: of the choice.

  Returns:
    `[n]` int32.

  Raises:
    ValueError: for an unknown kind, a rate out of range, or noise without a
      second class.
  """
  if kind not in _NOISE_KINDS:
    raise ValueError(
      f'label_noise_kind must be one of {list(_NOISE_KINDS)}, got {kind!r}'
    )
  if not 0 <= rate <= 1:
    raise ValueError(f'label_noise must be in [0, 1], got {rate}')
  if rate and len(classes) < 2:
    raise ValueError(f'label_noise={rate} needs a second class to confuse with')
  noisy = labels.astype(np.int32)
  for position, label in enumerate(classes):
    members = np.flatnonzero(labels == label)
    rng = np.random.default_rng([seed, label, *_NOISE])
    chosen = rng.permutation(members)[: round(rate * members.size)]
    shift: int | np.ndarray = 1
    if kind == 'symmetric':
      shift = rng.integers(1, max(len(classes), 2), size=chosen.size)
    noisy[chosen] = np.asarray(classes)[(position + shift) % len(classes)]
  return noisy


def counts(labels: np.ndarray, num_classes: int) -> np.ndarray:
  """Labelled examples of each class, `[num_classes]`."""
  return np.bincount(labels[labels != UNLABELLED], minlength=num_classes)


def summary(before: np.ndarray, after: np.ndarray, num_classes: int) -> str:
  """What the policies did, in a few lines for a person.

  Args:
    before: `[n]` labels as the data set has them.
    after: `[n]` labels that training sees.
    num_classes: number of classes.

  Returns:
    How many examples and labels there are, the labels of each class (of up to
    20 classes), their range and median over the classes that have some, the
    first ten classes that have none, and how many labels are wrong.
  """
  per_class = counts(after, num_classes)
  labelled, size = int(per_class.sum()), after.size
  share = labelled / max(size, 1)
  line = f'{size:,} examples, {labelled:,} labelled ({share:.1%})'
  if not labelled:
    return line
  if num_classes <= 20:
    line += f'; per class: {" ".join(map(str, per_class))}'
  some = per_class[per_class > 0]
  lines = [
    line,
    f'{some.size} of {num_classes} classes have labels: {some.min()} to '
    f'{some.max()} each, median {np.median(some):g}',
  ]
  without = np.flatnonzero(per_class == 0)
  if without.size:
    first = ', '.join(map(str, without[:10]))
    more = ', ...' if without.size > 10 else ''
    lines.append(f'classes without a label: {first}{more}')
  wrong = int(np.sum((after != UNLABELLED) & (after != before)))
  if wrong:
    lines.append(f'{wrong:,} labels made wrong ({wrong / labelled:.1%})')
  return '\n'.join(lines)


def pack(labels: np.ndarray, true_labels: np.ndarray) -> bytes:
  """An npz file of the labels that training sees.

  It has `labels` (`[n]` int32, -1 is unlabelled), `labelled` (`[n]` bool) and
  `true_labels`, in the order of the data set.

  Args:
    labels: `[n]` int32.
    true_labels: `[n]` labels as the data set has them.
  """
  file = io.BytesIO()
  np.savez_compressed(
    file,
    labels=labels,
    labelled=labels != UNLABELLED,
    true_labels=true_labels,
  )
  return file.getvalue()
