"""SIGTERM: the end of a run that is to go on later.

Schedulers send it before they take a machine away, often to one machine of
several. All processes then have to end after the same step, which JAX's
preemption service agrees upon (Orbax asks the same service).
"""

import ctypes
import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

# EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command goes on.
EXIT_CODE = 75


_asked = threading.Event()


class PreemptionError(Exception):
  """The run was told to end, and has saved; the same command goes on."""


class Notice:
  """Listens for SIGTERM while it is entered.

  The first one is a notice, which `reached` tells. A second one ends the
  process at once; a checkpoint that is being written then is left incomplete,
  which the next run sees, and goes on from the one before.
  """

  def __init__(self):
    """Listens to nothing yet."""
    self._told = False
    self._previous = self._service = None

  def __enter__(self) -> 'Notice':
    # Python lets only the main thread listen.
    if threading.current_thread() is threading.main_thread():
      self._service = _native_handler()
      self._previous = signal.signal(signal.SIGTERM, self._handle)
    return self

  def __exit__(self, *exception) -> None:
    if threading.current_thread() is threading.main_thread():
      signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)
      if self._service:
        _libc().signal(signal.SIGTERM, self._service)

  def _handle(self, number, frame):
    del frame
    if self._told:
      os._exit(EXIT_CODE)
    self._told = True
    if self._service:
      # JAX's service, which tells the other processes, listens in C++; Python
      # has taken its place, so the signal is handed on.
      ctypes.CFUNCTYPE(None, ctypes.c_int)(self._service)(number)

  def reached(self, steps: range) -> bool:
    """Whether the run is to end after these steps, the same on all processes.

    Args:
      steps: that were dispatched since the last call, numbered from 0. Every
        process calls this with the same ranges.
    """
    if not jax.distributed.is_initialized():
      return self._told or _asked.is_set()
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
  if not callable(signal.getsignal(signal.SIGTERM)):
    os._exit(EXIT_CODE)


def _native_handler():
  """Address of a SIGTERM handler that is not Python's, or None."""
  if callable(signal.getsignal(signal.SIGTERM)):
    return None
  # The C library tells the old handler only to who sets a new one.
  address = _libc().signal(signal.SIGTERM, None)
  _libc().signal(signal.SIGTERM, address)
  return None if address in (None, int(signal.SIG_IGN)) else address


def _libc():
  library = ctypes.CDLL(None)
  library.signal.restype = ctypes.c_void_p
  library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
  return library
