"""The documentation, read by a machine: links, commands, fields, code.

The Python blocks of a file run in one namespace, in a folder with the run
`runs/digits`. A block of `text` after one is its output. A block that cannot
run has `<!-- not run: why -->` above it.
"""

import ast
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import io
import itertools
import json
import os
import re
import runpy
import shlex
import subprocess
import sys

import jax
import ml_collections
import numpy as np
import pytest

from clop_jax import defaults
from clop_jax.experiment import build
from clop_jax.experiment import workdir as workdir_lib
from tests import small
from tests.repository import test_architecture

ROOT = small.ROOT
FILES = [
  str(path.relative_to(ROOT))
  for path in [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]
]
GROUPS = sorted(
  name
  for name, value in defaults.get_config().items()
  if isinstance(value, ml_collections.ConfigDict)
)
FENCE = re.compile(r'^```(\w*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def read(name):
  return (ROOT / name).read_text()


def prose(text):
  return FENCE.sub('', text)


def inline_code(text):
  return [' '.join(x.split()) for x in re.findall(r'`([^`]+)`', prose(text))]


# Links


def anchors(text):
  """Returns the names that GitHub gives to the headings."""
  found = {}
  for heading in re.findall(r'^#+ (.*)$', prose(text), re.MULTILINE):
    slug = re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
    number = found[slug] = found.get(slug, -1) + 1
    if number:
      found[f'{slug}-{number}'] = 0
  return set(found)


def links(text):
  text = re.sub(r'`[^`]*`', '', prose(text))
  return [x for x in re.findall(r'\]\(([^)\s]+)\)', text) if '://' not in x]


def test_the_anchor_of_a_heading_is_githubs():
  text = '# A `b`, (c) d_e: 1 + 2\n\n## x\n\n```\n# y\n```\n\n## x\n'
  assert anchors(text) == {'a-b-c-d_e-1--2', 'x', 'x-1'}


@pytest.mark.parametrize('name', FILES)
def test_links_lead_somewhere(name):
  for link in links(read(name)):
    path, _, anchor = link.partition('#')
    target = (ROOT / name).parent / path if path else ROOT / name
    assert target.exists(), f'{name} links to {link}'
    if anchor:
      assert anchor in anchors(target.read_text()), f'{name} links to {link}'


def test_the_index_has_every_page():
  pages = {path.name for path in (ROOT / 'docs').glob('*.md')}
  assert pages - {'README.md'} <= set(links(read('docs/README.md')))


# Commands

_PARSER = """
import importlib, json, os, sys, tempfile
from absl import flags
from clop_jax import cli
from clop_jax.study import grid
# Only the flags are of interest.
cli.parallel.start = cli.compilation_cache.enable = lambda *_, **__: 0
commands = json.load(sys.stdin)
modules = {}
for name, _ in commands:
  try:
    module = importlib.import_module(name)
    if hasattr(module, '__path__'):
      module = importlib.import_module(name + '.__main__')
    modules[name] = module
  except ImportError as error:
    modules[name] = str(error)

def main():
  if 'grid' in flags.FLAGS and flags.FLAGS.grid:
    grid.parse(flags.FLAGS.grid, flags.FLAGS.config)

errors = []
for name, arguments in commands:
  if isinstance(modules[name], str):
    errors.append(modules[name])
    continue
  with tempfile.TemporaryFile('w+') as file:
    child = os.fork()
    if not child:
      os.dup2(file.fileno(), 2)
      sys.argv = [name, *arguments]
      cli.run(main, modules[name].define_flags)
    _, status = os.waitpid(child, 0)
    file.seek(0)
    errors.append(file.read() if status else '')
print(json.dumps(errors))
"""


@dataclasses.dataclass
class Command:
  """A command in the documentation, without the variables before it."""

  file: str
  variables: dict
  words: list

  def __str__(self):
    return f'{self.file}: {shlex.join(self.words)}'

  def parsed_by(self):
    """Returns the module of ours that parses the flags, and the flags."""
    program, *rest = self.words
    if self.words[:2] == ['python', '-m'] and rest[1].startswith('clop_jax.'):
      return rest[1], rest[2:]
    scripts = [i for i, x in enumerate(rest) if x.startswith('launch/')]
    if program not in ('bash', 'sbatch') or not scripts:
      return None
    script, *flags = rest[scripts[0] :]
    if script == 'launch/quickstart.sh':
      flags = ['--config=configs/digits.py', '--workdir=runs/x', *flags]
    return f'clop_jax.{self.variables.get("COMMAND", "train")}', flags


def commands(name):
  text = read(name)
  lines = []
  for language, body in FENCE.findall(text):
    if language == 'bash':
      body = re.sub(
        r"<<'(\w+)'\n.*?^\1$", '', body, flags=re.DOTALL | re.MULTILINE
      )
      lines += body.replace('\\\n', ' ').splitlines()
  starts = r'([A-Z_]+=\S+ )*(python (-m|\w+/)|bash \w+/)'
  lines += [x for x in inline_code(text) if re.match(starts, x)]
  for line in lines:
    words = shlex.split(line, comments=True)
    variables = {}
    while words and re.match('[A-Z_0-9]+=', words[0]):
      key, _, value = words.pop(0).partition('=')
      variables[key] = value
    if words:
      yield Command(name, variables, [x for x in map(filled, words) if x])


def filled(word):
  """Returns a word with a value for a placeholder, or '' for an ellipsis."""
  if '...' in word or word in ('GRID', '\\'):
    return ''
  return re.sub('=([NIS])$', '=0', word)


COMMANDS = [command for name in FILES for command in commands(name)]
PROBES = [
  Command('probe', {}, f'python -m clop_jax.{x}'.split())
  for x in (
    'train --config=configs/digits.py --wrokdir=w',
    'train --config=configs/digits.py --config.los.x=1',
    'study --config=configs/digits.py --grid=los.x=1',
    'train --config=configs/digits.py --workdir=w',
  )
]


@pytest.fixture(scope='module')
def complaints():
  """Returns the errors of our commands about their flags."""
  found = [x for x in [*COMMANDS, *PROBES] if x.parsed_by()]
  assert len(found) > 20
  result = subprocess.run(
    [sys.executable, '-c', _PARSER],
    input=json.dumps([x.parsed_by() for x in found]),
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=os.environ | {'XLA_FLAGS': ''},
  )
  assert result.returncode == 0, result.stderr
  errors = json.loads(result.stdout)
  return {str(x): e for x, e in zip(found, errors, strict=True) if e}


@pytest.mark.parametrize('name', FILES)
def test_commands_have_flags_and_fields_that_exist(name, complaints):
  own = [error for x, error in complaints.items() if x.startswith(f'{name}: ')]
  assert not own


def test_a_wrong_flag_or_field_would_be_seen(complaints):
  flag, field, grid, right = (complaints.get(str(x)) for x in PROBES)
  assert 'wrokdir' in flag and 'config.los.x' in field and "'los'" in grid
  assert not right


@pytest.mark.parametrize('name', FILES)
def test_modules_and_scripts_of_commands_exist(name):
  for command in commands(name):
    program, *rest = command.words
    if command.words[:2] == ['python', '-m']:
      assert importlib.util.find_spec(rest[1]) is not None, command
      if rest[1].startswith(('clop_jax', 'docs', 'tests')):
        source = small.source_of(rest[1]).read_text()
        assert "__name__ == '__main__'" in source, command
        if not rest[1].startswith('clop_jax'):
          for flag in re.findall(r'--[\w-]+', ' '.join(rest[2:])):
            assert f"'{flag}'" in source, command
    elif program in ('python', 'bash') and rest[0] not in ('-', '-c'):
      assert (ROOT / rest[0]).exists(), command


def fields_of(config, prefix=''):
  """Returns the full names of all fields and groups."""
  names = set()
  for name, value in config.items():
    names.add(f'{prefix}{name}')
    if isinstance(value, ml_collections.ConfigDict):
      names |= fields_of(value, f'{prefix}{name}.')
  return names


@pytest.mark.parametrize('name', FILES)
def test_fields_that_the_text_names_exist(name):
  known = fields_of(defaults.get_config())
  text = read(name)
  for field in re.findall(r'--config\.([a-z][\w.]*\w)', text):
    is_open = field.startswith(('data.options.', 'data.class_fractions.'))
    assert field in known or is_open, field
  for code in inline_code(text):
    match = re.fullmatch(rf'({"|".join(GROUPS)})\.(\w+)(=.*)?', code)
    if match and f'{match[1]}.{match[2]}' not in known:
      # `loss` and some others are modules as well, and files.
      is_file = match[2] in ('py', 'json', 'npz', 'md')
      assert is_file or hasattr(
        importlib.import_module(f'clop_jax.{match[1]}'), match[2]
      ), code


_ARRAYS = {'test_images', 'test_labels', 'test_split', 'test_top1'}


@pytest.mark.parametrize('name', FILES)
def test_tests_that_the_text_names_exist(name):
  sources = ''.join(path.read_text() for path in ROOT.glob('tests/**/*.py'))
  for path in re.findall(r'tests/[\w/]+\.py', read(name)):
    assert (ROOT / path).exists(), f'{name} names {path}'
  # `test_images` and the like are arrays of npz files.
  named = {*re.findall(r'`(test_\w+)`', read(name))} - _ARRAYS
  for test in named:
    assert f'def {test}(' in sources, f'{name} names {test}'


# Code


@pytest.fixture(scope='module')
def run(tmp_path_factory, digits_dir):
  """Returns a folder with an untrained run `runs/digits`."""
  folder = tmp_path_factory.mktemp('docs')
  workdir = str(folder / 'runs' / 'digits')
  config = small.digits_config(digits_dir)
  built = build.build(config, total_steps=10, steps_per_epoch=5)
  labels = np.zeros(10, np.int32)
  with (
    workdir_lib.claim(config, workdir, labels, labels),
    workdir_lib.open_checkpoints(config, workdir) as checkpoints,
  ):
    checkpoints.save(jax.jit(built.create_state)(), 0)
  return folder


def python_blocks(text):
  """Yields `(code, its output or None)` of the blocks that run."""
  found = list(FENCE.finditer(text))
  for block, after in itertools.zip_longest(found, found[1:]):
    if block[1] != 'python':
      continue
    above = text[: block.start()].rstrip().rpartition('\n')[2]
    if re.fullmatch(r'<!-- not run: .+ -->', above):
      continue
    between = text[block.end() : after.start()].strip() if after else 'end'
    prints = after and after[1] == 'text' and not between
    yield block[2], after[2] if prints else None


WITH_PYTHON = [
  name
  for name in FILES
  if name != 'README.md' and list(python_blocks(read(name)))
]


@pytest.mark.parametrize('name', WITH_PYTHON)
def test_python_blocks_run_and_print_what_they_say(name, run, monkeypatch):
  monkeypatch.chdir(run)
  namespace = {}
  for code, expected in python_blocks(read(name)):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
      exec(compile(code, name, 'exec'), namespace)
    if expected is not None:
      assert output.getvalue() == expected


# Pages made from, or about, something that may change


def test_the_page_of_the_config_is_up_to_date():
  script = runpy.run_path(str(ROOT / 'docs' / 'make_config_reference.py'))
  assert read('docs/config.md') == script['reference'](), (
    f'docs/config.md is out of date; run: {script["COMMAND"]}'
  )


def test_the_page_of_the_config_explains_every_field():
  rows = re.findall(
    r'^\| `([\w.]+)` \| `.*?` \| .* \| (.*) \|$', read('docs/config.md'), re.M
  )
  texts = dict(rows)
  config = defaults.get_config()
  for name in fields_of(config):
    value = functools.reduce(lambda x, part: x[part], name.split('.'), config)
    if not isinstance(value, ml_collections.ConfigDict) or not len(value):
      assert texts.pop(name), f'no comment explains {name}'
  assert not texts


def test_the_advice_has_no_figure_that_was_not_measured():
  measured = ''.join(
    read(f'docs/{name}.md') for name in ('results', 'study_tables', 'theory')
  )
  advice = re.sub(r'\]\(.*?\)', '', prose(read('docs/choosing.md')))
  advice = re.sub(r'`[^`]*`', '', advice)
  figures = re.findall(r'(?<![\w.])\d+\.\d+(?![\w.]*\d)', advice)
  assert len(figures) > 60
  for figure in figures:
    assert re.search(rf'(?<![\d.]){re.escape(figure)}(?!\d)', measured), figure


@pytest.mark.parametrize('name', ['loss', 'prototypes', 'collapse'])
def test_public_functions_have_an_example_that_runs(name):
  module = importlib.import_module(f'clop_jax.{name}')
  functions = [
    value
    for key, value in vars(module).items()
    if not key.startswith('_')
    and getattr(value, '__module__', '') == module.__name__
  ]
  assert len(functions) > 5
  for function in functions:
    # Collected by pytest's --doctest-modules.
    assert '>>> print(' in function.__doc__ or '>>> loss.' in function.__doc__


# Warnings of libraries at their import are not pdoc's; pytest turns those of
# the package itself into errors.
_PDOC = """
import importlib, runpy, sys, warnings
modules, sys.argv = sys.argv[1].split(','), sys.argv[2:]
with warnings.catch_warnings():
  warnings.simplefilter('ignore')
  for name in modules:
    importlib.import_module(f'clop_jax.{name}')
warnings.simplefilter('error')
runpy.run_module('pdoc', run_name='__main__')
"""


def test_the_api_reference_is_built_without_a_warning(tmp_path):
  (words,) = [
    x.words for x in COMMANDS if x.words[:3] == ['python', '-m', 'pdoc']
  ]
  words = [str(tmp_path) if x == 'docs/api' else x for x in words[2:]]
  modules = ','.join(module for module, _ in test_architecture.modules())
  result = subprocess.run(
    [sys.executable, '-c', _PDOC, modules, *words],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert result.returncode == 0, result.stderr
  assert not result.stderr
  for module, _ in test_architecture.modules():
    if module.rpartition('.')[2].startswith('_'):
      continue
    page = tmp_path / 'clop_jax' / f'{module.replace(".", "/")}.html'
    assert page.exists(), f'{module} has no page'
    # A line of a formula that begins as a list does would become one.
    formulas = re.findall(r'\$\$(.*?)\$\$', page.read_text(), re.DOTALL)
    assert not [x for x in formulas if '<' in x]
    if module == 'loss':
      assert len(formulas) >= 7


def messages():
  """Yields all texts of the package, with `*` for each value."""
  for _, path in test_architecture.modules():
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.JoinedStr):
        parts = [getattr(x, 'value', None) for x in node.values]
        yield ''.join(x if isinstance(x, str) else '*' for x in parts)
      elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


def test_errors_that_questions_quote_are_those_of_the_code():
  headings = re.findall(r'^## (.*)$', read('docs/troubleshooting.md'), re.M)
  quoted = [x for heading in headings for x in re.findall('"(.*?)"', heading)]
  assert len(quoted) > 5
  texts = list(messages())
  for message in quoted:
    parts = [x.strip() for x in re.split(r'\.\.\.|\d+|\bnan\b', message)]
    assert any(all(x in text for x in parts) for text in texts), message
