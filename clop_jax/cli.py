"""How every command starts and ends: flags in, one clear line out on error."""

from collections.abc import Callable
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

# Flags whose files cannot be remote.
_LOCAL_FLAGS = ('figure', 'source', 'table')


class _PathParser(flags.ArgumentParser):
  """Parses a path, in which a leading `~` is the home folder."""

  syntactic_help = 'a path'

  def parse(self, argument: str) -> str:
    return files.expanded(argument)

  def flag_type(self) -> str:
    return 'path'


# For `flags.DEFINE(command.PATH, name, default, help)`.
PATH = _PathParser()


def run(
  main: Callable[[], None],
  define_flags: Callable[[], None],
  *,
  joins: bool = True,
) -> None:
  """Parses the flags, joins the other processes if any, and calls `main`.

  A user's error is one line and exit 1; a run that was told to end and saved
  leaves with `preemption.EXIT_CODE`.

  Args:
    main: takes nothing; it reads the flags.
    define_flags: defines the command's own flags.
    joins: False for a command of one process, which joins no others even
      inside a cluster's job.
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
  flags.DEFINE_integer('num_processes', None, 'How many processes there are.')
  flags.DEFINE_integer('process_id', None, 'Which one this is, from 0.')
  flags.DEFINE_integer(
    'peer_timeout_seconds',
    60,
    'After so long without a sign a process counts as dead.',
    lower_bound=1,
  )
  flags.DEFINE_integer(
    'join_timeout_seconds',
    300,
    'Seconds to wait for the other processes at the start.',
    lower_bound=1,
  )


class _Output:
  """A stream that a command goes on without when nobody reads it any more.

  `train ... | head` shall not end the training.
  """

  def __init__(self, stream):
    self._stream = stream

  def __getattr__(self, name):
    return getattr(self._stream, name)

  def write(self, text):
    try:
      return self._stream.write(text)
    except BrokenPipeError:
      return self._lose(len(text))

  def flush(self):
    try:
      self._stream.flush()
    except BrokenPipeError:
      self._lose(0)

  def _lose(self, count):
    # Below Python, too: what it still holds is written at the latest when it
    # ends, and libraries have the same number.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, self._stream.fileno())
    os.close(nowhere)
    return count


def _guarded(main, joins):
  values = flags.FLAGS
  sys.unraisablehook = _report
  if not values['verbosity'].present:
    # Orbax and TFDS tell of every file they touch, and print the traceback of
    # what they raise as well; --verbosity=0 shows it.
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
    reason = f'{" ".join(str(error).split()):.200}'
    if memory.is_exhausted(error):
      advice = _advice(memory.device_advice)
      message = f'the devices are out of memory ({reason}). {advice}'
    elif parallel.is_lost_peer(error):
      message = (
        'another process of this run has ended or cannot be reached '
        f'({reason}); start all processes again: training resumes from the '
        'last checkpoint'
      )
    elif isinstance(error, MemoryError):
      advice = _advice(memory.host_advice)
      details = f' ({reason})' if reason else ''
      message = f'this machine is out of memory{details}. {advice}'
    elif isinstance(error, _USER_ERRORS):
      message = str(error)
    else:
      raise
    if values.traceback:
      traceback.print_exc()
    save_failed = isinstance(error, checkpoint.SaveError)
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT):
      message += '; free some space and run the same command again'
    elif save_failed and number != errno.ENOENT:
      message += '; make the folder writable and run the same command again'
    _fail(
      message,
      at_once=save_failed or isinstance(error.__cause__, checkpoint.SaveError),
    )


def _check_paths():
  """Checks the remote paths among the flags and the fields of the config."""
  for name, value in _texts():
    if name in _LOCAL_FLAGS:
      remote.check_local(f'--{name}', value)
    elif name != 'coordinator_address':
      remote.check(f'--{name}', value)


def _texts():
  """`(flag or field, text)` of what the user has given."""
  values = flags.FLAGS
  for name in values:
    # ml_collections makes a flag of each field that is given as one.
    if values[name].present and not name.startswith('config'):
      value = values[name].value
      for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str):
          yield name, text
  groups = [('config', values['config'].value)] if 'config' in values else []
  while groups:
    name, group = groups.pop()
    for field, value in (group or {}).items():
      if isinstance(value, str):
        yield f'{name}.{field}', value
      # What a source's options may be is the source's own matter.
      elif hasattr(value, 'items') and field != 'options':
        groups.append((f'{name}.{field}', value))


def _advice(advise):
  """Advice for the command's config, or for a command that has none."""
  values = flags.FLAGS
  if 'label_fraction' in values:  # evaluate, whose config is the run's
    return 'Lower the batch size, for example --config.eval.batch_size=64'
  if 'config' in values and values['config'].value is not None:
    return advise(values['config'].value)
  if 'batch_size' in values:
    return 'Lower the batch size, for example --batch_size=64'
  return 'Use a machine with more memory'


