"""Every config field is checked against its declaration."""

import math
import re

from absl import flags
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import ml_collections
import pytest

from clop_jax import cli
from clop_jax import defaults
from clop_jax import fields
from clop_jax import train
from clop_jax.experiment import workdir
from clop_jax.study import grid
from tests import small

CONFIG = 'configs/digits.py'
NONSENSE = (
  math.nan,
  math.inf,
  -math.inf,
  -1,
  -1.5,
  10**20,
  1e30,
  'nonsense',
  None,
  True,
  (),
  (math.nan,),
  (1, 2, 3, 4),
  ('x',),
  {},
)


def set_field(config, name, value):
  group = config
  *path, last = name.split('.')
  for part in path:
    group = group[part]
  with group.ignore_type():
    group[last] = value


def good_values(field):
  """Returns values at the ends of a field's range."""
  if field.choices:
    return list(field.choices)
  if field.kind is bool:
    return [True, False]
  if field.kind is str:
    return ['x', *[''] * field.may_be_empty, *[None] * field.optional]
  if field.kind is dict:
    return [{}, {'3': 0.5} if field.range() else {'key': 'value'}]
  step = 1 if field.kind is int else 1e-9
  ends = [field.low + step * field.above, field.high - step * field.below]
  ends = [field.kind(end) for end in ends]
  if field.lengths is None:
    return [*ends, *[None] * field.optional]
  least, _ = field.lengths
  return [tuple(sorted(ends * 2)[: max(least, 1)]), tuple(ends[:1] * least)]


@pytest.mark.parametrize('name', defaults.FIELDS)
def test_field_accepts_only_its_range(name):
  field = defaults.FIELDS[name]
  config = defaults.get_config()
  for value in good_values(field):
    set_field(config, name, value)
    defaults.check(config)
  for end, is_open, step in (
    (field.low, field.above, -1),
    (field.high, field.below, 1),
  ):
    if math.isfinite(end) and field.kind is not dict:
      beyond = field.kind(end if is_open else end + step * max(1, abs(end)))
      many = (beyond,) * max(1, field.lengths[0]) if field.lengths else beyond
      assert not field.accepts(many)
  refused = 0
  for value in NONSENSE:
    if field.accepts(value):
      continue
    set_field(config, name, value)
    if field.accepts(fields.flat(config, defaults.FIELDS)[name]):
      continue  # ml_collections has converted it to a number
    with pytest.raises(ValueError, match=rf'config\.{name} must be .*, got'):
      defaults.check(config)
    refused += 1
  assert refused >= 8
  assert field.meaning.endswith(('.', ')'))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
  name=st.sampled_from(sorted(defaults.FIELDS)),
  value=st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(-2, 5), st.floats(), st.text(max_size=2))),
  ),
)
def test_any_value_is_accepted_or_named(name, value):
  config = defaults.get_config()
  set_field(config, name, tuple(value) if isinstance(value, list) else value)
  try:
    defaults.check(config)
  except ValueError as error:
    assert f'config.{name} must be' in str(error)
    return
  # Accepted numbers are finite and in range.
  field = defaults.FIELDS[name]
  values = value if isinstance(value, list) else [value]
  for one in values:
    if one is not None and field.kind in (int, float):
      assert math.isfinite(one) and field.low <= one <= field.high


def test_missing_and_unknown_fields_are_named():
  for change, message in (
    (
      lambda c: c.train.__delattr__('batch_size'),
      r'train\.batch_size.*missing',
    ),
    (lambda c: c.loss.update(clop_wieght=1.0), r'did you mean loss\.clop_w'),
    (lambda c: set_field(c, 'train', 5), r'config\.train must be a group.*5'),
  ):
    config = defaults.get_config()
    change(config)
    with pytest.raises(ValueError, match=message):
      defaults.check(config)


