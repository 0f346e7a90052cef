"""Warning of a collapse, from the effective rank of the embeddings."""

import dataclasses
import math

# CLOP weights from here on can themselves cause a collapse, unless the
# contrastive loss is one of the large ones.
_LARGE_WEIGHT = 3
_LARGE_LOSSES = ('vicreg', 'barlow_twins')


@dataclasses.dataclass
class CollapseAlarm:
  """Warns once per collapse, when the effective rank has stayed low.

  Attributes:
    num_classes: Number of classes.
    dim: Dimension of the embeddings.
    batch_size: Number of images in a step, each with two views.
    share: Share of `min(num_classes, dim, 2 * batch_size)` below which a rank
      is low.
    patience: Number of low ranks in a row that cause the warning.
    clop_weight: Weight of the CLOP loss, for the advice.
    contrastive: Contrastive loss as in `config.loss`, for the advice.
  """

  num_classes: int
  dim: int
  batch_size: int
  share: float
  patience: int
  clop_weight: float
  contrastive: str
  _low_steps: list[int] = dataclasses.field(default_factory=list)

  def record(self, step: int, effective_rank: float | None) -> str | None:
    """Records the effective rank of a step; returns a warning if one is due.

    NaN and None are ignored.
    """
    if effective_rank is None or math.isnan(effective_rank):
      return None
    bound = self.share * min(self.num_classes, self.dim, 2 * self.batch_size)
    if effective_rank >= bound:
      self._low_steps.clear()
      return None
    self._low_steps.append(step)
    if len(self._low_steps) != self.patience:
      return None
    return (
      f'the embeddings are collapsing: their effective rank is '
      f'{effective_rank:.2f} at step {step}, and on all {self.patience} '
      f'logged steps since {self._low_steps[0]} it was below {bound:.2f}, that '
      f'is {self.share:g} of min(num_classes={self.num_classes}, '
      f'dim={self.dim}, 2 * batch={2 * self.batch_size}); {self._advice()}'
    )

  def _advice(self):
    """Returns what to change; see `docs/choosing.md` and `docs/collapse.md`."""
    rate = 'lower config.optimizer.learning_rate'
    if self.contrastive == 'none':
      return rate  # without another term, the weight only scales the rate
    if self.contrastive in _LARGE_LOSSES:
      return f'{rate} or raise config.loss.clop_weight'
    weight = f'config.loss.clop_weight, {self.clop_weight:g} now'
    if self.clop_weight < _LARGE_WEIGHT:
      return f'{rate} or raise {weight}, but keep it below {_LARGE_WEIGHT}'
    return (
      f'lower {weight} ({_LARGE_WEIGHT} and more can cause a collapse), or set '
      f'config.loss.clop_after_epochs=1, or {rate}'
    )
