"""The evaluation protocol's two methods against scikit-learn on CPU."""

from collections.abc import Iterator
import functools
import warnings

import numpy as np
from sklearn import exceptions
from sklearn import linear_model
from sklearn import neighbors

from clop_jax.evaluation import probe
from docs.benchmarks import contest

NEIGHBOURS, ITERATIONS, L2, CLASSES = 200, 100, 1e-3, 100
# Examples to learn from, to classify, dimension.
_SIZES = {'full': (50_000, 10_000, 2048), 'small': (300, 100, 16)}


@functools.cache
def _features(small):
  """Returns classes as overlapping clouds, the same for all contestants."""
  train, test, dim = _SIZES['small' if small else 'full']
  rng = np.random.default_rng(0)
  means = rng.normal(size=(CLASSES, dim)).astype(np.float32)
  labels = np.arange(train + test) % CLASSES
  noise = rng.standard_normal((train + test, dim), np.float32)
  x = 0.15 * means[labels] + noise
  return x[:train], labels[:train], x[train:], labels[train:]


def contests(suite: str, small: bool) -> Iterator[contest.Contest]:
  """Yields one contest for each method."""
  train, test, dim = _SIZES['small' if small else 'full']
  cases = {
    f'kNN, {test:,} against {train:,} features of {dim:,}, k = {NEIGHBOURS}': (
      _our_knn,
      _their_knn,
    ),
    f'linear probe, {train:,} features of {dim:,}, 2 x {ITERATIONS} '
    'iterations of L-BFGS': (_our_probe, _their_probe),
  }
  for case, (ours, theirs) in cases.items():
    yield contest.Contest(
      'protocol',
      case,
      {
        'ours': functools.partial(_program, ours, small),
        'scikit-learn': functools.partial(_program, theirs, small),
      },
      turns=3 if suite == 'gpu' else 1,  # minutes a call on a few cores
      check=_agree,
    )


def _agree(results):
  """Checks that the accuracies agree within a percent of the test set."""
  ours, theirs = results.values()
  assert abs(ours - theirs) <= 0.01, results


def _program(measure, small):
  features = _features(small)
  last = {}

  def run():
    last['accuracy'] = measure(*features)

  return contest.Program(run, result=lambda: last['accuracy'])


def _our_knn(x, labels, test_x, test_labels):
  k = min(NEIGHBOURS, len(x))
  return probe.knn(
    x, labels, test_x, test_labels, num_classes=CLASSES, neighbours=(k,)
  )[k]


def _their_knn(x, labels, test_x, test_labels):
  def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)

  # Of unit vectors the squared distance is 2 - 2 cos.
  knn = neighbors.KNeighborsClassifier(
    min(NEIGHBOURS, len(x)),
    weights=lambda distance: np.exp((1 - distance**2 / 2) / 0.1),
    algorithm='brute',
    n_jobs=-1,
  )
  return knn.fit(unit(x), labels).score(unit(test_x), test_labels)


def _our_probe(x, labels, test_x, test_labels):
  return probe.linear_probe(
    x,
    labels,
    test_x,
    test_labels,
    num_classes=CLASSES,
    l2_strengths=(L2,),
    max_iterations=ITERATIONS,
  )['top1']


def _their_probe(x, labels, test_x, test_labels):
  mean, deviation = x.mean(axis=0), x.std(axis=0)
  x, test_x = (x - mean) / deviation, (test_x - mean) / deviation

  def fit(x, labels):
    # Its penalty is |W|^2 / (2 C) over the sum, ours is over the mean.
    model = linear_model.LogisticRegression(
      C=1 / (L2 * len(x)), max_iter=ITERATIONS, tol=0.0
    )
    with warnings.catch_warnings():
      # All iterations run, as in ours.
      warnings.simplefilter('ignore', exceptions.ConvergenceWarning)
      return model.fit(x, labels)

  # The protocol fits twice: without a tenth, to choose, and with it.
  tenth = np.arange(len(x)) // CLASSES % 10 == 0
  fit(x[~tenth], labels[~tenth]).score(x[tenth], labels[tenth])
  return fit(x, labels).score(test_x, test_labels)
