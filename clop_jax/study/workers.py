"""Processes that do one task after another, and may die of one.

A worker is started once and kept: Python, JAX and the device take seconds to
start. Knows nothing of what the tasks are.
"""

from collections.abc import Callable, Iterable, Iterator
import collections
import contextlib
import multiprocessing
from multiprocessing import connection
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from typing import Any

# A training that is told to end saves its state first.
SECONDS_TO_END = 120
# In the place of a task.
_END = None


def cores() -> list[int]:
  """The CPU cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return sorted(os.sched_getaffinity(0))
  # macOS binds no process to cores.
  return list(range(os.cpu_count() or 1))


@contextlib.contextmanager
def _bound_to(chosen):
  """Binds this thread to cores, where the system can."""
  if not hasattr(os, 'sched_setaffinity'):
    yield
    return
  allowed = os.sched_getaffinity(0)
  os.sched_setaffinity(0, chosen)
  try:
    yield
  finally:
    os.sched_setaffinity(0, allowed)


class Worker:
  """A process that does what it is sent, seen from the one that sends.

  Attributes:
    killed: whether `stop` had to kill it.
  """

  def __init__(
    self, module: str, *, cores: Iterable[int], environment: dict[str, str]
  ):
    """Starts the process, and does not wait for it to be ready.

    Args:
      module: run with `python -m`; it calls `serve`.
      cores: CPU cores that the process may use.
      environment: variables of the process.
    """
    self.killed = False
    self.connection, theirs = multiprocessing.Pipe()
    # The process inherits the cores from this thread; XLA makes as many threads
    # as there are when it starts.
    with theirs, _bound_to(cores):
      # In a session of its own: a Ctrl-C in the terminal is the caller's.
      self._process = subprocess.Popen(
        [sys.executable, '-m', module, str(theirs.fileno())],
        env=environment,
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
      )

  @property
  def pid(self) -> int:
    """The process's number."""
    return self._process.pid

  def send(self, task: Any) -> None:
    """Gives it a task, anything that can be pickled."""
    # That the process has died is seen where the reply is awaited.
    with contextlib.suppress(BrokenPipeError):
      self.connection.send(task)

  def receive(self) -> Any:
    """Waits for the reply to the task.

    Raises:
      ChildProcessError: if the process ended instead.
    """
    try:
      return self.connection.recv()
    except (EOFError, OSError):
      code = self._process.wait()
      self.connection.close()
      how = f'the process ended with exit code {code}'
      if code < 0:
        how = f'the process was ended by {_signal_name(-code)}'
      raise ChildProcessError(how) from None

  def ended(self) -> bool:
    """Whether the process is no more."""
    return self._process.poll() is not None

  def tell_to_end(self) -> None:
    """Asks it to save and end; it may be told by others as well."""
    # A signal could be its second SIGTERM, which would end it in the middle of
    # the save: schedulers send the first to all processes of a job.
    if not self.ended():
      with contextlib.suppress(OSError):
        self.connection.send(_END)

  def kill(self) -> None:
    """Ends the process and what it has started."""
    if not self.ended():
      self.killed = True
      with contextlib.suppress(ProcessLookupError):
        os.killpg(self.pid, signal.SIGKILL)

  def wait(self) -> None:
    """Returns when the process has ended."""
    self._process.wait()
    self.connection.close()


def stop(processes: Iterable[Worker]) -> None:
  """Ends workers: tells them, and kills those that do not follow."""
  processes = list(processes)
  for worker in processes:
    worker.tell_to_end()
  limit = time.monotonic() + SECONDS_TO_END
  while time.monotonic() < limit and not all(w.ended() for w in processes):
    time.sleep(0.05)
  for worker in processes:
    worker.kill()
    worker.wait()


def _signal_name(number):
  try:
    return signal.Signals(number).name
  except ValueError:
    return f'signal {number}'


def run(
  tasks: Iterable[tuple[Any, Any]],
  start: Callable[[int], Worker],
  count: int,
  *,
  told: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Any, Any, str | None]]:
  """Does tasks on several workers, and replaces one that dies.

  Args:
    tasks: `(name, task)`.
    start: makes the worker of a place, from 0.
    count: how many places there are.
    told: asked now and then; when it is true the workers are ended.

  Yields:
    `(name, reply, None)` as tasks are done, or `(name, None, what happened)` of
    the task that a worker died of.
  """
  waiting = collections.deque(tasks)
  workers, busy = {}, {}  # by place: the worker, the name of its task
  try:
    while waiting or busy:
      for place in range(count):
        if waiting and place not in busy:
          if place not in workers:
            workers[place] = start(place)
          busy[place], task = waiting.popleft()
          workers[place].send(task)
      ready = connection.wait(
        [workers[place].connection for place in busy], timeout=0.2
      )
      if told():
        return
      for place in [p for p in busy if workers[p].connection in ready]:
        reply = error = None
        try:
          reply = workers[place].receive()
        except ChildProcessError as caught:
          error = str(caught)
          del workers[place]
          if told():
            # It was told as well, and was faster.
            return
        yield busy.pop(place), reply, error
  finally:
    stop(workers.values())


def serve(function: Callable[[Any], Any], *, end: Callable[[], None]) -> None:
  """What a worker's module runs: replies to tasks until the caller is gone.

  Args:
    function: of the task; gives the reply.
    end: called in another thread when the caller asks for the end; it ends the
      task under way, or the process.
  """
  caller = connection.Connection(int(sys.argv[1]))
  tasks = queue.SimpleQueue()

  def listen():
    while True:
      try:
        task = caller.recv()
      except (EOFError, OSError):
        # Also in the middle of a task: nobody would see to what it does.
        os._exit(1)
      if task is _END:
        end()
      tasks.put(task)

  threading.Thread(target=listen, daemon=True).start()
  while (task := tasks.get()) is not _END:
    caller.send(function(task))
