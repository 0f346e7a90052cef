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
