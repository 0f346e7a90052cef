import functools

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clop_jax import loss
from tests import oracles

NUM_CLASSES = 3
_RNG = np.random.default_rng(0)
CLASS_WEIGHTS = np.array([0.5, 2.0, 1.5])


def prototypes_of(dim):
  return np.random.default_rng(dim).normal(size=(NUM_CLASSES, dim))


def _clop_case(distance, class_weights=None, **numbers):
  def ours(z, labels):
    prototypes = jnp.asarray(prototypes_of(z.shape[-1]), jnp.float32)
    keywords = numbers | {'distance': distance, 'class_weights': class_weights}
    return loss.clop_loss(z, labels, prototypes, **keywords)

  def oracle(z, labels):
    prototypes = prototypes_of(z.shape[-1])
    return oracles.clop(
      z, labels, prototypes, distance, class_weights, **numbers
    )

  return ours, oracle


def _case(name, *numbers, labelled=False, **keywords):
  """A loss, and the oracle of the same name, which takes positional numbers."""
  function, oracle = getattr(loss, f'{name}_loss'), getattr(oracles, name)
  if labelled:
    return (
      lambda z, y: function(z, y, **keywords),
      lambda z, y: oracle(z, y, *numbers),
    )
  return lambda z, y: function(z, **keywords), lambda z, y: oracle(z, *numbers)


_SUPCON_IN = {'labelled': True, 'temperature': 0.4, 'variant': 'in'}
# Each loss as (ours, oracle), both functions of (embeddings, labels).
CASES = {
  'clop cosine': _clop_case('cosine'),
  'clop euclidean': _clop_case('euclidean'),
  'clop manhattan': _clop_case('manhattan'),
  'clop weighted': _clop_case('cosine', CLASS_WEIGHTS),
  'clop softmax': _clop_case('softmax', CLASS_WEIGHTS, temperature=0.3),
  'clop repulsion': _clop_case('cosine', repulsion=0.7),
  'nt_xent': _case('nt_xent', 0.3, temperature=0.3),
  'nt_xent blocked': _case('nt_xent', 0.3, temperature=0.3, block_size=3),
  'supcon out': _case('supcon', 0.4, labelled=True, temperature=0.4),
  'supcon in': _case('supcon', 0.4, 'in', **_SUPCON_IN),
  'supcon blocked': _case('supcon', 0.4, 'in', **_SUPCON_IN, block_size=4),
  'dcl': _case('dcl', 0.3, temperature=0.3),
  'vicreg': _case('vicreg'),
  'barlow_twins': _case('barlow_twins'),
}


@functools.cache
def value_and_grad(name):
  return jax.jit(jax.value_and_grad(CASES[name][0]))


@pytest.mark.parametrize('name', CASES)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_value_and_gradient_equal_the_float64_oracle(name, data):
  views, batch, dim = data.draw(
    st.sampled_from([(2, 2, 3), (2, 5, 4), (3, 4, 3)])
  )
  labels = np.array(
    data.draw(
      st.lists(st.integers(-1, NUM_CLASSES - 1), min_size=batch, max_size=batch)
    ),
    np.int32,
  )
  seed = data.draw(st.integers(0, 10_000))
  scale = data.draw(st.sampled_from([0.3, 1.0, 5.0]))
  z = scale * np.random.default_rng(seed).normal(size=(views, batch, dim))
  z = z.astype(np.float32)
  value, gradient = value_and_grad(name)(z, labels)

  def oracle(x):
    return CASES[name][1](x, labels)

  expected = oracle(z.astype(np.float64))
  expected_gradient = oracles.gradient(oracle, z)
  assert value.dtype == jnp.float32 and value.shape == ()
  size = max(1.0, abs(expected))
  np.testing.assert_allclose(value, expected, atol=2e-5 * size)
  size = max(1.0, np.abs(expected_gradient).max())
  np.testing.assert_allclose(gradient, expected_gradient, atol=5e-5 * size)


@pytest.mark.parametrize(
  ('keywords', 'expected'),
  [
    # Cosines 1, -1 and 0.6; distances of the directions 0, 2 and sqrt(0.8) or,
    # in the other norm, 0, 2 and 1.2.
    ({}, (0 + 2 + 0.4) / 3),
    ({'distance': 'euclidean'}, (0 + 2 + 0.8**0.5) / 3),
    ({'distance': 'manhattan'}, (0 + 2 + 1.2) / 3),
    ({'class_weights': np.array([1.0, 4.0])}, (0 + 4 * 2 + 0.4) / 6),
  ],
)
def test_clop_by_hand(keywords, expected):
  z = jnp.array([[1.0, 0.0], [0.0, -2.0], [3.0, 4.0], [5.0, 5.0]])
  labels = jnp.array([0, 1, 0, -1])
  value = loss.clop_loss(z, labels, jnp.eye(2), **keywords)
  assert value == pytest.approx(expected)


