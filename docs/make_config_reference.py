"""Writes docs/config.md from clop_jax/defaults.py and configs/*.py.

python docs/make_config_reference.py
"""

import pathlib
import runpy

from clop_jax import defaults
from clop_jax import fields

ROOT = pathlib.Path(__file__).resolve().parents[1]
PATH = ROOT / 'docs' / 'config.md'
COMMAND = 'python docs/make_config_reference.py'

_HEAD = f"""# Every field of a config

This page is generated from `clop_jax/defaults.py` by
`{COMMAND}`. A file in `configs/` starts from these
defaults and changes
[the fields listed at the end](#what-the-files-of-configs-set).

Set any field on the command line, after the config file:

```bash
python -m clop_jax.train --config=configs/digits.py --workdir=runs/digits \\
  --config.loss.clop_weight=0.3 --config.loss.contrastive=supcon \\
  '--config.eval.probe_l2=(0.001,0.01)'
```

Write a list in brackets and quotes, as above. A field whose default is None is
optional: `--config.data.image_size=None` unsets it. An unknown field, or a
value of the wrong type or out of range, is an error. Numbers must be finite.
Commands expand a leading `~` in `{'` and `'.join(defaults.PATHS)}`.
The config of a run is `config.json` in its workdir.
"""


def differences(path: pathlib.Path) -> tuple[str, dict]:
  """Returns the first docstring line of a config file and what it changes."""
  module = runpy.run_path(str(path))
  changed = {}
  for name, value in fields.flat(
    module['get_config'](), defaults.FIELDS
  ).items():
    value = value.to_dict() if hasattr(value, 'to_dict') else value
    if value != defaults.FIELDS[name].default:
      changed[name] = value
  return module['__doc__'].splitlines()[0], changed


def reference() -> str:
  """Returns the text of docs/config.md."""
  blocks, rows, group = [_HEAD], [], None
  for name, field in defaults.FIELDS.items():
    path = name.rpartition('.')[0]
    note = defaults.NOTES.get(name)
    if path != group or note:
      rows = ['| field | default | range | meaning |', '|---|---|---|---|']
      if path != group:
        blocks.append(f'## {path or "seed"}')
      if note:
        blocks.append(_text(note))
      blocks.append(rows)
      group = path
    rows.append(
      f'| `{name}` | {_value(field.default)} | {_text(field.range())} | '
      f'{_text(field.meaning)} |'
    )
  blocks.append('## What the files of configs/ set')
  for path in sorted((ROOT / 'configs').glob('*.py')):
    summary, changed = differences(path)
    rows = ['| field | value |', '|---|---|']
    rows += [f'| `{name}` | {_value(x)} |' for name, x in changed.items()]
    blocks += [f'### configs/{path.name}', summary, rows]
  blocks = [x if isinstance(x, str) else '\n'.join(x) for x in blocks]
  return '\n\n'.join(block.strip() for block in blocks) + '\n'


def _value(value):
  if isinstance(value, tuple):
    value = tuple(
      float(f'{x:.4g}') if isinstance(x, float) else x for x in value
    )
  return f'`{value!r}`'


def _text(text):
  return text.replace('|', '\\|')


if __name__ == '__main__':
  PATH.write_text(reference())
  print(f'written: {PATH.relative_to(ROOT)}')
