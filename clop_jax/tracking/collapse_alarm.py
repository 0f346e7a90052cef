"""The warning that the embeddings are collapsing, from the effective rank."""

import math

# From this weight on the CLOP term itself can be what collapses, beside losses
# that are not many times as large.
_OWN_COLLAPSE = 3
_LARGE_LOSSES = ('vicreg', 'barlow_twins')


class CollapseAlarm:
  """Tells when the effective rank has stayed low, once for each collapse."""

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
    """Has heard nothing yet.

    Args:
      num_classes: number of classes.
      dim: of the embeddings.
      batch_size: images in a step, of two views each.
      share: of `min(num_classes, dim, 2 * batch_size)` that counts as low.
      patience: so many steps in a row that are heard of.
      clop_weight: lambda of the training; the way out depends on it.
      contrastive: its contrastive loss, as `config.loss` names it.
    """
    self._way_out = _way_out(clop_weight, contrastive)
    self._largest = min(num_classes, dim, 2 * batch_size)
    self._of = (
      f'min(num_classes={num_classes}, dim={dim}, 2 * batch={2 * batch_size})'
    )
    self._share, self._patience = share, patience
    self._low = []

  def hear(self, step: int, effective_rank: float) -> str | None:
    """Takes the rank of a step; gives the warning when it is time for it."""
    if math.isnan(effective_rank):
      return None
    bound = self._share * self._largest
    if effective_rank >= bound:
      self._low.clear()
      return None
    self._low.append(step)
    if len(self._low) != self._patience:
      return None
    return (
      f'the embeddings are collapsing: their effective rank is '
      f'{effective_rank:.2f} at step {step}, and on all {self._patience} '
      f'logged steps since {self._low[0]} it was below {bound:.2f}, that is '
      f'{self._share:g} of {self._of}; {self._way_out}'
    )


def _way_out(clop_weight, contrastive):
  """What to change, see `docs/choosing.md` and `docs/collapse.md`."""
  rate = 'lower config.optimizer.learning_rate'
  if contrastive == 'none':
    return rate  # a weight is nothing but a rate where it has no other term
  if contrastive in _LARGE_LOSSES:
    return f'{rate} or raise config.loss.clop_weight'
  if clop_weight < _OWN_COLLAPSE:
    return (
      f'{rate} or raise config.loss.clop_weight, {clop_weight:g} now, but not '
      f'to {_OWN_COLLAPSE} or more'
    )
  return (
    f'lower config.loss.clop_weight, {clop_weight:g} now ({_OWN_COLLAPSE} and '
    'more can collapse by themselves), or set config.loss.clop_after_epochs=1, '
    f'or {rate}'
  )
