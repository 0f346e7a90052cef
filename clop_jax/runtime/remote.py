"""Paths on remote file systems, and the packages that reach them."""

import importlib.util
import re

import fsspec

# Schemes that both `etils.epath` and Orbax know.
_PACKAGES = {'gs': 'gcsfs', 's3': 's3fs'}


def check(name: str, value: str) -> None:
  """Checks that the remote paths in the value of an argument can be reached.

  Nothing is connected: this is about packages that are not installed.

  Args:
    name: Name of the argument, for the error.
    value: A path, or a text with paths in it, as `FIELD=gs://bucket/run`.

  Raises:
    ValueError: If the scheme of a path is unknown, or a package is missing.
  """
  for scheme in re.findall(r'(?:^|[=,])(\w[\w+.-]*)://', value):
    if scheme not in _PACKAGES:
      known = ' or '.join(f'{known}://' for known in _PACKAGES)
      raise ValueError(
        f'{name}={value}: {scheme}:// is not supported; give a local path, or '
        f'one that begins with {known}'
      )
    try:
      # As `etils.epath` does.
      fsspec.get_filesystem_class({'gs': 'gcs'}.get(scheme, scheme))
    except ImportError as error:
      # epath prefers TensorFlow, which reaches Google's storage by itself.
      if scheme == 'gs' and importlib.util.find_spec('tensorflow'):
        continue
      package = _PACKAGES[scheme]
      raise ValueError(
        f'{name}={value} needs the package {package}: pip install {package} '
        f'({error})'
      ) from error


def check_local(name: str, value: str) -> None:
  """Checks that the value of an argument is not a remote path.

  Raises:
    ValueError: If it is one.
  """
  if re.match(r'\w[\w+.-]*://', value):
    raise ValueError(f'{name} must be a local path, got {value}')
