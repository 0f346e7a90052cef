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
_SECONDS_TO_END = 20


class Worker:
  """A process that does what it is sent, seen from the one that sends."""

  def __init__(
    self, module: str, *, cores: Iterable[int], environment: dict[str, str]
  ):
    """Starts the process, and does not wait for it to be ready.

    Args:
      module: run with `python -m`; it calls `serve`.
      cores: CPU cores that the process may use.
      environment: variables of the process.
    """
    self.connection, theirs = multiprocessing.Pipe()
    allowed = os.sched_getaffinity(0)
    # The process inherits the cores from this thread; XLA makes as many threads
    # as there are when it starts.
    os.sched_setaffinity(0, cores)
    try:
      # In a session of its own: a Ctrl-C in the terminal is the caller's.
      self._process = subprocess.Popen(
        [sys.executable, '-m', module, str(theirs.fileno())],
        env=environment,
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
      )
    finally:
      os.sched_setaffinity(0, allowed)
      theirs.close()

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
      raise ChildProcessError(
        f'the process ended with exit code {code}'
      ) from None

  def ended(self) -> bool:
    """Whether the process is no more."""
    return self._process.poll() is not None

  def signal(self, number: int) -> None:
    """Sends a signal to the process and to what it has started."""
    if not self.ended():
      with contextlib.suppress(ProcessLookupError):
        os.killpg(self.pid, number)

  def wait(self) -> None:
    """Returns when the process has ended."""
    self._process.wait()
    self.connection.close()


def stop(processes: Iterable[Worker]) -> None:
  """Ends workers: tells them, and kills those that do not follow."""
  processes = list(processes)
  for worker in processes:
    worker.signal(signal.SIGTERM)
  limit = time.monotonic() + _SECONDS_TO_END
  while time.monotonic() < limit and not all(w.ended() for w in processes):
    time.sleep(0.05)
  for worker in processes:
    worker.signal(signal.SIGKILL)
    worker.wait()


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
        yield busy.pop(place), reply, error
  finally:
    stop(workers.values())


def serve(function: Callable[[Any], Any]) -> None:
  """What a worker's module runs: replies to tasks until the caller is gone.

  Args:
    function: of the task; gives the reply.
  """
  caller = connection.Connection(int(sys.argv[1]))
  tasks = queue.SimpleQueue()

  def listen():
    while True:
      try:
        tasks.put(caller.recv())
      except (EOFError, OSError):
        # Also in the middle of a task: nobody would see to what it does.
        os._exit(1)

  threading.Thread(target=listen, daemon=True).start()
  while True:
    caller.send(function(tasks.get()))
