"""Directions of imports, and the libraries that a light import loads."""

import ast
import graphlib
import re
import subprocess
import sys

import pytest

from tests import small

PACKAGE = small.ROOT / 'clop_jax'

# Rows of the modules that are not in a folder.
METHOD = ('arguments', 'linalg', 'loss', 'prototypes', 'collapse', 'theory')
CONFIG = ('fields', 'defaults')

# Each row imports from itself and the rows named here, see CONTRIBUTING.md. All
# other modules are commands.
MAY_IMPORT = {
  'method': (),
  'runtime': (),
  'models': (),
  'config': (),
  'data': ('method', 'runtime'),
  'training': ('method', 'runtime', 'models', 'data'),
  'experiment': ('training', 'config'),
  'evaluation': ('experiment',),
  'tracking': ('evaluation',),
  'commands': ('tracking',),
  'study': ('commands',),
}
# Only these read the config.
READS_CONFIG = {*MAY_IMPORT} - {
  'method',
  'runtime',
  'models',
  'data',
  'training',
}
LIBRARIES = {
  'method': {'jax', 'numpy', 'optax'},
  'models': {'jax', 'flax', 'etils', 'numpy', 'safetensors', 'torch'},
  'training': {'jax', 'flax', 'optax', 'numpy'},
}


def row_of(name):
  """Returns the row of a module by its dotted name."""
  folder = name.split('.')[0]
  if folder in MAY_IMPORT:
    return folder
  if folder in METHOD:
    return 'method'
  return 'config' if folder in CONFIG else 'commands'


def reachable(row):
  rows = set(MAY_IMPORT[row])
  return rows.union(*(reachable(lower) for lower in rows))


def modules(row=None):
  for path in sorted(PACKAGE.rglob('*.py')):
    name = '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)
    if path.name != '__init__.py' and row in (None, row_of(name)):
      yield name, path


def imports(path):
  """Returns the modules of clop_jax and the libraries that a file imports."""
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


@pytest.mark.parametrize('row', MAY_IMPORT)
def test_a_folder_imports_only_from_rows_below(row):
  allowed = reachable(row) | {row}
  found = list(modules(row))
  assert found
  for name, path in found:
    ours, others = imports(path)
    for imported in ours:
      assert row_of(imported) in allowed, f'{name} imports {imported}'
    assert others <= LIBRARIES.get(row, others), name
    if row not in READS_CONFIG:
      assert 'ml_collections' not in others, name


def test_the_diagram_shows_these_directions():
  text = (small.ROOT / 'CONTRIBUTING.md').read_text()
  picture = text.partition('```mermaid')[2].partition('```')[0]
  drawn = set(re.findall(r'^ *(\w+).* --> (\w+)', picture, re.MULTILINE))
  assert drawn == {
    (row, lower) for row, rows in MAY_IMPORT.items() for lower in rows
  }


def test_imports_have_no_cycle():
  graph = {name: imports(path)[0] for name, path in modules()}
  graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
  ('statement', 'unwanted'),
  [
    (
      'import clop_jax.loss',
      'flax optax grain orbax tensorflow_datasets tensorflow matplotlib sklearn'
      ' dm_pix ml_collections',
    ),
    (
      'from clop_jax.training import train_step, optimizer',
      'grain orbax tensorflow_datasets tensorflow ml_collections',
    ),
    (
      'from docs.benchmarks import run, startup',
      'grain orbax tensorflow_datasets tensorflow ml_collections sklearn',
    ),
  ],
  ids=['loss', 'train_step', 'benchmarks'],
)
def test_light_imports_load_no_heavy_library(statement, unwanted):
  code = f'{statement}\nimport sys\nprint(" ".join(sys.modules))'
  result = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    check=True,
    cwd=small.ROOT,
  )
  loaded = {name.split('.')[0] for name in result.stdout.split()}
  assert 'jax' in loaded and not loaded & {*unwanted.split()}
