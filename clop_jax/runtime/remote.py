"""Checks of remote paths, and of the packages that reach them."""

import importlib.util
import re

import fsspec

# Schemes that both `etils.epath` and Orbax support.
_PACKAGES = {'gs': 'gcsfs', 's3': 's3fs'}


def check(name: str, value: str) -> None:
  """Checks that the packages for remote paths in an argument are installed.

  Args:
    name: Name of the argument.
    value: A path, or a text that contains paths, as `FIELD=gs://bucket/run`.

  Raises:
    ValueError: If the scheme of a path is unknown, or a package is missing.
  """
  for scheme in re.findall(r'(?:^|[=,])(\w[\w+.-]*)://', value):
    if scheme not in _PACKAGES:
      known = ' or '.join(f'{known}://' for known in _PACKAGES)
      raise ValueError(
        f'{name}={value}: {scheme}:// is not supported; use a local path, or '
        f'one that starts with {known}'
      )
    try:
      # The name that `etils.epath` uses.
      fsspec.get_filesystem_class({'gs': 'gcs'}.get(scheme, scheme))
    except ImportError as error:
      # epath prefers TensorFlow, which supports Google's storage.
      if scheme == 'gs' and importlib.util.find_spec('tensorflow'):
        continue
      package = _PACKAGES[scheme]
      raise ValueError(
        f'{name}={value} needs the package {package}: pip install {package} '
        f'({error})'
      ) from error


def check_local(name: str, value: str) -> None:
  """Raises ValueError if the value of an argument is a remote path."""
  if re.match(r'\w[\w+.-]*://', value):
    raise ValueError(f'{name} must be a local path, got {value}')
