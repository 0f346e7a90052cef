"""Rules by which prototypes change in training: fixed, learned or aligned.

The train step calls a rule once per step, on every device.
"""

from collections.abc import Callable
import dataclasses
from typing import Protocol

import jax
from jax import lax
import jax.numpy as jnp

from clop_jax import collapse
from clop_jax import prototypes as prototypes_lib


class Rule(Protocol):
  """How prototypes change."""

  def statistics(self, prototypes: jax.Array):
    """Returns the initial statistics, which the training state holds."""

  def clop_factor(self, step: jax.Array) -> jax.Array | float:
    """Returns the factor on the CLOP weight after `step` steps."""

  def update(
    self,
    prototypes: jax.Array,
    statistics,
    *,
    step: jax.Array,
    embeddings: jax.Array,
    labels: jax.Array,
    gradient: Callable[[], jax.Array],
    axis_name: str | None,
  ):
    """Returns the prototypes and the statistics after a step.

    Args:
      prototypes: Prototypes `[num_classes, dim]`.
      statistics: Statistics of the rule.
      step: Number of steps, including this one.
      embeddings: Embeddings `[views, batch, dim]` of this shard.
      labels: Labels `[batch]`; -1 is unlabelled.
      gradient: Function that returns the gradient of the CLOP loss of the
        global batch with respect to the prototypes.
      axis_name: Name of the mapped axis, or None.
    """


@dataclasses.dataclass(frozen=True)
class Fixed:
  """Prototypes that never change, as in the paper."""

  def statistics(self, prototypes):
    """See `Rule`."""
    del prototypes

  def clop_factor(self, step):
    """See `Rule`."""
    del step
    return 1.0

  def update(self, prototypes, statistics, **_):
    """See `Rule`."""
    return prototypes, statistics


@dataclasses.dataclass(frozen=True)
class Learned(Fixed):
  r"""Prototypes that follow the gradient and are made orthonormal again.

  .. math:: C \leftarrow \mathrm{polar}\Big(C - \eta\,
    \frac{\partial L_{CLOP}}{\partial C}\Big)

  The polar factor is the nearest orthonormal set, so this is projected gradient
  descent on the Stiefel manifold.

  Attributes:
    learning_rate: Learning rate eta, must be positive.
  """

  learning_rate: float

  def update(self, prototypes, statistics, *, gradient, **_):
    """See `Rule`."""
    moved = prototypes - self.learning_rate * gradient()
    return prototypes_lib.orthonormalize(moved), statistics


@dataclasses.dataclass(frozen=True)
class Aligned(Fixed):
  """Prototypes that are aligned to the class means, once or periodically.

  The means are those of the normalized embeddings of labelled examples in the
  train steps of the last epoch. Until the first alignment there is no CLOP
  term, because it would pull the means towards the initial prototypes.

  Attributes:
    align: Function `(class_means, prototypes) -> prototypes`.
    first_step: Step of the first alignment.
    every_steps: Number of steps between alignments; None aligns once.
    steps_per_epoch: Number of steps over which the means are taken.
  """

  align: Callable[[jax.Array, jax.Array], jax.Array]
  first_step: int
  every_steps: int | None
  steps_per_epoch: int

  def statistics(self, prototypes):
    """See `Rule`."""
    return {
      'sum': jnp.zeros(prototypes.shape, jnp.float32),
      'count': jnp.zeros(len(prototypes), jnp.float32),
    }

  def clop_factor(self, step):
    """See `Rule`."""
    return jnp.where(step >= self.first_step, 1.0, 0.0)

  def update(
    self, prototypes, statistics, *, step, embeddings, labels, axis_name, **_
  ):
    """See `Rule`."""
    one_hot = jax.nn.one_hot(labels, len(prototypes))
    unit = collapse.normalize(embeddings)
    seen = {
      'sum': jnp.einsum('bk,vbd->kd', one_hot, unit),
      'count': len(unit) * jnp.sum(one_hot, axis=0),
    }
    if axis_name is not None:
      seen = lax.psum(seen, axis_name)
    statistics = jax.tree.map(jnp.add, statistics, seen)
    due = step == self.first_step
    if self.every_steps is not None:
      later = step - self.first_step
      due |= (later > 0) & (later % self.every_steps == 0)

    def aligned():
      counts = jnp.maximum(statistics['count'], 1.0)
      return self.align(statistics['sum'] / counts[:, None], prototypes)

    prototypes = lax.cond(due, aligned, lambda: prototypes)
    ends = step % self.steps_per_epoch == 0
    return prototypes, jax.tree.map(
      lambda x: jnp.where(ends, jnp.zeros_like(x), x), statistics
    )
