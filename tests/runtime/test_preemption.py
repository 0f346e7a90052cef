"""SIGTERM to a process that has not imported JAX yet, or never will."""

import os
import signal
import subprocess
import sys

import pytest

from tests import small

# A signal cannot interrupt this, and Python's handlers have to wait for it.
_IN_C = 'hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)'
_MOMENTS = {
  'at once': (75, 'end(); time.sleep(60)'),
  'main thread in C': (75, f'end(after=0.1); {_IN_C}'),
  'first of a notice': (
    3,
    """
with preemption.Notice():
  end()
  time.sleep(0.1)
sys.exit(3)
""",
  ),
  'second of a notice': (
    75,
    """
with preemption.Notice():
  end()
  time.sleep(0.1)
  end()
  time.sleep(60)
""",
  ),
  'second of a notice, main thread in C': (
    75,
    f"""
with preemption.Notice():
  end()
  end(after=0.1)
  {_IN_C}
""",
  ),
  'after a notice': (
    75,
    """
with preemption.Notice():
  pass
end()
time.sleep(60)
""",
  ),
  'when Python ends': (
    3,
    """
class Late:
  def __del__(self, end=end):
    end()

late = Late()
sys.exit(3)
""",
  ),
}


def run(code):
  return subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    cwd=small.ROOT,
    timeout=60,
  )


@pytest.mark.parametrize(
  ('exit_code', 'code'), list(_MOMENTS.values()), ids=list(_MOMENTS)
)
def test_a_listening_command_ends_by_sigterm_at_any_moment(exit_code, code):
  result = run(f"""
import hashlib, os, signal, sys, threading, time
from clop_jax.runtime import preemption
assert 'jax' not in sys.modules
preemption.listen()

def end(kill=os.kill, pid=os.getpid(), number=signal.SIGTERM, after=None):
  if after is None:
    kill(pid, number)
  else:
    threading.Timer(after, end).start()

{code}
""")
  assert result.returncode == exit_code, result.stderr
  assert not result.stderr


@pytest.mark.parametrize(
  ('sent', 'exit_code', 'lines'),
  [('SIGTERM', 75, 0), ('SIGINT', -signal.SIGINT, 1)],
)
def test_the_imports_of_train_may_be_ended(sent, exit_code, lines, tmp_path):
  # It is imported in the place of the first library.
  (tmp_path / 'absl.py').write_text(
    'import os, signal, time\n'
    # Ignored where the tests run in the background of a shell.
    'signal.signal(signal.SIGINT, signal.default_int_handler)\n'
    f'os.kill(os.getpid(), signal.{sent})\n'
    'time.sleep(60)\n'
  )
  path = os.pathsep.join([str(tmp_path), str(small.ROOT)])
  result = subprocess.run(
    [sys.executable, '-m', 'clop_jax.train'],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env=os.environ | {'PYTHONPATH': path},
    timeout=60,
  )
  assert result.returncode == exit_code, result.stderr
  assert len(result.stderr.splitlines()) == lines, result.stderr