def test_repulsion_of_weight_one_is_the_pull_to_the_centred_prototypes():
  k = 4
  z = jnp.asarray(_RNG.normal(size=(2, 9, 6)), jnp.float32)
  labels = jnp.asarray(_RNG.integers(0, k, size=9))
  c = jnp.eye(k, 6)
  ours = jax.grad(loss.clop_loss)(z, labels, c, repulsion=1.0)
  # c_y less the mean of the others is k / (k - 1) times the centred c_y, whose
  # length is sqrt((k - 1) / k).
  simplex = jax.grad(loss.clop_loss)(z, labels, c - c.mean(axis=0))
  np.testing.assert_allclose(
    ours, (k / (k - 1)) ** 0.5 * simplex, atol=1e-6, rtol=1e-5
  )


@pytest.mark.parametrize(
  'remedy', [{'repulsion': 1.0}, {'distance': 'softmax', 'temperature': 0.5}]
)
def test_equal_embeddings_are_not_pulled_to_the_prototypes_mean(remedy):
  """As the paper's distance does: see theory.py for what follows from it."""
  k = 5
  c = jnp.eye(k, 8)
  labels = jnp.arange(k)
  off_the_mean = jnp.eye(8)[7] + 0.1 * c.mean(axis=0)

  def of_common(z, **how):
    return loss.clop_loss(jnp.tile(z, (k, 1)), labels, c, **how)

  pulled = -jax.grad(of_common)(off_the_mean) @ c.mean(axis=0)
  remedied = -jax.grad(of_common)(off_the_mean, **remedy) @ c.mean(axis=0)
  assert pulled > 0.1
  assert remedied <= 1e-6


@pytest.mark.parametrize('distance', loss.DISTANCES)
def test_clop_without_labels_is_exactly_zero_with_zero_gradient(distance):
  z = jnp.asarray(_RNG.normal(size=(2, 5, 4)), jnp.float32)
  value, gradient = jax.value_and_grad(loss.clop_loss)(
    z, jnp.full(5, -1), jnp.eye(4), distance=distance
  )
  assert value == 0
  assert (gradient == 0).all()


def test_clop_takes_one_view_without_the_views_axis():
  z = jnp.asarray(_RNG.normal(size=(5, 4)), jnp.float32)
  labels = jnp.array([0, 1, -1, 3, 2])
  one = loss.clop_loss(z, labels, jnp.eye(4))
  assert one == loss.clop_loss(z[None], labels, jnp.eye(4))
  masked = loss.clop_loss(z[labels >= 0], labels[labels >= 0], jnp.eye(4))
  assert one == pytest.approx(float(masked), rel=1e-6)


def test_clop_label_beyond_the_prototypes_is_not_clamped_to_another_class():
  z, labels = jnp.ones((3, 4)), jnp.array([0, 4, 1])
  with pytest.raises(ValueError, match=r'labels.* 4, got 4 at index 1'):
    loss.clop_loss(z, labels, jnp.eye(4))
  assert jnp.isnan(jax.jit(loss.clop_loss)(z, labels, jnp.eye(4)))


def test_clop_gradient_reaches_the_prototypes_of_labelled_classes_only():
  z = jnp.asarray(_RNG.normal(size=(2, 3, 4)), jnp.float32)
  gradient = jax.grad(loss.clop_loss, argnums=2)(
    z, jnp.array([1, -1, 1]), jnp.eye(4)
  )
  moved = jnp.abs(gradient).sum(axis=1) > 0
  assert moved.tolist() == [False, True, False, False]


def test_nt_xent_of_two_perfect_pairs_by_hand():
  z = jnp.stack([jnp.eye(2), jnp.eye(2)])
  # One positive at cosine 1, two negatives at 0.
  expected = -np.log(np.exp(2) / (np.exp(2) + 2))
  assert loss.nt_xent_loss(z, temperature=0.5) == pytest.approx(expected)
  assert loss.dcl_loss(z, temperature=0.5) == pytest.approx(np.log(2) - 2)


