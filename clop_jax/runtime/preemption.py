"""Preemption: after SIGTERM a run saves its state and exits.

Schedulers send SIGTERM before they take a machine away, often to one machine of
several. In runs of several processes, JAX's preemption service listens to it
and agrees on a step after which all of them save.

JAX is imported only where it is needed, because commands call `listen` before
their other imports, which take seconds.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
from typing import Any

# EX_TEMPFAIL of sysexits.h: rerun the same command to resume.
EXIT_CODE = 75

_NOTHING_TO_SAVE = (
  b'preempted: nothing is left to save; rerun the same command to resume\n'
)

_asked = threading.Event()
_notice: 'Notice | None' = None  # the one that is entered


class PreemptionError(Exception):
  """The run was preempted and has saved. The same command resumes it."""


def listen() -> None:
  """Makes SIGTERM end this process with `EXIT_CODE` while no `Notice` listens.

  Before its first step and after its last one, a command loses nothing by
  ending at once. Also shortens the output of Ctrl-C to one line. Call this
  first, in the main thread.
  """
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  # Python calls its handlers in the main thread, which may be in C++ for
  # minutes to restore or compile. A thread reads the descriptor at once.
  signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  threading.Thread(target=_obey, args=(reader,), daemon=True).start()
  signal.signal(signal.SIGTERM, lambda *_: None)
  # Python restores the default action when it exits, which would replace the
  # exit code.
  atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)
  sys.excepthook = _excepthook


def _obey(reader):
  """Ends the process for signals that the main thread need not handle."""
  noticed = None
  while True:
    if os.read(reader, 1)[0] != signal.SIGTERM:
      continue
    if _notice is None:
      with contextlib.suppress(AttributeError, OSError):  # without a stdout
        os.write(sys.__stdout__.fileno(), _NOTHING_TO_SAVE)
      os._exit(EXIT_CODE)
    if _notice is noticed:  # the second one
      os._exit(EXIT_CODE)
    noticed = _notice


def _excepthook(kind, error, trace):
  if issubclass(kind, KeyboardInterrupt):
    print('error: interrupted', file=sys.stderr)
  else:
    sys.__excepthook__(kind, error, trace)


class Notice:
  """Listens for SIGTERM while it is entered.

  The first signal makes `reached` return True. In a run of one process a second
  one ends the process at once. An incomplete checkpoint is then ignored, and
  the next run resumes from the one before.
  """

  _came = False
  _outer: 'Notice | None' = None
  _previous: Any = None

  def __enter__(self) -> 'Notice':
    global _notice
    # Python lets only the main thread listen.
    if threading.current_thread() is threading.main_thread():
      self._outer, _notice = _notice, self
      if not _is_distributed():  # JAX's service listens otherwise
        self._previous = signal.signal(signal.SIGTERM, self._handle)
    return self

  def __exit__(self, *exception) -> None:
    global _notice
    if _notice is self:
      _notice = self._outer
      if not _is_distributed():
        signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)

  def _handle(self, number, frame):
    if self._came:
      os._exit(EXIT_CODE)
    self._came = True

  def came(self) -> bool:
    """Returns True if a run of one process should save and end."""
    return not _is_distributed() and (self._came or _asked.is_set())

  def reached(self, steps: range) -> bool:
    """Returns True, on all processes at once, if the run should save and end.

    Args:
      steps: Steps that were dispatched since the last call, from 0. Every
        process must pass the same ranges.
    """
    if not _is_distributed():
      return self.came()
    from jax.experimental import multihost_utils

    # The service picks one of the steps that it is asked about.
    return any(
      [multihost_utils.reached_preemption_sync_point(s + 1) for s in steps]
    )


def ask() -> None:
  """Preempts this run of one process, from any thread.

  A SIGTERM before or after this is still the first one. Ends the process at
  once if there is nothing to save.
  """
  _asked.set()
  if _notice is None:
    os._exit(EXIT_CODE)


def _is_distributed():
  if 'jax' not in sys.modules:
    return False
  import jax

  return jax.distributed.is_initialized()
