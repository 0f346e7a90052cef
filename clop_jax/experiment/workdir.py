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
from typing import Any

from etils import epath
import ml_collections
import numpy as np

from clop_jax import defaults
from clop_jax import fields
from clop_jax.data import labels as label_policy
from clop_jax.experiment import checkpoint
from clop_jax.experiment import metrics_log
from clop_jax.runtime import files
from clop_jax.runtime import locks
from clop_jax.runtime import parallel


# Groups of the config that have no say in what is trained.
_NOT_TRAINED = ('watch', 'eval')

CONFIG, LABELS = 'config.json', 'labels.npz'
_CONFIG_FIX = 'put an intact copy back, or use another --workdir'
_LABELS_FIX = 'delete it, and the command that trained the run writes it again'


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
  return files.is_folder(folder) and any(
    x.name.isdigit() for x in folder.iterdir()
  )


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

  If the run then fails before it has logged or saved a step, they are removed
  again, so that they do not stand in the way of a corrected command.

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
    made = []

    def begin():
      checkpoint.check_directory(workdir)
      _check_config(config, workdir)
      _check_labels(workdir, labels)
      metrics_log.check(os.path.join(workdir, metrics_log.FILE))
      stack.enter_context(locked(workdir))
      # Only now can no other run write there.
      _check_config(config, workdir)
      _check_labels(workdir, labels)
      paths = [epath.Path(workdir) / name for name in (CONFIG, LABELS)]
      made.extend(path for path in paths if not files.exists(path))
      _save_config(config, workdir)
      _save_labels(workdir, labels, true_labels)

    parallel.by_main(begin)
    try:
      yield
    except Exception:
      with contextlib.suppress(OSError):
        if made and not _has_begun(workdir):
          for path in made:
            path.unlink(missing_ok=True)
      raise


def _has_begun(workdir):
  """Returns True if a run has logged or saved a step."""
  log = epath.Path(workdir) / metrics_log.FILE
  logged = files.exists(log) and bool(log.read_bytes())
  return logged or has_checkpoint(workdir)


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
  if not files.exists(epath.Path(workdir) / CONFIG):
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
  path = epath.Path(workdir) / CONFIG
  content = to_json(config)
  if files.exists(path):
    if to_json(load_config(workdir))['eval'] == content['eval']:
      return
    # Evaluation takes its settings from here: those of the last training.
    saved = files.read_json(path, fix=_CONFIG_FIX)
    content = saved | {'eval': content['eval']}
  text = json.dumps(content, indent=2) + '\n'
  files.write_whole(path, text.encode())


def _check_labels(workdir, labels):
  """Refuses a workdir of other data."""
  path = epath.Path(workdir) / LABELS
  if not files.exists(path):
    return
  before = _read_labels(path)
  if not np.array_equal(before, labels):
    raise ValueError(
      f'{path} was made from other data than config.data gives now '
      f'({before.size:,} examples there, {labels.size:,} here); use another '
      '--workdir, or the same data'
    )


def _save_labels(workdir, labels, true_labels):
  path = epath.Path(workdir) / LABELS
  if not files.exists(path):
    files.write_whole(path, label_policy.pack(labels, true_labels))


def _read_labels(path):
  """The labels that the training of a workdir saw, `[n]`."""
  labels = files.read_npz(path, ['labels'], fix=_LABELS_FIX)['labels']
  if labels.ndim != 1 or labels.dtype.kind != 'i':
    raise ValueError(
      f'{path}: labels must be integers [n], got {labels.dtype} '
      f'{list(labels.shape)}; {_LABELS_FIX}'
    )
  return labels


def num_labels(workdir: str) -> int | None:
  """How many examples the training of a workdir had the labels of.

  None: the workdir does not say.
  """
  path = epath.Path(workdir) / LABELS
  if not files.exists(path):
    return None
  return int(np.sum(_read_labels(path) != label_policy.UNLABELLED))


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
  if files.is_remote(path) or files.exists(path) or not glob.has_magic(path):
    return _within(path) or [path]
  found = [inner for match in _matches(path) for inner in _within(match)]
  if not found:
    raise ValueError(
      f'--workdir={path} matches no workdir of a run (a folder with '
      'config.json, or with such folders in it)'
    )
  return list(dict.fromkeys(found))