def test_barlow_twins_and_vicreg_by_hand():
  z = jnp.array([[[1.0, 0.0], [-1.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0]]])
  # Correlation 1 in the first dimension, 0 in the dead second one.
  assert loss.barlow_twins_loss(z) == pytest.approx(1.0, abs=1e-4)
  # No invariance term; deviations sqrt(2) and sqrt(1e-4) in both views.
  assert loss.vicreg_loss(z) == pytest.approx(25 * (1 - 0.01), rel=1e-5)


@pytest.mark.parametrize('unique', [True, False])
@pytest.mark.parametrize('variant', ['out', 'in'])
def test_supcon_without_shared_labels_is_nt_xent(unique, variant):
  z = jnp.asarray(_RNG.normal(size=(2, 6, 5)), jnp.float32)
  labels = jnp.arange(6) if unique else jnp.full(6, -1)
  assert loss.supcon_loss(
    z, labels, temperature=0.2, variant=variant
  ) == pytest.approx(float(loss.nt_xent_loss(z, temperature=0.2)), rel=1e-5)


@pytest.mark.parametrize('variant', ['out', 'in'])
@pytest.mark.parametrize('block_size', [None, 2])
def test_supcon_anchor_without_positive_adds_nothing_and_is_never_nan(
  variant, block_size
):
  z = jnp.asarray(_RNG.normal(size=(1, 5, 3)), jnp.float32)
  function = jax.value_and_grad(
    functools.partial(loss.supcon_loss, variant=variant, block_size=block_size)
  )
  value, gradient = function(z, jnp.array([0, 0, 1, -1, -1]))
  expected = oracles.supcon(
    np.asarray(z, np.float64), [0, 0, 1, -1, -1], 0.1, variant
  )
  assert value == pytest.approx(expected, rel=1e-4)
  assert jnp.isfinite(gradient).all()
  value, gradient = function(z, jnp.arange(5))
  assert value == 0 and (gradient == 0).all()
  value, gradient = function(z[:, :1], jnp.array([3]))
  assert value == 0 and (gradient == 0).all()


@pytest.mark.parametrize('block_size', [1, 5, 7, 8, 24, 100])
def test_blocks_of_any_size_give_the_dense_value_and_gradient(block_size):
  z = jnp.asarray(_RNG.normal(size=(2, 12, 6)), jnp.float32)
  labels = jnp.asarray(_RNG.integers(-1, 3, size=12))

  def both(z, **keywords):
    supcon = loss.supcon_loss(z, labels, **keywords)
    return supcon + loss.nt_xent_loss(z, **keywords)

  dense = jax.value_and_grad(both)(z)
  blocked = jax.value_and_grad(both)(z, block_size=block_size)
  np.testing.assert_allclose(dense[0], blocked[0], rtol=1e-5)
  np.testing.assert_allclose(dense[1], blocked[1], atol=2e-6)


@pytest.mark.parametrize(
  ('embeddings', 'devices', 'platform', 'expected'),
  [
    (2047, 1, 'cpu', None),
    (2048, 1, 'cpu', 512),
    (8192, 1, 'gpu', None),
    (8194, 1, 'gpu', 512),
    (8194, 2, 'gpu', None),
    (131072, 256, 'tpu', None),  # docs/scaling.md: the whole is best there
    (131072, 8, 'tpu', 4096),
  ],
)
def test_blocks_are_chosen_where_the_matrix_is_large(
  embeddings, devices, platform, expected
):
  chosen = loss.choose_block_size(embeddings, devices, platform=platform)
  assert chosen == expected


def test_blocks_scale_with_the_cotangent_and_pass_a_learned_temperature():
  z = jnp.asarray(_RNG.normal(size=(2, 6, 4)), jnp.float32)

  def total(temperature, block_size):
    return 3 * loss.nt_xent_loss(
      z, temperature=temperature, block_size=block_size
    )

  gradient = jax.grad(total)
  assert gradient(0.3, 5) == pytest.approx(float(gradient(0.3, None)), rel=1e-4)


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('kind', ['zeros', 'identical', 'one zero'])
def test_degenerate_embeddings_have_finite_values_and_gradients(name, kind):
  z = {
    'zeros': jnp.zeros((2, 4, 3)),
    'identical': jnp.full((2, 4, 3), 0.7),
    'one zero': jnp.ones((2, 4, 3)).at[1, 2].set(0.0),
  }[kind]
  value, gradient = value_and_grad(name)(z, jnp.array([0, 0, 1, -1]))
  assert jnp.isfinite(value)
  assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize('distance', ['euclidean', 'manhattan'])
