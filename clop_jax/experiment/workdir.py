"""The workdir of a run: config, labels and lock file.

A workdir may be remote (`gs://`, `s3://`), as far as `etils.epath` and Orbax
support it.
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

CONFIG, LABELS = 'config.json', 'labels.npz'
_CONFIG_FIX = 'put an intact copy back, or use another --workdir'
_LABELS_FIX = 'delete it; the command that trained the run writes it again'


def open_checkpoints(
  config: ml_collections.ConfigDict, workdir: str, *, read_only: bool = False
) -> checkpoint.Checkpoints:
  """Opens the checkpoints of a workdir."""
  return checkpoint.Checkpoints(
    os.path.join(workdir, checkpoint.FOLDER),
    keep=config.train.keep_checkpoints,
    best_metric=config.train.keep_best,
    best_mode=config.train.keep_best_mode,
    read_only=read_only,
  )


def has_checkpoint(workdir: str) -> bool:
  """Returns True if a run in this folder has saved a step to resume from."""
  folder = epath.Path(workdir) / checkpoint.FOLDER
  return files.is_folder(folder) and any(
    x.name.isdigit() for x in folder.iterdir()
  )


def to_json(config: ml_collections.ConfigDict) -> dict:
  """Returns a config as JSON types: tuples become lists."""
  return json.loads(json.dumps(config.to_dict()))


@contextlib.contextmanager
def claim(
  config: ml_collections.ConfigDict,
  workdir: str,
  labels: np.ndarray,
  true_labels: np.ndarray,
) -> Iterator[None]:
  """Locks a workdir for one run, and writes its config and labels.

  If the run then fails before it has logged or saved a step, they are removed
  again, so that a corrected command can use the workdir.

  The main process holds the lock, and the other processes wait for it here.

  Args:
    config: Config of the run.
    workdir: Path of the workdir, created if missing.
    labels: `[n]` labels for training.
    true_labels: `[n]` labels of the data.

  Raises:
    ValueError: If another run uses the workdir, or it was made with another
      config or other data. Nothing is written then.
  """
  paths = [epath.Path(workdir) / name for name in (CONFIG, LABELS)]
  log = epath.Path(workdir) / metrics_log.FILE
  new = []
  with contextlib.ExitStack() as stack:

    def begin():
      checkpoint.check_directory(workdir)
      _check_config(config, workdir)
      _check_labels(workdir, labels)
      metrics_log.check(str(log))
      stack.enter_context(locked(workdir))
      new.extend(path for path in paths if not files.exists(path))
      _save_config(config, workdir)
      if paths[1] in new:
        files.write_whole(paths[1], label_policy.pack(labels, true_labels))

    parallel.by_main(begin)
    try:
      yield
    except Exception:
      with contextlib.suppress(OSError):
        is_logged = files.exists(log) and log.read_bytes()
        if not is_logged and not has_checkpoint(workdir):
          for path in new:
            path.unlink(missing_ok=True)
      raise


@contextlib.contextmanager
def locked(workdir: str) -> Iterator[None]:
  """Locks a folder, created if missing, for this process.

  A remote folder, or one on a file system without locks, is not locked.

  Raises:
    ValueError: If another process holds the lock.
  """
  path = epath.Path(workdir)
  path.mkdir(parents=True, exist_ok=True)
  if files.is_remote(path):
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
  """Raises ValueError if the workdir was made with another config."""
  if not files.exists(epath.Path(workdir) / CONFIG):
    return
  saved, new = to_json(load_config(workdir)), to_json(config)
  # Groups that do not affect training.
  for group in ('watch', 'eval'):
    saved.pop(group), new.pop(group)
  unlike = differences(saved, new)
  if unlike:
    raise ValueError(
      f'--workdir={workdir} was made with another config: '
      f'{"; ".join(unlike)}. Use another --workdir, or the same config'
    )


def _save_config(config, workdir):
  path = epath.Path(workdir) / CONFIG
  content = to_json(config)
  if files.exists(path):
    if to_json(load_config(workdir))['eval'] == content['eval']:
      return
    # Evaluation reads its settings here: those of the last training command.
    saved = files.read_json(path, fix=_CONFIG_FIX)
    content = saved | {'eval': content['eval']}
  files.write_whole(path, f'{json.dumps(content, indent=2)}\n'.encode())


def _check_labels(workdir, labels):
  """Raises ValueError if the workdir was made with other data."""
  path = epath.Path(workdir) / LABELS
  if not files.exists(path):
    return
  before = _read_labels(path)
  if not np.array_equal(before, labels):
    raise ValueError(
      f'{path} was made from other data than those of config.data '
      f'({before.size:,} examples there, {labels.size:,} here); use another '
      '--workdir, or the same data'
    )


def _read_labels(path):
  """Returns the training labels of a workdir, `[n]`."""
  labels = files.read_npz(path, ['labels'], fix=_LABELS_FIX)['labels']
  if labels.ndim != 1 or labels.dtype.kind != 'i':
    raise ValueError(
      f'{path}: labels must be integers [n], got {labels.dtype} '
      f'{list(labels.shape)}; {_LABELS_FIX}'
    )
  return labels


def num_labels(workdir: str) -> int | None:
  """Returns the number of labelled examples of a run, None if unknown."""
  path = epath.Path(workdir) / LABELS
  if not files.exists(path):
    return None
  return int(np.sum(_read_labels(path) != label_policy.UNLABELLED))


def find(path: str) -> list[str]:
  """Returns the workdirs at a path, sorted.

  Args:
    path: A workdir, a folder with workdirs at any depth, or a shell pattern
      (`runs/*`) for either. A path without workdirs is returned alone, for
      `load_config` to report.

  Raises:
    ValueError: If no workdir matches a pattern.
  """
  if files.is_remote(path) or files.exists(path) or not glob.has_magic(path):
    return _within(path) or [path]
  found = [x for match in sorted(glob.glob(path)) for x in _within(match)]
  if not found:
    raise ValueError(
      f'--workdir={path} matches no workdir of a run (a folder with '
      'config.json, or with such folders in it)'
    )
  return found


def _within(path):
  """Returns the workdirs at or below a local path."""
  if files.is_remote(path):
    return []
  found = []

  def fail(error):
    if os.path.normpath(error.filename) == os.path.normpath(path):
      raise error
    parallel.warn(f'skipping {error.filename}: {error.strerror}')

  onerror = fail if files.is_folder(path) else None
  for folder, folders, names in os.walk(path, onerror=onerror):
    if CONFIG in names:
      found.append(folder)
      folders.clear()  # a workdir contains no other
    folders[:] = [name for name in folders if not name.startswith('.')]
  return sorted(found)


def load_config(workdir: str) -> ml_collections.ConfigDict:
  """Returns the config of a workdir, with defaults for missing fields.

  Raises:
    ValueError: If the folder is missing or is no workdir, or its config is
      damaged.
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
      'a run; it contains: '
      + (', '.join(sorted(x.name for x in folder.iterdir())) or 'nothing')
    )
  saved = completed(files.read_json(path, fix=_CONFIG_FIX), str(path))
  return ml_collections.ConfigDict(saved).lock()


