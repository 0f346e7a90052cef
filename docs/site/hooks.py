"""Hooks of the documentation site, see docs/mkdocs.yml.

They add pages that have no file in docs/ (CONTRIBUTING.md, one page for each
module and example), and turn equations into MathML, so the site needs neither
scripts nor fonts for them.
"""

import ast
import html
import os
import pathlib
import re

from latex2mathml import converter
from mkdocs.structure import files as mkdocs_files

DOCS = pathlib.Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
EXAMPLES = DOCS / 'examples'

# One page for each, in this order; the rest is internal.
API = {
  'Method': [
    'loss',
    'loss.contrastive',
    'loss.redundancy',
    'loss.views',
    'prototypes',
    'collapse',
    'theory',
  ],
  'Runs': ['train', 'evaluate', 'embed', 'export', 'plan', 'preview'],
  'Config': ['defaults', 'fields'],
}
# Folders whose modules follow under their own names.
FOLDERS = [
  'data',
  'models',
  'training',
  'experiment',
  'evaluation',
  'tracking',
  'study',
  'runtime',
]

# `\max_k` and `\max_{...}`; the letters of arg max are joined by a hard space.
_LIMITS = re.compile(
  r'(\\max|\\min|\\operatorname\{arg.m..\})_(\{[^{}]+\}|\w)', re.ASCII
)


def on_config(config):
  """Sets the folder of the sources and the modules of the API."""
  config.docs_dir = str(DOCS)
  for section in config.nav:
    for entry in section.get('Reference', []) if type(section) is dict else []:
      if 'API' in entry:
        entry['API'] = _api_nav()
  return config


def _modules(folder):
  return [
    f'{folder}.{path.stem}'
    for path in sorted((ROOT / 'clop_jax' / folder).glob('*.py'))
    if not path.stem.startswith('__')
  ]


def _api_nav():
  groups = dict(API) | {folder: _modules(folder) for folder in FOLDERS}
  return ['api/index.md'] + [
    {group: [{module: _page(module)} for module in modules]}
    for group, modules in groups.items()
  ]


def _page(module):
  return f'api/{module.replace(".", "/")}.md'


def on_files(files, config):
  """Adds the pages that have no file in docs/."""
  pages = {'CONTRIBUTING.md': (ROOT / 'CONTRIBUTING.md').read_text()}
  pages['api/index.md'] = _api_index()
  for group in _api_nav()[1:]:
    for entries in group.values():
      for entry in entries:
        for module, page in entry.items():
          pages[page] = _api_page(module)
  for path in sorted(EXAMPLES.glob('*.py')):
    pages[f'examples/{path.stem}.md'] = _example_page(path)
  for name, content in pages.items():
    file = mkdocs_files.File.generated(config, name, content=content)
    if name.startswith('examples/'):
      file.inclusion = mkdocs_files.InclusionLevel.NOT_IN_NAV
    files.append(file)
  return files


def _summary(module):
  path = ROOT / 'clop_jax' / module.replace('.', '/')
  path = path / '__init__.py' if path.is_dir() else path.with_suffix('.py')
  return ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]


def _api_index():
  lines = ['# API reference', '', 'Every module, from its docstrings.']
  for group in _api_nav()[1:]:
    for name, entries in group.items():
      lines += ['', f'## {name}', '', '| module | |', '|---|---|']
      for entry in entries:
        for module, page in entry.items():
          link = page.removeprefix('api/')
          lines.append(f'| [`{module}`]({link}) | {_summary(module)} |')
  return '\n'.join(lines) + '\n'


def _api_page(module):
  name = f'clop_jax.{module}'
  lines = [f'# {name}', '']
  if not module.startswith('loss'):
    return '\n'.join([*lines, f'::: {name}', *_options()])
  # `clop_jax.loss` exports all its functions, too many for one page.
  if module == 'loss':
    others = ', '.join(
      f'[{x}]({x.replace(".", "/")}.md)'
      for x in API['Method']
      if x.startswith('loss.')
    )
    lines += [f'More losses: {others}.', '']
  lines += [f'::: {name}', *_options(members=False)]
  for function in _losses(module):
    lines += [f'::: clop_jax.loss.{function}', '']
  return '\n'.join(lines)


def _losses(module):
  """Returns the functions of `clop_jax.loss` that stand on a page."""
  path = ROOT / 'clop_jax' / 'loss' / '__init__.py'
  names = []
  for node in ast.parse(path.read_text()).body:
    if isinstance(node, ast.ImportFrom):
      source = node.module.removeprefix('clop_jax.')
      page = source if source in API['Method'] else 'loss'
      if page == module:
        names += [alias.name for alias in node.names]
  return sorted(names, key=lambda name: name != 'clop_loss')


