"""Connections between the processes of one run.

JAX waits silently for missing processes, and aborts with a stack trace when
one is lost. Here the processes meet before JAX starts, on the port that JAX
uses afterwards, and stay connected until they end.
"""

from collections.abc import Callable
import contextlib
import ipaddress
from multiprocessing import connection as mp_connection
import os
import re
import socket
import struct
import sys
import threading
import time
from typing import NamedTuple, NoReturn

# Enough for a busy name server. A wrong name should fail soon.
_RESOLVE_SECONDS = 5
_HELLO_SECONDS = 5
# JAX on process 0 needs this long to listen. Who connects earlier loses 1 s.
_LISTENS_AFTER_SECONDS = 0.2
_MAX_LENGTH = 4096
_ANY_INTERFACE = '::'


class Address(NamedTuple):
  """Host and port. `str` gives `HOST:PORT`, with brackets around IPv6."""

  host: str
  port: int

  def __str__(self) -> str:
    host = f'[{self.host}]' if ':' in self.host else self.host
    return f'{host}:{self.port}'


def parse_address(text: str, name: str = '--coordinator_address') -> Address:
  """Returns the address in `HOST:PORT`. IPv6 addresses need brackets.

  Raises:
    ValueError: If the text has another form. `name` is named in the message.
  """
  match = re.fullmatch(r'(?:\[([\da-fA-F:.]+)\]|([\w.-]+)):(\d{1,5})', text)
  if match and 1 <= int(match[3]) <= 65535:
    return Address(match[1] or match[2], int(match[3]))
  raise ValueError(
    f'{name} must be HOST:PORT with a port from 1 to 65535 (an IPv6 address in '
    f'brackets, as [::1]:1234), got {text!r}'
  )


def bind_address(address: Address) -> Address:
  """Returns the address that process 0 listens on.

  An IP address of this machine or localhost stands for itself, all else for
  all interfaces: a machine may resolve its own name differently than the others
  do, as Debian does with 127.0.1.1, and no interface of it has the address that
  others reach it by through a network address translation.
  """
  if address.host == 'localhost':
    return Address('127.0.0.1', address.port)
  try:
    version = ipaddress.ip_address(address.host).version
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_STREAM) as probe:
      probe.bind((address.host, 0))
    return address
  except (ValueError, OSError):
    return Address(_ANY_INTERFACE, address.port)


def _send(connection, message):
  """Sends a message. It is lost if the other process has ended."""
  with contextlib.suppress(OSError):
    connection.send_bytes(message.encode())


def _receive(connection, timeout=0):
  """Returns a message, None after the timeout, '' at the end of the stream."""
  try:
    if not connection.poll(timeout):
      return None
    return connection.recv_bytes(_MAX_LENGTH).decode(errors='replace')
  except (OSError, EOFError):
    return ''


def meet(
  address: Address,
  number: int,
  count: int,
  *,
  timeout: float,
  bind: Address | None = None,
) -> 'Peers':
  """Waits until all processes of a run have arrived.

  Args:
    address: Address of process 0, the same for all.
    number: Number of this process, from 0.
    count: Number of processes.
    timeout: Seconds to wait.
    bind: Address that process 0 listens on. Default: all interfaces.

  Raises:
    ValueError: If the host cannot be resolved, the port is taken, or the
      processes contradict each other.
    TimeoutError: If one of them does not arrive.
  """
  _check_host(address.host, timeout)
  others = (
    f'process 0 at {address} and all {count} processes'
    if number
    else f'the other {count - 1} of {count} processes to connect to {address}'
  )
  print(
    f'process {number} of {count}: waiting up to {timeout:g} s for {others}',
    file=sys.stderr,
    flush=True,
  )
  if number:
    return Peers({0: _attend(address, number, count, timeout)})
  with _listen(bind or Address(_ANY_INTERFACE, address.port)) as listener:
    connections = _gather(listener, address, count, timeout)
  for connection in connections.values():
    _send(connection, 'go')
  return Peers(connections)


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
      if time.monotonic() >= deadline:
        raise ValueError(
          f'--coordinator_address: host {host!r} cannot be resolved '
          f'({getattr(error, "strerror", None) or error}); pass the name or '
          'address of the machine of process 0'
        ) from None
    time.sleep(0.5)


def _listen(bind):
  everywhere = bind.host == _ANY_INTERFACE
  try:
    if everywhere and not socket.has_dualstack_ipv6():
      return socket.create_server(('', bind.port))
    return socket.create_server(
      bind,
      family=socket.AF_INET6 if ':' in bind.host else socket.AF_INET,
      dualstack_ipv6=everywhere,
    )
  except OSError as error:
    raise ValueError(
      f'--coordinator_address: process 0 cannot listen on {bind} '
      f'({error.strerror}); pass another port to all processes, or set '
      'JAX_COORDINATOR_BIND_ADDRESS to an address of this machine'
    ) from None


