"""Processes of one run: how they meet, and how they notice a lost one.

JAX waits for the processes in silence and ends those that are left with a stack
trace. Here they meet before JAX starts, on the port that JAX takes over
afterwards, and stay connected until they end.
"""

from collections.abc import Callable
import contextlib
import ipaddress
import os
import re
import selectors
import socket
import sys
import threading
import time
from typing import NamedTuple, NoReturn

# Long enough for a busy name server; a wrong name should fail soon.
_RESOLVE_SECONDS = 5
# A process that has lost one of the others may be about to end by itself: it
# may have got the same signal, or the error of a collective operation.
_GRACE_SECONDS = 5
_MAX_LINE = 4096
_EVERYWHERE = '::'


class Address(NamedTuple):
  """Host and port; `str` gives `HOST:PORT`, with brackets around IPv6."""

  host: str
  port: int

  def __str__(self) -> str:
    host = f'[{self.host}]' if ':' in self.host else self.host
    return f'{host}:{self.port}'


def parse_address(text: str, name: str = '--coordinator_address') -> Address:
  """Returns the address that a text describes.

  Args:
    text: `HOST:PORT`; an IPv6 address needs brackets.
    name: Name of the argument, for the error.

  Raises:
    ValueError: If the text has another form.
  """
  match = re.fullmatch(r'(?:\[([^\[\]]+)\]|([\w.-]+)):(\d{1,5})', text)
  if match and 1 <= int(match[3]) <= 65535:
    if match[2]:
      return Address(match[2], int(match[3]))
    try:
      ipaddress.IPv6Address(match[1])
      return Address(match[1], int(match[3]))
    except ValueError:
      pass
  raise ValueError(
    f'{name} must be HOST:PORT with a port from 1 to 65535 (an IPv6 address in '
    f'brackets, as [::1]:1234), got {text!r}'
  )


def bind_address(address: Address) -> Address:
  """Returns the address that process 0 listens on.

  That is the address itself if it is an IP address or localhost. Other names
  stand for all interfaces of their machine: it may know itself by an address
  that others do not see, as Debian's 127.0.1.1.
  """
  if address.host == 'localhost':
    return Address('127.0.0.1', address.port)
  try:
    ip = ipaddress.ip_address(address.host)
  except ValueError:
    return Address(_EVERYWHERE, address.port)
  # Behind a translation of addresses no interface has the public one.
  return address if _is_local(ip) else Address(_EVERYWHERE, address.port)


def _is_local(ip):
  family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
  with socket.socket(family, socket.SOCK_STREAM) as probe:
    try:
      probe.bind((str(ip), 0))
    except OSError:
      return False
  return True


