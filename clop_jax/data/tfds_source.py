"""Data sets of TFDS: prepared once, read at random without TensorFlow."""

import contextlib
import difflib
import errno
import glob
import importlib.util
import io
import os
import shutil
import sys

import numpy as np
import tqdm

from clop_jax.data import images
from clop_jax.runtime import locks

_PREPARE = 'python -m clop_jax.prepare'


class TfdsSource:
  """A prepared split; images are decoded by Pillow when they are read.

  TFDS would decode with TensorFlow or OpenCV where it finds one: another
  decoder on another machine, and other pixels.

  Attributes:
    num_classes: Number of classes.
    class_names: Names of the classes, by label.
  """

  def __init__(self, builder, split: str):
    """Opens a split of a prepared builder.

    Raises:
      ValueError: If the split is missing (the valid ones are listed), or the
        files do not allow random access.
    """
    import tensorflow_datasets as tfds

    self._name, self._split = builder.info.full_name, split
    splits = list(builder.info.splits)
    parts = [part.partition('[')[0].strip() for part in split.split('+')]
    if not {*parts} <= {*splits}:
      raise ValueError(
        f'split must be one of {splits} of {builder.name}, got {split!r}'
      )
    try:
      self._records = builder.as_data_source(
        split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
      )
    except NotImplementedError as error:
      raise ValueError(
        f'{builder.data_dir} was prepared as '
        f'{builder.info.file_format.value}, which has no random access; give '
        f'another folder: {_PREPARE} --name={builder.name} --data_dir=DIR, and '
        'train with --config.data.data_dir=DIR'
      ) from error
    features = builder.info.features
    # Only these two: others could need TensorFlow to be decoded.
    self._features = tfds.features.FeaturesDict(
      {name: features[name] for name in ('image', 'label')}
    )
    self._decoders = {'image': tfds.decode.SkipDecoding()}
    label = features['label']
    self.num_classes, self.class_names = label.num_classes, label.names
    self._labels = None
    # A part of a split, as 'train[:10%]', is not worth a file.
    self._cache = (
      os.path.join(builder.data_dir, f'clop_jax_labels_{split}.npy')
      if split in splits
      else None
    )

  def __len__(self):
    return len(self._records)

  def _encoded(self, index):
    return self._features.deserialize_example_np(
      self._records[index], decoders=self._decoders
    )

  def __getitem__(self, index):
    example = self._encoded(index)
    image = images.decode(example['image'], self.name_of(index))
    return {'image': image, 'label': int(example['label'])}

  def name_of(self, index):
    """Returns the data set, split and number of an example."""
    return f'{self._name} {self._split} example {index}'

  @property
  def labels(self) -> np.ndarray:
    """All labels, `[n]` int32; read once, without decoding, and kept in a file.

    The file lies beside the prepared data. If it cannot be written, the labels
    are read again each time.
    """
    found = self._cached() if self._labels is None else self._labels
    if found is None:
      indices = tqdm.tqdm(
        range(len(self)), 'reading labels', disable=not sys.stderr.isatty()
      )
      found = np.array(
        [int(self._encoded(index)['label']) for index in indices], np.int32
      )
      self._keep(found)
    self._labels = found
    return found

  def _cached(self):
    if self._cache is None or not os.path.exists(self._cache):
      return None
    try:
      labels = np.load(self._cache)
    except (OSError, ValueError, EOFError):
      return None
    fits = labels.dtype == np.int32 and labels.shape == (len(self),)
    return labels if fits else None

  def _keep(self, labels):
    if self._cache is None:
      return
    # Several processes may come here at once.
    partial = f'{self._cache}.{os.getpid()}.partial'
    try:
      with open(partial, 'wb') as file:
        np.save(file, labels)
      os.replace(partial, self._cache)
    except OSError:  # somebody else's folder, or remote
      with contextlib.suppress(OSError):
        os.remove(partial)


def load(
  name: str, split: str, data_dir: str | None = None, *, progress: bool = False
) -> TfdsSource:
  """Returns the split of a data set, prepared first if necessary.

  Args:
    name: Name in TFDS ('cifar100', 'imagenette/320px-v2'), or one of ours.
    split: Split in TFDS, or a part of one, as 'train[:10%]'.
    data_dir: Folder of TFDS's data sets; None is TFDS's default.
    progress: True shows a progress bar while preparing.

  Raises:
    ValueError: If the name or split is unknown, or the set cannot be prepared.
    OSError: If it cannot be written.
  """
  return TfdsSource(prepared(name, data_dir, progress=progress), split)