def test_range_of_a_declaration_is_described():
  ranges = {name: field.range() for name, field in defaults.FIELDS.items()}
  assert ranges['augment.size'] == '1 to 4096 px'
  assert not fields.Field(0.0, 'A number.', float).accepts(math.inf)
  assert ranges['optimizer.momentum'] == 'at least 0, below 1'
  assert ranges['optimizer.name'] == 'sgd, lars, adamw'
  field = fields.reals((0.1,), 'Numbers.', 0, 1, above=True)
  assert field.expected() == (
    'a list of 1 or more numbers, each above 0, at most 1'
  )


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['config.seed=0'], "'config.seed=0'.*begin with --"),
    (['--config.seed=-1'], r'config\.seed.*-1'),
    (['--config.optimizer.learning_rate=nan'], r'learning_rate.*nan'),
    (['--config.augment.mean=(inf,)'], r'augment\.mean.*inf'),
    (['--config.eval.probe_iterations=0'], r'eval\.probe_iterations.* 0'),
    (['--config.loss.clop_wieght=0'], r'clop_wieght.*loss\.clop_weight\?'),
    (['--config.los.clop_weight=0'], r'los\.clop_weight.*loss\.clop_weight\?'),
    (['--config.zzz=0'], r"config\.zzz.*'data'.*'train'"),
    (['--config.train.batch_size=abc'], r'config\.train\.batch_size=abc'),
    (['--config.train.batch_size=None'], r'train\.batch_size.*whole.*None'),
    (['--config.data.class_fractions.3=1.5'], r'class_fractions.*1 to|1\.5'),
    (['--config.data.class_fractions.3=x'], r"class_fractions.*'x'"),
    (
      ['--config.data.class_fractions.10=.5'],
      r"class_fractions.*10\), got '10'",
    ),
    (['--config.data.name=cifra10'], "'cifra10'.*cifar10"),
    (['--config=nowhere.py'], r'nowhere\.py.*configs/cifar10\.py, configs/'),
    (['--config='], '--config'),
    (['--workdir='], '--workdir must'),
    (['--profile=0'], '--profile=0'),
    (['--wrokdir=w'], "'wrokdir'"),
  ],
)
def test_command_refuses_wrong_flags_before_writing(
  arguments, message, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  given = [f'--config={small.ROOT / CONFIG}', '--workdir=w', *arguments]
  assert re.search(message, small.refused(train, *given))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('argument', 'field', 'value'),
  [
    ('--config.data.image_size=None', 'image_size', None),
    ('--config.data.class_fractions.3=0.5', 'class_fractions', {'3': 0.5}),
    ('--config.data.options.size=4', 'options', {'size': 4}),
    ('--config.data.options.split=a', 'options', {'split': 'a'}),
  ],
)
def test_command_accepts_none_and_entries_of_groups(
  argument, field, value, monkeypatch
):
  seen = []
  monkeypatch.setattr(
    train, 'main', lambda: seen.append(flags.FLAGS.config.data.to_dict())
  )
  config = f'--config={small.ROOT / CONFIG}'
  with small.flags_of(train, config, argument, parse=cli._parse):
    train.main()
  assert seen[0][field] == value


@pytest.mark.parametrize(
  'text',
  [
    '',
    'def get_config(',
    'import nowhere_to_be_found',
    'def get_config():\n  return 5\n',
    'def get_config():\n  raise RuntimeError("x")\n',
  ],
)
def test_broken_config_file_is_one_line(text, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'c.py').write_text(text)
  line = small.refused(train, '--config=c.py', '--workdir=w')
  assert 'c.py' in line or 'config' in line
  assert not (tmp_path / 'w').exists()


def test_grid_varies_the_fraction_of_a_class():
  config = defaults.get_config()
  values = grid.parse(['data.class_fractions.3=0.1,1'], config)
  assert values == {'data.class_fractions.3': [0.1, 1.0]}
  cell = {'data.class_fractions.3': 0.1}
  applied = grid.applied(workdir.to_json(config), cell)
  assert applied['data']['class_fractions'] == {'3': 0.1}


def test_frozen_config_is_checked():
  config = ml_collections.FrozenConfigDict(defaults.get_config())
  defaults.check(config)