def test_an_embedding_on_its_prototype_has_a_finite_gradient(distance):
  value, gradient = jax.value_and_grad(loss.clop_loss)(
    jnp.eye(3), jnp.arange(3), jnp.eye(3), distance=distance
  )
  assert value == 0
  assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('position', [(0, 0, 0), (1, 3, 2)])
def test_a_nan_in_the_embeddings_is_not_hidden(name, position):
  # The second position is an unlabelled example.
  z = jnp.asarray(_RNG.normal(size=(2, 4, 3)), jnp.float32)
  labels = jnp.array([0, 0, 1, -1])
  assert jnp.isnan(CASES[name][0](z.at[position].set(jnp.nan), labels))


@pytest.mark.parametrize(
  'name', [n for n in CASES if n not in ('vicreg', 'barlow_twins')]
)
def test_lengths_that_overflow_or_vanish_in_float32_keep_their_direction(name):
  z = jnp.asarray(_RNG.normal(size=(2, 4, 3)), jnp.float32)
  labels = jnp.array([0, 0, 1, -1])
  expected = float(CASES[name][0](z, labels))
  for scale in (1e25, 1e-25):
    assert CASES[name][0](z * scale, labels) == pytest.approx(
      expected, rel=1e-4
    )


@pytest.mark.parametrize('name', CASES)
def test_bfloat16_input_is_computed_in_float32(name):
  z = jnp.asarray(_RNG.normal(size=(2, 4, 3)), jnp.bfloat16)
  labels = jnp.array([0, 0, 1, -1])
  value, gradient = jax.value_and_grad(CASES[name][0])(z, labels)
  assert value.dtype == jnp.float32
  assert gradient.dtype == jnp.bfloat16
  # The rounding of the input aside, nothing is lost.
  exact = CASES[name][0](z.astype(jnp.float32), labels)
  assert value == pytest.approx(float(exact), rel=1e-6)


@pytest.mark.parametrize('name', CASES)
def test_jit_and_vmap_agree_with_the_plain_call(name):
  z = jnp.asarray(_RNG.normal(size=(2, 2, 4, 3)), jnp.float32)
  labels = jnp.array([[0, 0, 1, -1], [2, -1, 2, 1]])
  ours = CASES[name][0]
  plain = [float(ours(*pair)) for pair in zip(z, labels, strict=True)]
  np.testing.assert_allclose(jax.vmap(ours)(z, labels), plain, rtol=1e-5)
  np.testing.assert_allclose(
    jax.jit(ours)(z[0], labels[0]), plain[0], rtol=1e-5
  )


Z = np.zeros((2, 4, 3), np.float32)
Y = np.zeros(4, np.int32)
C = np.eye(3)


@pytest.mark.parametrize(
  ('name', 'arguments', 'keywords', 'message'),
  [
    ('nt_xent', (Z[0],), {}, r'embeddings .*\[views, .*\(4, 3\)'),
    ('nt_xent', (Z[:1],), {}, r'embeddings .*at least 2 .*\(1, 4, 3\)'),
    ('nt_xent', (Z.astype(int),), {}, 'embeddings .*floating.*int'),
    ('nt_xent', (Z[:, :0],), {}, r'embeddings .*\(2, 0, 3\)'),
    ('supcon', (Z, Y[:, None]), {}, r'labels .*\[4, 1\]'),
    ('supcon', (Z, Y), {'variant': 'both'}, "variant .*'in'.*'both'"),
    ('dcl', (Z[:, :1],), {}, 'embeddings .*2 examples.*1'),
    ('vicreg', (Z[:, :1],), {}, 'embeddings .*2 examples.*1'),
    ('barlow_twins', (Z[:, :1],), {}, 'embeddings .*2 examples.*1'),
    ('clop', (Z, Y, np.eye(4)), {}, r'prototypes .*\[\*, 3\].*\(4, 4\)'),
    ('clop', (Z, Y, C), {'distance': 'l2'}, "distance .*'softmax'.*'l2'"),
    (
      'clop',
      (Z, Y, C),
      {'repulsion': 0.5, 'distance': 'softmax'},
      r"repulsion=0\.5 .*'cosine'.*'softmax'",
    ),
    (
      'clop',
      (Z, Y, C),
      {'distance': 'softmax', 'temperature': 0.0},
      r'temperature .*0\.0',
    ),
    (
      'clop',
      (Z, Y, C),
      {'class_weights': np.ones(2)},
      r'class_weights .*\[3\].*\(2,\)',
    ),
  ],
)
def test_a_wrong_argument_is_named(name, arguments, keywords, message):
  with pytest.raises(ValueError, match=message):
    getattr(loss, f'{name}_loss')(*arguments, **keywords)
