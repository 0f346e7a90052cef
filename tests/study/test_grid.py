"""Tests of grids: values, errors and names of cells."""

import ml_collections
import pytest

from clop_jax import defaults
from clop_jax.experiment import workdir as workdir_lib
from clop_jax.study import grid


@pytest.mark.parametrize(
  ('given', 'field', 'values'),
  [
    (
      'optimizer.learning_rate=0.001,1,1e1',
      'optimizer.learning_rate',
      [0.001, 1.0, 10.0],
    ),
    ('seed=0,2', 'seed', [0, 2]),
    ('model.head_bn=true,False', 'model.head_bn', [True, False]),
    ('optimizer.clip_norm=None,2', 'optimizer.clip_norm', [None, 2.0]),
    ('loss.block_size=None,64', 'loss.block_size', [None, 64]),
    ('loss.contrastive=nt_xent,dcl', 'loss.contrastive', ['nt_xent', 'dcl']),
    ('data.unlabelled_split=None,a=b', 'data.unlabelled_split', [None, 'a=b']),
    ('data.options.noise=1,2', 'data.options.noise', [1.0, 2.0]),
  ],
)
def test_values_get_the_type_of_their_field(given, field, values):
  config = defaults.get_config()
  config.data.options.noise = 0.5  # a field of this config only
  parsed = grid.parse([given], config)
  assert parsed == {field: values}
  assert [type(v) for v in parsed[field]] == [type(v) for v in values]
  # A config from study.json has no types for None, and no tuples.
  saved = ml_collections.ConfigDict(workdir_lib.to_json(config))
  assert grid.parse([given], saved) == parsed


@pytest.mark.parametrize(
  ('texts', 'message'),
  [
    (
      ['loss.clop_wieght=0,1'],
      r'loss\.clop_wieght.* config\.loss .*clop_weight',
    ),
    (['lr=1'], "'lr'.* augment, data, eval"),
    (['seed.x=1'], r"config\.seed .*'x'.* no fields"),
    (['loss=1'], r'config\.loss is a group.* clop_weight'),
    (['loss.clop_weight'], r"field=value,value.* 'loss\.clop_weight'"),
    (['=1'], "field=value,value.* '=1'"),
    (['loss.clop_weight=abc'], 'clop_weight=abc.* number'),
    (['loss.clop_weight=nan'], 'clop_weight=nan.* number'),
    (['loss.clop_weight=None'], 'clop_weight=None.* number'),
    (['loss.clop_weight=-1'], 'clop_weight=-1.* 0 to'),
    (['loss.contrastive=simclr'], 'contrastive=simclr.*nt_xent'),
    (['optimizer.clip_norm=x'], 'clip_norm=x.* None or a number'),
    (['seed=0.5'], r'seed=0\.5.* whole number'),
    (['seed=0,,1'], 'seed=: .* whole number'),
    (['model.head_bn=1'], 'head_bn=1.* true or false'),
    (['eval.probe_l2=0.1,1'], r'probe_l2 is a list.*--config\.eval\.probe_l2='),
    (['seed=0', 'seed=1'], 'seed is repeated'),
    (['optimizer.learning_rate=1,1.0'], r'value 1\.0 is repeated'),
    (['data.options.noise=1'], r"config\.data\.options .*'noise'"),
  ],
)
def test_a_wrong_grid_is_one_clear_line(texts, message):
  with pytest.raises(ValueError, match=message) as caught:
    grid.parse(texts, defaults.get_config())
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('fields', 'names'),
  [
    (
      {'optimizer.learning_rate': [0.1, 10.0], 'seed': [0, 1]},
      [
        'learning_rate=0.1,seed=0',
        'learning_rate=0.1,seed=1',
        'learning_rate=10,seed=0',
        'learning_rate=10,seed=1',
      ],
    ),
    # Fields with the same last part have their full names.
    (
      {'train.batch_size': [8], 'eval.batch_size': [8]},
      ['train.batch_size=8,eval.batch_size=8'],
    ),
    # Paths become file names that cannot collide.
    (
      {'data.data_dir': ['a/b', 'a_b', '..', None]},
      ['data_dir=a%2Fb', 'data_dir=a_b', 'data_dir=..', 'data_dir=None'],
    ),
  ],
)
def test_cells_are_named_by_their_values(fields, names):
  named = grid.cells(fields)
  assert list(named) == names
  assert named[names[-1]] == {f: values[-1] for f, values in fields.items()}


def test_a_cell_s_config_is_the_base_with_its_values():
  base = workdir_lib.to_json(defaults.get_config())
  config = grid.applied(base, {'loss.clop_weight': 7.0, 'seed': 3})
  assert workdir_lib.differences(base, config) == [
    'loss.clop_weight is 1.0 there and 7.0 here',
    'seed is 0 there and 3 here',
  ]
