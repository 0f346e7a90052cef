"""Start and end of every command: flags, config and one-line errors."""

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

# Errors that a user can cause. All others are bugs and keep their traceback.
_USER_ERRORS = (
  ValueError,
  OSError,
  FloatingPointError,
  checkpoint.DamagedCheckpointError,
)

_FIELD = re.compile(r'--?(?:no)?config\.([\w.]+)')
# Overrides that absl (None) or ml_collections (new entries) cannot parse.
_LATE = re.compile(
  r'--?config\.(?:[\w.]+=None$|(?:data\.class_fractions|\w+\.options)\.\w+=)'
)

# Flags whose files must be local.
_LOCAL_FLAGS = ('figure', 'source', 'table')


class _PathParser(flags.ArgumentParser):
  """Parses a path and expands a leading `~`."""

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
  """Parses the flags, joins the other processes and calls `main`.

  A user's error becomes one line and exit code 1. A preempted run that saved a
  checkpoint exits with `preemption.EXIT_CODE`.

  Args:
    main: Function that runs the command; it reads the flags.
    define_flags: Function that defines the flags of the command.
    joins: If false, the command always runs in one process.
  """
  # File names need not be UTF-8. Standard error escapes them by itself.
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='backslashreplace')
  sys.stdout, sys.stderr = _Output(sys.stdout), _Output(sys.stderr)
  define_flags()
  _define_common_flags(joins)
  app.run(lambda _: _guarded(main, joins), flags_parser=_parse)


def _define_common_flags(joins):
  flags.DEFINE_bool('traceback', False, 'Print the traceback of an error.')
  if not joins:
    return
  flags.DEFINE_string(
    'coordinator_address', None, 'HOST:PORT of process 0 (several processes).'
  )
  flags.DEFINE_integer('num_processes', None, 'Number of processes.')
  flags.DEFINE_integer('process_id', None, 'Index of this process, from 0.')
  flags.DEFINE_integer(
    'peer_timeout_seconds',
    60,
    'Seconds without a heartbeat after which a process counts as dead.',
    lower_bound=1,
  )
  flags.DEFINE_integer(
    'join_timeout_seconds',
    300,
    'Seconds to wait for the other processes at startup.',
    lower_bound=1,
  )


class _Output:
  """A stream that ignores a closed pipe, as after `train ... | head`."""

  def __init__(self, stream):
    self._stream = stream

  def __getattr__(self, name):
    return getattr(self._stream, name)

  def write(self, text):
    with self._discarding():
      self._stream.write(text)
    return len(text)

  def flush(self):
    with self._discarding():
      self._stream.flush()

  @contextlib.contextmanager
  def _discarding(self):
    try:
      yield
    except BrokenPipeError:
      # Libraries and Python's exit write to the file descriptor as well.
      with open(os.devnull, 'w') as nowhere:
        os.dup2(nowhere.fileno(), self._stream.fileno())


def _guarded(main, joins):
  values = flags.FLAGS
  sys.unraisablehook = _report
  if not values['verbosity'].present:
    # Orbax and TFDS log every file and each traceback.
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


