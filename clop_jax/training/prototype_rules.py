"""What becomes of the prototypes while training: fixed, learned or aligned.

A rule is asked once a step, inside the compiled step and on every device alike.
Its three methods are those of `Rule`.
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
    """What the rule keeps in the state, as it is before the first step."""

  def clop_factor(self, step: jax.Array) -> jax.Array | float:
    """The CLOP term's weight is multiplied by it in the step after `step`."""

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
    """The prototypes and statistics after a step.

    Args:
      prototypes: `[num_classes, dim]`.
      statistics: as the rule left them.
      step: steps made, this one included.
      embeddings: `[views, batch, dim]` of this shard.
      labels: `[batch]`; -1 is unlabelled.
      gradient: gives the gradient of the CLOP loss of the global batch by the
        prototypes.
      axis_name: the mapped axis, or None.
    """


@dataclasses.dataclass(frozen=True)
class Fixed:
  """They stay as they were made: the paper's."""

  def statistics(self, prototypes):
    """See `Rule`."""
    del prototypes

  def clop_factor(self, step):
    """See `Rule`."""
    del step
    return 1.0

  def update(self, prototypes, statistics, **of_step):
    """See `Rule`."""
    del of_step
    return prototypes, statistics


@dataclasses.dataclass(frozen=True)
class Learned(Fixed):
  r"""They follow the gradient, and are made orthonormal again.

  .. math:: C \leftarrow \mathrm{polar}\Big(C - \eta\,
    \frac{\partial L_{CLOP}}{\partial C}\Big)

  The polar factor is the nearest orthonormal set, so this is projected gradient
  descent on the Stiefel manifold.

  Attributes:
    learning_rate: eta.
  """

  learning_rate: float

  def __post_init__(self):
    """Checks the rate.

    Raises:
      ValueError: if it is not above 0.
    """
    if not self.learning_rate > 0:
      raise ValueError(
        'config.prototypes.learning_rate must be above 0, got '
        f'{self.learning_rate}'
      )

  def update(self, prototypes, statistics, *, gradient, **of_step):
    """See `Rule`."""
    del of_step
    moved = prototypes - self.learning_rate * gradient()
    return prototypes_lib.orthonormalize(moved), statistics


@dataclasses.dataclass(frozen=True)
class Aligned(Fixed):
  """They are set to suit the class means: once, or every so often.

  The means are those of the normalized embeddings of labelled examples, as the
  training steps saw them in the epoch before. Until the first time there is no
  CLOP term: it would draw the means to where the prototypes happen to be.

  Attributes:
    align: `(class_means, prototypes) -> prototypes`.
    first_step: when they are set for the first time.
    every_steps: between further times; None: there are none.
    steps_per_epoch: over so many steps the means are taken.
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
    self,
    prototypes,
    statistics,
    *,
    step,
    embeddings,
    labels,
    axis_name,
    **of_step,
  ):
    """See `Rule`."""
    del of_step
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

    def set_anew():
      counts = jnp.maximum(statistics['count'], 1.0)
      return self.align(statistics['sum'] / counts[:, None], prototypes)

    prototypes = lax.cond(due, set_anew, lambda: prototypes)
    ends = step % self.steps_per_epoch == 0
    return prototypes, jax.tree.map(
      lambda x: jnp.where(ends, jnp.zeros_like(x), x), statistics
    )
