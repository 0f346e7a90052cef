"""Event files for TensorBoard, written by tensorboardX."""

import contextlib
import io
import os
import re
import socket
import time

from etils import epath
import numpy as np

from clop_jax.runtime import files

FOLDER = 'tensorboard'
BINS = 50  # of a histogram
_FLUSH_SECONDS = 10
_REMOTE_FLUSH_SECONDS = 60  # each flush sends the whole file
_QUEUE = 10_000  # events that may wait for a slow disk
_PREFIX = 'clop_jax'  # under which tensorboardX finds `_EventFile`


def check(workdir: str) -> None:
  """Raises OSError if the workdir's `tensorboard/` cannot be written."""
  folder = os.path.join(workdir, FOLDER)
  if not files.is_remote(folder) and os.path.lexists(folder):
    files.check_writable(
      os.path.join(folder, 'events'), 'config.watch.tensorboard=True'
    )


class TensorBoard:
  """One event file. A run that resumes writes another one."""

  def __init__(self, workdir: str, *, start: int):
    """Opens a file that sorts after all existing ones.

    Args:
      workdir: Workdir, local or remote; the file goes to its `tensorboard/`.
      start: Step at which the run starts. TensorBoard hides later steps of
        older files.

    Raises:
      OSError: If the file cannot be written.
    """
    # These imports take half a second.
    from tensorboardX import SummaryWriter
    from tensorboardX import record_writer

    self._file = _EventFile(os.path.join(workdir, FOLDER))
    record_writer.register_writer_factory(_PREFIX, self._file)
    remote = files.is_remote(workdir)
    self._writer = SummaryWriter(
      f'{_PREFIX}:',
      purge_step=start + 1,
      max_queue=_QUEUE,
      flush_secs=_REMOTE_FLUSH_SECONDS if remote else _FLUSH_SECONDS,
    )

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Adds numbers by tag; `'group/name'` groups them."""
    self._file.raise_failure()
    for tag, value in values.items():
      self._writer.add_scalar(tag, value, step)

  def histogram(self, step: int, tag: str, values: np.ndarray) -> None:
    """Adds a histogram of finite numbers `[n]`."""
    # tensorboardX's rule makes millions of bins for values that are nearly
    # equal, as in a collapse.
    values = np.asarray(values, np.float64)
    self._writer.add_histogram(tag, values, step, bins=BINS)

  def picture(self, step: int, tag: str, image: np.ndarray) -> None:
    """Adds an image `[height, width, 3]`, uint8."""
    self._writer.add_image(tag, image, step, dataformats='HWC')

  def text(self, step: int, tag: str, text: str) -> None:
    """Adds a text in Markdown; TensorBoard appends `/text_summary` to tags."""
    self._writer.add_text(tag, text, step)

  def close(self, failed: bool = False) -> None:
    """Writes what is left; raises OSError if an event could not be written."""
    self._writer.close()
    self._file.raise_failure()


class _EventFile:
  """The file that tensorboardX writes to; it is its own factory.

  tensorboardX writes in a thread, which an exception would end, and the
  training would wait for it forever. So the training raises the first one.
  """

  def __init__(self, folder):
    self._folder, self._failure = folder, None
    self._remote = files.is_remote(folder)
    with self._guarded():
      folder = epath.Path(folder)
      folder.mkdir(parents=True, exist_ok=True)
      self._path = _next_path(folder)
      # Remote files cannot be appended to: they are sent whole.
      self._stream = io.BytesIO() if self._remote else self._path.open('wb')
    self.raise_failure()

  def directory_check(self, path):
    pass  # created above

  def open(self, path):
    return self  # under our own path

  def write(self, data):
    with self._guarded():
      self._stream.write(data)

  def flush(self):
    with self._guarded():
      self._stream.flush()
      if self._remote:
        self._path.write_bytes(self._stream.getvalue())

  def close(self):
    with contextlib.suppress(OSError):  # already kept by `flush`
      self._stream.close()

  @contextlib.contextmanager
  def _guarded(self):
    try:
      yield
    except Exception as error:  # remote file systems raise many kinds
      self._failure = self._failure or error

  def raise_failure(self):
    """Raises OSError if the file could not be written."""
    if self._failure is None:
      return
    reason = getattr(self._failure, 'strerror', None) or self._failure
    failure = OSError(
      f'config.watch.tensorboard=True: {files.as_text(str(self._folder))} '
      f'cannot be written ({reason}); make it writable or pass '
      '--config.watch.tensorboard=false'
    )
    failure.errno = getattr(self._failure, 'errno', None)
    raise failure from self._failure


def _next_path(folder):
  """Returns a path that sorts after the existing event files.

  TensorBoard reads files in the order of their names, and a run may resume on a
  host whose clock is behind.
  """
  names = [path.name for path in folder.iterdir()]
  matches = [re.match(r'events\.out\.tfevents\.(\d+)\.', x) for x in names]
  after = max((int(match[1]) + 1 for match in matches if match), default=0)
  when = max(int(time.time()), after)
  return folder / f'events.out.tfevents.{when:010d}.{socket.gethostname()}'
