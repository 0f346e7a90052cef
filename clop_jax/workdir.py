"""A run's folder: its config, its labels, and who is at work in it.

A folder may be remote (`gs://`, `s3://`), as far as `etils.epath` and Orbax
reach it.
"""

from collections.abc import Iterator
import contextlib
import glob
import json
import os
import socket

from etils import epath
import ml_collections
import numpy as np

from clop_jax import checkpoint
from clop_jax import defaults
from clop_jax import locks
from clop_jax import parallel
from clop_jax.data import labels as label_policy


# Groups of the config that have no say in what is trained.
_NOT_TRAINED = ('watch', 'eval')


def open_checkpoints(
  config: ml_collections.ConfigDict, workdir: str, *, read_only: bool = False
) -> checkpoint.Checkpoints:
  """The checkpoints of a workdir, kept as the config says."""
  return checkpoint.Checkpoints(
    os.path.join(workdir, checkpoint.FOLDER),
    keep=config.train.keep_checkpoints,
    best_metric=config.train.keep_best,
    best_mode=config.train.keep_best_mode,
    read_only=read_only,
  )


def has_checkpoint(workdir: str) -> bool:
  """Whether a run in this folder has saved a step, so that it would go on."""
  folder = epath.Path(workdir) / checkpoint.FOLDER
  return folder.is_dir() and any(x.name.isdigit() for x in folder.iterdir())


def to_json(config: ml_collections.ConfigDict) -> dict:
  """The config as JSON has it: tuples are lists."""
  return json.loads(json.dumps(config.to_dict()))


@contextlib.contextmanager
def claim(
  config: ml_collections.ConfigDict,
  workdir: str,
  labels: np.ndarray,
  true_labels: np.ndarray,
) -> Iterator[None]:
  """Holds a workdir for one run, and puts its config and labels there.

  The lock is the main process's and ends with it, also when it is killed. (A
  remote folder has none.) The other processes wait here for the main one.

  Args:
    config: of the run.
    workdir: made if it is missing.
    labels: `[n]` that training sees.
    true_labels: `[n]` that the data have.

  Raises:
    ValueError: if another run is at work there, or the workdir was made with
      another config or other data; nothing was written then.
  """
  with contextlib.ExitStack() as stack:

    def begin():
      _check_config(config, workdir)
      stack.enter_context(locked(workdir))
      _save_config(config, workdir)
      _save_labels(workdir, labels, true_labels)

    parallel.by_main(begin)
    yield


@contextlib.contextmanager
def locked(workdir: str) -> Iterator[None]:
  """Holds a folder, made if it is missing, for one process at a time.

  A remote folder has no lock, nor has one on a file system without locks.

  Raises:
    ValueError: if another process holds it.
  """
  path = epath.Path(workdir)
  path.mkdir(parents=True, exist_ok=True)
  if '://' in str(workdir):
    yield
    return
  with open(path / '.lock', 'a+') as file:
    try:
      locks.take(file)
    except BlockingIOError:
      file.seek(0)
      who = file.read().strip() or 'unknown'
      raise ValueError(
        f'--workdir={workdir} is in use by another run ({who}); wait for it, '
        'stop it, or use another --workdir'
      ) from None
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    file.flush()
    yield


def _check_config(config, workdir):
  """Refuses a workdir of another config."""
  if not (epath.Path(workdir) / 'config.json').exists():
    return
  unlike = differences(
    _trained(to_json(load_config(workdir))), _trained(to_json(config))
  )
  if unlike:
    raise ValueError(
      f'--workdir={workdir} was made with another config: '
      f'{"; ".join(unlike)}. Use another --workdir, or the same config'
    )


def _trained(config):
  """What of a config of `to_json` has a say in what is trained."""
  return {
    name: value for name, value in config.items() if name not in _NOT_TRAINED
  }


def _save_config(config, workdir):
  path = epath.Path(workdir) / 'config.json'
  content = to_json(config)
  if path.exists():
    _check_config(config, workdir)
    if to_json(load_config(workdir))['eval'] == content['eval']:
      return
    # Evaluation takes its settings from here: those of the last training.
    content = json.loads(path.read_text()) | {'eval': content['eval']}
  text = json.dumps(content, indent=2) + '\n'
  write_whole(path, text.encode())


