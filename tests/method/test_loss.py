import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clop_jax import loss
from tests import oracles

NUM_CLASSES = 3
CLASS_WEIGHTS = np.array([0.5, 2.0, 1.5])
PROTOTYPES = np.random.default_rng(3).normal(size=(NUM_CLASSES, 3))


def clop_case(distance='cosine', class_weights=None, **numbers):
  keywords = numbers | {'distance': distance, 'class_weights': class_weights}
  return (
    lambda z, y: loss.clop_loss(z, y, jnp.float32(PROTOTYPES), **keywords),
    lambda z, y: oracles.clop(z, y, PROTOTYPES, **keywords),
  )


def case(name, *numbers, labelled=False, **keywords):
  """A loss, and the oracle of the same name, which takes positional numbers."""
  function, oracle = getattr(loss, f'{name}_loss'), getattr(oracles, name)
  if labelled:
    return (
      lambda z, y: function(z, y, **keywords),
      lambda z, y: oracle(z, y, *numbers),
    )
  return lambda z, y: function(z, **keywords), lambda z, y: oracle(z, *numbers)


SUPCON_IN = {'labelled': True, 'temperature': 0.4, 'variant': 'in'}
# Each loss as (ours, oracle), both functions of (embeddings, labels).
CASES = {
  'clop cosine': clop_case(),
  'clop euclidean': clop_case('euclidean'),
  'clop manhattan': clop_case('manhattan'),
  'clop softmax': clop_case('softmax', CLASS_WEIGHTS, temperature=0.3),
  'clop repulsion': clop_case(repulsion=0.7),
  'nt_xent': case('nt_xent', 0.3, temperature=0.3),
  'nt_xent blocked': case('nt_xent', 0.3, temperature=0.3, block_size=3),
  'supcon out': case('supcon', 0.4, labelled=True, temperature=0.4),
  'supcon in': case('supcon', 0.4, 'in', **SUPCON_IN),
  'supcon blocked': case('supcon', 0.4, 'in', **SUPCON_IN, block_size=4),
  'dcl': case('dcl', 0.3, temperature=0.3),
  'vicreg': case('vicreg'),
  'barlow_twins': case('barlow_twins'),
  'w_mse': case('w_mse'),
  'w_mse without shrinkage': case('w_mse', 0.0, epsilon=0.0),
  'invariance': case('invariance'),
  'alignment and uniformity': case(
    'alignment_uniformity',
    2.0,
    0.5,
    1.0,
    5.0,
    alignment_weight=2.0,
    uniformity_weight=0.5,
    alpha=1.0,
    t=5.0,
  ),
  'spectral': case('spectral_contrastive', 3.0, mu=3.0),
  'cross_entropy': case('cross_entropy', labelled=True),
  'sigmoid': case('sigmoid', 0.5, -1.0, temperature=0.5, bias=-1.0),
}


def all_losses(z, labels):
  return {
    name: jax.value_and_grad(ours)(z, labels)
    for name, (ours, _) in CASES.items()
  }


# One program for all losses: compiling takes longer than running.
values_and_gradients = jax.jit(all_losses)


def embeddings(views=2, batch=5, seed=0, scale=1.0):
  rng = np.random.default_rng(seed)
  return np.float32(scale * rng.normal(size=(views, batch, 3)))


LABELS = np.array([0, 0, 1, -1, 2], np.int32)


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize(
  ('views', 'labels', 'scale'),
  [
    (2, [0, 0, 1, -1, 2], 1.0),
    (2, [2, 2, 2, 2, 2], 5.0),
    (2, [-1, -1, 1, -1, -1], 0.3),
    (3, [1, -1, 0, 1], 1.0),
  ],
)
def test_value_and_gradient_equal_the_float64_oracle(
  name, views, labels, scale
):
  z, labels = embeddings(views, len(labels), scale=scale), np.array(labels)
  value, gradient = values_and_gradients(z, labels)[name]

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


@pytest.mark.parametrize(
  'keywords', [{'repulsion': 1.0}, {'distance': 'softmax', 'temperature': 0.5}]
)
def test_equal_embeddings_are_not_pulled_to_the_mean_of_prototypes(keywords):
  # Unlike with the paper's distance, see theory.py.
  k = 5
  c = jnp.eye(k, 8)
  off_the_mean = jnp.eye(8)[7] + 0.1 * c.mean(axis=0)

  def of_common(z, **keywords):
    return loss.clop_loss(jnp.tile(z, (k, 1)), jnp.arange(k), c, **keywords)

  def pull(**keywords):
    gradient = jax.grad(functools.partial(of_common, **keywords))
    return -jax.jit(gradient)(off_the_mean) @ c.mean(axis=0)

  assert pull() > 0.1
  assert pull(**keywords) <= 1e-6


