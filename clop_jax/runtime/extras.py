"""Optional dependencies."""

import importlib.util


def check(module: str, field: str, extra: str) -> None:
  """Raises ValueError if a module that a flag or field needs is missing.

  Args:
    module: Name of the module.
    field: Flag or field with its value, for the error.
    extra: Extra of the package that installs the module.
  """
  spec = importlib.util.find_spec(module)
  # A folder of that name, such as wandb leaves behind, has no origin.
  if spec is None or spec.origin is None:
    raise ValueError(f"{field} needs {module}: pip install 'clop-jax[{extra}]'")
