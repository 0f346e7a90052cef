"""Which examples keep their label. Labels are int32, -1 is unlabelled."""

import os

import numpy as np

UNLABELLED = -1


def check_range(labels: np.ndarray, num_classes: int) -> None:
  """Refuses labels that are no class and not -1.

  Raises:
    ValueError: naming the first wrong label and its index.
  """
  wrong = np.flatnonzero((labels < UNLABELLED) | (labels >= num_classes))
  if wrong.size:
    raise ValueError(
      f'labels must be in [-1, num_classes={num_classes}), got '
      f'{labels[wrong[0]]} at index {wrong[0]} ({wrong.size} of {labels.size} '
      'labels are wrong); set data.num_classes to the number of classes'
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
  kept = np.full(labels.shape, UNLABELLED, np.int32)
  for label in np.unique(labels[labels != UNLABELLED]):
    members = np.flatnonzero(labels == label)
    count = round(fraction * members.size)
    if fraction > 0:
      count = max(count, 1)
    rng = np.random.default_rng([seed, int(label)])
    kept[rng.permutation(members)[:count]] = label
  return kept


def counts(labels: np.ndarray, num_classes: int) -> np.ndarray:
  """Labelled examples of each class, `[num_classes]`."""
  return np.bincount(labels[labels != UNLABELLED], minlength=num_classes)


def save(path: str, labels: np.ndarray) -> None:
  """Writes the labels that training sees, whole or not at all.

  The file has `labels` (`[n]` int32, -1 is unlabelled) and `labelled` (`[n]`
  bool), in the order of the data set.
  """
  partial = f'{path}.partial'
  with open(partial, 'wb') as file:
    np.savez_compressed(file, labels=labels, labelled=labels != UNLABELLED)
  os.replace(partial, path)


def load(path: str) -> np.ndarray:
  """The labels that `save` wrote, `[n]` int32."""
  with np.load(path) as arrays:
    return arrays['labels']