def builder(name: str, data_dir: str | None = None):
  """Returns the TFDS builder of that name.

  Raises:
    ValueError: If there is none, or it has no `image` with a class `label`.
  """
  # Here, because TFDS takes a second to import.
  import tensorflow_datasets as tfds

  from clop_jax.data import digits
  from clop_jax.data import tiny_imagenet

  ours = {'digits': digits.Digits, 'tiny_imagenet': tiny_imagenet.TinyImagenet}
  # array_record: random access, and no TensorFlow to read it.
  arguments = {'data_dir': data_dir, 'file_format': 'array_record'}
  if name in ours:
    return ours[name](**arguments)
  try:
    made = tfds.builder(name, **arguments)
  except (tfds.core.DatasetNotFoundError, ValueError) as error:
    known = [*ours, *tfds.list_builders(with_community_datasets=False)]
    near = difflib.get_close_matches(name, known, n=3)
    hint = f'; near it: {", ".join(near)}' if near else ''
    reason = '' if name.split('/')[0] not in known else f' ({error})'
    raise ValueError(
      'config.data.name must be folder, npz, synthetic, digits, tiny_imagenet '
      f'or a data set of TFDS, got {name!r}{hint}{reason}'
    ) from error
  except ImportError as error:
    raise ValueError(
      f'config.data.name={name!r} cannot even be described without TensorFlow '
      f"({error}); pip install 'clop-jax[prepare]'"
    ) from error
  described = made.info.features
  is_dict = isinstance(described, tfds.features.FeaturesDict)
  features = dict(described.items()) if is_dict else {}
  if not (
    isinstance(features.get('image'), tfds.features.Image)
    and isinstance(features.get('label'), tfds.features.ClassLabel)
  ):
    raise ValueError(
      f'config.data.name={name!r} is not a set of labelled images: it has '
      f'{", ".join(features) or "no features"}, expected image and label'
    )
  return made


def prepared(name: str, data_dir: str | None, *, progress: bool = False):
  """Returns the builder of that name, prepared by this process or another one.

  Several processes of one machine (or of a shared folder with locks) may call
  this at once: one prepares, the others wait. The files of an interrupted
  preparation are removed.

  Raises:
    ValueError: If it cannot be prepared; the error names what is needed.
    OSError: If it cannot be written.
  """
  made = builder(name, data_dir)
  if made.is_prepared():
    return made
  with _alone(made.data_dir) as is_alone:
    # Another process may have prepared it meanwhile, which `made` cannot see.
    made = builder(name, data_dir)
    if made.is_prepared():
      return made
    _check_needs(made, name, data_dir)
    parent, version = os.path.split(made.data_dir)
    pattern = f'incomplete.*_{glob.escape(version)}'
    for leftover in glob.glob(os.path.join(glob.escape(parent), pattern)):
      if is_alone:  # else another process may be writing it
        shutil.rmtree(leftover, ignore_errors=True)
    _prepare(made, name, data_dir, progress)
  return made


@contextlib.contextmanager
def _alone(data_dir):
  """Holds the lock of a data set, which ends with the process.

  Yields False if there are no locks, as in a remote folder. TFDS writes to a
  folder of its own and renames it at the end, so nothing is lost.
  """
  if '://' in data_dir:
    yield False
    return
  os.makedirs(os.path.dirname(data_dir), exist_ok=True)
  with open(f'{data_dir}.lock', 'a') as file:
    try:
      is_locked = locks.take(file)
    except BlockingIOError:
      print(
        f'waiting for another process that prepares {data_dir}',
        file=sys.stderr,
        flush=True,
      )
      is_locked = locks.take(file, wait=True)
    yield is_locked


def _check_needs(made, name, data_dir):
  """Raises ValueError with all that is missing, before any download."""
  needs = []
  folder = os.path.join(made._data_dir_root, 'downloads', 'manual')
  instructions = made.MANUAL_DOWNLOAD_INSTRUCTIONS
  if instructions and not (os.path.isdir(folder) and os.listdir(folder)):
    needs.append(
      f'a download by hand into {folder}: {" ".join(instructions.split())}'
    )
  # TFDS's builders that use TensorFlow import it lazily under this name.
  module = sys.modules[type(made).__module__]
  if hasattr(module, 'tf') and not importlib.util.find_spec('tensorflow'):
    needs.append(_TENSORFLOW)
  if needs:
    raise ValueError(
      f'{name} is not prepared in {made.data_dir}, and preparing it needs '
      f'{"; and ".join(needs)}. Then: {_command(name, data_dir)}'
    )


_TENSORFLOW = (
  "TensorFlow (pip install 'clop-jax[prepare]'; training then goes without it)"
)


def _command(name, data_dir):
  where = f' --data_dir={data_dir}' if data_dir else ''
  return f'{_PREPARE} --name={name}{where}'


def _prepare(made, name, data_dir, progress):
  import tensorflow_datasets as tfds

  if progress:
    tfds.enable_progress_bar()
  else:
    tfds.disable_progress_bar()
  try:
    # TFDS prints to standard output, which belongs to the command.
    with contextlib.redirect_stdout(sys.stderr if progress else io.StringIO()):
      made.download_and_prepare()
  except ImportError as error:
    raise ValueError(
      f'preparing {name} needs {_TENSORFLOW} ({error}). Then: '
      f'{_command(name, data_dir)}'
    ) from error
  except (
    tfds.download.DownloadError,
    OSError,
    ValueError,
    AssertionError,
    RuntimeError,
  ) as error:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
      raise
    raise ValueError(
      f'{name} cannot be prepared in {made.data_dir}: '
      f'{" ".join(str(error).split())}. Nothing there counts as prepared; once '
      f'the cause is gone: {_command(name, data_dir)}'
    ) from error
