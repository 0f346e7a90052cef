"""What has been compiled once is kept: a second start waits a few seconds.

The commands switch it on (`cli.run`); a program that imports `clop_jax`
decides for itself.
"""

import os
import sys
from typing import Any

import jax


def enable() -> str | None:
  """Keeps compiled programs in the user's cache folder, for all later runs.

  The folder is `clop_jax/compiled` in `$XDG_CACHE_HOME` or `~/.cache`; it may
  be deleted at any time. JAX names entries by the program, the versions and the
  device, so none is used where it does not belong. A folder that the user chose
  (`JAX_COMPILATION_CACHE_DIR`) stays, and `JAX_ENABLE_COMPILATION_CACHE=false`
  switches it off.

  Returns:
    The folder in use, or None without one: it cannot be made or written to,
    which costs nothing but time and is a line on stderr.
  """
  config: Any = jax.config  # its fields are not typed
  if not config.jax_enable_compilation_cache:
    return None
  if config.jax_compilation_cache_dir:
    return config.jax_compilation_cache_dir
  cache = os.environ.get('XDG_CACHE_HOME', '')
  if not os.path.isabs(cache):  # so the standard has it
    cache = os.path.join(os.path.expanduser('~'), '.cache')
  folder = os.path.join(cache, 'clop_jax', 'compiled')
  try:
    os.makedirs(folder, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
      raise PermissionError(f'{folder} cannot be written to')
  except OSError as error:
    print(
      f'warning: what is compiled is not kept ({error}); set '
      'JAX_COMPILATION_CACHE_DIR to a folder that can be written to',
      file=sys.stderr,
    )
    return None
  jax.config.update('jax_compilation_cache_dir', folder)
  return folder
