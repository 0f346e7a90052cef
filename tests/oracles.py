"""Reference losses: float64 loops over examples, written from the papers.

They share no code with the library. Gradients are central differences.
"""

import math

import numpy as np


def cosine(a, b):
  lengths = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
  return float(a @ b) / lengths if lengths else 0.0


def unit(a):
  length = math.sqrt(float(a @ a))
  return a / length if length else a


def clop(
  z,
  labels,
  prototypes,
  distance='cosine',
  class_weights=None,
  temperature=0.1,
  repulsion=0.0,
):
  total, weight_sum = 0.0, 0.0
  for view in z:
    for embedding, label in zip(view, labels, strict=True):
      if label < 0:
        continue
      prototype = prototypes[label]
      weight = 1.0 if class_weights is None else float(class_weights[label])
      cosines = [cosine(embedding, c) for c in prototypes]
      if distance == 'cosine':
        others = sum(cosines) - cosines[label]
        value = 1 - cosines[label] + repulsion * others / (len(cosines) - 1)
      elif distance == 'softmax':
        exponentials = [math.exp(c / temperature) for c in cosines]
        value = -math.log(exponentials[label] / sum(exponentials))
      elif distance == 'euclidean':
        value = math.sqrt(sum((unit(embedding) - prototype) ** 2))
      else:
        value = sum(abs(unit(embedding) - prototype))
      total += weight * value
      weight_sum += weight
  return total / weight_sum if weight_sum else 0.0


def _anchors(z):
  views, batch, _ = z.shape
  return [(v, i) for v in range(views) for i in range(batch)]


def supcon(z, labels, temperature, variant='out'):
  anchors = _anchors(z)
  losses = []
  for a in anchors:
    others = [b for b in anchors if b != a]
    positives = [
      b
      for b in others
      if b[1] == a[1] or (labels[a[1]] >= 0 and labels[b[1]] == labels[a[1]])
    ]
    if not positives:
      continue
    partition = sum(math.exp(cosine(z[a], z[b]) / temperature) for b in others)
    shares = [
      math.exp(cosine(z[a], z[p]) / temperature) / partition for p in positives
    ]
    if variant == 'out':
      losses.append(-sum(math.log(s) for s in shares) / len(shares))
    else:
      losses.append(-math.log(sum(shares) / len(shares)))
  return sum(losses) / len(losses) if losses else 0.0


def nt_xent(z, temperature):
  anchors = _anchors(z)
  total = 0.0
  for a in anchors:
    partition = sum(
      math.exp(cosine(z[a], z[b]) / temperature) for b in anchors if b != a
    )
    terms = [
      -math.log(math.exp(cosine(z[a], z[v, a[1]]) / temperature) / partition)
      for v in range(len(z))
      if v != a[0]
    ]
    total += sum(terms) / len(terms)
  return total / len(anchors)


def dcl(z, temperature):
  anchors = _anchors(z)
  total = 0.0
  for a in anchors:
    attractions = [
      cosine(z[a], z[v, a[1]]) / temperature for v in range(len(z)) if v != a[0]
    ]
    negatives = sum(
      math.exp(cosine(z[a], z[b]) / temperature)
      for b in anchors
      if b[1] != a[1]
    )
    total += -sum(attractions) / len(attractions) + math.log(negatives)
  return total / len(anchors)


def vicreg(z, invariance=25.0, variance=25.0, covariance=1.0):
  views, n, d = z.shape
  pairs = [(a, b) for a in range(views) for b in range(a + 1, views)]

  def variance_of(x):
    total = 0.0
    for j in range(d):
      mean = sum(x[:, j]) / n
      spread = sum((value - mean) ** 2 for value in x[:, j]) / (n - 1)
      total += max(0.0, 1 - math.sqrt(spread + 1e-4))
    return total / d

  def covariance_of(x):
    total = 0.0
    for i in range(d):
      for j in range(d):
        if i != j:
          mean_i, mean_j = sum(x[:, i]) / n, sum(x[:, j]) / n
          total += (sum((x[:, i] - mean_i) * (x[:, j] - mean_j)) / (n - 1)) ** 2
    return total / d

  total = 0.0
  for a, b in pairs:
    total += invariance * sum(((z[a] - z[b]) ** 2).ravel()) / (n * d)
    total += variance * (variance_of(z[a]) + variance_of(z[b]))
    total += covariance * (covariance_of(z[a]) + covariance_of(z[b]))
  return total / len(pairs)


