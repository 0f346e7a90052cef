"""Declarations of config fields: type, range, unit and meaning in one place.

The check of a config, its errors, `--help` and docs/config.md all come from the
declarations in `defaults`.
"""

from collections.abc import Mapping
import dataclasses
import difflib
import functools
import math
from typing import Any

import numpy as np

_MANY = 10_000

_KINDS = {
  bool: 'true or false',
  int: 'a whole number',
  float: 'a number',
  str: 'a text that is not empty',
}


@dataclasses.dataclass(frozen=True)
class Field:
  """A field of a config.

  Attributes:
    default: Default value.
    meaning: Description for the documentation.
    kind: Type of the value, or of each number of a list.
    unit: Unit of a number, as 'px'; '' for none.
    low: Lowest value; for a group, of each entry.
    high: Highest value; for a group, of each entry.
    above: True if `low` itself is too low.
    below: True if `high` itself is too high.
    choices: All valid values; () for any.
    lengths: Least and greatest length of a list; None for no list.
    ascending: True if a list must be in ascending order.
    optional: True if None is valid.
    may_be_empty: True if an empty text is valid.
    is_path: True for a path, in which commands expand a leading `~`.
  """

  default: Any
  meaning: str
  kind: type
  unit: str = ''
  low: float = -math.inf
  high: float = math.inf
  above: bool = False
  below: bool = False
  choices: tuple = ()
  lengths: tuple[int, int] | None = None
  ascending: bool = False
  optional: bool = False
  may_be_empty: bool = False
  is_path: bool = False

  def range(self) -> str:
    """Returns the range for the documentation, '' if there is none."""
    if self.choices:
      return ', '.join(map(str, self.choices))
    low, high = _number(self.low), _number(self.high)
    if low and high and not self.above and not self.below:
      limits = f'{low} to {high}'
    else:
      lower = low and f'{"above" if self.above else "at least"} {low}'
      upper = high and f'{"below" if self.below else "at most"} {high}'
      limits = ', '.join(filter(None, (lower, upper)))
    return ' '.join(filter(None, (limits, self.unit)))

  def expected(self) -> str:
    """Describes the valid values, for an error."""
    text = 'a text' if self.may_be_empty else _KINDS.get(self.kind, 'a group')
    if self.kind is dict and self.range():
      text += ' of numbers'
    if self.lengths is not None:
      least, most = self.lengths
      count = f'{least}' if least == most else f'{least} to {most}'
      count = f'{least} or more' if most >= _MANY else count
      numbers = 'whole numbers' if self.kind is int else 'numbers'
      order = ' in ascending order' if self.ascending else ''
      text = f'a list of {count} {numbers}{order}'
      text += ', each' if self.range() else ''
    limits = self.range()
    text += f' {"from " if " to " in limits else ""}{limits}' if limits else ''
    if self.choices:
      text = f'one of {list(self.choices)}'
    return f'None or {text}' if self.optional else text

  def accepts(self, value: Any) -> bool:
    """Returns True if the value is valid."""
    if value is None:
      return self.optional
    if self.kind is dict:
      return hasattr(value, 'items') and (
        not self.range() or all(map(self._accepts_one, value.values()))
      )
    if self.lengths is None:
      return self._accepts_one(value)
    least, most = self.lengths
    return (
      isinstance(value, tuple | list)
      and least <= len(value) <= most
      and all(map(self._accepts_one, value))
      and (not self.ascending or list(value) == sorted(value))
    )

  def _accepts_one(self, value):
    types = {bool: bool, str: str, int: int | np.integer}.get(
      self.kind, int | float | np.number
    )
    if not isinstance(value, types):
      return False
    if isinstance(value, bool) and self.kind is not bool:
      return False
    if self.choices:
      return value in self.choices
    if self.kind is bool:
      return True
    if self.kind is str:
      return self.may_be_empty or bool(value)
    # A comparison with NaN is false.
    return (
      (value > self.low if self.above else value >= self.low)
      and (value < self.high if self.below else value <= self.high)
      and abs(value) != math.inf
    )


def _number(x):
  if abs(x) == math.inf:
    return ''
  return f'{int(x)}' if x == int(x) and abs(x) < 1e15 else f'{x:g}'


def _bounded(kind, default, meaning, low, high, **more):
  optional = default is None
  return Field(
    default, meaning, kind, low=low, high=high, optional=optional, **more
  )


whole = functools.partial(_bounded, int)
real = functools.partial(_bounded, float)


def share(default: float | None, meaning: str, **more) -> Field:
  """Declares a number from 0 to 1."""
  return real(default, meaning, 0, 1, **more)


def reals(
  default: tuple,
  meaning: str,
  low: float,
  high: float,
  *,
  length: int | tuple[int, int] = (1, _MANY),
  kind: type = float,
  **more,
) -> Field:
  """Declares a list of numbers."""
  lengths = (length, length) if isinstance(length, int) else length
  return _bounded(kind, default, meaning, low, high, lengths=lengths, **more)


def text(default: str | None, meaning: str, **more) -> Field:
  """Declares a text."""
  return Field(default, meaning, str, optional=default is None, **more)


def choice(default: Any, meaning: str, *choices: Any) -> Field:
  """Declares a text or a number that must be one of several."""
  return Field(default, meaning, type(default), choices=choices)


def switch(default: bool, meaning: str) -> Field:
  """Declares a field that is true or false."""
  return Field(default, meaning, bool)


def check(
  config: Mapping,
  fields: dict[str, Field],
  *,
  where: str = 'config.',
  fix: str = '',
) -> None:
  """Checks all values of a config.

  Args:
    config: Config.
    fields: Declarations by full name, as 'loss.temperature'.
    where: Prefix of a field's name in an error.
    fix: Advice at the end of an error.

  Raises:
    ValueError: If a field is missing, unknown or out of range.
  """
  end = f'; {fix}' if fix else ''
  for group in {name.rpartition('.')[0] for name in fields} - {''}:
    value = config.get(group, {})
    if not hasattr(value, 'items'):
      raise ValueError(
        f'{where}{group} must be a group of fields, got {value!r:.40}{end}'
      )
  values = flat(config, fields)
  for name in values:
    check_name(name, fields, where=where, end=end)
  for name, field in fields.items():
    if name not in values:
      raise ValueError(f'{where}{name} is missing{end}')
    if not field.accepts(values[name]):
      raise ValueError(
        f'{where}{name} must be {field.expected()}, got '
        f'{_plain(values[name])!r:.100}{end}'
      )


def check_name(
  name: str, fields: dict[str, Field], *, where: str = '', end: str = ''
) -> None:
  """Raises ValueError, with the nearest names, if there is no such field."""
  if name in fields:
    return
  near = difflib.get_close_matches(name, fields, 1)
  group = name.rpartition('.')[0]
  known = [x for x in fields if group and x.rpartition('.')[0] == group]
  known = known or sorted({x.partition('.')[0] for x in fields})
  advice = f'did you mean {near[0]}?' if near else f'there are {known}'
  raise ValueError(f'{where}{name} is no field of a config; {advice}{end}')


def _plain(value):
  return value.to_dict() if hasattr(value, 'to_dict') else value


def flat(
  config: Mapping,
  fields: dict[str, Field],
  prefix: str = '',
) -> dict[str, Any]:
  """Returns the values of a config by full name."""
  values = {}
  for name, value in config.items():
    full = f'{prefix}{name}'
    if hasattr(value, 'items') and full not in fields:
      values |= flat(value, fields, f'{full}.')
    else:
      values[full] = value
  return values
