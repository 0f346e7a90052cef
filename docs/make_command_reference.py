"""Writes docs/commands.md from the flags and docstrings of the commands.

python docs/make_command_reference.py
"""

import ast
import importlib
import pathlib
import re

from absl import flags

from clop_jax import cli

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMMAND = 'python docs/make_command_reference.py'

# Each command and the page that describes it.
GUIDES = {
  'train': ('Training', 'training.md'),
  'evaluate': ('Evaluation', 'evaluation.md'),
  'embed': ('Embedding', 'embed.md'),
  'export': ('Export', 'export.md'),
  'study': ('Studies', 'study.md'),
  'plan': ('Scaling', 'scaling.md'),
  'prepare': ('Data', 'data.md#sources'),
  'preview': ('Data', 'data.md'),
}
# Removed flags, which only give an error.
_HIDDEN = ('eval',)

_HEAD = f"""# Commands

Every command prints its flags with `--help`. Commands that read a config also
accept `--config.FIELD=VALUE` for any [field](config.md). An error is one line
on standard error and exit code 1; see
[exit codes](pods.md#exit-codes-preemption-and-requeue) for the others.
`{COMMAND}` generates this page.
"""

_PROCESSES = """## Flags of several processes

Every command except `plan` joins the processes that run the same command, see
[On many devices](pods.md).
"""


def reference() -> dict[str, str]:
  """Returns the text of docs/commands.md by its path in docs/."""
  blocks = [_HEAD]
  blocks.append(
    '\n'.join(
      ['| command | |', '|---|---|']
      + [f'| [`{x}`](#{x}) | {_docstring(x).splitlines()[0]} |' for x in GUIDES]
    )
  )
  for name, (title, page) in GUIDES.items():
    module = importlib.import_module(_module(name))
    summary, *paragraphs = _docstring(name).split('\n\n')
    blocks += [f'## {name}', summary]
    for text in paragraphs:
      if text.startswith('python '):
        blocks.append(f'```bash\n{text}\n```')
      else:
        blocks.append(_linked(text))
    blocks += [
      f'Guide: [{title}]({page}).',
      _table(_defined(module.define_flags)),
    ]
  blocks += [
    _PROCESSES,
    _table(_defined(lambda: cli._define_common_flags(True))),
  ]
  text = '\n\n'.join(block.strip() for block in blocks) + '\n'
  return {'commands.md': text}


def _module(name):
  return f'clop_jax.{name}' + ('.__main__' if name == 'study' else '')


def _docstring(name):
  path = ROOT / (_module(name).replace('.', '/') + '.py')
  return ast.get_docstring(ast.parse(path.read_text()))


def _linked(text):
  titles = {page: title for title, page in GUIDES.values()}
  text = text.replace('*', '\\*')
  return re.sub(r'docs/(\w+\.md)', lambda x: f'[{titles[x[1]]}]({x[1]})', text)


def _defined(define_flags):
  """Returns the flags that a function defines, and removes them."""
  before = {*flags.FLAGS}
  define_flags()
  names = sorted({*flags.FLAGS} - before)
  found = [flags.FLAGS[name] for name in names if name not in _HIDDEN]
  for name in names:
    delattr(flags.FLAGS, name)
  return found


def _table(defined):
  rows = ['| flag | default | meaning |', '|---|---|---|']
  for flag in defined:
    name = f'--[no]{flag.name}' if flag.boolean else f'--{flag.name}'
    if isinstance(flag.parser, flags.EnumParser):
      name += '=' + ','.join(flag.parser.enum_values)
    rows.append(f'| `{name}` | {_default(flag)} | {_meaning(flag)} |')
  return '\n'.join(rows)


def _default(flag):
  value = flag.default
  if isinstance(value, list):
    value = ','.join(map(str, value))
  elif flag.boolean and value is not None:
    value = str(value).lower()
  return f'`{value}`' if isinstance(value, (str, int)) and value != '' else ''


def _meaning(flag):
  # absl adds the values of an enumeration, and how to repeat a flag.
  text = re.sub(r'^<[\w|]+>: ', '', ' '.join(flag.help.split()))
  text = text.removesuffix('; repeat this option to specify a list of values')
  return re.sub(r'([|*<])', r'\\\1', text)


if __name__ == '__main__':
  for name, text in reference().items():
    (ROOT / 'docs' / name).write_text(text)
    print(f'written: docs/{name}')
