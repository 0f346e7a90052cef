"""The files of an evaluation in a run's workdir.

`eval.json`, `embeddings.npz` and `figures/embeddings.png` are of the newest
checkpoint, with the run's own data and settings and all labels; anything else
is a file of `evaluations/`.
"""

import io
import json
import os
import re

from etils import epath
import numpy as np

from clop_jax.data import sources
from clop_jax.runtime import files

_MAX_ROWS = 2000  # of the embeddings that are kept for figures
FOLDER = 'evaluations'  # of a workdir


def write(workdir: str, result: dict, arrays: dict) -> None:
  """Writes what `evaluate` returned: `eval.json` and `embeddings.npz`.

  Args:
    workdir: of the run, or another folder, which is made if it is missing.
    result: for `eval.json`.
    arrays: for `embeddings.npz`: all as they are, but of the `embeddings`
      (as float16) and `labels` at most 2,000 rows, evenly spaced.
  """
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
  epath.Path(workdir).mkdir(parents=True, exist_ok=True)
  files.write_whole(os.path.join(workdir, 'embeddings.npz'), packed.getvalue())
  # Last: where it is, the rest is as well.
  text = json.dumps(result, indent=2) + '\n'
  files.write_whole(os.path.join(workdir, 'eval.json'), text.encode())


def write_measurement(workdir: str, measurement: dict) -> None:
  """Writes one of `Evaluation.measurements` into the folder `evaluations`."""
  place = measurement['data']
  if measurement['other_data']:
    place = [measurement[x] for x in ('data', 'train_split', 'test_split')]
    if measurement['data'] in sources.WITHOUT_PREPARING:
      place.insert(1, _name(measurement['data_dir']))
    place = '-'.join(filter(None, place))
  name = '_'.join(
    [
      f'step{measurement["step"]}',
      # A part of a split, as train[:10%], is no name for a file.
      re.sub(r'[^\w.+-]+', '-', place),
      measurement['mode'],
      f'{measurement["label_fraction"]:g}',
      *(
        re.sub(r'[^\w.+-]+', '-', f'{field}={value}').strip('-')
        for field, value in measurement['eval_changed'].items()
      ),
    ]
  )
  _write_json(os.path.join(workdir, FOLDER, f'{name}.json'), measurement)


def write_older(workdir: str, result: dict) -> None:
  """Writes what `write` writes of the newest checkpoint, of another one."""
  path = os.path.join(workdir, FOLDER, f'step{result["step"]}.json')
  _write_json(path, result)


def _name(path):
  return os.path.basename(os.path.abspath(path)) if path else ''


def _write_json(path, content):
  epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps(content, indent=2) + '\n'
  files.write_whole(path, text.encode())
