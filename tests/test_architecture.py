"""The arrows between modules, and what a light import may load."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / 'clop_jax'

# Layer of each module: it imports only from layers below its own. Where a
# module may use fewer libraries than the others of its layer, they are listed.
LAYERS = {
  'arguments': -1,
  'fields': -1,
  'linalg': -1,
  'files': -1,
  'loss': 0,
  'prototypes': 0,
  'collapse': 0,
  'theory': 0,
  'grad_cache': 0,
  'randaugment': 0,
  'augment': 0.5,  # one of its operations is randaugment
  'models.resnet': 0,
  'models.heads': 0.5,  # shares models.resnet's meaning of bn_scope
  'torchvision_weights': 0,
  'gpu_updates': 0,
  'optimizer': 0.5,  # its chains on GPUs are of gpu_updates
  'colours': 0,
  'column_files': 0,
  'parallel': 0,
  'peers': -1,
  'locks': 0,
  'remote': 0,
  'preemption': 0,
  'compilation_cache': 0,
  'hlo': 0,
  'topologies': 0,
  'breakdown': 0.2,  # parts as hlo has them
  'profiling': 0.5,  # prints a breakdown
  'workers': 0,
  'data.labels': 0,
  'data.digits': 0,
  'data.tiny_imagenet': 0,
  'data.images': 0,
  'data.synthetic': 0,
  'data.arrays': 0,
  'data.folder': 0.2,  # data.images decodes
  'data.tfds_source': 0.2,  # likewise; imports our builders, lazily
  'data.sources': 0.4,  # chooses among the sources
  'data.reader': 0.6,  # what a source gives, at one shape
  'data.loader': 1,
  'train_state': 1,
  'prototype_rules': 1,
  'metrics_log': 1,
  'event_files': 1,
  'wandb_log': 1.2,  # takes what event_files does
  'quick_picture': 1,
  'collapse_alarm': 1,
  'train_step': 2,
  'checkpoint': 2,
  'probe': 2,
  'finetune': 2,
  'figures': 2,
  'results': 2,
  'study_figures': 2.5,  # chooses what figures draws of results
  'report': 3,
  'defaults': 2,
  'memory': 3,
  'experiment': 3,
  'workdir': 3,
  'inputs': 3,
  'command': 3.2,
  'grid': 3,
  'restored': 3.5,  # a workdir's checkpoint as what its experiment builds
  'protocol': 3.5,  # what inputs reads, measured
  'measurement': 3.7,  # of a restored run, by the protocol
  'evaluation_files': 3.7,
  'data.views': 1,
  'pictures': 3.7,  # of a training, by inputs and data.views
  'watching': 3.8,  # of a training, by protocol and restored
  'train': 4,
  'evaluate': 4,
  'export': 4,
  'embed': 4,
  'plan': 4.2,  # train's program
  'data.prepare': 4,
  'data.preview': 4,
  'ensemble': 4.2,  # several of train
  'cell': 4.5,  # train and evaluate in one
  'study': 5,
}
LIBRARIES = {
  'hlo': set(),
  'arguments': {'jax', 'numpy'},
  'fields': {'numpy'},
  'topologies': {'jax'},
  'files': {'etils', 'numpy'},
  'linalg': {'jax'},
  'loss': {'jax'},
  'prototypes': {'jax', 'optax'},
  'collapse': {'jax'},
  'prototype_rules': {'jax'},
  'theory': {'jax'},
  'grad_cache': {'jax'},
  'augment': {'jax', 'dm_pix'},
  'randaugment': {'jax'},
  'data.images': {'numpy', 'PIL'},
  'data.arrays': {'numpy'},
  'data.synthetic': {'numpy'},
  'data.folder': {'numpy', 'PIL'},
  'data.reader': {'PIL', 'numpy'},
  'defaults': {'ml_collections'},
  'models.resnet': {'jax', 'flax'},
  'models.heads': {'jax', 'flax'},
  # Where PyTorch is installed it reads .pth files.
  'torchvision_weights': {'etils', 'numpy', 'safetensors', 'torch'},
  'gpu_updates': {'jax', 'numpy', 'optax'},
  'optimizer': {'jax', 'optax'},
  'parallel': {'jax', 'numpy'},
  'peers': set(),
  'locks': set(),
  'remote': {'fsspec'},
  'preemption': {'jax'},
  'compilation_cache': {'jax'},
  'breakdown': {'jax'},
  'profiling': {'jax'},
  'workers': set(),
  'grid': {'ml_collections'},
  'metrics_log': {'etils', 'jax', 'tqdm'},
  'event_files': {'etils', 'numpy', 'tensorboardX'},
  'wandb_log': {'PIL', 'numpy', 'wandb'},
  'quick_picture': {'PIL', 'numpy'},
  'colours': set(),
  'column_files': {'numpy', 'pyarrow'},
  'collapse_alarm': set(),
  'data.labels': {'numpy'},
  'train_state': {'jax', 'flax', 'optax'},
  'train_step': {'jax', 'flax', 'optax'},
  'finetune': {'jax', 'flax', 'optax', 'numpy'},
  'figures': {'matplotlib', 'numpy'},
  'results': {'numpy'},
  'study_figures': {'numpy', 'sklearn', 'threadpoolctl'},
  'report': {'numpy'},
}


def modules():
  for path in sorted(PACKAGE.rglob('*.py')):
    name = '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)
    if not name.endswith('__init__'):
      yield name, path


def imports(path):
  """Modules of ours, and top-level names of others, that a file imports."""
  ours, others = set(), set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      others |= {alias.name.split('.')[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      package = node.module or ''
      if package.split('.')[0] == 'clop_jax':
        prefix = package.removeprefix('clop_jax').strip('.')
        ours |= {f'{prefix}.{alias.name}'.strip('.') for alias in node.names}
      else:
        others.add(package.split('.')[0])
  return ours, others - set(sys.stdlib_module_names)


@pytest.mark.parametrize(
  ('name', 'path'), list(modules()), ids=[name for name, _ in modules()]
)
def test_a_module_imports_only_from_layers_below(name, path):
  assert name in LAYERS, f'{name} has no layer yet'
  ours, others = imports(path)
  for imported in ours:
    assert LAYERS[imported] < LAYERS[name], f'{name} imports {imported}'
  if name in LIBRARIES:
    assert others <= LIBRARIES[name]
  if LAYERS[name] < 3 and name != 'defaults':
    assert 'ml_collections' not in others, 'only commands read the config'


def test_every_layered_module_exists():
  assert set(LAYERS) == {name for name, _ in modules()}


def loaded_by(statement):
  code = f'{statement}\nimport sys\nprint(" ".join(sys.modules))'
  result = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  return {name.split('.')[0] for name in result.stdout.split()}


def test_importing_the_losses_loads_jax_and_nothing_heavier():
  loaded = loaded_by('import clop_jax.loss')
  heavy = {
    'flax',
    'optax',
    'grain',
    'orbax',
    'tensorflow_datasets',
    'tensorflow',
    'matplotlib',
    'sklearn',
    'dm_pix',
    'ml_collections',
  }
  assert 'jax' in loaded
  assert not loaded & heavy


def test_a_training_step_needs_no_input_or_checkpoint_library():
  loaded = loaded_by('from clop_jax import train_step, optimizer')
  assert not loaded & {
    'grain',
    'orbax',
    'tensorflow_datasets',
    'tensorflow',
    'ml_collections',
  }
