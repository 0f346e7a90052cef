"""The grid of a study: fields and their values as texts, checked, and cells."""

from collections.abc import Sequence
import copy
import itertools
import math
from typing import Any
import urllib.parse

import ml_collections

from clop_jax import defaults
from clop_jax.runtime import files

_BOOLEANS = {'true': True, 'false': False}
# Of the common file systems, in bytes.
_LONGEST_NAME = 255


def parse(
  texts: Sequence[str], config: ml_collections.ConfigDict
) -> dict[str, list]:
  """Fields and values of `field=value,value` texts.

  Args:
    texts: such as `optimizer.learning_rate=0.1,1`.
    config: that the fields are of.

  Returns:
    The values of each field, by its full name.

  Raises:
    ValueError: for an unknown field, a value of the wrong type, or a field or
      a value that is there twice.

  Example:
    >>> from clop_jax import defaults
    >>> from clop_jax.study import grid
    >>> grid.parse(['seed=0,1', 'loss.clop_weight=0,1'], defaults.get_config())
    {'seed': [0, 1], 'loss.clop_weight': [0.0, 1.0]}
  """
  fields = {}
  for given in texts:
    field, equals, values = given.partition('=')
    if not (field and equals):
      raise ValueError(
        '--grid must be field=value,value, as optimizer.learning_rate=0.1,1; '
        f'got {given!r}'
      )
    kind, optional = _type(field, config)
    if field in fields:
      raise ValueError(
        f'--grid {field} is there twice; give all its values in one'
      )
    fields[field] = []
    for value in values.split(','):
      parsed = _value(field, value, kind, optional)
      if parsed in fields[field]:
        raise ValueError(f'--grid {given}: the value {value} is there twice')
      fields[field].append(parsed)
  return fields


def _type(field, config):
  """`(type, whether None is allowed)` of a field's values."""
  if field.startswith('data.class_fractions.'):
    return float, False
  group, default = config, defaults.get_config()
  *path, last = field.split('.')
  for depth, name in enumerate([*path, last]):
    if not isinstance(group, ml_collections.ConfigDict) or name not in group:
      raise _unknown(field, path[:depth], name, group)
    if depth < len(path):
      group = group[name]
      default = default.get(name, {}) if default else {}
  if isinstance(group[last], ml_collections.ConfigDict):
    raise ValueError(
      f'--grid {field}: config.{field} is a group; name a field of it: '
      f'{", ".join(sorted(group[last])) or "it has none"}'
    )
  # Of a source's options only the config file knows.
  typed = default if last in default else group
  kind, optional = typed.get_type(last), typed[last] is None
  if kind in (tuple, list):
    raise ValueError(
      f'--grid {field}: config.{field} is a list, and a comma separates the '
      'values of a grid; set it for the whole study with '
      f'--config.{field}=...'
    )
  return kind, optional


def _unknown(field, path, name, group):
  has = sorted(group) if hasattr(group, 'keys') else ['no fields']
  return ValueError(
    f'--grid {field}: {".".join(["config", *path])} has no field {name!r}; it '
    f'has: {", ".join(has) or "no fields"}'
  )


def _value(field, given, kind, optional):
  if optional and given == 'None':
    return None
  expected = {
    bool: 'true or false',
    int: 'a whole number like 1',
    float: 'a number like 1.0',
  }.get(kind)
  if expected is None:
    return files.expanded(given) if field in defaults.PATHS else given
  try:
    value = _BOOLEANS[given.lower()] if kind is bool else kind(given)
  except (KeyError, ValueError):
    value = math.nan
  if not math.isfinite(value):
    raise ValueError(
      f'--grid {field}={given}: must be {expected}'
      f'{" or None" if optional else ""}'
    )
  return value


def text(value: Any) -> str:
  """A value as `--grid` takes it: 0.1, 1, true, None, cosine."""
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, float):
    return repr(value).removesuffix('.0')
  return str(value)


def cells(grid: dict[str, list]) -> dict[str, dict[str, Any]]:
  """Every choice of one value for each field, by the cell's name.

  The name is a file's, and of the last parts of the fields' names where those
  differ: `learning_rate=0.1,clop_weight=0`.

  Args:
    grid: see `parse`.

  Returns:
    The fields and values of each cell, the first field changing last.

  Raises:
    ValueError: if two cells have one name, or one is too long for a file.
  """
  short = [field.split('.')[-1] for field in grid]
  labels = [
    field if short.count(last) > 1 else last
    for field, last in zip(grid, short, strict=True)
  ]
  found = {}
  for values in itertools.product(*grid.values()):
    parts = [
      f'{label}={urllib.parse.quote(text(value), safe="+")}'
      for label, value in zip(labels, values, strict=True)
    ]
    name = ','.join(parts)
    if name in found:
      raise ValueError(f'--grid has two cells {name}; leave one of them out')
    if len(name.encode()) > _LONGEST_NAME:
      raise ValueError(
        f'--grid makes a cell whose name, a folder, has {len(name.encode())} '
        f'bytes, and {_LONGEST_NAME} are allowed: {name:.60}...; set long '
        'values for the whole study with --config.FIELD=, or vary fewer fields'
      )
    found[name] = dict(zip(grid, values, strict=True))
  return found


def applied(config: dict, values: dict[str, Any]) -> dict:
  """A config (as JSON has it) with the values of a cell in it.

  Raises:
    ValueError: for a field that the config does not have.
  """
  config = copy.deepcopy(config)
  for field, value in values.items():
    group = config
    *path, last = field.split('.')
    for depth, name in enumerate([*path, last]):
      is_new = name not in group and path != ['data', 'class_fractions']
      if not isinstance(group, dict) or is_new:
        raise _unknown(field, path[:depth], name, group)
      if depth < len(path):
        group = group[name]
    group[last] = value
  return config
