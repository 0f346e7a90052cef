"""Names in a config: one of ours, or `package.module:attribute`."""

from collections.abc import Mapping
import importlib
import inspect
from typing import Any


def resolve(field: str, name: str, ours: Mapping[str, Any]) -> Any:
  """Returns the object that a config field names.

  Args:
    field: Name of the field, for errors.
    name: A key of `ours`, or `package.module:attribute` of anything that
      Python can import.
    ours: Objects of this package by name.

  Returns:
    The object, always callable.

  Raises:
    ValueError: If the name is unknown, or cannot be imported or called.
  """
  if name in ours:
    return ours[name]
  where = f'config.{field}={name!r}'
  module_name, colon, attribute = name.partition(':')
  if not colon:
    raise ValueError(
      f"config.{field} must be one of {[*ours]} or 'package.module:attribute', "
      f'got {name!r}'
    )
  try:
    value = importlib.import_module(module_name)
  except Exception as error:
    missing = isinstance(error, ModuleNotFoundError)
    advice = '; run in its folder, or add that to PYTHONPATH' if missing else ''
    raise ValueError(
      f'{where}: cannot import {module_name} ({type(error).__name__}: {error})'
      f'{advice}'
    ) from error
  for part in attribute.split('.'):
    if not hasattr(value, part):
      raise ValueError(f'{where}: {module_name} has no attribute {attribute!r}')
    value = getattr(value, part)
  if not callable(value):
    raise ValueError(f'{where} must be callable, got {type(value).__name__}')
  return value


def check_call(field: str, function: Any, *arguments, **options) -> None:
  """Raises ValueError if a function does not take these arguments.

  Args:
    field: Name of the config field with the options, for errors.
    function: Function or class.
    *arguments: Positional arguments.
    **options: Keyword arguments.
  """
  try:
    inspect.signature(function).bind(*arguments, **options)
  except TypeError as error:
    function = getattr(function, 'func', function)  # of a partial
    name = getattr(function, '__name__', function)
    raise ValueError(f'config.{field}: {name}: {error}') from None


def call(field: str, function: Any, **options) -> Any:
  """Calls a function with the options of a config; see `check_call`."""
  check_call(field, function, **options)
  return function(**options)