def _report(unraisable):
  """`sys.unraisablehook`, but for what follows a failed save in other threads.

  TensorStore's go on telling an event loop that Orbax has closed.
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
  # ml_collections looks there as well, whatever it is passed.
  sys.argv = argv
  unset = [a for a in argv if _is_unset(a)]
  try:
    rest = flags.FLAGS([a for a in argv if a not in unset])
    for override in unset:
      _unset(override)
    _expand_config()
    if rest[1:]:
      _fail(
        f'unexpected argument {rest[1]!r}; flags begin with --, as '
        f'--{rest[1].lstrip("-")}'
      )
    if 'config' in flags.FLAGS and flags.FLAGS['config'].value is not None:
      defaults.check(flags.FLAGS['config'].value)
    return rest
  except (flags.Error, ValueError, TypeError, OSError) as error:
    _fail(str(error))
  except Exception as error:
    # ml_collections tells of an unknown field by an AttributeError or KeyError.
    # Anything else comes from the config file, which is Python.
    path = ' '.join(a for a in argv if re.match('--?config=', a))
    _fail(
      _unknown_field(argv)
      or f'{path} cannot be loaded ({type(error).__name__}: {error})'
    )


def _print_help():
  """What the command is for, its own flags, and how to see all others."""
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
  """`--config=~/mine.py` with the home folder's path."""
  match = re.fullmatch(r'(--?config=)(~.*)', argument, re.DOTALL)
  return match[1] + files.expanded(match[2]) if match else argument


def _expand_config():
  """Expands the paths that the config holds, if there is one."""
  config = flags.FLAGS['config'].value if 'config' in flags.FLAGS else None
  for field in defaults.PATHS if config is not None else ():
    group, name = field.split('.')
    value = config.get(group, {}).get(name)
    if isinstance(value, str):
      config[group][name] = files.expanded(value)


def _packaged(argument):
  """`--config=configs/NAME.py` where there is no such file: the package's own.

  A wheel has them, and a checkout wherever the command is run.
  """
  match = re.fullmatch(r'(--?config=)configs/(\w+\.py)', argument)
  if not match or os.path.exists(argument.removeprefix(match[1])):
    return argument
  found = _own_configs().get(match[2])
  return match[1] + str(found) if found else argument


def _own_configs():
  """The files of `configs/`: within the package, or beside it in a checkout."""
  package = pathlib.Path(__file__).parent
  for folder in (package / 'configs', package.parent / 'configs'):
    if (folder / 'digits.py').exists():
      return {path.name: path for path in sorted(folder.glob('*.py'))}
  return {}


def _is_unset(argument):
  """Whether it is `--config.some.field=None`, which absl takes for a text."""
  return re.fullmatch(r'--?config\.[\w.]+=None', argument) is not None


def _unset(override):
  """Sets an optional field to None."""
  name = override.lstrip('-').removesuffix('=None').removeprefix('config.')
  group = flags.FLAGS['config'].value
  *path, last = name.split('.')
  for part in path:
    group = group[part]
  field = defaults.FIELDS.get(name)  # a source's own option has none
  if field is not None and not field.optional:
    raise ValueError(f'--config.{name} must be {field.expected()}, got None')
  group[last] = None


def _unknown_field(argv):
  """The first override of a field that the config file does not have."""
  overrides = [a for a in argv if a.lstrip('-').startswith('config.')]
  # ml_collections looks for overrides in sys.argv, whatever it is passed.
  sys.argv = [a for a in argv if a not in overrides]
  try:
    flags.FLAGS(sys.argv)
  except Exception:
    return None  # the file itself is at fault
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


def _fail(message, code=1, at_once=False):
  message = ' '.join(message.split())
  if at_once or parallel.is_joined():
    # Not by way of Python's end, which waits for threads that may hang, nor
    # JAX's, which waits for processes that may be dead.
    parallel.end(message, code)
  print(f'error: {message}', file=sys.stderr, flush=True)
  sys.exit(code)