def _options(**options):
  options = {'show_root_heading': False, 'show_root_toc_entry': False} | options
  return (
    ['    options:']
    + [f'      {key}: {str(value).lower()}' for key, value in options.items()]
    + ['']
  )


def _example_page(path):
  return (
    f'# examples/{path.name}\n\n```python\n{path.read_text().strip()}\n```\n'
  )


def on_page_markdown(markdown, page, config, files):
  """Rewrites what only works on GitHub."""
  markdown = re.sub(r'```mermaid\n(.*?)```', _imports, markdown, flags=re.S)
  source = page.file.src_uri
  path = ROOT / source if source == 'CONTRIBUTING.md' else DOCS / source
  folders = path.parent, (DOCS / source).parent
  return re.sub(
    r'(?<!!)\[([^\]]*)\]\(([^)#:\s]+)(#[\w-]*)?\)',
    lambda match: _site_link(*match.groups(''), *folders),
    markdown,
  )


def _site_link(text, link, anchor, folder, page_folder):
  """Returns a link of a file in `folder` as one of a page in `page_folder`.

  Only the text remains of links to folders, and to files that the site lacks.
  """
  target = pathlib.Path(os.path.normpath(folder / link))
  if target == ROOT / 'README.md':
    target, anchor = DOCS / 'README.md', ''
  elif target == ROOT / 'CONTRIBUTING.md':
    target = DOCS / 'CONTRIBUTING.md'
  elif target.suffix == '.py' and target.parent == EXAMPLES:
    target = target.with_suffix('.md')
  if target.is_dir() or not target.is_relative_to(DOCS):
    return text
  return f'[{text}]({os.path.relpath(target, page_folder)}{anchor})'


def _imports(match):
  """Returns the edges of a Mermaid graph, which needs a script, as a table."""
  labels, edges = {}, {}
  for edge in re.findall(r'^ *(\S.*) --> (.*)$', match[1], re.M):
    names = []
    for node in edge:
      name, _, label = node.strip().rstrip(']').partition('[')
      labels[name] = label.strip('"') or labels.get(name, name)
      names.append(name)
    edges.setdefault(names[0], []).append(names[1])
  rows = ['| folder | imports from |', '|---|---|']
  for name, targets in edges.items():
    rows.append(f'| {labels[name]} | {"; ".join(labels[x] for x in targets)} |')
  return '\n'.join(rows) + '\n'


def on_page_content(content, page, config, files):
  """Turns equations into MathML, and paths in docstrings into links."""
  content = re.sub(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>',
    _mathml,
    content,
    flags=re.S,
  )
  # Values such as `76.7 -> 77.3` and `76.7 ± 3.6` stay on one line.
  content = re.sub(r'(?<=\d) -&gt; (?=-?\d)', '&nbsp;→&nbsp;', content)
  content = re.sub(r' ± (?=\d)', '&nbsp;±&nbsp;', content)
  if page.file.src_uri.startswith('api/'):
    content = re.sub(
      r'docs/([\w/]+\.md)', lambda x: _link(x, page, files), content
    )
  return content


def _mathml(match):
  text = html.unescape(match[2]).strip()
  # latex2mathml has no \arg, and puts limits beside their operator.
  text = re.sub(
    r'\\arg\s*\\(max|min)', '\\\\operatorname{arg\N{NO-BREAK SPACE}\\1}', text
  )
  if match[1] == 'span':
    return _convert(text, 'inline')
  text = _LIMITS.sub(r'\\underset{\2}{\1}', text)
  # Parts may wrap on a narrow screen.
  parts = [x for x in re.split(r'\\qquad', text) if x.strip()]
  if any(part.count('{') != part.count('}') for part in parts):
    parts = [text]
  parts = ''.join(_convert(x, 'block') for x in parts)
  return f'<div class="equation">{parts}</div>'


def _convert(text, display):
  math = converter.convert(text, display=display)
  # As \lVert is no fence to latex2mathml, it would stretch over the whole row.
  return math.replace(
    '<mo>&#x02016;</mo>', '<mo fence="false" stretchy="false">&#x02016;</mo>'
  )


def _link(match, page, files):
  target = files.get_file_from_path(match[1])
  if target is None:
    return match[0]
  return f'<a href="{target.url_relative_to(page.file)}">{match[0]}</a>'
