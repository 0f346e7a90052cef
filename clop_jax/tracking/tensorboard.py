"""TensorBoard's event files, written without TensorFlow.

Every record is written by the thread that calls, so that a full disk is an
error where it happens.
"""

import os
import re
import socket
import struct
import tempfile
import time

from etils import epath
import numpy as np

# Between two flushes, which wait for the disk.
_FLUSH_SECONDS = 10
_REMOTE_FLUSH_SECONDS = 60  # the whole file is sent again
BINS = 50  # of a histogram


def check(folder: str) -> None:
  """Raises OSError if a local folder is there and cannot be written to."""
  if '://' in folder or not os.path.lexists(folder):
    return
  # Also where a permission is not all that is in the way.
  with tempfile.TemporaryFile(dir=folder):
    pass


class EventFile:
  """One event file of a run; a run that goes on writes another one."""

  def __init__(self, folder: str, *, start: int):
    """Opens a file after all that there are.

    Args:
      folder: made if it is missing; local, or remote as `epath` has it.
      start: the step to go on from; what older files of the folder have of
        later steps is hidden from TensorBoard, for it is trained again.

    Raises:
      OSError: if the folder cannot be written to.
    """
    # Half a second, which only those who watch should pay.
    import tensorboardX
    from tensorboardX.proto import event_pb2
    from tensorboardX.proto import summary_pb2

    self._event_type, self._summary = event_pb2.Event, summary_pb2.Summary
    target = _next_path(epath.Path(folder))
    self._remote, self._scratch, path = None, None, os.fspath(target)
    if '://' in str(folder):
      # A remote file cannot be added to: it is written here, and sent whole.
      self._scratch = tempfile.TemporaryDirectory()
      self._remote = target
      path = os.path.join(self._scratch.name, target.name)
    self._path, self._period = path, _FLUSH_SECONDS
    if self._remote is not None:
      self._period = _REMOTE_FLUSH_SECONDS
    self._records = tensorboardX.RecordWriter(path)
    self._write(file_version='brain.Event:2')
    session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(step=start + 1 if start else 0, session_log=session)
    self.flush()

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Adds numbers, by their tags.

    Args:
      step: that they are of.
      values: by tag; 'group/name' puts them into a group.
    """
    value = self._summary.Value
    self._add(step, [value(tag=k, simple_value=v) for k, v in values.items()])

  def histogram(self, step: int, tag: str, values: np.ndarray) -> None:
    """Adds a histogram of some numbers, all finite.

    Args:
      step: that they are of.
      tag: their name.
      values: `[n]`, at least one.
    """
    from tensorboardX import summary

    # Of a fixed number: what chooses bins by the spread of the values makes
    # millions of them where nearly all are alike, as in a collapse.
    made = summary.histogram(tag, np.asarray(values, np.float64), bins=BINS)
    self._add(step, made.value)

  def picture(self, step: int, tag: str, png: bytes) -> None:
    """Adds a PNG.

    Args:
      step: that it is of.
      tag: its name.
      png: the file's bytes.
    """
    width, height = struct.unpack('>II', png[16:24])
    image = self._summary.Image(
      width=width, height=height, colorspace=3, encoded_image_string=png
    )
    self._add(step, [self._summary.Value(tag=tag, image=image)])

  def text(self, step: int, tag: str, text: str) -> None:
    """Adds a text.

    Args:
      step: that it is of.
      tag: its name; TensorBoard adds `/text_summary` to it.
      text: as Markdown has it.
    """
    from tensorboardX import summary

    self._add(step, summary.text(tag, text).value)
    self.flush()

  def flush(self) -> None:
    """Brings all that was added to the disk, or to the remote folder."""
    self._records.flush()
    self._flushed = time.monotonic()
    if self._remote is not None:
      with open(self._path, 'rb') as file:
        self._remote.write_bytes(file.read())

  def close(self) -> None:
    """Flushes, and ends the file."""
    try:
      self.flush()
    finally:
      self._records.close()
      if self._scratch is not None:
        self._scratch.cleanup()

  def _add(self, step, values):
    self._write(step=step, summary=self._summary(value=values))
    if time.monotonic() - self._flushed > self._period:
      self.flush()

  def _write(self, **fields):
    event = self._event_type(wall_time=time.time(), **fields)
    self._records.write(event.SerializeToString())


def _next_path(folder):
  """A file's path that sorts after those that there are, as readers sort."""
  folder.mkdir(parents=True, exist_ok=True)
  names = [path.name for path in folder.iterdir()]
  found = [re.match(r'events\.out\.tfevents\.(\d+)\.', name) for name in names]
  # Of two hosts the one that goes on may have the slower clock.
  after = max((int(match[1]) + 1 for match in found if match), default=0)
  when = max(int(time.time()), after)
  return folder / f'events.out.tfevents.{when:010d}.{socket.gethostname()}'
