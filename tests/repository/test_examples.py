"""The examples run and give the results that they claim."""

import ast
import contextlib
import functools
import importlib
import io
import re
import subprocess
import sys
import tempfile

import pytest

from tests import small

FOLDER = small.ROOT / 'docs' / 'examples'
NAMES = sorted(path.stem for path in FOLDER.glob('*.py'))
NUMBER = re.compile(r'-?\d+(?:\.\d+)?(?:e-?\d+)?')


@functools.cache
def printed(name):
  """Returns the lines that an example prints."""
  text = (FOLDER / f'{name}.py').read_text()
  if 'def main(workdir)' in text:
    return printed_by_main(name)
  environment = small.environment(8 if 'device_count=8' in text else 1)
  result = subprocess.run(
    [sys.executable, '-W', 'error::DeprecationWarning', FOLDER / f'{name}.py'],
    capture_output=True,
    text=True,
    env=environment,
  )
  assert result.returncode == 0, result.stderr
  return result.stdout.splitlines()


def printed_by_main(name):
  """Returns the last line that an example of the trainer prints, here."""
  with (
    pytest.MonkeyPatch.context() as patch,
    tempfile.TemporaryDirectory() as workdir,
    contextlib.redirect_stdout(io.StringIO()) as output,
  ):
    patch.syspath_prepend(FOLDER)
    importlib.import_module(name).main(f'{workdir}/run')
  return output.getvalue().splitlines()[-1:]


def figures(line):
  """Returns the numbers after the name of a line."""
  return [float(x) for x in NUMBER.findall(line.partition(': ')[2] or line)]


def tree(name):
  return ast.parse((FOLDER / f'{name}.py').read_text())


@pytest.mark.parametrize('name', NAMES)
def test_output_matches_the_docstring(name):
  docstring = ast.get_docstring(tree(name))
  lines = printed(name)
  said = [line.strip() for line in docstring.splitlines()[-len(lines) :]]
  assert [NUMBER.sub('#', x) for x in said] == [
    NUMBER.sub('#', x) for x in lines
  ]
  for there, here in zip(said, lines, strict=True):
    if 'e-' in there:
      continue  # rounding, which differs between machines
    # A training at the edge of collapse is sensitive to rounding.
    assert figures(here) == pytest.approx(figures(there), rel=0.3, abs=0.02)


@pytest.mark.parametrize('name', ['nnx_model', 'equinox_model'])
def test_clop_prevents_collapse(name):
  (rank, knn), (clop_rank, clop_knn) = map(figures, printed(name))
  assert rank < 10 < clop_rank  # classes
  assert clop_knn > knn


def test_clop_sorts_the_codes_of_an_autoencoder():
  (error, accuracy), (clop_error, clop_accuracy), (strong_error, _) = map(
    figures, printed('own_loss')
  )
  assert accuracy < 0.3 and clop_accuracy > 0.7
  assert error < clop_error < strong_error


def test_clop_uses_the_few_labels_of_a_table():
  (_, accuracy), (_, clop_accuracy) = map(figures, printed('tabular'))
  assert clop_accuracy > accuracy + 0.01


@pytest.mark.parametrize('name', ['pmap', 'shard_map'])
def test_eight_devices_equal_one(name):
  labels, losses, means, difference = printed(name)
  counts = figures(labels)
  assert len(counts) == 8 and len(set(counts)) > 3
  match = re.fullmatch(r'loss on 8 devices (.*), on one (.*)', losses)
  whole, one = match.groups()
  assert float(whole) == pytest.approx(float(one), abs=2e-6)
  assert abs(float(NUMBER.findall(means)[-1]) - float(one)) > 0.1
  assert figures(difference)[-1] < 1e-6


@pytest.mark.parametrize('name', NAMES)
def test_examples_use_public_functions_and_are_listed(name):
  ours = {
    alias.name
    for node in ast.walk(tree(name))
    if isinstance(node, ast.ImportFrom) and node.module == 'clop_jax'
    for alias in node.names
  }
  public = {'loss', 'prototypes', 'collapse', 'defaults', 'train', 'evaluate'}
  assert ours and ours <= public
  listed = (small.ROOT / 'docs' / 'own_code.md').read_text()
  assert f'(examples/{name}.py)' in listed
  assert f'python docs/examples/{name}.py' in ast.get_docstring(tree(name))
