"""Declarations of config fields: type, range, unit and meaning in one place.

Config checks, their errors, `--help` and docs/config/ all read the
declarations in `defaults`.
"""

from collections.abc import Mapping
import dataclasses
import difflib
import math
import numbers
from typing import Any

# Name of an object that was passed from Python and has none.
GIVEN = '(given)'

_MANY = 10_000

_KINDS = {
  bool: 'true or false',
  int: 'a whole number',
  float: 'a number',
  str: 'a non-empty string',
  dict: 'a group',
}
_TYPES = {bool: bool, str: str, int: numbers.Integral}


@dataclasses.dataclass(frozen=True)
class Field:
  """A field of a config."""

  default: Any
  meaning: str  # for the documentation
  kind: type  # of the value, or of each number of a list
  low: float = -math.inf  # of a number, or of each number of a list or group
  high: float = math.inf
  above: bool = False  # `low` itself is invalid
  below: bool = False  # `high` itself is invalid
  unit: str = ''
  choices: tuple = ()  # all valid values; () for any
  importable: bool = False  # 'package.module:attribute' is valid, too
  lengths: tuple[int, int] | None = None  # least and greatest; None: no list
  ascending: bool = False  # a list must be in ascending order
  optional: bool = False  # None is valid
  may_be_empty: bool = False  # '' is valid
  is_path: bool = False  # commands expand a leading `~`

  def range(self) -> str:
    """Returns the range for the documentation, '' if there is none."""
    if self.choices:
      names = [*self.choices, *['package.module:attribute'] * self.importable]
      return ', '.join(map(str, names))
    if math.isinf(self.low):
      return ''
    low, high = f'{self.low:.10g}', f'{self.high:.10g}'
    if self.above:
      return f'above {low}, at most {high} {self.unit}'.strip()
    if self.below:
      return f'at least {low}, below {high} {self.unit}'.strip()
    return f'{low} to {high} {self.unit}'.strip()

  def expected(self) -> str:
    """Returns the description of valid values for an error."""
    limits = self.range()
    limits = f' from {limits}' if ' to ' in limits else limits and f' {limits}'
    if self.choices:
      text = f'one of {list(self.choices)}'
      text += " or 'package.module:attribute'" * self.importable
    elif self.lengths is not None:
      least, most = self.lengths
      count = f'{least}' if least == most else f'{least} to {most}'
      count = f'{least} or more' if most >= _MANY else count
      whole = 'whole ' * (self.kind is int)
      order = ' in ascending order' * self.ascending
      each = f', each{limits}' if limits else ''
      text = f'a list of {count} {whole}numbers{order}{each}'
    elif self.kind is dict and limits:
      text = f'a group of numbers{limits}'
    else:
      text = _KINDS.get(self.kind, 'a group') + limits
      text = 'a string' if self.may_be_empty else text
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
    if isinstance(value, bool) != (self.kind is bool):
      return False
    if not isinstance(value, _TYPES.get(self.kind, numbers.Real)):
      return False
    if self.choices:
      return value in self.choices or (
        self.importable and (':' in value or value == GIVEN)
      )
    if self.kind is str:
      return self.may_be_empty or bool(value)
    # Comparisons with NaN are false.
    return (
      (value > self.low if self.above else value >= self.low)
      and (value < self.high if self.below else value <= self.high)
      and abs(value) != math.inf
    )


def whole(
  default: int | None, meaning: str, low: int = 1, high: int = 10**9, **more
) -> Field:
  """Declares a whole number."""
  return Field(
    default, meaning, int, low, high, optional=default is None, **more
  )


def real(
  default: float | None, meaning: str, low: float = 0, high=1e6, **more
) -> Field:
  """Declares a number."""
  return Field(
    default, meaning, float, low, high, optional=default is None, **more
  )


def share(default: float | None, meaning: str, **more) -> Field:
  """Declares a number from 0 to 1."""
  return real(default, meaning, 0, 1, **more)


def reals(
  default: tuple,
  meaning: str,
  low: float = 0,
  high: float = 1e6,
  *,
  lengths: tuple[int, int] = (1, _MANY),
  kind: type = float,
  **more,
) -> Field:
  """Declares a list of numbers."""
  return Field(default, meaning, kind, low, high, lengths=lengths, **more)


def text(default: str | None, meaning: str, **more) -> Field:
  """Declares a string."""
  return Field(default, meaning, str, optional=default is None, **more)


def choice(choices: tuple, meaning: str, **more) -> Field:
  """Declares a value that must be one of several; the first is the default."""
  return Field(choices[0], meaning, type(choices[0]), choices=choices, **more)


def options(meaning: str) -> Field:
  """Declares a group of keyword arguments, which their function checks."""
  return Field({}, meaning, dict)


def switch(default: bool, meaning: str) -> Field:
  """Declares a field that is true or false."""
  return Field(default, meaning, bool)


def group(name: str, /, **declared: Field) -> dict[str, Field]:
  """Returns the fields of a group by full name, as `loss.temperature`."""
  return {f'{name}.{field}': value for field, value in declared.items()}


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
  for name in {name.rpartition('.')[0] for name in fields} - {''}:
    value = config.get(name, {})
    if not hasattr(value, 'items'):
      raise ValueError(
        f'{where}{name} must be a group of fields, got {value!r:.40}{end}'
      )
  values = flat(config, fields)
  for name in values:
    check_name(name, fields, where=where, end=end)
  for name, field in fields.items():
    if name not in values:
      raise ValueError(f'{where}{name} is missing{end}')
    value = values[name]
    if not field.accepts(value):
      value = value.to_dict() if hasattr(value, 'to_dict') else value
      raise ValueError(
        f'{where}{name} must be {field.expected()}, got {value!r:.100}{end}'
      )


def check_name(
  name: str, fields: dict[str, Field], *, where: str = '', end: str = ''
) -> None:
  """Raises ValueError, naming similar fields, if the field does not exist."""
  if name in fields:
    return
  near = difflib.get_close_matches(name, fields, 1)
  start = name.rpartition('.')[0]
  known = [x for x in fields if start and x.rpartition('.')[0] == start]
  known = known or sorted({x.partition('.')[0] for x in fields})
  advice = f'did you mean {near[0]}?' if near else f'expected one of {known}'
  raise ValueError(f'{where}{name} is not a field of a config; {advice}{end}')


def flat(
  config: Mapping, fields: dict[str, Field], prefix: str = ''
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
