"""Remote paths in every flag and field that takes one."""

import importlib.util

import pytest

from clop_jax import cli
from clop_jax import embed
from clop_jax import evaluate
from clop_jax import export
from clop_jax import preview
from clop_jax import train
from clop_jax.data import sources
from clop_jax.runtime import remote
from tests import small

# From ml_collections, when it reads a config file.
pytestmark = pytest.mark.filterwarnings(
  'ignore:the load_module:DeprecationWarning'
)
CONFIG = f'--config={small.ROOT}/configs/digits.py'
GCSFS = r'gs://bucket/x needs .*pip install gcsfs'


@pytest.fixture(autouse=True)
def without_packages(monkeypatch):
  def missing(protocol):
    raise ImportError(f'no package for {protocol}')

  monkeypatch.setattr(remote.fsspec, 'get_filesystem_class', missing)
  find_spec = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    'find_spec',
    lambda name, *rest: (
      None if name == 'tensorflow' else find_spec(name, *rest)
    ),
  )


@pytest.mark.parametrize(
  ('module', 'arguments', 'message'),
  [
    (train, [CONFIG, '--workdir=gs://bucket/x'], f'--workdir={GCSFS}'),
    (train, [CONFIG, '--workdir=s3://b/x'], r's3://b/x .*pip install s3fs'),
    (
      train,
      [CONFIG, '--workdir=w', '--config.model.initial_weights=gs://bucket/x'],
      f'--config.model.initial_weights={GCSFS}',
    ),
    (evaluate, ['--workdir=w', '--workdir=gs://bucket/x'], GCSFS),
    (evaluate, ['--workdir=w', '--figure=gs://b/x.png'], '--figure must be a'),
    (evaluate, ['--workdir=w', '--table=s3://b/x.md'], '--table must be a'),
    (embed, ['--workdir=gs://bucket/x', '--out=x.npz'], GCSFS),
    (embed, ['--workdir=w', '--source=gs://b/x'], '--source must be a local'),
    (export, ['--workdir=w', '--out=gs://bucket/x'], f'--out={GCSFS}'),
    (preview, [CONFIG, '--out=foo://b/x.png'], '--out=.*foo:// is not supp'),
  ],
)
def test_a_missing_package_is_named_before_any_work(module, arguments, message):
  with (
    small.flags_of(module, *arguments),
    pytest.raises(ValueError, match=message),
  ):
    cli._check_paths()


@pytest.mark.parametrize(
  ('name', 'data_dir', 'message'),
  [
    ('digits', 'gs://bucket/x', GCSFS),
    ('folder', 'gs://bucket/x', 'config.data.data_dir must be a local path'),
    ('npz', 's3://bucket/x.npz', 'config.data.data_dir must be a local path'),
  ],
)
def test_remote_data_are_checked(name, data_dir, message):
  with pytest.raises(ValueError, match=message):
    sources.load(name, 'train', data_dir)


def test_local_paths_and_other_texts_are_allowed(monkeypatch):
  for value in ('runs/a', '/x:y', '', 'a=b,c', 'C:/x'):
    remote.check('--workdir', value)
  # TensorFlow supports Google's storage.
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name)
  remote.check('--workdir', 'gs://bucket/x')
