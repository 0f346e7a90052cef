r"""Fine-tuning: trains a backbone and a linear head on labels.

.. math:: \min_{\theta, W, b}
  \frac{1}{n} \sum_i -\log \mathrm{softmax}(W f_\theta(x_i) + b)_{y_i}

by SGD with momentum and a cosine learning rate. Batch normalization is in
training mode. The backbone starts from a checkpoint, the head from zeros.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import numpy as np
import optax

from clop_jax.data import augment
from clop_jax.data import loader
from clop_jax.data import reader as reader_lib
from clop_jax.evaluation import probe
from clop_jax.evaluation import protocol
from clop_jax.experiment import inputs
from clop_jax.models import adapters
from clop_jax.models import heads
from clop_jax.runtime import parallel
from clop_jax.training import train_state

# Written into every result. Increase it whenever the same weights could give
# other numbers. In version 1 a streamed set was augmented differently.
PROTOCOL_VERSION = 2

_MOMENTUM = 0.9
_KEPT = ('size', 'mean', 'std', 'crop_area', 'crop_aspect', 'interpolation')


def recipe(fields: Mapping[str, Any], *, random: bool = True) -> augment.Recipe:
  """Returns an augmentation that crops and flips.

  Args:
    fields: Fields of `config.augment`.
    random: If False, the whole image is used, as in evaluation.
  """
  return augment.Recipe(
    **{name: fields[name] for name in _KEPT},
    crop_probability=1.0 if random else 0.0,
    flip_probability=fields['flip_probability'] if random else 0.0,
    jitter_probability=0.0,
    grey_probability=0.0,
  )


def create_state(variables, *, num_classes: int, feature_dim: int) -> dict:
  """Returns the state before the first step, with a copy of the variables."""
  head = heads.LinearHead(num_classes)
  features = jnp.zeros((1, feature_dim), jnp.float32)
  # The step donates its state. Without a copy the arrays of the checkpoint
  # would be deleted.
  variables = jax.tree.map(jnp.copy, variables)
  params = {
    'backbone': variables['params'],
    'head': head.init(jax.random.key(0), features)['params'],
  }
  return {
    'params': params,
    'batch_stats': variables['batch_stats'],
    'opt_state': _optimizer(0.0, 1).init(params),
    'step': jnp.zeros((), jnp.int32),
  }


def _optimizer(learning_rate, total_steps):
  # Not optax.cosine_decay_schedule, because total_steps is traced.
  def schedule(step):
    return learning_rate * 0.5 * (1 + jnp.cos(math.pi * step / total_steps))

  return optax.sgd(schedule, momentum=_MOMENTUM)


def train_step(
  state: dict,
  batch: dict[str, jax.Array],
  key: jax.Array,
  numbers: dict[str, jax.Array],
  *,
  backbone: Any,
  recipe: augment.Recipe,
  bn_scope: str = 'global',
  axis_name: str | None = None,
) -> tuple[dict, jax.Array]:
  """Makes one update with one shard of the batch.

  Args:
    state: State, see `create_state`; the same on every device.
    batch: This shard's `image` `[batch, height, width, channels]` uint8,
      `label` `[batch]` and `index` `[batch]`.
    key: Key of the augmentation, the same at every step.
    numbers: Scalars `learning_rate` (the peak) and `total_steps`.
    backbone: Backbone from images to features, with the same `axis_name`.
    recipe: Augmentation.
    bn_scope: Scope of batch normalization, as in the backbone.
    axis_name: Name of the mapped axis, or None.

  Returns:
    The next state, and the loss: the mean over the global batch.
  """
  keys = augment.example_keys(key, state['step'], batch['index'])
  make: Callable = functools.partial(augment.view, recipe=recipe)
  images = jax.vmap(make)(keys, batch['image'])

  def loss_of(params):
    variables = {
      'params': params['backbone'],
      'batch_stats': state['batch_stats'],
    }
    features, updated = adapters.adapt(backbone).apply(
      variables, images, True, train_state.keys_of_views(keys, 1)
    )
    logits = _logits(params['head'], features)
    loss = jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
    )
    if axis_name is not None:
      # The global mean, because all shards have the same size.
      loss = lax.pmean(loss, axis_name)
    return loss, updated.get('batch_stats', state['batch_stats'])

  (loss, batch_stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(
    state['params']
  )
  if axis_name is not None:
    batch_stats = train_state.averaged(
      batch_stats, axis_name, everything=bn_scope == 'device'
    )
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
  """Fits a backbone and a head; all fits share one compiled step."""

  def __init__(
    self,
    backbone: Any,
    variables: Any,
    *,
    num_classes: int,
    recipe: augment.Recipe,
    channels: int,
    bn_scope: str,
    mesh: Mesh,
    seed: int,
  ):
    """Compiles nothing yet; the seed is that of the augmentation."""
    shape = (1, recipe.size, recipe.size, channels)
    backbone = adapters.adapt(backbone)
    features, _ = jax.eval_shape(
      functools.partial(backbone.apply, train=False),
      variables,
      jax.ShapeDtypeStruct(shape, np.float32),
    )
    self._create = functools.partial(
      create_state, num_classes=num_classes, feature_dim=features.shape[-1]
    )
    self._variables, self._mesh = variables, mesh
    self._key = jax.random.fold_in(jax.random.key(seed), 2)

    def step(state, shared, batch):
      batch = jax.tree.map(lambda x: x[0], batch)
      return train_step(
        state,
        loader.unpack(shared['resident'], batch),
        shared['key'],
        shared['numbers'],
        backbone=backbone,
        recipe=recipe,
        bn_scope=bn_scope,
        axis_name=parallel.DATA_AXIS,
      )

    self._step = parallel.map_step(step, mesh, batch_axes=(None, None, 1))

    @functools.partial(jax.jit, out_shardings=parallel.replicated(mesh))
    def apply(state, images):
      x = augment.whole(
        images,
        size=recipe.size,
        mean=recipe.mean,
        std=recipe.std,
        interpolation=recipe.interpolation,
      )
      variables = {
        'params': state['params']['backbone'],
        'batch_stats': state['batch_stats'],
      }
      features, _ = backbone.apply(variables, x, False)
      return features, _logits(state['params']['head'], features)

    self._apply = apply

  def fit(
    self, data: loader.Loader, *, learning_rate: float, total_steps: int
  ) -> tuple[dict, float]:
    """Trains from the weights of the checkpoint.

    Returns:
      The last state, and the loss of the last step. The loss is not finite if
      the training diverged.
    """
    state = jax.device_get(self._create(self._variables))
    state = parallel.replicate(self._mesh, state)
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
    """Returns a function from uint8 images to `(features, logits)`."""
    return functools.partial(self._apply, state)


def choose(
  learning_rates: Sequence[float], accuracy_at: Callable[[float], float]
) -> tuple[float, float]:
  """Returns the best learning rate, the lowest on a tie, and its accuracy."""
  accuracies = {rate: accuracy_at(rate) for rate in sorted(learning_rates)}
  best = max(accuracies, key=accuracies.__getitem__)
  return best, accuracies[best]


class FineTuning:
  """Fine-tuning by the protocol; all fractions share one `Trainer`."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    backbone: Any,
    variables: Any,
    readers: Mapping[str, reader_lib.Reader],
    mesh: Mesh,
  ):
    """Loads the training split if it fits the devices.

    Args:
      config: Config with a known `data.num_classes`.
      backbone: Module from images to features.
      variables: Variables of the backbone, which do not change.
      readers: Readers of 'train' and 'test', see `protocol.readers`.
      mesh: Mesh of the devices.
    """
    fields = config.eval
    try:
      parallel.check_batch_size(fields.finetune_batch_size, mesh)
    except ValueError as error:
      raise ValueError(f'config.eval.finetune_batch_size: {error}') from error
    self._config, self._readers, self._mesh = config, readers, mesh
    self._trainer = Trainer(
      backbone,
      variables,
      num_classes=config.data.num_classes,
      recipe=recipe(config.augment, random=fields.finetune_augment),
      channels=config.data.channels,
      bn_scope=config.model.bn_scope,
      mesh=mesh,
      seed=config.seed,
    )
    train = readers['train']
    # Each fit selects its own batches.
    shared: Any = {'batch_size': None, 'seed': config.seed, 'mesh': mesh}
    self._data: loader.ResidentLoader | loader.StreamLoader
    if inputs.is_resident(config, train):
      self._data = loader.ResidentLoader(*loader.read_all(train), **shared)
    else:
      self._data = loader.StreamLoader(
        train,
        num_workers=inputs.num_workers(config, train),
        prefetch=config.data.prefetch,
        **shared,
      )

  def __call__(self, chosen: np.ndarray) -> dict[str, float | int | None]:
    """Fine-tunes on some of the training examples.

    The learning rate is the one with the best top-1 on a held-out, stratified
    tenth of them, the lowest on a tie. The network is then fine-tuned on all of
    them. If none can be held out, the middle learning rate is used and
    `finetune_held_out_top1` is None.

    Args:
      chosen: Positions of the examples, all of which can be decoded.

    Raises:
      FloatingPointError: If the fit diverged.
    """
    config, train = self._config, self._readers['train']
    rates = sorted(config.eval.finetune_learning_rates)
    held_out = probe.stratified_tenth(train.labels[chosen], config.seed)

    def accuracy_at(rate):
      state, loss = self._fit(chosen[~held_out], rate)
      if not np.isfinite(loss):
        return -1.0
      return self._accuracy(state, train.subset(chosen[held_out]), (1,))[0]

    rate, held_out_top1 = rates[(len(rates) - 1) // 2], None
    if len(rates) > 1 and held_out.any():
      rate, held_out_top1 = choose(rates, accuracy_at)
    state, loss = self._fit(chosen, rate)
    if not np.isfinite(loss):
      raise FloatingPointError(
        f'fine-tuning diverged (loss {loss}) at learning rate {rate}, the best '
        f'of config.eval.finetune_learning_rates={rates}; try lower ones'
      )
    ks = (1, min(5, config.data.num_classes))
    top1, top5 = self._accuracy(state, self._readers['test'], ks)
    return {
      'finetune_top1': top1,
      'finetune_top5': top5,
      'finetune_learning_rate': float(rate),
      'finetune_held_out_top1': held_out_top1,
      'finetune_steps': int(state['step']),
      'finetune_protocol_version': PROTOCOL_VERSION,
    }

  def _fit(self, chosen, rate):
    fields, size = self._config.eval, self._config.eval.finetune_batch_size
    if len(chosen) < size:
      # One batch of all examples. Some come twice if the devices could not
      # share them evenly.
      size = -(-len(chosen) // self._mesh.size) * self._mesh.size
      chosen = np.resize(chosen, size)
    data = self._data.among(chosen, batch_size=size, seed=self._config.seed)
    steps = fields.finetune_epochs * data.steps_per_epoch
    return self._trainer.fit(
      data,
      learning_rate=rate,
      total_steps=max(steps, fields.finetune_min_steps),
    )

  def _accuracy(self, state, reader, ks):
    _, logits, labels = protocol.extract(
      self._config, reader, self._trainer.apply(state), self._mesh
    )
    return probe.top_k(logits, labels, ks)
