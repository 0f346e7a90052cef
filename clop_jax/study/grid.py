"""The grid of a study: the values of its fields, and its cells."""

from collections.abc import Sequence
import copy
import dataclasses
import itertools
import math
from typing import Any
import urllib.parse

import ml_collections

from clop_jax import defaults
from clop_jax import fields
from clop_jax.runtime import files

_BOOLEANS = {'true': True, 'false': False}
_LONGEST_NAME = 255  # bytes, on common file systems


def parse(
  texts: Sequence[str], config: ml_collections.ConfigDict
) -> dict[str, list]:
  """Returns the fields and values of `field=value,value` texts.

  Args:
    texts: Texts such as `optimizer.learning_rate=0.1,1`.
    config: Config that has the fields.

  Returns:
    The values of each field, by its full name.

  Raises:
    ValueError: If a field is unknown, a value is invalid, or a field or a value
      is repeated.

  Example:
    >>> from clop_jax import defaults
    >>> from clop_jax.study import grid
    >>> grid.parse(['seed=0,1', 'loss.clop_weight=0,1'], defaults.get_config())
    {'seed': [0, 1], 'loss.clop_weight': [0.0, 1.0]}
  """
  grid = {}
  for given in texts:
    field, equals, values = given.partition('=')
    if not (field and equals):
      raise ValueError(
        '--grid must be field=value,value, such as '
        f'optimizer.learning_rate=0.1,1; got {given!r}'
      )
    if field in grid:
      raise ValueError(f'--grid {field} is repeated; pass all its values once')
    declared = _declaration(field, config)
    grid[field] = []
    for value in values.split(','):
      parsed = _value(field, value, declared)
      if parsed in grid[field]:
        raise ValueError(f'--grid {given}: the value {value} is repeated')
      grid[field].append(parsed)
  return grid


def _declaration(field, config):
  """Returns the declaration of a field; that of an option is by its value."""
  group, last = _group_of(field, config)
  if parent := _open_group(field):
    return dataclasses.replace(parent, kind=float)
  if isinstance(group[last], ml_collections.ConfigDict):
    raise ValueError(
      f'--grid {field}: config.{field} is a group; name a field of it: '
      f'{", ".join(sorted(group[last])) or "it has none"}'
    )
  declared = defaults.FIELDS.get(field)
  if declared is None:
    kind, optional = group.get_type(last), group[last] is None
    lengths = (0, 0) if kind in (tuple, list) else None
    declared = fields.Field(None, '', kind, optional=optional, lengths=lengths)
  if declared.lengths is not None:
    raise ValueError(
      f'--grid {field}: config.{field} is a list, which a grid cannot vary; '
      f'set it for all cells by --config.{field}=...'
    )
  return declared


def _open_group(field):
  """Returns the declaration of a field's group if it takes any name."""
  declared = defaults.FIELDS.get(field.rpartition('.')[0])
  is_open = declared is not None and declared.kind is dict and declared.range()
  return declared if is_open else None


def _group_of(field, config):
  """Returns the group of a config that has a field, and the field's last name.

  Raises:
    ValueError: If the config does not have the field.
  """
  names = field.split('.')
  group = config
  for depth, name in enumerate(names, 1):
    if depth == len(names) and _open_group(field):
      break
    known = sorted(group) if hasattr(group, 'keys') else []
    if name not in known:
      raise ValueError(
        f'--grid {field}: {".".join(["config", *names[: depth - 1]])} has no '
        f'field {name!r}; it has: {", ".join(known) or "no fields"}'
      )
    if depth < len(names):
      group = group[name]
  return group, names[-1]


def _value(field, given, declared):
  if declared.optional and given == 'None':
    return None
  try:
    if declared.kind is bool:
      value = _BOOLEANS[given.lower()]
    else:
      value = declared.kind(given)
  except (KeyError, ValueError):
    value = math.nan  # which no field accepts
  if not declared.accepts(value):
    raise ValueError(f'--grid {field}={given}: must be {declared.expected()}')
  return files.expanded(value) if declared.is_path else value


def text(value: Any) -> str:
  """Returns a value as `--grid` takes it: 0.1, 1, true, None, cosine."""
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, float):
    return repr(value).removesuffix('.0')
  return str(value)


def cells(grid: dict[str, list]) -> dict[str, dict[str, Any]]:
  """Returns every combination of the values, by the cell's name.

  The name is a file name such as `learning_rate=0.1,clop_weight=0`. It has the
  full names of fields whose last parts are equal. The first field changes last.

  Raises:
    ValueError: If two cells have the same name, or a name is too long.
  """
  short = [field.split('.')[-1] for field in grid]
  labels = [
    field if short.count(last) > 1 else last
    for field, last in zip(grid, short, strict=True)
  ]
  named = {}
  for values in itertools.product(*grid.values()):
    parts = [
      f'{label}={urllib.parse.quote(text(value), safe="+")}'
      for label, value in zip(labels, values, strict=True)
    ]
    name = ','.join(parts)
    if name in named:
      raise ValueError(f'--grid has two cells {name}; remove one of them')
    if len(name.encode()) > _LONGEST_NAME:
      raise ValueError(
        f'--grid: the name of a cell must have at most {_LONGEST_NAME} bytes, '
        f'got {len(name.encode())} bytes: {name:.60}...; vary fewer fields, or '
        'set long values for all cells by --config.FIELD='
      )
    named[name] = dict(zip(grid, values, strict=True))
  return named


def applied(config: dict, values: dict[str, Any]) -> dict:
  """Returns a config (as JSON has it) with the values of a cell.

  Raises:
    ValueError: If the config does not have a field.
  """
  config = copy.deepcopy(config)
  for field, value in values.items():
    group, last = _group_of(field, config)
    group[last] = value
  return config
