"""JAX's persistent compilation cache, so later runs start in seconds."""

import os
import sys
from typing import Any

import jax


def enable() -> str | None:
  """Enables the cache in `$XDG_CACHE_HOME/clop_jax/compiled`.

  The default of `$XDG_CACHE_HOME` is `~/.cache`. A folder chosen by
  `JAX_COMPILATION_CACHE_DIR` stays, and `JAX_ENABLE_COMPILATION_CACHE=false`
  disables the cache. The folder may be deleted at any time.

  Returns:
    The folder in use. None if the cache is disabled, or after a warning if the
    folder cannot be written.
  """
  config: Any = jax.config  # its fields are not typed
  if not config.jax_enable_compilation_cache:
    return None
  if config.jax_compilation_cache_dir:
    return config.jax_compilation_cache_dir
  cache = os.environ.get('XDG_CACHE_HOME', '')
  if not os.path.isabs(cache):  # the XDG standard ignores relative paths
    cache = os.path.join(os.path.expanduser('~'), '.cache')
  folder = os.path.join(cache, 'clop_jax', 'compiled')
  try:
    os.makedirs(folder, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
      raise PermissionError(f'{folder} cannot be written')
  except OSError as error:
    print(
      f'warning: compiled programs are not cached ({error}); set '
      'JAX_COMPILATION_CACHE_DIR to a writable folder',
      file=sys.stderr,
    )
    return None
  jax.config.update('jax_compilation_cache_dir', folder)
  return folder
