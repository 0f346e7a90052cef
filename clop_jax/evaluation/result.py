"""The result of an evaluation and its files, such as eval.json."""

import dataclasses
import io
import json
import os
import re
from typing import Any

from etils import epath
import numpy as np

from clop_jax.data import sources
from clop_jax.runtime import files

COMPLETE = ('linear', 'knn')  # modes that eval.json needs, with all labels
FOLDER = 'evaluations'  # in a workdir, for everything that is not in eval.json
_MAX_ROWS = 2000  # number of embeddings saved for figures


@dataclasses.dataclass(frozen=True)
class Result:
  """Measurements of a checkpoint.

  Attributes:
    step: Step of the checkpoint.
    measurements: One dictionary for each mode and fraction: the accuracies, the
      data and the settings.
    complete: Content of `eval.json`. None unless the request had the modes
      'linear' and 'knn' with all labels, on the run's own data and settings.
    arrays: Arrays of the test split for figures, None if `complete` is.
      Normalized `embeddings` `[n, dim]`, `labels` `[n]`, singular values
      `spectrum` `[min(n, dim)]`, `class_mean_cosines` `[num_classes,
      num_classes]`, and `prototypes` `[num_classes, dim]`.
  """

  step: int
  measurements: list[dict]
  complete: Any = None
  arrays: Any = None

  def write(self, folder: str, *, newest: bool = True) -> None:
    """Writes the result into the workdir or another folder.

    `complete` becomes `eval.json`, `arrays` becomes `embeddings.npz` (at most
    2,000 embeddings, evenly spaced). Every other measurement becomes a file in
    `evaluations/`.

    Args:
      folder: Folder, created if missing.
      newest: False for an older checkpoint. `complete` then becomes a file in
        `evaluations/`, and `arrays` is not written.

    Raises:
      OSError: If a file cannot be written.
    """
    contents = {
      f'{FOLDER}/{_file_name(x)}': x
      for x in self.measurements
      if self.complete is None
      or x['mode'] not in COMPLETE
      or x['label_fraction'] != 1
    }
    if self.complete is not None and newest:
      epath.Path(folder).mkdir(parents=True, exist_ok=True)
      path = os.path.join(folder, 'embeddings.npz')
      files.write_whole(path, _packed(self.arrays))
      # Last, so that the other files exist wherever this one does.
      contents['eval.json'] = self.complete
    elif self.complete is not None:
      contents[f'{FOLDER}/step{self.step}.json'] = self.complete
    for name, content in contents.items():
      path = os.path.join(folder, name)
      epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
      text = json.dumps(content, indent=2) + '\n'
      files.write_whole(path, text.encode())


def _file_name(measurement):
  """Returns a name that tells the data, mode, fraction and settings."""
  place = [measurement['data']]
  if measurement['other_data']:
    if measurement['data'] in sources.WITHOUT_PREPARING:
      path = measurement['data_dir'] or ''
      place.append(path and os.path.basename(os.path.abspath(path)))
    place += [measurement['train_split'], measurement['test_split']]
  parts = [
    '-'.join(filter(None, place)),
    measurement['mode'],
    f'{measurement["label_fraction"]:g}',
    *(f'{k}={v}'.strip('[]') for k, v in measurement['eval_changed'].items()),
  ]
  # Splits such as train[:10%], and lists, have characters unfit for a name.
  parts = [re.sub(r'[^\w.+-]+', '-', part) for part in parts]
  return f'step{measurement["step"]}_{"_".join(parts)}.json'


def _packed(arrays):
  """Returns the bytes of `embeddings.npz`."""
  count = len(arrays['labels'])
  shown = np.linspace(0, count - 1, min(count, _MAX_ROWS)).round().astype(int)
  packed = io.BytesIO()
  np.savez_compressed(
    packed,
    embeddings=arrays['embeddings'][shown].astype(np.float16),
    labels=arrays['labels'][shown].astype(np.int32),
    spectrum=arrays['spectrum'].astype(np.float32),
    class_mean_cosines=arrays['class_mean_cosines'].astype(np.float32),
    prototypes=arrays['prototypes'].astype(np.float32),
  )
  return packed.getvalue()
