"""How every command starts and ends: flags in, one clear line out on error."""

import ast
from collections.abc import Callable
import contextlib
import errno
import io
import os
import pathlib
import re
import sys
import textwrap
import traceback

from absl import app
from absl import flags
from absl import logging

from clop_jax import defaults
from clop_jax import fields
from clop_jax.experiment import checkpoint
from clop_jax.experiment import memory
from clop_jax.runtime import compilation_cache
from clop_jax.runtime import files
from clop_jax.runtime import parallel
from clop_jax.runtime import preemption
from clop_jax.runtime import remote

# What a user can cause: wrong values, files and folders, a diverged run, a
# damaged checkpoint. Anything else is our own fault and keeps its traceback.
_USER_ERRORS = (
  ValueError,
  OSError,
  FloatingPointError,
  checkpoint.DamagedCheckpointError,
)

_FIELD = re.compile(r'--?(?:no)?config\.([\w.]+)')
# absl has no None, and ml_collections adds no entries to a config.
_LATE = re.compile(
  r'--?config\.(?:[\w.]+=None$|data\.(?:class_fractions|options)\.\w+=)'
)

# Flags whose files cannot be remote.
_LOCAL_FLAGS = ('figure', 'source', 'table')


class _PathParser(flags.ArgumentParser):
  """Parses a path, in which a leading `~` is the home folder."""

  syntactic_help = 'a path'

  def parse(self, argument: str) -> str:
    return files.expanded(argument)

  def flag_type(self) -> str:
    return 'path'


# For `flags.DEFINE(cli.PATH, name, default, help)`.
PATH = _PathParser()


def run(
  main: Callable[[], None],
  define_flags: Callable[[], None],
  *,
  joins: bool = True,
) -> None:
  """Parses the flags, joins the other processes if any, and calls `main`.

  A user's error becomes one line and exit code 1. A run that was preempted and
  has saved exits with `preemption.EXIT_CODE`.

  Args:
    main: Function without arguments; it reads the flags.
    define_flags: Function that defines the flags of the command.
    joins: False for a command that always runs in one process.
  """
  # Names of files need not be UTF-8. Standard error escapes them by itself.
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='backslashreplace')
  sys.stdout, sys.stderr = _Output(sys.stdout), _Output(sys.stderr)
  define_flags()
  flags.DEFINE_bool('traceback', False, 'Print the traceback of an error.')
  if joins:
    _define_process_flags()
  app.run(lambda _: _guarded(main, joins), flags_parser=_parse)


def _define_process_flags():
  flags.DEFINE_string(
    'coordinator_address', None, 'HOST:PORT of process 0 (several processes).'
  )
  flags.DEFINE_integer('num_processes', None, 'Number of processes.')
  flags.DEFINE_integer('process_id', None, 'Number of this process, from 0.')
  flags.DEFINE_integer(
    'peer_timeout_seconds',
    60,
    'Seconds without a sign after which a process counts as dead.',
    lower_bound=1,
  )
  flags.DEFINE_integer(
    'join_timeout_seconds',
    300,
    'Seconds to wait for the other processes at the start.',
    lower_bound=1,
  )


class _Output:
  """A stream whose reader may leave, as in `train ... | head`."""

  def __init__(self, stream):
    self._stream = stream

  def __getattr__(self, name):
    return getattr(self._stream, name)

  def write(self, text):
    try:
      return self._stream.write(text)
    except BrokenPipeError:
      self._discard()
      return len(text)

  def flush(self):
    try:
      self._stream.flush()
    except BrokenPipeError:
      self._discard()

  def _discard(self):
    # Replaces the file descriptor, which libraries write to as well. Python
    # flushes what it still holds when it exits.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, self._stream.fileno())
    os.close(nowhere)