def test_without_labels_clop_and_its_gradient_are_exactly_zero():
  results = values_and_gradients(embeddings(), np.full(5, -1))
  for name in CASES:
    if name.startswith('clop'):
      value, gradient = results[name]
      assert value == 0 and (gradient == 0).all(), name


def test_clop_takes_one_view_without_the_views_axis():
  z, c = jnp.asarray(embeddings()[0]), jnp.eye(3)
  one = loss.clop_loss(z, LABELS, c)
  assert one == loss.clop_loss(z[None], LABELS, c)
  masked = loss.clop_loss(z[LABELS >= 0], LABELS[LABELS >= 0], c)
  assert one == pytest.approx(float(masked), rel=1e-6)


def test_a_traced_label_beyond_the_prototypes_gives_nan():
  clop = jax.jit(loss.clop_loss)
  assert jnp.isnan(clop(jnp.ones((3, 4)), jnp.array([0, 4, 1]), jnp.eye(4)))


def test_clop_gradient_reaches_the_prototypes_of_labelled_classes_only():
  gradient = jax.jit(jax.grad(loss.clop_loss, argnums=2))(
    embeddings(), jnp.array([1, -1, 1, -1, -1]), jnp.eye(3)
  )
  assert gradient.any(axis=1).tolist() == [False, True, False]


def test_nt_xent_and_dcl_of_two_perfect_pairs_by_hand():
  z = jnp.stack([jnp.eye(2), jnp.eye(2)])
  # One positive at cosine 1, two negatives at 0.
  expected = -np.log(np.exp(2) / (np.exp(2) + 2))
  assert loss.nt_xent_loss(z, temperature=0.5) == pytest.approx(expected)
  assert loss.dcl_loss(z, temperature=0.5) == pytest.approx(np.log(2) - 2)


def test_barlow_twins_and_vicreg_by_hand():
  z = jnp.array([[[1.0, 0.0], [-1.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0]]])
  # Correlation 1 in the first dimension, 0 in the constant second one.
  assert loss.barlow_twins_loss(z) == pytest.approx(1.0, abs=1e-4)
  # No invariance term; deviations sqrt(2) and sqrt(1e-4) in both views.
  assert loss.vicreg_loss(z) == pytest.approx(25 * (1 - 0.01), rel=1e-5)


def supcon_variants(z, labels):
  return {
    (variant, size): jax.value_and_grad(loss.supcon_loss)(
      z, labels, variant=variant, block_size=size
    )
    for variant in ('out', 'in')
    for size in (2, 100)  # in blocks, and whole
  }


def test_supcon_without_shared_labels_is_nt_xent():
  z = embeddings()
  expected = float(loss.nt_xent_loss(z, temperature=0.1))
  supcon = jax.jit(supcon_variants)
  for labels in (np.arange(5), np.full(5, -1)):
    for value, _ in supcon(z, labels).values():
      assert value == pytest.approx(expected, rel=1e-5)


def test_supcon_anchors_without_positive_add_nothing():
  z = embeddings(views=1)
  supcon = jax.jit(supcon_variants)
  labels = np.array([0, 0, 1, -1, -1])
  for (variant, size), (value, gradient) in supcon(z, labels).items():
    expected = oracles.supcon(z.astype(np.float64), labels, 0.1, variant)
    assert value == pytest.approx(expected, rel=1e-4), (variant, size)
    assert jnp.isfinite(gradient).all()
  for value, gradient in supcon(z, np.arange(5)).values():
    assert value == 0 and (gradient == 0).all()


