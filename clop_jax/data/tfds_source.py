"""Data sets of TFDS, prepared once and read at random without TensorFlow."""

import contextlib
import difflib
import errno
import glob
import importlib.util
import io
import os
import shutil
import sys

from etils import epath
import numpy as np
import tqdm

from clop_jax.data import images
from clop_jax.runtime import files
from clop_jax.runtime import locks

_PREPARE = 'python -m clop_jax.prepare'


class TfdsSource:
  """A source of a prepared split, whose images are decoded by Pillow.

  TFDS would decode with TensorFlow or OpenCV if they are installed, and the
  pixels would depend on the machine.

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
        f'{builder.data_dir} is prepared as '
        f'{builder.info.file_format.value}, which has no random access; run '
        f'{_PREPARE} --name={builder.name} --data_dir=DIR with another folder, '
        'and train with --config.data.data_dir=DIR'
      ) from error
    features = builder.info.features
    # Other features might need TensorFlow to be decoded.
    self._features = tfds.features.FeaturesDict(
      {name: features[name] for name in ('image', 'label')}
    )
    self._decoders = {'image': tfds.decode.SkipDecoding()}
    label = features['label']
    self.num_classes, self.class_names = label.num_classes, label.names
    self._labels: np.ndarray | None = None
    # Not for a part of a split, such as 'train[:10%]'.
    self._cache = None
    if split in splits:
      name = f'clop_jax_labels_{split}.npy'
      self._cache = os.path.join(builder.data_dir, name)

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
    """Labels `[n]` int32, cached in a file beside the prepared data."""
    if self._labels is not None:
      return self._labels
    labels = self._cached_labels()
    if labels is None:
      indices = tqdm.tqdm(
        range(len(self)), 'reading labels', disable=not sys.stderr.isatty()
      )
      labels = np.array(
        [self._encoded(index)['label'] for index in indices], np.int32
      )
      if self._cache is not None:
        buffer = io.BytesIO()
        np.save(buffer, labels)
        with contextlib.suppress(OSError):  # not writable
          files.write_whole(self._cache, buffer.getvalue())
    self._labels = labels
    return labels

  def _cached_labels(self):
    try:
      labels = np.load(io.BytesIO(epath.Path(self._cache).read_bytes()))
    except (OSError, ValueError, EOFError, TypeError):  # damaged, or no cache
      return None
    fits = labels.dtype == np.int32 and labels.shape == (len(self),)
    return labels if fits else None


def load(
  name: str, split: str, data_dir: str | None = None, *, progress: bool = False
) -> TfdsSource:
  """Returns a split of a data set, prepared first if necessary.

  Args:
    name: Name of the data set, such as 'cifar100' or 'imagenette/320px-v2'.
    split: Split, or parts of splits, such as 'train[:10%]+test'.
    data_dir: Folder of TFDS's data sets; None is TFDS's default.
    progress: True shows a progress bar while preparing.

  Raises:
    ValueError: If the name or split is unknown, or the set cannot be prepared.
    OSError: If it cannot be written.
  """
  return TfdsSource(prepared(name, data_dir, progress=progress), split)


def builder(name: str, data_dir: str | None = None):
  """Returns the TFDS builder of a set with an `image` and a class `label`."""
  # Importing TFDS takes a second.
  import tensorflow_datasets as tfds

  from clop_jax.data import digits
  from clop_jax.data import tiny_imagenet

  ours = {'digits': digits.Digits, 'tiny_imagenet': tiny_imagenet.TinyImagenet}
  # array_record has random access, and is read without TensorFlow.
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
      f'config.data.name={name!r} needs TensorFlow ({error}): pip install '
      "'clop-jax[prepare]'"
    ) from error
  features = made.info.features
  is_dict = isinstance(features, tfds.features.FeaturesDict)
  features = dict(features.items()) if is_dict else {}
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
  """Returns a builder after preparing its data set, if necessary.

  If several processes call this at once, one prepares and the others wait. The
  files of an interrupted preparation are removed.

  Raises:
    ValueError: If the set cannot be prepared. The error says what is missing.
    OSError: If it cannot be written.
  """
  made = builder(name, data_dir)
  if made.is_prepared():
    return made
  with _alone(made.data_dir) as is_alone:
    # Another process may have prepared it meanwhile, which `made` does not see.
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
  """Locks a data set; yields False if there are no locks, as in remote folders.

  Without a lock nothing is lost: TFDS writes to a folder of its own.
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
        f'waiting for the process that prepares {data_dir}',
        file=sys.stderr,
        flush=True,
      )
      is_locked = locks.take(file, wait=True)
    yield is_locked


def _check_needs(made, name, data_dir):
  """Raises ValueError if anything is missing, before any download."""
  needs = []
  folder = os.path.join(made._data_dir_root, 'downloads', 'manual')
  instructions = made.MANUAL_DOWNLOAD_INSTRUCTIONS
  if instructions and not (os.path.isdir(folder) and os.listdir(folder)):
    needs.append(
      f'files that you download into {folder}: {" ".join(instructions.split())}'
    )
  # Builders that use TensorFlow import it lazily under this name.
  module = sys.modules[type(made).__module__]
  if hasattr(module, 'tf') and not importlib.util.find_spec('tensorflow'):
    needs.append(_TENSORFLOW)
  if needs:
    raise ValueError(
      f'{name} is not prepared in {made.data_dir}, and preparing it needs '
      f'{"; and ".join(needs)}. Then run {_command(name, data_dir)}'
    )


_TENSORFLOW = (
  "TensorFlow (pip install 'clop-jax[prepare]'; training does not need it)"
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
    # TFDS prints to standard output, which is for the command's results.
    with contextlib.redirect_stdout(sys.stderr if progress else io.StringIO()):
      made.download_and_prepare()
  except ImportError as error:
    raise ValueError(
      f'preparing {name} needs {_TENSORFLOW} ({error}). Then run '
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
      f'{" ".join(str(error).split())}. Fix the cause, then run '
      f'{_command(name, data_dir)}'
    ) from error
