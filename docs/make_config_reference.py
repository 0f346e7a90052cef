"""Writes docs/config.md from clop_jax/defaults.py and configs/*.py.

python docs/make_config_reference.py
"""

import pathlib
import runpy

import ml_collections

from clop_jax import defaults

ROOT = pathlib.Path(__file__).resolve().parents[1]
PATH = ROOT / 'docs' / 'config.md'
COMMAND = 'python docs/make_config_reference.py'

_HEAD = f"""# Every field of a config

Made from `clop_jax/defaults.py` by `{COMMAND}`: to change
it, change the declarations there. A file of `configs/` takes these defaults and
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
exist, or a value of another type or out of range, is refused in one line that
says what there is; numbers must be finite.
A leading `~` of `{'`, `'.join(defaults.PATHS)}` is expanded.
The config of a run is its workdir's `config.json`.
"""


def flatten(config: ml_collections.ConfigDict, prefix: str = '') -> dict:
  """Values by full name, as `loss.clop_weight`; an empty group is a value."""
  values = {}
  for name, value in config.items():
    if isinstance(value, ml_collections.ConfigDict) and len(value):
      values |= flatten(value, f'{prefix}{name}.')
    else:
      is_group = isinstance(value, ml_collections.ConfigDict)
      values[f'{prefix}{name}'] = {} if is_group else value
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
      f'| `{name}` | {_value(values[name])} | {_text(field.range())} | '
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
