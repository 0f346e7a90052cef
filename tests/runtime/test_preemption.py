"""SIGTERM to a process that has not imported JAX yet, or never will."""

import os
import signal
import subprocess
import sys

import pytest

from tests import small

# No signal interrupts this, so Python's handlers have to wait for it.
_IN_C = 'hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)'
_MOMENTS = {
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


def run(*arguments, **options):
  return subprocess.run(
    [sys.executable, *arguments],
    capture_output=True,
    text=True,
    timeout=60,
    **options,
  )


@pytest.mark.parametrize(
  ('exit_code', 'code'), list(_MOMENTS.values()), ids=list(_MOMENTS)
)
def test_sigterm_ends_a_listening_command_at_any_moment(exit_code, code):
  prelude = """
import hashlib, os, signal, sys, threading, time
from clop_jax.runtime import preemption
assert 'jax' not in sys.modules
preemption.listen()

def end(kill=os.kill, pid=os.getpid(), number=signal.SIGTERM, after=None):
  if after is None:
    kill(pid, number)
  else:
    threading.Timer(after, end).start()
"""
  result = run('-c', prelude + code, cwd=small.ROOT)
  assert result.returncode == exit_code, result.stderr
  assert not result.stderr


@pytest.mark.parametrize(
  ('sent', 'exit_code', 'lines'),
  [('SIGTERM', 75, 0), ('SIGINT', -signal.SIGINT, 1)],
)
def test_a_signal_ends_the_imports_of_train(sent, exit_code, lines, tmp_path):
  # Imported in place of the first library.
  (tmp_path / 'absl.py').write_text(
    'import os, signal, time\n'
    # Ignored if the tests run in the background of a shell.
    'signal.signal(signal.SIGINT, signal.default_int_handler)\n'
    f'os.kill(os.getpid(), signal.{sent})\n'
    'time.sleep(60)\n'
  )
  path = os.pathsep.join([str(tmp_path), str(small.ROOT)])
  result = run(
    *('-m', 'clop_jax.train'),
    cwd=tmp_path,
    env=os.environ | {'PYTHONPATH': path},
  )
  assert result.returncode == exit_code, result.stderr
  assert len(result.stderr.splitlines()) == lines, result.stderr
