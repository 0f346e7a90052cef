"""Declarations of config fields: type, range, unit and meaning in one place.

The check of a config, its error messages, `--help` and docs/config.md all come
from the declarations in `defaults`.
"""

from collections.abc import Mapping
import dataclasses
import difflib
import math
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Field:
  """A field of a config.

  Attributes:
    default: Default value.
    meaning: What it does, as documentation has it.
    kind: Type of the value, or of each number of a list.
    unit: Unit of a number, as 'px'; '' for none.
    low: Lowest value.
    high: Highest value.
    above: True if `low` itself is too low.
    below: True if `high` itself is too high.
    choices: All values that there are; () for any.
    lengths: Least and greatest length of a list; None for no list.
    ascending: True if a list must not fall.
    optional: True if None is a value.
    may_be_empty: True if an empty text is a value.
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
    """Returns the range as documentation has it, '' if there is none."""
    if self.choices:
      return ', '.join(map(str, self.choices))
    unit = f' {self.unit}' if self.unit else ''
    lower = (
      ''
      if self.low == -math.inf
      else f'above {self.low:g}'
      if self.above
      else f'at least {_number(self.low)}'
    )
    upper = (
      ''
      if self.high == math.inf
      else f'below {self.high:g}'
      if self.below
      else f'at most {_number(self.high)}'
    )
    if lower and upper and not self.above and not self.below:
      both = f'{_number(self.low)} to {_number(self.high)}'
    else:
      both = ', '.join(filter(None, (lower, upper)))
    return both + unit if both else self.unit

  def expected(self) -> str:
    """Returns what a value must be, for an error."""
    if self.kind is dict:
      return 'a group of options'
    if self.choices:
      text = f'one of {list(self.choices)}'
    else:
      one = {
        bool: 'true or false',
        int: 'a whole number',
        float: 'a number',
        str: 'a text' if self.may_be_empty else 'a text that is not empty',
      }[self.kind]
      if self.lengths is not None:
        many = 'whole numbers' if self.kind is int else 'numbers'
        least, most = self.lengths
        count = (
          f'{least}'
          if least == most
          else f'{least} or more'
          if most >= _MANY
          else f'{least} to {most}'
        )
        order = ' in ascending order' if self.ascending else ''
        one = f'a list of {count} {many}{order}'
        if self.range():
          one += ', each'
      limits = self.range()
      limits = f'from {limits}' if ' to ' in limits else limits
      text = f'{one} {limits}'.rstrip()
    return f'None or {text}' if self.optional else text

  def accepts(self, value: Any) -> bool:
    """Returns True if a config may have the value."""
    if value is None:
      return self.optional
    if self.kind is dict:
      return hasattr(value, 'items')
    if self.lengths is None:
      return self._accepts_one(value)
    if not isinstance(value, tuple | list):
      return False
    least, most = self.lengths
    if not least <= len(value) <= most or not all(
      map(self._accepts_one, value)
    ):
      return False
    return not self.ascending or list(value) == sorted(value)

  def _accepts_one(self, value):
    if self.kind in (bool, str):
      if not isinstance(value, self.kind):
        return False
    elif isinstance(value, bool) or not isinstance(
      value,
      int | np.integer if self.kind is int else int | float | np.number,
    ):
      return False
    if self.choices:
      return value in self.choices
    if self.kind is str:
      return self.may_be_empty or bool(value)
    if self.kind is bool:
      return True
    # A comparison with NaN is false.
    return (
      (value > self.low if self.above else value >= self.low)
      and (value < self.high if self.below else value <= self.high)
      and abs(value) != math.inf
    )


_MANY = 10_000


def _number(x):
  return f'{int(x)}' if x == int(x) and abs(x) < 1e15 else f'{x:g}'


def whole(
  default: int | None, meaning: str, low: int, high: int, **more
) -> Field:
  """Declares a whole number."""
  return _bounded(int, default, meaning, low, high, **more)


def real(
  default: float | None, meaning: str, low: float, high: float, **more
) -> Field:
  """Declares a number."""
  return _bounded(float, default, meaning, low, high, **more)


def _bounded(kind, default, meaning, low, high, **more):
  optional = default is None
  return Field(
    default, meaning, kind, low=low, high=high, optional=optional, **more
  )


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
  **more,
) -> Field:
  """Declares a list of numbers of the type of the default's."""
  lengths = (length, length) if isinstance(length, int) else length
  kind = more.pop('kind', float)
  return Field(
    default, meaning, kind, low=low, high=high, lengths=lengths, **more
  )


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
    where: What stands before the name of a field in an error.
    fix: Advice that an error ends with.

  Raises:
    ValueError: If a field is missing or unknown, or its value is out of range.
  """
  end = f'; {fix}' if fix else ''
  for group in {name.rpartition('.')[0] for name in fields} - {''}:
    found = config.get(group, {})
    if not hasattr(found, 'items'):
      raise ValueError(
        f'{where}{group} must be a group of fields, got {found!r:.40}{end}'
      )
  values = flat(config, fields)
  for name in values:
    if name not in fields:
      group = name.rpartition('.')[0]
      near = difflib.get_close_matches(name, fields, 1)
      known = [x for x in fields if x.rpartition('.')[0] == group]
      advice = f'did you mean {near[0]}?' if near else f'there are {known}'
      raise ValueError(f'{where}{name} is no field of a config; {advice}{end}')
  for name, field in fields.items():
    if name not in values:
      raise ValueError(f'{where}{name} is missing{end}')
    if not field.accepts(values[name]):
      raise ValueError(
        f'{where}{name} must be {field.expected()}, got '
        f'{values[name]!r:.100}{end}'
      )


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
