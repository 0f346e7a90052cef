"""Tests of the collapse warning."""

import math

import pytest

from clop_jax.tracking import collapse_alarm


def alarm_of(**changes):
  options = {'num_classes': 10, 'dim': 128, 'batch_size': 64}
  options |= {'share': 0.5, 'patience': 2}
  options |= {'clop_weight': 1.0, 'contrastive': 'nt_xent'}
  return collapse_alarm.CollapseAlarm(**options | changes)


@pytest.mark.parametrize(
  ('ranks', 'changes', 'expected'),
  [
    # Steps in a row count, and a recovery starts anew.
    ([4, 6, 4, 6, 4], {}, []),
    ([4, 4, 4, 4, 4], {}, [1]),
    ([4, 4, 6, 4, 4], {}, [1, 4]),
    ([5, 5, 5], {}, []),  # at the bound
    ([4, math.nan, 4, None], {}, [2]),
    ([0, 0, 0], {'share': 0}, []),
    # The bound is no higher than a rank can be.
    ([9, 9], {'dim': 16, 'num_classes': 20}, []),
    ([7, 7], {'dim': 16, 'num_classes': 20}, [1]),
    ([7, 7], {'batch_size': 4, 'num_classes': 20}, []),
    ([3, 3], {'batch_size': 4, 'num_classes': 20}, [1]),
  ],
)
def test_the_alarm_warns_once_per_collapse(ranks, changes, expected):
  alarm = alarm_of(**changes)
  warnings = [alarm.record(step, rank) for step, rank in enumerate(ranks)]
  steps = [step for step, text in enumerate(warnings) if text is not None]
  assert steps == expected


@pytest.mark.parametrize(
  ('weight', 'contrastive', 'lowered', 'raised'),
  [
    (0, 'nt_xent', ['optimizer.learning_rate'], 'loss.clop_weight, 0 now'),
    (3, 'supcon', ['loss.clop_weight, 3', 'optimizer.learning_rate'], None),
    # A loss of this size needs weights of another order.
    (10, 'vicreg', ['optimizer.learning_rate'], 'loss.clop_weight'),
    (1, 'none', ['optimizer.learning_rate'], None),
  ],
)
def test_the_advice_depends_on_the_weight(weight, contrastive, lowered, raised):
  alarm = alarm_of(patience=1, clop_weight=weight, contrastive=contrastive)
  advice = alarm.record(1, 2.0).split('; ', 1)[1]
  assert advice.count('lower ') == len(lowered)
  assert all(f'lower config.{name}' in advice for name in lowered)
  assert ('raise' in advice) == (raised is not None)
  assert raised is None or f'raise config.{raised}' in advice