def barlow_twins(z, redundancy=5e-3):
  views, n, d = z.shape
  pairs = [(a, b) for a in range(views) for b in range(a + 1, views)]

  def standardized(x):
    columns = []
    for j in range(d):
      mean = sum(x[:, j]) / n
      variance = sum((value - mean) ** 2 for value in x[:, j]) / n
      columns.append((x[:, j] - mean) / math.sqrt(variance + 1e-5))
    return columns

  total = 0.0
  for a, b in pairs:
    first, second = standardized(z[a]), standardized(z[b])
    for i in range(d):
      for j in range(d):
        correlation = sum(first[i] * second[j]) / n
        if i == j:
          total += (1 - correlation) ** 2
        else:
          total += redundancy * correlation**2
  return total / len(pairs)


def _view_pairs(z):
  return [(a, b) for a in range(len(z)) for b in range(a + 1, len(z))]


def invariance(z):
  values = [
    1 - cosine(x, y)
    for a, b in _view_pairs(z)
    for x, y in zip(z[a], z[b], strict=True)
  ]
  return sum(values) / len(values)


def alignment_uniformity(z, alignment=1.0, uniformity=1.0, alpha=2.0, t=2.0):
  def distance(x, y):
    return math.sqrt(sum((unit(x) - unit(y)) ** 2))

  n = z.shape[1]
  aligned = [
    distance(z[a, i], z[b, i]) ** alpha
    for a, b in _view_pairs(z)
    for i in range(n)
  ]
  uniform = 0.0
  for view in z:
    terms = [
      math.exp(-t * distance(view[i], view[j]) ** 2)
      for i in range(n)
      for j in range(n)
      if i != j
    ]
    uniform += math.log(sum(terms) / len(terms))
  return alignment * sum(aligned) / len(aligned) + uniformity * uniform / len(z)


def spectral_contrastive(z, mu=1.0):
  n = z.shape[1]
  total = 0.0
  for a, b in _view_pairs(z):
    for i in range(n):
      total -= 2 * mu * cosine(z[a, i], z[b, i]) / n
      for j in range(n):
        if i != j:
          total += (mu * cosine(z[a, i], z[b, j])) ** 2 / (n * (n - 1))
  return total / len(_view_pairs(z))


def sigmoid(z, temperature=0.1, bias=-10.0):
  n = z.shape[1]
  total = 0.0
  for a, b in _view_pairs(z):
    for i in range(n):
      for j in range(n):
        logit = cosine(z[a, i], z[b, j]) / temperature + bias
        sign = 1 if i == j else -1
        total += math.log(1 + math.exp(-sign * logit)) / n
  return total / len(_view_pairs(z))


def cross_entropy(z, labels):
  total, count = 0.0, 0
  for view in z:
    for logits, label in zip(view, labels, strict=True):
      if label >= 0:
        total += math.log(sum(math.exp(a - logits[label]) for a in logits))
        count += 1
  return total / count if count else 0.0


def w_mse(z, epsilon=1e-3):
  n, d = z.shape[1:]

  def whitened(view):
    means = [sum(view[:, j]) / n for j in range(d)]
    covariance = np.zeros((d, d))
    for i in range(d):
      for j in range(d):
        products = (view[:, i] - means[i]) * (view[:, j] - means[j])
        covariance[i, j] = (1 - epsilon) * sum(products) / (n - 1)
      covariance[i, i] += epsilon
    inverse = np.linalg.inv(np.linalg.cholesky(covariance))
    return [inverse @ (row - means) for row in view]

  views = [whitened(view) for view in z]
  values = [
    2 - 2 * cosine(x, y)
    for a, b in _view_pairs(z)
    for x, y in zip(views[a], views[b], strict=True)
  ]
  return sum(values) / len(values)


def gradient(function, z, step=1e-6):
  """Central differences of a scalar function of an array, float64."""
  z = np.array(z, np.float64)
  result = np.zeros_like(z)
  for position in np.ndindex(z.shape):
    middle = z[position]
    z[position] = middle + step
    above = function(z)
    z[position] = middle - step
    below = function(z)
    z[position] = middle
    result[position] = (above - below) / (2 * step)
  return result
