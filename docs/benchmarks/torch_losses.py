"""The losses in PyTorch, as peers of clop_jax/loss.py."""

import torch
from torch.nn import functional


def nt_xent_authors(z1, z2, temperature):
  """NT-Xent in its common published form.

  Two batches `[n, dim]`: the matrix of their 2n x 2n similarities is taken
  apart by masks, and the positive put first as the class of a cross entropy.
  """
  n = len(z1)
  z = functional.normalize(torch.cat([z1, z2]), dim=1)
  similarity = z @ z.T
  itself = torch.eye(2 * n, dtype=torch.bool, device=z.device)
  partner = itself.roll(n, dims=1)
  positives = similarity[partner].view(2 * n, 1)
  negatives = similarity[~(itself | partner)].view(2 * n, 2 * n - 2)
  logits = torch.cat([positives, negatives], dim=1) / temperature
  classes = torch.zeros(2 * n, dtype=torch.long, device=z.device)
  return functional.cross_entropy(logits, classes)


def nt_xent_expert(z, temperature):
  """NT-Xent of `[2, n, dim]`, with one product and nothing copied out of it."""
  n = z.shape[1]
  z = functional.normalize(z.flatten(0, 1).float(), dim=1)
  scaled = z / temperature
  logits = scaled @ z.T
  logits.fill_diagonal_(-torch.inf)
  positives = (scaled * z.roll(n, dims=0)).sum(1)
  return (logits.logsumexp(1) - positives).mean()


def clop(z, labels, prototypes):
  """1 - cosine to the own prototype, mean over the labelled embeddings.

  `z` is `[n, dim]` or `[views, n, dim]`; label -1 is unlabelled.
  """
  own = prototypes[labels.clamp_min(0)]
  distances = 1 - functional.cosine_similarity(z.float(), own, dim=-1)
  weights = (labels >= 0).float().expand_as(distances)
  return (distances * weights).sum() / weights.sum().clamp_min(1)