def _guarded(main, joins):
  values = flags.FLAGS
  sys.unraisablehook = _report
  if not values['verbosity'].present:
    # Orbax and TFDS log every file they touch, and the traceback of what they
    # raise as well; --verbosity=0 shows it.
    logging.set_verbosity(logging.FATAL)
  try:
    _check_paths()
    if joins:
      parallel.start(
        values.coordinator_address,
        values.num_processes,
        values.process_id,
        peer_timeout_seconds=values.peer_timeout_seconds,
        join_timeout_seconds=values.join_timeout_seconds,
      )
    compilation_cache.enable()
    main()
    parallel.leave()
  except KeyboardInterrupt:
    _fail('interrupted', code=130)
  except preemption.PreemptionError as notice:
    if parallel.is_main():
      print(notice, flush=True)
    parallel.leave()
    sys.exit(preemption.EXIT_CODE)
  except Exception as error:
    message = _message(error)
    if message is None:
      raise
    if values.traceback:
      traceback.print_exc()
    causes = (error, error.__cause__)
    _fail(
      message,
      at_once=any(isinstance(x, checkpoint.SaveError) for x in causes),
    )


def _message(error):
  """Returns the line for a user's error, None for any other one."""
  reason = f'{" ".join(str(error).split()):.200}'
  if memory.is_exhausted(error):
    advice = _advice(memory.device_advice)
    return f'the devices are out of memory ({reason}). {advice}'
  if parallel.is_lost_peer(error):
    return (
      f'another process of this run has ended or cannot be reached ({reason}); '
      'start all processes again: training resumes from the last checkpoint'
    )
  if isinstance(error, MemoryError):
    details = f' ({reason})' if reason else ''
    advice = _advice(memory.host_advice)
    return f'this machine is out of memory{details}. {advice}'
  if not isinstance(error, _USER_ERRORS):
    return None
  number = error.errno if isinstance(error, OSError) else None
  if number in (errno.ENOSPC, errno.EDQUOT):
    return f'{error}; free some space and run the same command again'
  if isinstance(error, checkpoint.SaveError) and number != errno.ENOENT:
    return f'{error}; make the folder writable and run the same command again'
  return str(error)


def _check_paths():
  """Checks the remote paths among the flags and the fields of the config."""
  for name, value in _texts():
    if name in _LOCAL_FLAGS:
      remote.check_local(f'--{name}', value)
    elif name != 'coordinator_address':
      remote.check(f'--{name}', value)


def _texts():
  """Yields `(flag or field, text)` for all texts given by the user."""
  values = flags.FLAGS
  for name in values:
    # ml_collections makes a flag of each field that is given as one.
    if values[name].present and not name.startswith('config'):
      value = values[name].value
      for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str):
          yield name, text
  config = values['config'].value if 'config' in values else None
  # The source itself checks its options.
  for name, value in fields.flat(config or {}, defaults.FIELDS).items():
    if isinstance(value, str):
      yield f'config.{name}', value


def _advice(advise):
  """Returns advice for the config of the command, if it has one."""
  values = flags.FLAGS
  if 'label_fraction' in values:  # evaluate, whose config is the run's
    return 'Lower the batch size, for example --config.eval.batch_size=64'
  if 'config' in values and values['config'].value is not None:
    return advise(values['config'].value)
  if 'batch_size' in values:
    return 'Lower the batch size, for example --batch_size=64'
  return 'Use a machine with more memory'


