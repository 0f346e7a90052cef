"""Processes that meet, or fail to. Here they are threads."""

import concurrent.futures
import re
import socket
import threading

import pytest

from clop_jax.runtime import peers

HOST = '127.0.0.1'


@pytest.fixture
def address():
  with socket.socket() as listener:
    listener.bind((HOST, 0))
    return peers.Address(HOST, listener.getsockname()[1])


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('127.0.0.1:1234', ('127.0.0.1', 1234)),
    ('node-1.example.org:65535', ('node-1.example.org', 65535)),
    ('[::1]:1', ('::1', 1)),
  ],
)
def test_an_address_is_parsed_and_printed(text, expected):
  address = peers.parse_address(text)
  assert address == expected and str(address) == text


@pytest.mark.parametrize(
  'text',
  [
    *('node', 'node:', ':1234', 'node:port', 'node:0', 'node:99999', ''),
    *('::1:1234', '[::1]', '[node]:1234', 'http://node:1234', 'a b:1234'),
  ],
)
def test_a_malformed_address_is_an_error(text):
  message = f'--coordinator_address.*HOST:PORT.*{re.escape(repr(text))}'
  with pytest.raises(ValueError, match=message):
    peers.parse_address(text)


@pytest.mark.parametrize(
  ('host', 'expected'),
  [
    ('127.0.0.1', '127.0.0.1'),
    ('localhost', '127.0.0.1'),
    ('::1', '::1'),
    ('node1', '::'),
    ('192.0.2.1', '::'),  # of no machine
  ],
)
def test_process_0_listens_on_an_ip_address_of_its_own(host, expected):
  if host == '::1' and not socket.has_dualstack_ipv6():
    pytest.skip('this machine has no IPv6')
  assert peers.bind_address(peers.Address(host, 7)) == (expected, 7)


def meet(address, numbers, *, count=None, timeout=20):
  """Returns what `peers.meet` returns or raises in each process."""

  def one(number, count):
    bind = peers.bind_address(address)
    return peers.meet(address, number, count, timeout=timeout, bind=bind)

  counts = count or [len(numbers)] * len(numbers)
  with concurrent.futures.ThreadPoolExecutor(len(numbers)) as pool:
    futures = [pool.submit(one, *x) for x in zip(numbers, counts, strict=True)]
    return [future.exception() or future.result() for future in futures]


def test_processes_wait_for_each_other(address, capsys):
  for met in meet(address, [2, 1, 0]):
    met.close()
  lines = sorted(capsys.readouterr().err.splitlines())
  assert re.match('process 0 of 3: waiting .* the other 2 of 3 ', lines[0])
  assert re.match(f'process 1 of 3: waiting .* process 0 at {HOST}:', lines[1])
  # JAX can use the port.
  socket.create_server(address).close()


@pytest.mark.parametrize(
  ('numbers', 'count', 'messages'),
  [
    ([0, 2], [4, 4], [r'2 of 4 processes \(1, 3\) did not connect'] * 2),
    ([0, 1], [2, 3], ['--num_processes=2, process 1 has .*=3'] * 2),
    ([0, 1, 1], [3] * 3, ['two processes have --process_id=1'] * 3),
    ([1], [2], ['process 0 at .* did not start the run within 1 s']),
  ],
)
def test_processes_that_fail_to_meet_all_report_why(
  numbers, count, messages, address
):
  errors = meet(address, numbers, count=count, timeout=1)
  for error, message in zip(errors, messages, strict=True):
    with pytest.raises((ValueError, TimeoutError), match=message):
      raise error


def test_a_port_in_use_is_named(address):
  with socket.create_server(address):
    (error,) = meet(address, [0], count=[2], timeout=1)
  with pytest.raises(ValueError, match=rf'listen on {HOST}:\d+ \(Address alr'):
    raise error


def test_a_host_without_an_address_is_named(monkeypatch):
  monkeypatch.delenv('KUBERNETES_SERVICE_HOST', raising=False)
  monkeypatch.setattr(peers, '_RESOLVE_SECONDS', 0)
  for number in (0, 1):
    with pytest.raises(ValueError, match=r"host 'no\.invalid' cannot be res"):
      peers.meet(peers.Address('no.invalid', 7), number, 2, timeout=60)


def test_another_program_is_not_process_0(address):
  def answer(listener):
    while True:
      try:
        connected, _ = listener.accept()
      except OSError:
        return
      with connected:
        connected.recv(100)
        connected.sendall(b'HTTP/1.1 400 Bad Request\r\n\r\n')

  with socket.create_server(address) as listener:
    threading.Thread(target=answer, args=[listener], daemon=True).start()
    (error,) = meet(address, [1], count=[2], timeout=1)
    listener.shutdown(socket.SHUT_RDWR)
  with pytest.raises(TimeoutError, match='another program answers'):
    raise error


def test_another_program_that_stops_in_a_message_is_passed_over(
  address, monkeypatch
):
  monkeypatch.setattr(peers, '_HELLO_SECONDS', 1)

  def interrupt():
    while True:
      try:
        connected = socket.create_connection(address)
      except OSError:  # process 0 does not listen yet
        continue
      connected.sendall(b'GE')
      return connected

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    zero = pool.submit(meet, address, [0], count=[2])
    with interrupt():
      for met in [*meet(address, [1], count=[2]), *zero.result()]:
        met.close()


class Watched:
  """A process that watches the others, and its messages."""

  def __init__(self, met, timeout):
    self.peers, self.messages = met, []
    self._ended = threading.Event()
    met.watch(timeout, self._end)

  def _end(self, message):
    self.messages.append(message)
    self._ended.set()

  def wait(self, seconds=10):
    self._ended.wait(seconds)
    return self.messages


@pytest.fixture
def three(address):
  met = meet(address, [0, 1, 2])
  yield met
  for each in met:
    each.leave()
    each.close()


@pytest.mark.parametrize('lost', [0, 2])
def test_a_process_that_died_ends_the_others(lost, three):
  watched = [Watched(x, 60) for i, x in enumerate(three) if i != lost]
  three[lost].close()
  for each in watched:
    assert each.wait()[0].startswith(f'process {lost} died')


@pytest.mark.parametrize('hung', [0, 2])
def test_a_process_that_hangs_ends_the_others(hung, three):
  watched = [Watched(x, 1) for i, x in enumerate(three) if i != hung]
  for each in watched:
    assert f'process {hung} has been silent for 1 s' in each.wait()[0]


def test_a_process_that_leaves_is_not_lost(three):
  zero, one = Watched(three[0], 1), Watched(three[1], 1)
  three[2].leave()
  three[2].close()
  assert not zero.wait(1.5)
  zero.peers.leave()
  zero.peers.close()
  assert not one.wait(1.5)