def completed(saved: Any, path: str) -> dict:
  """Returns a config, perhaps of another version, with all known fields.

  Args:
    saved: Config as `to_json` returns it.
    path: Path of the file, for errors.

  Raises:
    ValueError: If a field has the wrong type, or is out of range.
  """
  if not isinstance(saved, dict):
    raise ValueError(f'{path}: config must be an object, got {saved!r:.40}')
  saved = _upgraded(saved)
  config = _completed(saved, to_json(defaults.get_config()))
  # A later version of the code may have fields that this one does not.
  known = _known(config, defaults.FIELDS, '')
  fields.check(known, defaults.FIELDS, where=f'{path}: ', fix=_CONFIG_FIX)
  return config


def _upgraded(saved):
  """Returns a config of an earlier version with the fields of this one."""
  groups = ('data', 'model', 'loss')
  data, model, loss = (
    dict(x) if isinstance(x := saved.get(name), dict) else {} for name in groups
  )
  if isinstance(data.get('class_fractions'), str):  # '0:0.6,1:0.23'
    parts = [x.partition(':') for x in data['class_fractions'].split(',') if x]
    data['class_fractions'] = {
      label.strip(): float(value) for label, _, value in parts
    }
  if 'depth' in model:
    model['name'] = f'resnet{model.pop("depth")}'
  weights = loss.pop('vicreg_weights', (25, 25, 1))
  options = {
    'supcon': {'variant': (loss.pop('supcon_variant', 'out'), 'out')},
    'vicreg': {
      f'{term}_weight': (weight, default)
      for term, weight, default in zip(
        ('invariance', 'variance', 'covariance'),
        weights,
        (25, 25, 1),
        strict=True,
      )
    },
    'barlow_twins': {
      'redundancy_weight': (loss.pop('barlow_weight', 5e-3), 5e-3)
    },
  }
  if 'options' not in loss:
    # Without the defaults: a new config does not have them either.
    loss['options'] = {
      name: value
      for name, (value, default) in options.get(
        loss.get('contrastive'), {}
      ).items()
      if value != default
    }
  groups = zip(groups, (data, model, loss), strict=True)
  return saved | {name: group for name, group in groups if name in saved}


def _known(config, names, prefix):
  """Returns the part of a config that has a declaration."""
  groups = {name.rpartition('.')[0] for name in names}
  return {
    name: _known(value, names, f'{prefix}{name}.')
    if prefix + name in groups and isinstance(value, dict)
    else value
    for name, value in config.items()
    if prefix + name in names or prefix + name in groups
  }


def _completed(saved, default):
  """Returns the saved fields and the defaults of missing ones."""
  fields = default | saved
  for name, value in saved.items():
    if isinstance(value, dict) and isinstance(default.get(name), dict):
      fields[name] = _completed(value, default[name])
  return fields


def differences(old: dict, new: dict, prefix: str = '') -> list[str]:
  """Returns a text for each field in which two configs differ."""
  lines = []
  for name in sorted({*old, *new}):
    field = f'{prefix}{name}'
    before, after = old.get(name, 'missing'), new.get(name, 'missing')
    if isinstance(before, dict) and isinstance(after, dict):
      lines += differences(before, after, f'{field}.')
    elif before != after:
      lines.append(f'{field} is {before!r} there and {after!r} here')
  return lines