def _report(unraisable):
  # After a failed save, TensorStore's threads use a loop that Orbax closed.
  if str(unraisable.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(unraisable)


def _message(error):
  """Returns the line for a user's error, or None for a bug."""
  reason = f'{" ".join(str(error).split()):.200}'
  if memory.is_exhausted(error):
    advice = _advice(memory.device_advice)
    return f'the devices are out of memory ({reason}). {advice}'
  if parallel.is_lost_peer(error):
    return (
      f'another process of this run ended or cannot be reached ({reason}); '
      'restart all processes to resume from the last checkpoint'
    )
  if isinstance(error, MemoryError):
    details = f' ({reason})' if reason else ''
    advice = _advice(memory.host_advice)
    return f'this machine is out of memory{details}. {advice}'
  if not isinstance(error, _USER_ERRORS):
    return None
  number = error.errno if isinstance(error, OSError) else None
  if number in (errno.ENOSPC, errno.EDQUOT):
    return f'{error}; free some space and rerun the same command'
  if isinstance(error, checkpoint.SaveError) and number != errno.ENOENT:
    return f'{error}; make the folder writable and rerun the same command'
  return str(error)


def _advice(advise):
  """Returns advice on memory for the config or the flags of the command."""
  values = flags.FLAGS
  if 'label_fraction' in values:  # evaluate reads the config of the run
    return 'Lower the batch size, for example --config.eval.batch_size=64'
  if 'config' in values and values['config'].value is not None:
    return advise(values['config'].value)
  if 'batch_size' in values:
    return 'Lower the batch size, for example --batch_size=64'
  return 'Use a machine with more memory'


def _check_paths():
  """Checks the remote paths among the flags and the fields of the config."""
  values = flags.FLAGS
  # ml_collections defines a flag for each overridden field.
  given = {
    name: values[name].value
    for name in values
    if values[name].present and not name.startswith('config')
  }
  config = values['config'].value if 'config' in values else None
  # The source checks its own options.
  for name, value in fields.flat(config or {}, defaults.FIELDS).items():
    given[f'config.{name}'] = value
  given.pop('coordinator_address', None)
  for name, value in given.items():
    check = remote.check_local if name in _LOCAL_FLAGS else remote.check
    for text in value if isinstance(value, list) else [value]:
      if isinstance(text, str):
        check(f'--{name}', text)


def _parse(argv):
  if {'-h', '-help', '--help'} & {*argv[1:]}:
    _print_help()
    sys.exit(0)
  # ml_collections warns about what becomes an error below.
  logging.set_verbosity(logging.FATAL)
  try:
    argv = [_with_config_path(argument) for argument in argv]
    late = [argument for argument in argv if _LATE.match(argument)]
    for argument in argv:
      if (name := _FIELD.match(argument)) and argument not in late:
        fields.check_name(name[1], defaults.FIELDS, where='--config.')
    # ml_collections reads sys.argv as well.
    sys.argv = argv = [x for x in argv if x not in late]
    rest = flags.FLAGS(argv)
    config = flags.FLAGS['config'].value if 'config' in flags.FLAGS else None
    for override in late:
      _set(config, override)
    if rest[1:]:
      raise ValueError(
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
    # Config files are Python and can raise anything.
    path = ' '.join(x for x in argv if re.match('--?config=', x))
    _fail(f'{path} cannot be loaded ({type(error).__name__}: {error})')


def _with_config_path(argument):
  """Expands `~` in `--config=` and finds the configs of the package."""
  match = re.fullmatch(r'(--?config=)([^:]*)(.*)', argument, re.DOTALL)
  if not match:
    return argument
  flag, path, rest = match.groups()
  path = files.expanded(path)
  if not os.path.exists(path):
    # In a checkout, the configs are beside the package.
    package = pathlib.Path(__file__).parent
    folder = package / 'configs'
    folder = folder if folder.exists() else package.parent / 'configs'
    own = {f'configs/{x.name}': str(x) for x in sorted(folder.glob('*.py'))}
    if path not in own:
      raise ValueError(
        f'--config={path} does not exist; the package has {", ".join(own)}'
      )
    path = own[path]
  return flag + path + rest


def _set(config, override):
  """Sets a field to None, or a new entry of a group."""
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
  # Config files may use an integer as the key.
  last = next((key for key in group if str(key) == last), last)
  with config.unlocked():
    group[last] = value


def _print_help():
  """Prints the docstring and flags of the command, and the config fields."""
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


def _fail(message, code=1, at_once=False):
  message = ' '.join(message.split())
  if at_once or parallel.is_joined():
    # Python's exit waits for threads that may hang, JAX's exit for processes
    # that may be dead.
    parallel.end(message, code)
  print(f'error: {message}', file=sys.stderr, flush=True)
  sys.exit(code)
