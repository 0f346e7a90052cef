"""SIGTERM: the end of a run that is to go on later.

Schedulers send it before they take a machine away, often to one machine of
several. All processes then have to end after the same step, which JAX's
preemption service agrees upon (Orbax asks the same service).

JAX is imported only where it is needed: `listen` is called before the imports
of a command, which take seconds.
"""

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading

# EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command goes on.
EXIT_CODE = 75

_NOTHING_TO_SAVE = (
  b'preempted: nothing is left to save; rerun the same command to resume\n'
)

_asked = threading.Event()
_ending = threading.Lock()
# The one that is entered.
_notice: 'Notice | None' = None


class PreemptionError(Exception):
  """The run was preempted and has saved; the same command resumes it."""


def listen() -> None:
  """Makes SIGTERM end this process with `EXIT_CODE` while no `Notice` listens.

  For a command that loses nothing by ending at once before its first step and
  after its last one. It also shortens what an early Ctrl-C prints to one line.
  Call it first, in the main thread.
  """
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  # Python calls its handlers in the main thread, which may spend minutes in C++
  # to restore or compile. The descriptor is written to at once.
  signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  threading.Thread(target=_obey, args=(reader,), daemon=True).start()
  signal.signal(signal.SIGTERM, lambda *_: _end())
  # Registered first, called last: the exit code stands, and Python is about to
  # restore the default action, which would replace it.
  atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)
  sys.excepthook = _excepthook


def _obey(reader):
  """Ends the process for signals that no `Notice` waits for."""
  noticed = None
  while True:
    if os.read(reader, 1)[0] != signal.SIGTERM:
      continue
    if _notice is None:
      _end()
    if _notice is noticed:
      # The second one, which does not wait for the main thread either.
      os._exit(EXIT_CODE)
    noticed = _notice


def _end():
  # The handler and the thread may both come here.
  if _ending.acquire(blocking=False):
    with contextlib.suppress(AttributeError, OSError):  # without a stdout
      os.write(sys.__stdout__.fileno(), _NOTHING_TO_SAVE)
    os._exit(EXIT_CODE)


def _excepthook(kind, error, trace):
  if issubclass(kind, KeyboardInterrupt):
    print('error: interrupted', file=sys.stderr)
  else:
    sys.__excepthook__(kind, error, trace)


class Notice:
  """Listens for SIGTERM while it is entered.

  The first one is a notice, which `reached` tells. A second one ends the
  process at once; a checkpoint that is being written then is left incomplete,
  which the next run sees, and goes on from the one before.
  """

  def __init__(self):
    """Listens to nothing yet."""
    self._told = False
    self._previous = self._service = self._outer = None

  def __enter__(self) -> 'Notice':
    global _notice
    # Python lets only the main thread listen.
    if threading.current_thread() is threading.main_thread():
      self._outer, _notice = _notice, self
      before = _native_handler()
      self._previous = signal.signal(signal.SIGTERM, self._handle)
      # Python has one function in C for all of its handlers. Python cannot name
      # another one, and does not know of it.
      if before not in (None, int(signal.SIG_IGN), _native_handler()):
        self._service = before
    return self

  def __exit__(self, *exception) -> None:
    global _notice
    if threading.current_thread() is threading.main_thread():
      signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)
      if self._service:
        _libc().signal(signal.SIGTERM, self._service)
      _notice = self._outer

  def _handle(self, number, frame):
    del frame
    if self._told:
      os._exit(EXIT_CODE)
    self._told = True
    if self._service:
      # JAX's service, which tells the other processes, listens in C++; Python
      # has taken its place, so the signal is handed on.
      ctypes.CFUNCTYPE(None, ctypes.c_int)(self._service)(number)

  def came(self) -> bool:
    """Returns True if a run of one process should save and end."""
    import jax

    return not jax.distributed.is_initialized() and (
      self._told or _asked.is_set()
    )

  def reached(self, steps: range) -> bool:
    """Whether the run is to end after these steps, the same on all processes.

    Args:
      steps: that were dispatched since the last call, numbered from 0. Every
        process calls this with the same ranges.
    """
    import jax
    from jax.experimental import multihost_utils

    if not jax.distributed.is_initialized():
      return self.came()
    # The service picks one step from all that it is asked about.
    return any(
      [multihost_utils.reached_preemption_sync_point(s + 1) for s in steps]
    )


def ask() -> None:
  """Tells this process, of a run of one, what a first SIGTERM tells.

  Any thread may. Not counted with signals: a SIGTERM to the whole job, before
  or after this, is no second one. Where no `Notice` listens nothing would be
  saved, and the process ends at once.
  """
  _asked.set()
  if _notice is None:
    os._exit(EXIT_CODE)


def _native_handler():
  """Address of the function that the system calls on SIGTERM; None: none."""
  # Larger than any system's `struct sigaction`, which starts with the address.
  action = (ctypes.c_void_p * 64)()
  _libc().sigaction(signal.SIGTERM, None, action)
  return action[0]


def _libc():
  library = ctypes.CDLL(None)
  library.signal.restype = ctypes.c_void_p
  library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
  library.sigaction.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
  return library
