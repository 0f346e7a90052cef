"""Label policies: which training labels are kept, and which are made wrong.

Labels are int32, and -1 is unlabelled. Every choice depends on the seed and the
class alone, so a change to one class does not affect another.
"""

from collections.abc import Mapping, Sequence
import io
import re

import numpy as np

UNLABELLED = -1

_NOISE_KINDS = ('symmetric', 'asymmetric')

# Each policy has its own stream, [seed, class, purpose]; with a shared one, the
# second choice would depend on the first. `keep_fraction` has [seed, class]. No
# purpose is 0, because NumPy draws the same for [1, 2] and [1, 2, 0].
_NOISE, _COUNT, _CLASS_FRACTIONS, _LONG_TAIL = [1], [2], [3], [4]


def check_range(labels: np.ndarray, num_classes: int) -> None:
  """Raises ValueError if a label is neither a class nor -1."""
  if num_classes < 1:
    raise ValueError(
      f'config.data.num_classes must be at least 1, got {num_classes}'
    )
  wrong = np.flatnonzero((labels < UNLABELLED) | (labels >= num_classes))
  if wrong.size:
    first = labels[wrong[0]]
    fix = (
      'set config.data.num_classes to the number of classes'
      if first >= num_classes
      else 'unlabelled is -1'
    )
    raise ValueError(
      f'labels must be in [-1, config.data.num_classes={num_classes}), got '
      f'{first} at index {wrong[0]} ({wrong.size} of {labels.size} labels are '
      f'wrong); {fix}'
    )


def apply(
  labels: np.ndarray,
  *,
  num_classes: int,
  unlabelled_classes: Sequence[int] = (),
  imbalance_factor: float = 1.0,
  class_fractions: Mapping[int | str, float] | None = None,
  label_fraction: float = 1.0,
  labels_per_class: int | None = None,
  label_noise: float = 0.0,
  label_noise_kind: str = 'symmetric',
  seed: int,
) -> np.ndarray:
  """Applies the policies to labels, in the order of the arguments.

  Args:
    labels: Labels `[n]`, -1 is unlabelled.
    num_classes: Number of classes.
    unlabelled_classes: Classes that lose all labels.
    imbalance_factor: See `long_tail_fractions`.
    class_fractions: See `keep_class_fractions`. The classes may be strings, as
      in a config: `{'3': 0.5}`.
    label_fraction: See `keep_fraction`.
    labels_per_class: See `keep_count`.
    label_noise: See `add_noise`.
    label_noise_kind: See `add_noise`.
    seed: Seed of every choice.

  Returns:
    Labels `[n]` int32 for training.

  Raises:
    ValueError: If a label or an argument is out of range, or a class has no
      example.
  """
  check_range(labels, num_classes)
  if labels_per_class is not None and label_fraction != 1:
    raise ValueError(
      f'label_fraction={label_fraction} and labels_per_class='
      f'{labels_per_class} exclude each other; leave one of them out'
    )
  dropped = _classes('unlabelled_classes', unlabelled_classes, num_classes)
  fractions = class_fractions or {}
  classes = _classes('class_fractions', fractions, num_classes)
  fractions = dict(zip(classes, fractions.values(), strict=True))
  if both := {*dropped} & {*fractions}:
    raise ValueError(
      f'class_fractions and unlabelled_classes both name class {min(both)}; '
      'leave it out of one of them'
    )
  # Classes of an open set may be unlabelled from the start.
  empty = np.setdiff1d(
    np.flatnonzero(counts(labels, num_classes) == 0), dropped
  )
  if empty.size and (labels != UNLABELLED).any():
    raise ValueError(
      f'class {empty[0]} has no labelled example ({empty.size} of the '
      f'{num_classes} classes have none); label some, add the classes without '
      'labels to unlabelled_classes, or lower data.num_classes'
    )
  kept = np.where(np.isin(labels, dropped), UNLABELLED, labels)
  tail = long_tail_fractions(num_classes, imbalance_factor)
  kept = _keep_shares(kept, tail, seed, _LONG_TAIL)
  kept = keep_class_fractions(kept, fractions, seed=seed)
  if labels_per_class is None:
    kept = keep_fraction(kept, label_fraction, seed=seed)
  else:
    kept = keep_count(kept, labels_per_class, seed=seed)
  # Noise does not give labels of classes that lost all of theirs.
  emptied = {*dropped, *(c for c, share in fractions.items() if not share)}
  classes = [c for c in range(num_classes) if c not in emptied]
  return add_noise(
    kept, label_noise, kind=label_noise_kind, classes=classes, seed=seed
  )


