"""The documentation is correct: links, commands, fields, code and its site.

The Python blocks of a file run in one namespace, in a folder with the run
`runs/digits`. A `text` block after one is its output. A block that cannot run
has `<!-- not run: reason -->` above it.
"""

import ast
import contextlib
import importlib
import importlib.util
import io
import itertools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import types

from absl import flags
import jax
import pytest

from clop_jax import cli
from clop_jax import defaults
from clop_jax import loss
from clop_jax.study import grid
from tests import small
from tests.repository import test_architecture

ROOT = small.ROOT
FILES = [
  str(path.relative_to(ROOT))
  for path in [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]
]
FENCE = re.compile(r'^```(\w*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def read(name):
  return (ROOT / name).read_text()


def prose(text):
  return FENCE.sub('', text)


def inline_code(text):
  return [' '.join(x.split()) for x in re.findall(r'`([^`]+)`', prose(text))]


# Links


def anchors(text):
  """Returns the anchors of the headings, as GitHub names them."""
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


@pytest.mark.parametrize('name', FILES)
def test_links_exist(name):
  for link in links(read(name)):
    path, _, anchor = link.partition('#')
    target = (ROOT / name).parent / path if path else ROOT / name
    assert target.exists(), f'{name} links to {link}'
    if anchor:
      assert anchor in anchors(target.read_text()), f'{name} links to {link}'


def test_index_lists_every_page():
  pages = {path.name for path in (ROOT / 'docs').glob('*.md')}
  assert pages - {'README.md'} <= set(links(read('docs/README.md')))


# Commands


def commands(name):
  """Yields the variables and the words of each command."""
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
    # Without ellipses, and with values for placeholders.
    words = [
      re.sub('=([NIS])$', '=0', word)
      for word in words
      if '...' not in word and word not in ('GRID', '\\')
    ]
    if words:
      yield variables, words


def parsed_by(variables, words):
  """Returns the module of clop_jax that parses the flags, and the flags."""
  program, *rest = words
  if words[:2] == ['python', '-m'] and rest[1].startswith('clop_jax.'):
    return rest[1], rest[2:]
  scripts = [i for i, x in enumerate(rest) if x.startswith('launch/')]
  if program not in ('bash', 'sbatch') or not scripts:
    return None
  script, *arguments = rest[scripts[0] :]
  if script == 'launch/quickstart.sh':
    arguments = ['--config=configs/digits.py', '--workdir=x', *arguments]
  return f'clop_jax.{variables.get("COMMAND", "train")}', arguments


def complaint(name, arguments):
  """Returns the error of a command about its flags, '' if there is none."""
  module = importlib.import_module(name)
  if hasattr(module, '__path__'):
    module = importlib.import_module(f'{name}.__main__')

  def define_flags():
    module.define_flags()
    cli._define_common_flags(joins=True)

  fake = types.SimpleNamespace(define_flags=define_flags)
  errors = io.StringIO()
  try:
    with (
      contextlib.redirect_stderr(errors),
      contextlib.redirect_stdout(io.StringIO()),
      small.flags_of(fake, *arguments, parse=cli._parse),
    ):
      if 'grid' in flags.FLAGS and flags.FLAGS.grid:
        grid.parse(flags.FLAGS.grid, flags.FLAGS.config)
  except (SystemExit, ValueError) as error:
    return errors.getvalue() if isinstance(error, SystemExit) else str(error)
  return ''


@pytest.mark.parametrize('name', FILES)
def test_flags_and_fields_of_commands_exist(name, monkeypatch):
  monkeypatch.chdir(ROOT)
  for command in commands(name):
    if parsed := parsed_by(*command):
      assert not complaint(*parsed), command[1]


@pytest.mark.parametrize(
  ('line', 'part'),
  [
    ('train --config=configs/digits.py --wrokdir=w', 'wrokdir'),
    ('train --config=configs/digits.py --config.los.x=1', 'config.los.x'),
    ('study --config=configs/digits.py --grid=los.x=1', "'los'"),
  ],
)
def test_wrong_flags_and_fields_are_found(line, part):
  name, *arguments = line.split()
  assert part in complaint(f'clop_jax.{name}', arguments)


@pytest.mark.parametrize('name', FILES)
def test_modules_and_scripts_of_commands_exist(name):
  for _, words in commands(name):
    program, *rest = words
    if words[:2] == ['python', '-m']:
      assert importlib.util.find_spec(rest[1]) is not None, words
      if rest[1].startswith(('clop_jax', 'docs', 'tests')):
        source = small.source_of(rest[1]).read_text()
        assert "__name__ == '__main__'" in source, words
        if not rest[1].startswith('clop_jax'):
          for flag in re.findall(r'--[\w-]+', ' '.join(rest[2:])):
            assert f"'{flag}'" in source, words
    elif program in ('python', 'bash') and rest[0] not in ('-', '-c'):
      assert (ROOT / rest[0]).exists(), words


@pytest.mark.parametrize('name', FILES)
def test_fields_in_the_text_exist(name):
  groups = {field.partition('.')[0] for field in defaults.FIELDS} - {'seed'}
  known = {*defaults.FIELDS, *groups}
  text = read(name)
  for field in re.findall(r'--config\.([a-z][\w.]*\w)', text):
    field = field.removesuffix('.FIELD')
    group = defaults.FIELDS.get(field.rpartition('.')[0])
    assert field in known or (group and group.kind is dict), field
  for code in inline_code(text):
    match = re.fullmatch(rf'({"|".join(groups)})\.(\w+)(=.*)?', code)
    if match and f'{match[1]}.{match[2]}' not in known:
      # `loss` and some others are modules and files as well.
      is_file = match[2] in ('py', 'json', 'npz', 'md')
      assert is_file or hasattr(
        importlib.import_module(f'clop_jax.{match[1]}'), match[2]
      ), code


@pytest.mark.parametrize('name', FILES)
def test_tests_in_the_text_exist(name):
  sources = ''.join(path.read_text() for path in ROOT.glob('tests/**/*.py'))
  for path in re.findall(r'tests/[\w/]+\.py', read(name)):
    assert (ROOT / path).exists(), f'{name} names {path}'
  others = {'test_images', 'test_labels', 'test_split', 'test_top1'}
  for test in {*re.findall(r'`(test_\w+)`', read(name))} - others:
    assert f'def {test}(' in sources, f'{name} names {test}'


# Code


@pytest.fixture(scope='module')
def run(tmp_path_factory, digits_run):
  """Returns a folder with the run `runs/digits`."""
  folder = tmp_path_factory.mktemp('docs')
  shutil.copytree(digits_run, folder / 'runs' / 'digits')
  return folder


def python_blocks(text):
  """Yields `(code, output or None)` of the blocks that run."""
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
def test_python_blocks_run_and_print_their_output(name, run, monkeypatch):
  monkeypatch.chdir(run)
  one = jax.devices()[:1]  # faster than eight
  monkeypatch.setattr(jax, 'devices', lambda: one)
  namespace = {}
  for code, expected in python_blocks(read(name)):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
      exec(compile(code, name, 'exec'), namespace)
    if expected is not None:
      assert output.getvalue() == expected


# Pages that must match something else


@pytest.mark.parametrize('subject', ['config', 'command'])
def test_generated_reference_is_up_to_date(subject):
  script = runpy.run_path(str(ROOT / 'docs' / f'make_{subject}_reference.py'))
  for name, text in script['reference']().items():
    assert read(f'docs/{name}') == text, (
      f'docs/{name} is out of date; run: {script["COMMAND"]}'
    )


def test_figures_in_the_advice_were_measured():
  measured = ''.join(
    read(name)
    for name in FILES
    if re.match(r'docs/(results|study_tables|theory)\b', name)
  )
  advice = re.sub(r'\]\(.*?\)', '', prose(read('docs/choosing.md')))
  advice = re.sub(r'`[^`]*`', '', advice)
  figures = re.findall(r'(?<![\w.])\d+\.\d+(?![\w.]*\d)', advice)
  assert len(figures) > 60
  for figure in figures:
    assert re.search(rf'(?<![\d.]){re.escape(figure)}(?!\d)', measured), figure


@pytest.mark.parametrize('name', ['loss', 'prototypes', 'collapse'])
def test_public_functions_have_an_example(name):
  module = importlib.import_module(f'clop_jax.{name}')
  functions = [
    value
    for key, value in vars(module).items()
    if not key.startswith('_')
    and getattr(value, '__module__', '').startswith(module.__name__)
  ]
  assert len(functions) > 5
  for function in functions:
    # Collected by pytest's --doctest-modules.
    assert '>>> print(' in function.__doc__ or '>>> loss.' in function.__doc__


# The site


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  """Returns the text of each page of the site by its address."""
  folder = tmp_path_factory.mktemp('site')
  words = [
    *('-m', 'mkdocs', 'build', '--strict', '--quiet'),
    *('-f', 'docs/mkdocs.yml', '-d', str(folder)),
  ]
  # Plugins use what later versions of libraries deprecate.
  environment = os.environ | {'NO_MKDOCS_2_WARNING': '1', 'PYTHONWARNINGS': ''}
  result = subprocess.run(
    [sys.executable, *words],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  return {
    str(path.parent.relative_to(folder)): path.read_text()
    for path in folder.rglob('index.html')
  }


def article(html):
  return re.search(r'<article.*?</article>', html, re.DOTALL)[0]


def test_site_has_a_page_for_each_source_and_module(site):
  for name in FILES:
    page = re.sub(r'^docs/|(README)?\.md$', '', name).strip('/')
    assert (page or '.') in site, name
  for module, _ in test_architecture.modules():
    folder, _, name = module.rpartition('.')
    # These have no page of their own; `loss` has all of its functions.
    if name.startswith('__') or folder == 'loss' or not folder:
      continue
    assert f'api/{module.replace(".", "/")}' in site, module
  for name in loss.__all__:
    pages = [page for page in site if page.startswith('api/loss')]
    assert any(f'id="clop_jax.loss.{name}"' in site[page] for page in pages)


def test_site_loads_nothing_from_the_network(site):
  tags = r'<(?:script|link|img|iframe|source|object)\b[^>]*>'
  for page, html in site.items():
    for tag in re.findall(tags, html):
      assert not re.search(r'(?:src|href|data)=.?(?:https?:)?//', tag), page
    assert '@import' not in html and '.mermaid' not in html, page


def test_pages_of_the_site_are_short(site):
  for page, html in site.items():
    text = re.sub(r'<math.*?</math>|<[^>]+>', ' ', article(html), flags=re.S)
    words = [word for word in text.split() if re.search(r'\w', word)]
    assert len(words) <= 2500, f'{page} has {len(words)} words'


def test_equations_of_the_site_are_rendered(site):
  # No TeX is left, neither as text nor as the name of an unknown command.
  for page, html in site.items():
    text = re.sub(r'<(pre|code)\b.*?</\1>', '', article(html), flags=re.S)
    assert not re.search(r'\$\$|\\[a-zA-Z(\[]|\.\. math|merror', text), page
  counts = {'api/loss': 3, 'api/loss/contrastive': 3, 'api/prototypes': 6}
  for page, count in (counts | {'method': 18, 'theory': 10}).items():
    assert site[page].count('<math') >= count, page


def test_images_of_the_site_have_alternative_texts(site):
  images = [x for html in site.values() for x in re.findall('<img[^>]*>', html)]
  assert len(images) >= 2
  for image in images:
    assert re.search(r'alt="[^"]{10,}"', image), image


# Pages that must match code


def messages():
  """Yields all strings of the package, with `*` for each value."""
  for _, path in test_architecture.modules():
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.JoinedStr):
        parts = [getattr(x, 'value', None) for x in node.values]
        yield ''.join(x if isinstance(x, str) else '*' for x in parts)
      elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


def test_errors_quoted_in_troubleshooting_exist():
  headings = re.findall(r'^## (.*)$', read('docs/troubleshooting.md'), re.M)
  quoted = [x for heading in headings for x in re.findall('"(.*?)"', heading)]
  assert len(quoted) > 5
  texts = list(messages())
  for message in quoted:
    parts = [x.strip() for x in re.split(r'\.\.\.|\d+|\bnan\b', message)]
    assert any(all(x in text for x in parts) for text in texts), message