class _Connection:
  """Lines of text to and from another process."""

  def __init__(self, connected: socket.socket):
    self._socket = connected
    self._buffer = b''

  def fileno(self) -> int:
    return self._socket.fileno()

  def close(self) -> None:
    self._socket.close()

  def send(self, line: str) -> None:
    """Sends a line, which is lost if the other process has gone."""
    with contextlib.suppress(OSError):
      self._socket.sendall(f'{line}\n'.encode())

  def receive(self, timeout: float) -> str | None:
    """Waits for a line; None if there is none in time, or never will be."""
    deadline = time.monotonic() + timeout
    lines: list[str] = []
    is_open = True
    while not lines and is_open and time.monotonic() < deadline:
      self._socket.settimeout(max(0.01, deadline - time.monotonic()))
      lines, is_open = self.read(at_most_one=True)
    return lines[0] if lines else None

  def read(self, *, at_most_one: bool = False) -> tuple[list[str], bool]:
    """Returns the lines that have come, and False if no more can come."""
    is_open = True
    if b'\n' not in self._buffer:
      try:
        received = self._socket.recv(_MAX_LINE)
        self._buffer += received
        is_open = bool(received) and len(self._buffer) <= 4 * _MAX_LINE
      except (BlockingIOError, TimeoutError):
        pass
      except OSError:
        is_open = False
    *lines, rest = self._buffer.split(b'\n')
    if at_most_one and lines:
      rest = b'\n'.join([*lines[1:], rest])
      lines = lines[:1]
    self._buffer = rest
    return [line.decode(errors='replace') for line in lines], is_open

  def set_blocking(self, blocking: bool) -> None:
    self._socket.setblocking(blocking)

  def is_open(self) -> bool:
    """False if the other process has closed the connection."""
    self.set_blocking(False)
    try:
      return bool(self._socket.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
      return True
    except OSError:
      return False
    finally:
      self.set_blocking(True)


def meet(
  address: Address,
  number: int,
  count: int,
  *,
  timeout: float,
  bind: Address | None = None,
) -> 'Peers':
  """Waits until all processes of a run have come.

  Args:
    address: Address of process 0, the same for all.
    number: Number of this process, from 0.
    count: Number of processes.
    timeout: Seconds to wait.
    bind: Address that process 0 listens on. Default: all interfaces.

  Returns:
    The connections. Process 0 must still call `release`, when the others may
    start JAX.

  Raises:
    ValueError: If the host cannot be resolved, the port is taken, or the
      processes contradict each other.
    TimeoutError: If one of them does not come.
  """
  deadline = time.monotonic() + timeout
  _check_host(address.host, timeout)
  others = (
    f'the other {count - 1} of {count} processes to come to {address}'
    if number == 0
    else f'process 0 at {address} and all of the {count} processes'
  )
  print(
    f'process {number} of {count}: waiting for {others}, for at most '
    f'{timeout:g} s',
    file=sys.stderr,
    flush=True,
  )
  if number:
    return Peers(
      number, {0: _attend(address, number, count, timeout, deadline)}
    )
  bind = bind or Address(_EVERYWHERE, address.port)
  with _listen(bind) as listener:
    return Peers(0, _gather(listener, address, count, timeout, deadline))


def _check_host(host, timeout):
  """Raises ValueError if a name has no address."""
  # The names of pods appear when they are scheduled, which can take minutes.
  in_pod = 'KUBERNETES_SERVICE_HOST' in os.environ
  deadline = time.monotonic() + (timeout if in_pod else _RESOLVE_SECONDS)
  while True:
    try:
      socket.getaddrinfo(host, None)
      return
    except (socket.gaierror, UnicodeError) as error:
      is_final = getattr(error, 'errno', None) != socket.EAI_AGAIN
      if time.monotonic() >= deadline or (is_final and not in_pod):
        raise ValueError(
          f'--coordinator_address: host {host!r} cannot be resolved '
          f'({getattr(error, "strerror", None) or error}); give the name or '
          'address of the machine of process 0'
        ) from None
    time.sleep(0.5)


def _listen(bind):
  try:
    if bind.host == _EVERYWHERE and not socket.has_dualstack_ipv6():
      return socket.create_server(('', bind.port))
    if ':' in bind.host:
      return socket.create_server(
        (bind.host, bind.port),
        family=socket.AF_INET6,
        dualstack_ipv6=bind.host == _EVERYWHERE,
      )
    return socket.create_server((bind.host, bind.port))
  except OSError as error:
    raise ValueError(
      f'--coordinator_address: process 0 cannot listen on {bind} '
      f'({error.strerror}); give another port, the same to all processes'
    ) from None


def _gather(listener, address, count, timeout, deadline):
  """Connections of process 0 to all others, by number."""
  connections = {}

  def refuse(message, kind: type[Exception] = ValueError) -> NoReturn:
    for connection in connections.values():
      connection.send(f'refused {message}')
      connection.close()
    raise kind(message)

  while True:
    for number in [n for n, c in connections.items() if not c.is_open()]:
      connections.pop(number).close()
    missing = [n for n in range(1, count) if n not in connections]
    if not missing:
      return connections
    left = deadline - time.monotonic()
    if left <= 0:
      names = ', '.join(map(str, missing[:8])) + ', ...' * (len(missing) > 8)
      refuse(
        f'{len(missing)} of {count} processes ({names}) did not come to '
        f'process 0 at {address} within {timeout:g} s; start all of them, '
        'check that they can reach this address, or raise '
        '--join_timeout_seconds',
        TimeoutError,
      )
    # Wakes up in between to forget those that have gone.
    listener.settimeout(min(left, 1))
    try:
      connection = _Connection(listener.accept()[0])
    except TimeoutError:
      continue
    hello = connection.receive(min(left, _RESOLVE_SECONDS)) or ''
    match = re.fullmatch(r'clop_jax (\d+) of (\d+)', hello)
    if match is None:  # somebody else's
      connection.close()
      continue
    number, theirs = int(match[1]), int(match[2])
    before, connections[number] = connections.get(number), connection
    if theirs != count:
      refuse(
        f'process 0 has --num_processes={count}, process {number} has '
        f'--num_processes={theirs}'
      )
    if before is not None and before.is_open():
      before.send(f'refused two processes have --process_id={number}')
      before.close()
      refuse(f'two processes have --process_id={number}')


def _attend(address, number, count, timeout, deadline):
  """The connection of another process to process 0."""
  reason = 'nothing listens there'
  while (left := deadline - time.monotonic()) > 0:
    try:
      connected = socket.create_connection(address, timeout=min(left, 5))
    except OSError as error:
      reason = error.strerror or str(error)
    else:
      connection = _Connection(connected)
      connection.send(f'clop_jax {number} of {count}')
      # Process 0 gives the reason if it is the first to give up.
      answer = connection.receive(left + 1)
      if answer == 'go':
        return connection
      connection.close()
      word, _, message = (answer or '').partition(' ')
      if word == 'refused':
        raise ValueError(message)
      reason = 'what answers there is not process 0 of this run'
      if answer is None and time.monotonic() >= deadline:
        reason = f'not all of the {count} processes came'
    time.sleep(min(0.2, max(0, deadline - time.monotonic())))
  raise TimeoutError(
    f'process 0 at {address} did not start the run within {timeout:g} s '
    f'({reason}); start all processes, check that they can reach this address, '
    'or raise --join_timeout_seconds'
  )


class Peers:
  """Connections between process 0 and the others, from start to end."""

  def __init__(self, number: int, connections: dict[int, _Connection]):
    """Takes over the connections to other processes, by their number."""
    self._number = number
    self._connections = connections
    self._left = False

  def release(self) -> None:
    """Lets the others return from `meet`; only process 0 calls this."""
    for connection in self._connections.values():
      connection.send('go')

  def leave(self) -> None:
    """Says goodbye, so that the others do not take this process for lost."""
    self._left = True
    for connection in self._connections.values():
      connection.send('bye')

  def close(self) -> None:
    """Closes all connections."""
    for connection in self._connections.values():
      connection.close()

  def watch(self, timeout: float, end: Callable[[str], object]) -> None:
    """Watches the other processes in a thread.

    Args:
      timeout: Seconds after which a process that gives no sign is lost.
      end: Called with a message when a process is lost; ends this process.
    """
    threading.Thread(
      target=self._watch, args=(timeout, end), daemon=True, name='peers'
    ).start()

  def _watch(self, timeout, end):
    def lose(message, grace=0):
      for connection in self._connections.values():
        connection.send(f'lost {message}')
      time.sleep(grace)
      if not self._left:
        end(message)

    interval = min(timeout / 5, 5)
    selector = selectors.DefaultSelector()
    for number, connection in self._connections.items():
      connection.set_blocking(False)
      selector.register(connection, selectors.EVENT_READ, number)
    now = time.monotonic()
    seen = dict.fromkeys(self._connections, now)
    while seen and not self._left:
      for connection in self._connections.values():
        connection.send('alive')
      due = now + interval
      while seen and (left := due - time.monotonic()) > 0:
        for key, _ in selector.select(left):
          lines, is_open = key.fileobj.read()
          seen[key.data] = time.monotonic()
          if 'bye' in lines:
            selector.unregister(key.fileobj)
            del seen[key.data]
            continue
          for line in lines:
            word, _, message = line.partition(' ')
            if word == 'lost':
              lose(message)
          if not is_open:
            # JAX ends the others as soon as process 0 has gone.
            grace = 0 if self._number else _GRACE_SECONDS
            lose(f'process {key.data} has ended; see its log', grace)
            return
      now, before = time.monotonic(), now
      if now - before > timeout / 2:
        # It was this process that stood still.
        seen = dict.fromkeys(seen, now)
      for number, last in seen.items():
        if now - last > timeout:
          lose(
            f'process {number} has given no sign for {timeout:g} s '
            '(--peer_timeout_seconds)'
          )
          return