def _classes(name, classes, num_classes):
  """Returns classes as integers; the keys of a config are strings."""
  for label in classes:
    known = re.fullmatch(r'0|[1-9]\d*', str(label)) and int(label) < num_classes
    if not known:
      raise ValueError(
        f'{name} must name classes in [0, {num_classes}), got {label!r}'
      )
  return [int(label) for label in classes]


def keep_fraction(
  labels: np.ndarray, fraction: float, *, seed: int
) -> np.ndarray:
  """Keeps the labels of a random, rounded fraction of each class.

  At least one example of each class is kept unless the fraction is 0.
  """
  if not 0 <= fraction <= 1:
    raise ValueError(f'label_fraction must be in [0, 1], got {fraction}')
  return _keep(labels, lambda label, size: _share(fraction, size), seed, [])


def keep_count(labels: np.ndarray, count: int, *, seed: int) -> np.ndarray:
  """Keeps `count` random labels of each class, or all if it has fewer."""
  if count < 0:
    raise ValueError(f'labels_per_class must be at least 0, got {count}')
  return _keep(labels, lambda label, size: count, seed, _COUNT)


def keep_class_fractions(
  labels: np.ndarray, fractions: Mapping[int, float], *, seed: int
) -> np.ndarray:
  """Keeps a random fraction of the labels of some classes, as `keep_fraction`.

  Classes that `fractions` does not name keep all labels.
  """
  for label, fraction in fractions.items():
    if not 0 <= fraction <= 1:
      raise ValueError(
        f'class_fractions must be in [0, 1], got {fraction} for class {label}'
      )
  return _keep_shares(labels, fractions, seed, _CLASS_FRACTIONS)


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


def long_tail_fractions(
  num_classes: int, imbalance_factor: float
) -> dict[int, float]:
  r"""Returns the fraction of each class, falling exponentially from 1.

  .. math:: f_c = \mathrm{factor}^{-c / (k - 1)}

  Args:
    num_classes: Number of classes k.
    imbalance_factor: Ratio of the first fraction to the last, at least 1.

  Reference:
    Cui et al., arXiv 1901.05555, section 5.1.
  """
  if not 1 <= imbalance_factor < np.inf:
    raise ValueError(
      f'imbalance_factor must be at least 1 and finite, got {imbalance_factor}'
    )
  last = max(num_classes - 1, 1)
  return {c: float(imbalance_factor ** (-c / last)) for c in range(num_classes)}


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
    labels: Labels `[n]`, -1 stays -1.
    rate: Share in [0, 1] of each class's labelled examples, rounded.
    kind: 'symmetric' draws another class uniformly, 'asymmetric' uses the next
      one (the first after the last).
    classes: Classes that are confused, ascending. They include all that have
      labels.
    seed: Seed of the choice.
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
  """Returns the number of labelled examples of each class, `[num_classes]`."""
  return np.bincount(labels[labels != UNLABELLED], minlength=num_classes)


def summary(before: np.ndarray, after: np.ndarray, num_classes: int) -> str:
  """Describes the labels `after` the policies, and how many became wrong."""
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
    lines.append(f'{wrong:,} wrong labels ({wrong / labelled:.1%})')
  return '\n'.join(lines)


def pack(labels: np.ndarray, true_labels: np.ndarray) -> bytes:
  """Returns an npz file with the labels for training and the data set's own."""
  file = io.BytesIO()
  np.savez_compressed(
    file,
    labels=labels,
    labelled=labels != UNLABELLED,
    true_labels=true_labels,
  )
  return file.getvalue()