def _matches(pattern):
  """The paths that match a pattern, sorted.

  Leading folders that exist by that very name may also be meant literally, as
  in `runs/[2024]/*`.
  """
  found = {*glob.glob(pattern)}
  folder, rest = '', pattern
  while '/' in rest:
    name, rest = rest.split('/', 1)
    folder += f'{name}/'
    if not files.is_folder(folder):
      break
    found |= {*glob.glob(glob.escape(folder) + rest)}
  return sorted(found)


def _within(path):
  """The workdirs at or below a local path."""
  if files.is_remote(path):
    return []
  found = []

  def fail(error):
    if os.path.normpath(error.filename) == os.path.normpath(path):
      raise error
    parallel.warn(f'{error.filename} is left out: {error.strerror}')

  onerror = fail if files.is_folder(path) else None
  for folder, folders, names in os.walk(path, onerror=onerror):
    if CONFIG in names:
      found.append(folder)
      folders.clear()  # what a run keeps is no run
    folders[:] = [name for name in folders if not name.startswith('.')]
  return sorted(found)


def load_config(workdir: str) -> ml_collections.ConfigDict:
  """The config of a workdir.

  Fields that this version of the code has and the workdir's did not get their
  defaults, which train as before there was such a field.

  Raises:
    ValueError: if the folder is missing, or is not a workdir, or its config
      cannot be read.
  """
  folder = epath.Path(workdir)
  if not files.is_folder(folder):
    raise ValueError(
      f'--workdir={workdir} does not exist; train first: python -m '
      f'clop_jax.train --config=configs/digits.py --workdir={workdir}'
    )
  path = folder / CONFIG
  if not files.exists(path):
    raise ValueError(
      f'--workdir={workdir} holds no config.json, so it is not the workdir of '
      'a run; it has: '
      + (', '.join(sorted(x.name for x in folder.iterdir())) or 'nothing')
    )
  saved = completed(files.read_json(path, fix=_CONFIG_FIX), str(path))
  # Dictionaries become groups by themselves; lists stay lists.
  return ml_collections.ConfigDict(saved).lock()


def completed(saved: Any, path: str) -> dict:
  """Completes a config that was read from a file.

  Args:
    saved: Config as `to_json` returns it, perhaps of another version of the
      code.
    path: Path of the file, for errors.

  Returns:
    The config, with the defaults of the fields that it does not have.

  Raises:
    ValueError: If a field has the wrong type, or is out of range.
  """
  if not isinstance(saved, dict):
    raise ValueError(f'{path}: config must be an object, got {saved!r:.40}')
  data = saved.get('data')
  if isinstance(data, dict) and isinstance(data.get('class_fractions'), str):
    # Older workdirs have '0:0.6,1:0.23'.
    parts = [x.partition(':') for x in data['class_fractions'].split(',') if x]
    fractions = {label.strip(): float(value) for label, _, value in parts}
    saved = saved | {'data': data | {'class_fractions': fractions}}
  config = _completed(saved, to_json(defaults.get_config()))
  # A later version of the code may have fields that this one does not.
  known = _known(config, defaults.FIELDS, '')
  fields.check(known, defaults.FIELDS, where=f'{path}: ', fix=_CONFIG_FIX)
  return config


def _known(config, names, prefix):
  """The part of a config that has a declaration."""
  groups = {name.rpartition('.')[0] for name in names}
  return {
    name: _known(value, names, f'{prefix}{name}.')
    if prefix + name in groups and isinstance(value, dict)
    else value
    for name, value in config.items()
    if prefix + name in names or prefix + name in groups
  }


def _completed(saved, default):
  """The saved fields, and those of the defaults that are missing there."""
  fields = default | saved
  for name, value in saved.items():
    if (
      isinstance(value, dict)
      and isinstance(default.get(name), dict)
      and (name != 'options')
    ):
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
