"""Connections between the processes of one run.

JAX waits silently for missing processes, and ends the others with a stack trace
when one is lost. Here the processes meet before JAX starts, on the port that
JAX takes over afterwards, and stay connected until they end.
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

# Long enough for a busy name server; a wrong name should fail soon.
_RESOLVE_SECONDS = 5
# A process that has lost one of the others may be about to end by itself: it
# may have got the same signal, or the error of a collective operation.
_GRACE_SECONDS = 5
_MAX_LENGTH = 4096
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


def _connection(connected):
  """Returns a connection of messages over a socket."""
  connected.settimeout(None)
  # A foreign program may send only half of a message.
  limit = struct.pack('ll', _RESOLVE_SECONDS, 0)
  connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
  return mp_connection.Connection(connected.detach())


def _send(connection, message):
  """Sends a message, which is lost if the other process has gone."""
  with contextlib.suppress(OSError):
    connection.send_bytes(message.encode())


def _receive(connection, timeout=0):
  """Returns a message, None if none comes in time, '' if none will ever."""
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
  """Returns the connections of process 0 to all others, by number."""
  connections = {}

  def refuse(message, kind: type[Exception] = ValueError) -> NoReturn:
    for connection in connections.values():
      _send(connection, f'refused {message}')
      connection.close()
    raise kind(message)

  while True:
    # They send nothing before they are released, so this is their end.
    for number in [
      n for n, c in connections.items() if _receive(c) is not None
    ]:
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
    listener.settimeout(min(left, 1))
    try:
      connection = _connection(listener.accept()[0])
    except TimeoutError:
      continue
    hello = _receive(connection, min(left, _RESOLVE_SECONDS)) or ''
    match = re.fullmatch(r'clop_jax (\d+) of (\d+)', hello)
    if match is None:  # another program
      connection.close()
      continue
    number, theirs = int(match[1]), int(match[2])
    before, connections[number] = connections.get(number), connection
    if theirs != count:
      refuse(
        f'process 0 has --num_processes={count}, process {number} has '
        f'--num_processes={theirs}'
      )
    if before is not None and _receive(before) is None:
      _send(before, f'refused two processes have --process_id={number}')
      before.close()
      refuse(f'two processes have --process_id={number}')


def _attend(address, number, count, timeout, deadline):
  """Returns the connection of another process to process 0."""
  reason = 'nothing listens there'
  while (left := deadline - time.monotonic()) > 0:
    try:
      connected = socket.create_connection(address, timeout=min(left, 5))
    except OSError as error:
      reason = error.strerror or str(error)
    else:
      connection = _connection(connected)
      _send(connection, f'clop_jax {number} of {count}')
      # Process 0 gives the reason if it is the first to give up.
      answer = _receive(connection, left + 1)
      if answer == 'go':
        return connection
      connection.close()
      if answer and answer.startswith('refused '):
        raise ValueError(answer.removeprefix('refused '))
      reason = (
        f'not all of the {count} processes came'
        if answer is None
        else 'what answers there is not process 0 of this run'
      )
    time.sleep(min(0.2, max(0, deadline - time.monotonic())))
  raise TimeoutError(
    f'process 0 at {address} did not start the run within {timeout:g} s '
    f'({reason}); start all processes, check that they can reach this address, '
    'or raise --join_timeout_seconds'
  )


class Peers:
  """Connections between process 0 and the others, from start to end."""

  def __init__(
    self, number: int, connections: dict[int, mp_connection.Connection]
  ):
    """Takes over the connections of process `number`, by the other's number."""
    self._number = number
    self._connections = connections
    self._left = False

  def _tell(self, message):
    for connection in self._connections.values():
      _send(connection, message)

  def release(self) -> None:
    """Lets the others return from `meet`; only process 0 calls this."""
    self._tell('go')

  def leave(self) -> None:
    """Tells the others that this process ends and is not lost."""
    self._left = True
    self._tell('bye')

  def close(self) -> None:
    """Closes all connections."""
    for connection in self._connections.values():
      connection.close()

  def watch(self, timeout: float, end: Callable[[str], object]) -> None:
    """Watches the other processes in a thread.

    Args:
      timeout: Seconds without a sign after which a process is lost.
      end: Function that ends this process, called with a message when another
        one is lost.
    """
    threading.Thread(
      target=self._watch, args=(timeout, end), daemon=True, name='peers'
    ).start()

  def _watch(self, timeout, end):
    def lose(message, grace=0):
      self._tell(f'lost {message}')
      time.sleep(grace)
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
          elif message and message.startswith('lost '):
            lose(message.removeprefix('lost '))
          elif message == '':
            # JAX ends the others as soon as process 0 has gone.
            grace = 0 if self._number else _GRACE_SECONDS
            number = numbers[connection]
            lose(f'process {number} has ended; see its log', grace)
            return
      now, before = time.monotonic(), now
      if now - before > timeout / 2:
        # It was this process that stood still.
        seen = dict.fromkeys(seen, now)
      for connection, last in seen.items():
        if now - last > timeout:
          lose(
            f'process {numbers[connection]} has given no sign for {timeout:g} '
            's (--peer_timeout_seconds)'
          )
          return