def _gather(listener, address, count, timeout):
  """Returns the connections of process 0 to the others, by number."""
  connections = {}

  def refuse(error, *others) -> NoReturn:
    for connection in [*connections.values(), *others]:
      _send(connection, f'refused {error}')
      connection.close()
    raise error

  deadline = time.monotonic() + timeout
  while missing := [n for n in range(1, count) if n not in connections]:
    left = deadline - time.monotonic()
    if left <= 0:
      names = ', '.join(map(str, missing[:8])) + ', ...' * (len(missing) > 8)
      refuse(
        TimeoutError(
          f'{len(missing)} of {count} processes ({names}) did not connect to '
          f'process 0 at {address} within {timeout:g} s; start all of them, '
          'check that they can reach this address, or raise '
          '--join_timeout_seconds'
        )
      )
    listener.settimeout(left)
    try:
      connected, _ = listener.accept()
    except TimeoutError:
      continue
    # Another program may send half of a message and stay connected.
    connected.settimeout(None)
    limit = struct.pack('ll', _HELLO_SECONDS, 0)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    connection = mp_connection.Connection(connected.detach())
    hello = _receive(connection, _HELLO_SECONDS) or ''
    match = re.fullmatch(r'clop_jax (\d+) of (\d+)', hello)
    if match is None:  # another program
      connection.close()
      continue
    number, theirs = int(match[1]), int(match[2])
    before, connections[number] = connections.get(number), connection
    if theirs != count:
      refuse(
        ValueError(
          f'process 0 has --num_processes={count}, process {number} has '
          f'--num_processes={theirs}'
        )
      )
    # The earlier process may have died and been restarted.
    if before is not None and _receive(before) is None:
      refuse(ValueError(f'two processes have --process_id={number}'), before)
  return connections


def _attend(address, number, count, timeout):
  """Returns the connection of another process to process 0."""
  deadline = time.monotonic() + timeout
  reason = 'nothing listens there'
  while (left := deadline - time.monotonic()) > 0:
    try:
      connected = socket.create_connection(address, timeout=min(left, 5))
    except OSError as error:
      reason = error.strerror or str(error)
    else:
      connected.settimeout(None)
      connection = mp_connection.Connection(connected.detach())
      _send(connection, f'clop_jax {number} of {count}')
      # A second more, so that process 0 is first to give up: it knows why.
      answer = _receive(connection, left + 1)
      if answer == 'go':
        time.sleep(_LISTENS_AFTER_SECONDS)
        return connection
      connection.close()
      if answer and answer.startswith('refused '):
        raise ValueError(answer.removeprefix('refused '))
      reason = (
        f'not all of the {count} processes came'
        if answer is None
        else 'another program answers there'
      )
    time.sleep(min(0.2, max(0, deadline - time.monotonic())))
  raise TimeoutError(
    f'process 0 at {address} did not start the run within {timeout:g} s '
    f'({reason}); start all processes, check that they can reach this address, '
    'or raise --join_timeout_seconds'
  )


class Peers:
  """Connections between process 0 and the others, from start to end."""

  def __init__(self, connections: dict[int, mp_connection.Connection]):
    """Takes over connections, by the number of the other process."""
    self._connections = connections
    self._left = False

  def _tell(self, message):
    for connection in self._connections.values():
      _send(connection, message)

  def leave(self) -> None:
    """Tells the others that this process ends as planned."""
    self._left = True
    self._tell('bye')

  def close(self) -> None:
    """Closes all connections."""
    for connection in self._connections.values():
      connection.close()

  def watch(self, timeout: float, end: Callable[[str], object]) -> None:
    """Watches the other processes in a thread.

    Args:
      timeout: Seconds of silence after which a process counts as lost.
      end: Function that ends this process, called with a message when another
        one is lost.
    """
    threading.Thread(
      target=self._watch, args=(timeout, end), daemon=True, name='peers'
    ).start()

  def _watch(self, timeout, end):
    def lose(message):
      self._tell(f'lost {message}')
      if not self._left:
        end(message)

    interval = min(timeout / 5, 5)
    numbers = {c: n for n, c in self._connections.items()}
    now = time.monotonic()
    seen = dict.fromkeys(numbers, now)
    while seen and not self._left:
      self._tell('alive')
      due = now + interval
      while seen and (left := due - time.monotonic()) > 0:
        for connection in mp_connection.wait([*seen], left):
          message = _receive(connection)
          seen[connection] = time.monotonic()
          if message == 'bye':
            del seen[connection]
          elif message == '':
            return lose(f'process {numbers[connection]} died; see its log')
          elif message and message.startswith('lost '):
            return lose(message.removeprefix('lost '))
      now, before = time.monotonic(), now
      if now - before > timeout / 2:
        # This process itself was suspended, perhaps with all others.
        seen = dict.fromkeys(seen, now)
      for connection, last in seen.items():
        if now - last > timeout:
          return lose(
            f'process {numbers[connection]} has been silent for {timeout:g} s '
            '(--peer_timeout_seconds)'
          )
