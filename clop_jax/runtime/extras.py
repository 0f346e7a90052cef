"""Checks for optional dependencies."""

import importlib.util


def check(user: str, extra: str, *modules: str) -> None:
  """Raises ValueError if a module of an extra is missing.

  Args:
    user: Command, flag or field that needs the modules.
    extra: Extra of the package that installs them.
    *modules: Names of the modules.
  """
  missing = ', '.join(m for m in modules if not is_installed(m))
  if missing:
    raise ValueError(f"{user} needs {missing}: pip install 'clop-jax[{extra}]'")


def is_installed(module: str) -> bool:
  """Returns True if a module can be imported, without importing it."""
  spec = importlib.util.find_spec(module)
  # A folder of that name, as wandb creates one, has no origin.
  return spec is not None and spec.origin is not None