def test_blocks_of_any_size_give_the_dense_value_and_gradient():
  z, labels = embeddings(batch=12), np.arange(12) % 4 - 1

  def both(z, size):
    keywords = {'block_size': size, 'temperature': 0.3}
    supcon = loss.supcon_loss(z, labels, **keywords)
    return supcon + loss.nt_xent_loss(z, **keywords)

  sizes = (None, 1, 7, 8, 24)
  dense, *blocked = jax.jit(
    lambda z: [jax.value_and_grad(both)(z, size) for size in sizes]
  )(z)
  for value, gradient in blocked:
    np.testing.assert_allclose(value, dense[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, dense[1], atol=2e-6)


def test_blocks_scale_with_the_cotangent_and_differentiate_the_temperature():
  def gradient(temperature, block_size):
    return jax.grad(
      lambda t: (
        3
        * loss.nt_xent_loss(embeddings(), temperature=t, block_size=block_size)
      )
    )(temperature)

  blocked, dense = jax.jit(lambda t: (gradient(t, 4), gradient(t, None)))(0.3)
  assert blocked == pytest.approx(float(dense), rel=1e-4)


@pytest.mark.parametrize(
  ('embeddings', 'devices', 'platform', 'expected'),
  [
    (2047, 1, 'cpu', None),
    (2048, 1, 'cpu', 512),
    (8192, 1, 'gpu', None),
    (8194, 1, 'gpu', 512),
    (8194, 2, 'gpu', None),
    (131072, 256, 'tpu', None),  # docs/scaling.md: the whole is best
    (131072, 8, 'tpu', 4096),
  ],
)
def test_blocks_are_chosen_where_the_matrix_is_large(
  embeddings, devices, platform, expected
):
  chosen = loss.choose_block_size(embeddings, devices, platform=platform)
  assert chosen == expected


@pytest.mark.parametrize('kind', ['zeros', 'identical', 'one zero'])
def test_degenerate_embeddings_have_finite_values_and_gradients(kind):
  z = {
    'zeros': np.zeros((2, 5, 3), np.float32),
    'identical': np.full((2, 5, 3), 0.7, np.float32),
    'one zero': embeddings(),
  }[kind]
  z[1, 2] *= kind != 'one zero'
  for name, results in values_and_gradients(z, LABELS).items():
    # Without shrinkage the covariance of equal embeddings has no factor.
    if name != 'w_mse without shrinkage' or kind == 'one zero':
      assert all(np.isfinite(x).all() for x in results), name


@pytest.mark.parametrize('distance', ['euclidean', 'manhattan'])
def test_an_embedding_on_its_prototype_has_a_finite_gradient(distance):
  clop = functools.partial(loss.clop_loss, distance=distance)
  value, gradient = jax.jit(jax.value_and_grad(clop))(
    jnp.eye(3), jnp.arange(3), jnp.eye(3)
  )
  assert value == 0
  assert jnp.isfinite(gradient).all()


# The second position is an unlabelled example.
@pytest.mark.parametrize('position', [(0, 0, 0), (1, 3, 2)])
def test_a_nan_in_the_embeddings_gives_nan(position):
  z = embeddings()
  z[position] = np.nan
  for name, (value, _) in values_and_gradients(z, LABELS).items():
    assert jnp.isnan(value), name


@pytest.mark.parametrize('scale', [1e25, 1e-25])
def test_very_long_and_short_embeddings_keep_their_direction(scale):
  results = values_and_gradients(embeddings(scale=scale), LABELS)
  expected = values_and_gradients(embeddings(), LABELS)
  for name in CASES:
    # These do not normalize.
    if not name.startswith(
      ('vicreg', 'barlow_twins', 'w_mse', 'cross_entropy')
    ):
      value = float(expected[name][0])
      assert results[name][0] == pytest.approx(value, rel=1e-4), name


def test_bfloat16_embeddings_are_computed_in_float32():
  z = jnp.asarray(embeddings(), jnp.bfloat16)
  exact = values_and_gradients(z.astype(jnp.float32), LABELS)
  for name, (value, gradient) in values_and_gradients(z, LABELS).items():
    assert value.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    assert value == pytest.approx(float(exact[name][0]), rel=1e-6), name


def test_vmap_gives_the_same_as_jit():
  z = np.stack([embeddings(seed=0), embeddings(seed=1)])
  labels = np.stack([LABELS, LABELS[::-1]])
  mapped = jax.jit(jax.vmap(all_losses))(z, labels)
  for i in range(2):
    expected = values_and_gradients(z[i], labels[i])
    jax.tree.map(
      lambda x, y, i=i: np.testing.assert_allclose(x[i], y, atol=1e-4),
      mapped,
      expected,
    )


Z = np.zeros((2, 4, 3), np.float32)
Y = np.zeros(4, np.int32)
nt_xent = functools.partial(loss.nt_xent_loss, Z)
clop = functools.partial(loss.clop_loss, Z, Y, np.eye(3))


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: loss.nt_xent_loss(Z[0]), r'embeddings .*\[views, .*\(4, 3\)'),
    (lambda: loss.nt_xent_loss(Z[:1]), r'embeddings .*2 .*\(1, 4, 3\)'),
    (lambda: loss.nt_xent_loss(Z.astype(int)), 'embeddings .*int'),
    (lambda: loss.nt_xent_loss(Z[:, :0]), r'embeddings .*\(2, 0, 3\)'),
    (lambda: loss.nt_xent_loss([['xyz']]), 'embeddings'),
    (lambda: nt_xent(temperature=0), 'temperature.* 0'),
    (lambda: nt_xent(temperature=np.nan), 'temperature.*nan'),
    (lambda: nt_xent(temperature='1'), 'temperature.* 1'),
    (lambda: nt_xent(temperature=np.ones(2)), 'temperature'),
    (lambda: nt_xent(block_size=0), 'block_size.* 0'),
    (lambda: nt_xent(block_size=2.5), r'block_size.*2\.5'),
    (lambda: loss.supcon_loss(Z, Y[:, None]), r'labels .*\[4, 1\]'),
    (lambda: loss.supcon_loss(Z, Y > 0), 'labels.*bool'),
    (lambda: loss.supcon_loss(Z, Y, variant='both'), "variant .*'both'"),
    (lambda: loss.dcl_loss(Z[:, :1]), 'embeddings .*2 examples.*1'),
    (lambda: loss.vicreg_loss(Z[:, :1]), 'embeddings .*2 examples.*1'),
    (lambda: loss.barlow_twins_loss(Z[:, :1]), 'embeddings .*2 examples.*1'),
    (lambda: loss.w_mse_loss(Z[:, :3]), r'embeddings .*dim=3.*batch of 3'),
    (lambda: loss.w_mse_loss(Z, epsilon=1.5), r'epsilon.*1\.5'),
    (lambda: loss.sigmoid_loss(Z, temperature=0), 'temperature.* 0'),
    (lambda: loss.sigmoid_loss(Z, bias=np.nan), 'bias.*nan'),
    (lambda: loss.cross_entropy_loss(Z[0], Y), r'logits .*\(4, 3\)'),
    (lambda: loss.cross_entropy_loss(Z, Y + 3), 'labels .*3.* 3'),
    (lambda: loss.invariance_loss(Z[:1]), r'embeddings .*2 .*\(1, 4, 3\)'),
    (lambda: loss.spectral_contrastive_loss(Z, mu=0), 'mu.* 0'),
    (
      lambda: loss.spectral_contrastive_loss(Z[:, :1]),
      'embeddings .*2 examples.*1',
    ),
    (lambda: loss.alignment_uniformity_loss(Z, t=-1), 't must.* -1'),
    (
      lambda: loss.alignment_uniformity_loss(Z, alpha=0),
      'alpha.* 0',
    ),
    (
      lambda: loss.vicreg_loss(Z, variance_weight=np.inf),
      'variance_weight.*inf',
    ),
    (lambda: loss.clop_loss(Z, Y, np.eye(4)), r'prototypes .*3.*\(4, 4\)'),
    (lambda: loss.clop_loss(Z, Y, 'c'), 'prototypes'),
    (lambda: loss.clop_loss(Z, list('abcd'), np.eye(3)), 'labels.*U1'),
    (lambda: loss.clop_loss(Z, Y * 1.0, np.eye(3)), 'labels.*float'),
    (lambda: loss.clop_loss(Z, Y[:3], np.eye(3)), r'labels.*\[4\].*\[3\]'),
    (
      lambda: loss.clop_loss(Z, Y.astype(int) + 2**33, np.eye(3)),
      'labels.*3, got 85899.*index 0',
    ),
    (lambda: clop(distance='l2'), "distance .*'l2'"),
    (lambda: clop(repulsion=-1), 'repulsion.*-1'),
    (
      lambda: clop(repulsion=0.5, distance='softmax'),
      r"repulsion=0\.5 .*'softmax'",
    ),
    (
      lambda: clop(distance='softmax', temperature=0.0),
      r'temperature .*0\.0',
    ),
    (lambda: clop(class_weights=np.ones(2)), r'class_weights .*\[3\].*\(2,\)'),
  ],
)
def test_invalid_arguments(call, message):
  with pytest.raises(ValueError, match=message):
    call()
