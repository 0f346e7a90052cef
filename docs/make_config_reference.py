"""Writes docs/config.md from clop_jax/defaults.py and configs/*.py.

python docs/make_config_reference.py

What a field means stands beside it in `defaults.py`, as a comment: behind it,
or above it. A comment above a field that has one behind it too is about the
fields from there on.
"""

import ast
import dataclasses
import io
import pathlib
import runpy
import tokenize

import ml_collections

from clop_jax import defaults

ROOT = pathlib.Path(__file__).resolve().parents[1]
PATH = ROOT / 'docs' / 'config.md'
COMMAND = 'python docs/make_config_reference.py'

_HEAD = f"""# Every field of a config

Made from `clop_jax/defaults.py` by `{COMMAND}`: to change
it, change the comments there. A file of `configs/` takes these defaults and
sets what its experiment differs in; that is listed [at the
end](#what-the-files-of-configs-set).

Any field is set on the command line, behind the file:

```bash
python -m clop_jax.train --config=configs/digits.py --workdir=runs/digits \\
  --config.loss.clop_weight=0.3 --config.loss.contrastive=supcon \\
  '--config.eval.probe_l2=(0.001,0.01)'
```

A list goes in brackets and quotes, as above. A field whose default is None is
optional, and `--config.data.image_size=None` unsets it. A field that does not
exist, or a value of another type, is refused in one line that says what there
is. A leading `~` of `{'`, `'.join(defaults.PATHS)}` is expanded.
The config of a run is its workdir's `config.json`.
"""


@dataclasses.dataclass
class Field:
  """A field as its comments tell of it."""

  name: str
  text: str
  note: str = ''  # about the fields from here on


def fields() -> list[Field]:
  """The fields of `defaults.get_config`, in their order, with their texts."""
  path = ROOT / 'clop_jax' / 'defaults.py'
  source = path.read_text()
  comments = _comments(source)
  (function,) = [
    node
    for node in ast.parse(source).body
    if isinstance(node, ast.FunctionDef) and node.name == 'get_config'
  ]
  groups, found, of_group = {'config': ''}, [], ''
  for node in function.body:
    if not isinstance(node, ast.Assign):
      continue
    target, *aliases = node.targets
    if not isinstance(target, ast.Attribute):
      continue
    name = groups[target.value.id] + target.attr
    above, line = [], node.lineno - 1
    while line in comments and comments[line][0]:
      above.insert(0, comments[line][1])
      line -= 1
    above = ' '.join(above)
    if aliases:
      groups[aliases[0].id] = f'{name}.'
      of_group = above
      continue
    behind = comments.get(node.end_lineno, (False, ''))[1]
    if behind:
      notes = [x for x in (of_group, above) if x]
      found.append(Field(name, behind, note='\n\n'.join(notes)))
    else:
      found.append(Field(name, above, note=of_group))
    of_group = ''
  return found


def _comments(source):
  """Comments by line: whether they have it to themselves, and their text."""
  comments = {}
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      alone = not token.line[: token.start[1]].strip()
      comments[token.start[0]] = (alone, token.string.lstrip('# ').strip())
  return comments


def flatten(config: ml_collections.ConfigDict, prefix: str = '') -> dict:
  """Values by full name, as `loss.clop_weight`; an empty group is a value."""
  values = {}
  for name, value in config.items():
    if isinstance(value, ml_collections.ConfigDict) and len(value):
      values |= flatten(value, f'{prefix}{name}.')
    else:
      values[f'{prefix}{name}'] = value
  return values


def differences(path: pathlib.Path) -> tuple[str, dict]:
  """First line of a config file's docstring, and what it sets."""
  module = runpy.run_path(str(path))
  before = flatten(defaults.get_config())
  after = flatten(module['get_config']())
  changed = {
    name: value
    for name, value in after.items()
    if name not in before or before[name] != value
  }
  return module['__doc__'].splitlines()[0], changed


def reference() -> str:
  """The text of docs/config.md."""
  values = flatten(defaults.get_config())
  blocks, rows, group = [_HEAD], [], None
  for field in fields():
    *path, _ = field.name.split('.')
    if path != group or field.note:
      rows = ['| field | default | meaning |', '|---|---|---|']
      if path != group:
        blocks.append(f'## {".".join(path) or "seed"}')
      if field.note:
        blocks.append(_text(field.note))
      blocks.append(rows)
      group = path
    default = _value(values[field.name])
    rows.append(f'| `{field.name}` | {default} | {_text(field.text)} |')
  blocks.append('## What the files of configs/ set')
  for path in sorted((ROOT / 'configs').glob('*.py')):
    summary, changed = differences(path)
    rows = ['| field | value |', '|---|---|']
    rows += [f'| `{name}` | {_value(x)} |' for name, x in changed.items()]
    blocks += [f'### configs/{path.name}', summary, rows]
  blocks = [x if isinstance(x, str) else '\n'.join(x) for x in blocks]
  return '\n\n'.join(block.strip() for block in blocks) + '\n'


def _value(value):
  if isinstance(value, ml_collections.ConfigDict):
    value = value.to_dict()
  if isinstance(value, tuple):
    value = tuple(round(x, 4) if isinstance(x, float) else x for x in value)
  return f'`{value!r}`'


def _text(text):
  return text.replace('|', '\\|')


if __name__ == '__main__':
  PATH.write_text(reference())
  print(f'written: {PATH.relative_to(ROOT)}')
