"""Warning that the embeddings collapse, from their effective rank."""

import math

# CLOP weights from here on can cause a collapse themselves, unless the
# contrastive loss is one of the large ones.
_LARGE_WEIGHT = 3
_LARGE_LOSSES = ('vicreg', 'barlow_twins')


class CollapseAlarm:
  """Warns once per collapse, when the effective rank has stayed low."""

  def __init__(
    self,
    *,
    num_classes: int,
    dim: int,
    batch_size: int,
    share: float,
    patience: int,
    clop_weight: float,
    contrastive: str,
  ):
    """Stores the bound and the advice.

    Args:
      num_classes: Number of classes.
      dim: Dimension of the embeddings.
      batch_size: Number of images in a step, each with two views.
      share: Share of `min(num_classes, dim, 2 * batch_size)` below which a rank
        is low.
      patience: Number of low ranks in a row that cause the warning.
      clop_weight: Weight of the CLOP loss, for the advice.
      contrastive: Contrastive loss as in `config.loss`, for the advice.
    """
    self._bound = share * min(num_classes, dim, 2 * batch_size)
    self._bound_text = (
      f'{self._bound:.2f}, that is {share:g} of min(num_classes={num_classes}, '
      f'dim={dim}, 2 * batch={2 * batch_size})'
    )
    self._patience = patience
    self._advice = _advice(clop_weight, contrastive)
    self._low_steps = []

  def record(self, step: int, effective_rank: float | None) -> str | None:
    """Records the rank of a step and returns a warning if one is due.

    Args:
      step: Step of the rank.
      effective_rank: Effective rank. NaN and None are ignored.

    Returns:
      The warning, or None.
    """
    if effective_rank is None or math.isnan(effective_rank):
      return None
    if effective_rank >= self._bound:
      self._low_steps.clear()
      return None
    self._low_steps.append(step)
    if len(self._low_steps) != self._patience:
      return None
    return (
      f'the embeddings are collapsing: their effective rank is '
      f'{effective_rank:.2f} at step {step}, and on all {self._patience} '
      f'logged steps since {self._low_steps[0]} it was below '
      f'{self._bound_text}; {self._advice}'
    )


def _advice(clop_weight, contrastive):
  """Returns what to change; see `docs/choosing.md` and `docs/collapse.md`."""
  rate = 'lower config.optimizer.learning_rate'
  if contrastive == 'none':
    return rate  # without another term, the weight only scales the rate
  if contrastive in _LARGE_LOSSES:
    return f'{rate} or raise config.loss.clop_weight'
  if clop_weight < _LARGE_WEIGHT:
    return (
      f'{rate} or raise config.loss.clop_weight, {clop_weight:g} now, but keep '
      f'it below {_LARGE_WEIGHT}'
    )
  return (
    f'lower config.loss.clop_weight, {clop_weight:g} now ({_LARGE_WEIGHT} and '
    'more can cause a collapse), or set config.loss.clop_after_epochs=1, '
    f'or {rate}'
  )
