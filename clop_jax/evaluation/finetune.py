r"""Fine-tuning: a backbone and a linear head, trained together on labels.

.. math:: \min_{\theta, W, b}
  \frac{1}{n} \sum_i -\log \mathrm{softmax}(W f_\theta(x_i) + b)_{y_i}

by SGD with momentum and a cosine learning rate, batch normalization in training
mode, from the weights of a checkpoint and a head of zeros. The checkpoint's own
arrays are copied first and stay as they are.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from clop_jax.data import augment
from clop_jax.data import loader
from clop_jax.models import heads
from clop_jax.runtime import parallel

# Version of the procedure, written into every result. It changes whenever equal
# weights could give another figure. 1: the augmentation of some examples of a
# streamed set was not that of a resident one.
PROTOCOL_VERSION = 2

_MOMENTUM = 0.9


def recipe(
  *,
  size: int,
  mean: Sequence[float],
  std: Sequence[float],
  crop_area: Sequence[float],
  crop_aspect: Sequence[float],
  flip_probability: float,
  interpolation: str = 'bilinear',
  random: bool = True,
) -> dict:
  """The keyword arguments of `augment.view` that fine-tuning trains with.

  Args:
    size: height and width of a view, pixels.
    mean: per channel.
    std: per channel.
    crop_area: range of the share of the area.
    crop_aspect: range of width over height.
    flip_probability: of a horizontal flip.
    interpolation: 'bilinear' or 'bicubic'.
    random: False takes the whole image, as evaluation does.
  """
  return {
    'size': size,
    'mean': mean,
    'std': std,
    'crop_area': crop_area,
    'crop_aspect': crop_aspect,
    'interpolation': interpolation,
    'crop_probability': 1.0 if random else 0.0,
    'flip_probability': flip_probability if random else 0.0,
    'jitter_probability': 0.0,
    'grey_probability': 0.0,
  }


def create_state(variables, *, num_classes: int, feature_dim: int) -> dict:
  """The state before the first step.

  Args:
    variables: `{'params': ..., 'batch_stats': ...}` of the backbone; copied.
    num_classes: number of classes.
    feature_dim: of the backbone's output.

  Returns:
    `{'params', 'batch_stats', 'opt_state', 'step'}`; the parameters have the
    parts 'backbone' and 'head'.
  """
  head = heads.LinearHead(num_classes)
  features = jnp.zeros((1, feature_dim), jnp.float32)
  params = {
    # The training donates its state: without a copy the run's own arrays would
    # be gone after one step.
    'backbone': jax.tree.map(jnp.copy, variables['params']),
    'head': head.init(jax.random.key(0), features)['params'],
  }
  return {
    'params': params,
    'batch_stats': jax.tree.map(jnp.copy, variables['batch_stats']),
    'opt_state': _optimizer(0.0, 1).init(params),
    'step': jnp.zeros((), jnp.int32),
  }


def _optimizer(learning_rate, total_steps):
  """SGD whose rate falls from the peak to 0; both numbers may be traced."""

  def schedule(step):
    return learning_rate * 0.5 * (1 + jnp.cos(math.pi * step / total_steps))

  return optax.sgd(schedule, momentum=_MOMENTUM)


def train_step(
  state: dict,
  batch: dict[str, jax.Array],
  key: jax.Array,
  numbers: dict[str, jax.Array],
  *,
  backbone: nn.Module,
  recipe: dict,
  bn_scope: str = 'global',
  axis_name: str | None = None,
) -> tuple[dict, jax.Array]:
  """One update; pure, and written for one shard of the batch.

  Args:
    state: see `create_state`, the same on every device.
    batch: this shard's `image` `[batch, height, width, channels]` uint8,
      `label` `[batch]` in `[0, num_classes)` and `index` `[batch]`.
    key: of the augmentation, the same at every step.
    numbers: `learning_rate` (its peak) and `total_steps`, scalars.
    backbone: images to features; its `axis_name` is this one.
    recipe: keyword arguments of `augment.view`.
    bn_scope: as in the backbone.
    axis_name: the mapped axis, or None.

  Returns:
    The next state, and the loss: float32, the mean over the global batch.
  """
  keys = augment.example_keys(key, state['step'], batch['index'])
  make: Callable = functools.partial(augment.view, **recipe)
  images = jax.vmap(make)(keys, batch['image'])

  def loss_of(params):
    features, updated = backbone.apply(
      {'params': params['backbone'], 'batch_stats': state['batch_stats']},
      images,
      train=True,
      mutable=['batch_stats'],
    )
    logits = _logits(params['head'], features)
    loss = jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
    )
    if axis_name is not None:
      # Shards are of one size, so the mean of their means is the global one.
      loss = lax.pmean(loss, axis_name)
    return loss, updated['batch_stats']

  (loss, batch_stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(
    state['params']
  )
  if bn_scope == 'device' and axis_name is not None:
    batch_stats = lax.pmean(batch_stats, axis_name)
  tx = _optimizer(numbers['learning_rate'], numbers['total_steps'])
  updates, opt_state = tx.update(gradients, state['opt_state'], state['params'])
  state = {
    'params': optax.apply_updates(state['params'], updates),
    'batch_stats': batch_stats,
    'opt_state': opt_state,
    'step': state['step'] + 1,
  }
  return state, loss


def _logits(params, features):
  num_classes = jax.tree.leaves(params)[0].shape[-1]
  return heads.LinearHead(num_classes).apply({'params': params}, features)


class Trainer:
  """Fits a backbone and a head; whatever it fits is compiled once."""

  def __init__(
    self,
    backbone: nn.Module,
    variables: Any,
    *,
    num_classes: int,
    feature_dim: int,
    recipe: dict,
    bn_scope: str,
    mesh: Mesh,
    seed: int,
  ):
    """Takes what all fits have in common.

    Args:
      backbone: images to features, with `parallel.DATA_AXIS` as its axis.
      variables: of the backbone, where each fit starts.
      num_classes: number of classes.
      feature_dim: of the backbone's output.
      recipe: keyword arguments of `augment.view`.
      bn_scope: as in the backbone.
      mesh: see `parallel.make_mesh`.
      seed: of the augmentation.
    """
    self._backbone, self._variables = backbone, variables
    self._sizes = {'num_classes': num_classes, 'feature_dim': feature_dim}
    self._recipe, self._mesh = recipe, mesh
    self._key = jax.random.fold_in(jax.random.key(seed), 2)
    bound = functools.partial(
      train_step,
      backbone=backbone,
      recipe=recipe,
      bn_scope=bn_scope,
      axis_name=parallel.DATA_AXIS,
    )

    def step(state, shared, batch):
      batch = jax.tree.map(lambda x: x[0], batch)
      examples = loader.unpack(shared['resident'], batch)
      return bound(state, examples, shared['key'], shared['numbers'])

    self._step = parallel.map_step(step, mesh, batch_axes=(None, None, 1))

    @functools.partial(jax.jit, out_shardings=parallel.replicated(mesh))
    def apply(state, images):
      x = augment.whole(
        images,
        size=recipe['size'],
        mean=recipe['mean'],
        std=recipe['std'],
        interpolation=recipe['interpolation'],
      )
      variables = {
        'params': state['params']['backbone'],
        'batch_stats': state['batch_stats'],
      }
      features = backbone.apply(variables, x, train=False)
      return features, _logits(state['params']['head'], features)

    self._apply = apply

  def fit(
    self, data: loader.Loader, *, learning_rate: float, total_steps: int
  ) -> tuple[dict, float]:
    """A fit from the checkpoint's weights.

    Args:
      data: whose labels are all in `[0, num_classes)`.
      learning_rate: its peak.
      total_steps: updates.

    Returns:
      The last state, and the loss of the last step: NaN or infinite if the fit
      diverged.
    """
    state = create_state(self._variables, **self._sizes)
    state = parallel.replicate(self._mesh, jax.device_get(state))
    numbers = {
      'learning_rate': np.float32(learning_rate),
      'total_steps': np.float32(total_steps),
    }
    shared = parallel.replicate(
      self._mesh, {'key': self._key, 'numbers': numbers}
    ) | {'resident': data.resident}
    loss = math.nan
    steps = (range(step, step + 1) for step in range(total_steps))
    for batch in data.batches(steps):
      state, loss = self._step(state, shared, batch)
    return state, float(loss)

  def apply(
    self, state: dict
  ) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """uint8 images to `(features, logits)` by a state, in evaluation mode."""
    return functools.partial(self._apply, state)


def choose(
  learning_rates: Sequence[float], accuracy_at: Callable[[float], float]
) -> tuple[float, float | None]:
  """The candidate with the best accuracy; the lowest one on a tie.

  Args:
    learning_rates: candidates. One alone needs no accuracy.
    accuracy_at: a candidate to its accuracy on held-out examples.

  Returns:
    `(learning rate, its accuracy or None)`.

  Raises:
    ValueError: if there is no candidate, or one is not above 0.
  """
  if not len(learning_rates) or not all(rate > 0 for rate in learning_rates):
    raise ValueError(
      'config.eval.finetune_learning_rates must hold numbers above 0, got '
      f'{learning_rates!r}'
    )
  if len(learning_rates) == 1:
    return learning_rates[0], None
  found = {rate: accuracy_at(rate) for rate in sorted(learning_rates)}
  best = max(found, key=found.__getitem__)
  return best, found[best]
