"""How every command starts and ends: flags in, one clear line out on error."""

from collections.abc import Callable
import errno
import sys
import traceback

from absl import app
from absl import flags
from absl import logging

from clop_jax import checkpoint

# What a user can cause: wrong values, files and folders, a diverged run, a
# damaged checkpoint. Anything else is our own fault and keeps its traceback.
_USER_ERRORS = (
  ValueError,
  OSError,
  FloatingPointError,
  checkpoint.DamagedCheckpointError,
)


def run(main: Callable[[], None], define_flags: Callable[[], None]) -> None:
  """Parses the flags and calls `main`; a user's error is one line and exit 1.

  Args:
    main: takes nothing; it reads the flags.
    define_flags: defines the command's own flags.
  """
  define_flags()
  flags.DEFINE_bool('traceback', False, 'Print the traceback of an error.')
  app.run(lambda _: _guarded(main), flags_parser=_parse)


def _guarded(main):
  if not flags.FLAGS['verbosity'].present:
    # Orbax and TFDS tell of every file they touch; --verbosity=0 shows it.
    logging.set_verbosity(logging.ERROR)
  try:
    main()
  except _USER_ERRORS as error:
    if flags.FLAGS.traceback:
      traceback.print_exc()
    message = str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
      message += '; free some space and run the same command again'
    _fail(message)


def _parse(argv):
  try:
    return flags.FLAGS(argv)
  except (AttributeError, KeyError) as error:
    # ml_collections tells of an unknown config field in this way.
    _fail(_unknown_field(argv) or str(error))
  except (flags.Error, ValueError, TypeError, OSError) as error:
    _fail(str(error))


def _unknown_field(argv):
  """The first override of a field that the config file does not have."""
  overrides = [a for a in argv if a.lstrip('-').startswith('config.')]
  # ml_collections looks for overrides in sys.argv, whatever it is passed.
  sys.argv = [a for a in argv if a not in overrides]
  flags.FLAGS(sys.argv)
  for override in overrides:
    path = override.lstrip('-').split('=')[0].split('.')[1:]
    group = flags.FLAGS['config'].value
    for depth, name in enumerate(path):
      if not hasattr(group, 'keys') or name not in group:
        where = '.'.join(['config', *path[:depth]])
        fields = sorted(group) if hasattr(group, 'keys') else []
        return (
          f'--config.{".".join(path)}: {where} has no field {name!r}; '
          f'it has: {", ".join(fields) or "no fields"}'
        )
      group = group[name]
  return None


def _fail(message):
  print(f'error: {" ".join(message.split())}', file=sys.stderr)
  sys.exit(1)