def _save_labels(workdir, labels, true_labels):
  path = epath.Path(workdir) / 'labels.npz'
  if not path.exists():
    write_whole(path, label_policy.pack(labels, true_labels))
    return
  before = label_policy.unpack(path.read_bytes())
  if not np.array_equal(before, labels):
    raise ValueError(
      f'{path} was made from other data than config.data gives now '
      f'({before.size:,} examples there, {labels.size:,} here); use another '
      '--workdir, or the same data'
    )


def num_labels(workdir: str) -> int | None:
  """How many examples the training of a workdir had the labels of.

  None: the workdir does not say.
  """
  path = epath.Path(workdir) / 'labels.npz'
  if not path.exists():
    return None
  labels = label_policy.unpack(path.read_bytes())
  return int(np.sum(labels != label_policy.UNLABELLED))


def find(path: str) -> list[str]:
  """The workdirs that a path names.

  Args:
    path: a workdir; or a folder with workdirs in it at any depth, as a study's;
      or a pattern as of a shell (`runs/*`), for either.

  Returns:
    The workdirs, sorted. A path that holds none comes back alone: `load_config`
    says what is wrong with it.

  Raises:
    ValueError: if it is a pattern that no workdir matches.
  """
  if '://' in path or os.path.exists(path) or not glob.has_magic(path):
    return _within(path) or [path]
  found = [
    inner for match in sorted(glob.glob(path)) for inner in _within(match)
  ]
  if not found:
    raise ValueError(
      f'--workdir={path} matches no workdir of a run (a folder with '
      'config.json, or with such folders in it)'
    )
  return found


def _within(path):
  """The workdirs at or below a local path."""
  if '://' in path:
    return []
  found = []
  for folder, folders, files in os.walk(path):
    if 'config.json' in files:
      found.append(folder)
      folders.clear()  # what a run keeps is no run
    folders[:] = [name for name in folders if not name.startswith('.')]
  return sorted(found)


def write_whole(path: str | epath.Path, data: bytes) -> None:
  """Writes a file so that it is never there in part."""
  partial = epath.Path(f'{path}.partial')
  partial.write_bytes(data)
  partial.replace(path)


def load_config(workdir: str) -> ml_collections.ConfigDict:
  """The config of a workdir.

  Fields that this version of the code has and the workdir's did not get their
  defaults, which train as before there was such a field.

  Raises:
    ValueError: if the folder is missing, or is not a workdir, or its config
      cannot be read.
  """
  folder = epath.Path(workdir)
  if not folder.is_dir():
    raise ValueError(
      f'--workdir={workdir} does not exist; train first: python -m '
      f'clop_jax.train --config=configs/digits.py --workdir={workdir}'
    )
  path = folder / 'config.json'
  if not path.exists():
    raise ValueError(
      f'--workdir={workdir} holds no config.json, so it is not the workdir of '
      'a run; it has: '
      + (', '.join(sorted(x.name for x in folder.iterdir())) or 'nothing')
    )
  try:
    saved = json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f'{path} is not JSON ({error})') from error
  if not isinstance(saved, dict):
    raise ValueError(f'{path} is not a config: it holds {saved!r:.50}')
  # Dictionaries become groups by themselves; lists stay lists.
  return ml_collections.ConfigDict(completed(saved)).lock()


def completed(saved: dict) -> dict:
  """A config of `to_json`, and the defaults of the fields it does not have."""
  return _completed(saved, to_json(defaults.get_config()))


def _completed(saved, default):
  """The saved fields, and those of the defaults that are missing there."""
  fields = default | saved
  for name, value in saved.items():
    # What a source's options may be is the source's own matter.
    if isinstance(value, dict) and name in default and name != 'options':
      fields[name] = _completed(value, default[name])
  return fields


def differences(old: dict, new: dict, prefix: str = '') -> list[str]:
  """What two configs of `to_json` differ in, a text for each field."""
  lines = []
  for name in sorted({*old, *new}):
    field = f'{prefix}{name}'
    before, after = old.get(name, 'missing'), new.get(name, 'missing')
    if isinstance(before, dict) and isinstance(after, dict):
      lines += differences(before, after, f'{field}.')
    elif before != after:
      lines.append(f'{field} is {before!r} there and {after!r} here')
  return lines