def _report(unraisable):
  """Reports all but the errors of TensorStore's threads after a failed save.

  They still use an event loop that Orbax has closed.
  """
  if str(unraisable.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(unraisable)


def _parse(argv):
  if {'-h', '-help', '--help'} & {*argv[1:]}:
    _print_help()
    sys.exit(0)
  # ml_collections warns of what becomes an error below.
  logging.set_verbosity(logging.FATAL)
  argv = [_packaged(_expanded(argument)) for argument in argv]
  for argument in argv:
    path = re.match(r'--?config=([^:]*)', argument)
    if path and not os.path.exists(path[1]):
      _fail(
        f'--config={path[1]}: there is no such file; the package has '
        + ', '.join(f'configs/{name}' for name in _own_configs())
      )
  late = [argument for argument in argv if _LATE.match(argument)]
  try:
    for argument in argv:
      if (name := _FIELD.match(argument)) and argument not in late:
        fields.check_name(name[1], defaults.FIELDS, where='--config.')
    # ml_collections also reads sys.argv, whatever it is passed.
    sys.argv = argv = [a for a in argv if a not in late]
    rest = flags.FLAGS(argv)
    config = flags.FLAGS['config'].value if 'config' in flags.FLAGS else None
    for override in late:
      _set(config, override)
    if rest[1:]:
      _fail(
        f'unexpected argument {rest[1]!r}; flags begin with --, as '
        f'--{rest[1].lstrip("-")}'
      )
    if config is not None:
      for name in defaults.PATHS:
        group, _, field = name.partition('.')
        value = config.get(group, {}).get(field)
        if isinstance(value, str):
          config[group][field] = files.expanded(value)
      defaults.check(config)
    return rest
  except (flags.Error, ValueError, TypeError, OSError) as error:
    _fail(str(error))
  except Exception as error:
    # Anything else comes from the config file, which is Python.
    path = ' '.join(a for a in argv if re.match('--?config=', a))
    _fail(f'{path} cannot be loaded ({type(error).__name__}: {error})')


def _print_help():
  """Prints the docstring of the command, its flags and the config's fields."""
  main = sys.modules['__main__']
  print((main.__doc__ or '').strip(), end='\n\n')
  print(
    flags.FLAGS.module_help(main)
    + flags.FLAGS.module_help(sys.modules[__name__])
  )
  if 'config' in flags.FLAGS:
    print('--config.FIELD=VALUE sets a field of the config. The fields are:\n')
    for name, field in defaults.FIELDS.items():
      limits = f' ({field.range()})' if field.range() else ''
      print(
        textwrap.fill(f'  config.{name} = {field.default!r}{limits}', 78),
        textwrap.indent(textwrap.fill(field.meaning, 72), '      '),
        sep='\n',
      )
  print('--helpfull shows the flags of all libraries too.')


def _expanded(argument):
  """Expands the home folder in `--config=~/mine.py`."""
  match = re.fullmatch(r'(--?config=)(~.*)', argument, re.DOTALL)
  return match[1] + files.expanded(match[2]) if match else argument


def _packaged(argument):
  """Replaces a missing `configs/NAME.py` by the one of the package."""
  match = re.fullmatch(r'(--?config=)configs/(\w+\.py)', argument)
  if not match or os.path.exists(argument.removeprefix(match[1])):
    return argument
  found = _own_configs().get(match[2])
  return match[1] + str(found) if found else argument


def _own_configs():
  """Returns the package's configs by name; in a checkout they are beside it."""
  package = pathlib.Path(__file__).parent
  for folder in (package / 'configs', package.parent / 'configs'):
    if (folder / 'digits.py').exists():
      return {path.name: path for path in sorted(folder.glob('*.py'))}
  return {}


def _set(config, override):
  """Sets a field to None, or an entry of a group that any name may have."""
  name, _, text = override.lstrip('-').removeprefix('config.').partition('=')
  path, _, last = name.rpartition('.')
  if text == 'None' and path not in defaults.FIELDS:
    fields.check_name(name, defaults.FIELDS, where='--config.')
    if not defaults.FIELDS[name].optional:
      expected = defaults.FIELDS[name].expected()
      raise ValueError(f'--config.{name} must be {expected}, got None')
  group = config
  for part in filter(None, path.split('.')):
    group = group[part]
  value = {'true': True, 'false': False}.get(text.lower(), text)
  with contextlib.suppress(ValueError, SyntaxError):
    value = ast.literal_eval(text)
  # A config file may have written class 3 as an integer.
  last = next((key for key in group if str(key) == last), last)
  with config.unlocked():
    group[last] = value


def _fail(message, code=1, at_once=False):
  message = ' '.join(message.split())
  if at_once or parallel.is_joined():
    # Python's exit waits for threads that may hang, and JAX's for processes
    # that may be dead.
    parallel.end(message, code)
  print(f'error: {message}', file=sys.stderr, flush=True)
  sys.exit(code)
