"""Processes that start with all imports done, which take seconds.

A server imports everything once and forks for each process, before any thread
runs. Each process then has its own environment, JAX and exit.
"""

import contextlib
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

from tests import small

_SERVER = """
import importlib.util, json, os, signal, sys
from clop_jax.runtime import preemption
import orbax.checkpoint, sklearn.linear_model, tensorboardX, tensorflow_datasets
from clop_jax import cli, evaluate, train
from clop_jax.data import digits

def become(arguments, cwd, environment, files):
  os.setpgid(0, 0)
  # Ignored where the tests run in the background of a shell.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  os.chdir(cwd)
  os.environ.clear()
  os.environ.update(environment)
  for number, file in enumerate(files, start=1):
    os.dup2(os.open(file, os.O_WRONLY), number)
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  kind, what, *sys.argv[1:] = arguments
  if kind == '-m':
    spec = importlib.util.find_spec(what)
    is_package = spec and spec.submodule_search_locations
    module = importlib.import_module(what + '.__main__' * bool(is_package))
    if what == 'clop_jax.train':
      preemption.listen()
    cli.run(module.main, module.define_flags)
  else:
    exec(compile(what, '-c', 'exec'), {'__name__': '__main__'})

for line in sys.stdin:
  what, *arguments = json.loads(line)
  if what == 'start':
    answer = os.fork()
    if not answer:
      become(*arguments)
      sys.exit()
  else:
    pid, status = os.waitpid(*arguments, os.WNOHANG)
    answer = os.waitstatus_to_exitcode(status) if pid else None
  print(json.dumps(answer), flush=True)
"""


@functools.cache
def _server():
  # It ends when its standard input is closed.
  return subprocess.Popen(
    [sys.executable, '-c', _SERVER],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    cwd=small.ROOT,
  )


def _ask(*question):
  server = _server()
  print(json.dumps(question), file=server.stdin, flush=True)
  return json.loads(server.stdout.readline())


class Process:
  """Runs `python -m COMMAND` or `python -c CODE`, as `subprocess.Popen` does.

  Its outputs are files, so it never waits for a reader. It leads a process
  group.
  """

  def __init__(self, arguments, *, environment, cwd=small.ROOT):
    self._files = []
    for _ in range(2):
      file, name = tempfile.mkstemp()
      os.close(file)
      self._files.append(pathlib.Path(name))
    self.returncode = None
    self.pid = _ask(
      'start',
      [str(x) for x in arguments],
      str(cwd),
      dict(environment),
      [str(file) for file in self._files],
    )

  def poll(self):
    if self.returncode is None:
      self.returncode = _ask('poll', self.pid)
    return self.returncode

  def wait(self, timeout=240):
    deadline = time.monotonic() + timeout
    while self.poll() is None:
      if time.monotonic() > deadline:
        raise subprocess.TimeoutExpired(str(self.pid), timeout)
      time.sleep(0.01)

  def communicate(self, timeout=240):
    """Returns the texts of stdout and stderr after the process has ended."""
    self.wait(timeout)
    return self._printed

  @functools.cached_property
  def _printed(self):
    texts = [file.read_text() for file in self._files]
    for file in self._files:
      file.unlink()
    return tuple(texts)

  def send_signal(self, number):
    if self.poll() is None:
      os.kill(self.pid, number)

  def kill(self):
    with contextlib.suppress(ProcessLookupError):
      self.send_signal(signal.SIGKILL)


def refused(name: str, *arguments: str, cwd=small.ROOT) -> str:
  """Returns the one line of a command that must refuse its arguments."""
  process = Process(
    ['-m', name, *arguments], environment=small.environment(), cwd=cwd
  )
  output, errors = process.communicate()
  assert process.returncode == 1 and not output, output + errors
  (line,) = errors.splitlines()
  assert line.startswith('error: ')
  return line
