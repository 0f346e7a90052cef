"""One training step, a pure function of (state, batch, key)."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from clop_jax import collapse
from clop_jax import loss
from clop_jax import prototypes as prototypes_lib
from clop_jax.data import augment
from clop_jax.training import grad_cache
from clop_jax.training import optimizer
from clop_jax.training import prototype_rules
from clop_jax.training import siamese
from clop_jax.training import train_state


# See `siamese`.
TARGETS = ('none', 'stop_gradient', 'moving_average')


@dataclasses.dataclass(frozen=True)
class Parts:
  """Networks, losses and optimizer of a train step.

  Attributes:
    backbone: Backbone from images to features, see `models.adapters`.
    projection_head: Flax module from features to embeddings.
    tx: Optax chain.
    schedule: Learning rate of a step, as in `tx`; it is only logged.
    recipe: Random operations that make the views.
    contrastive: Contrastive loss, `(embeddings, labels, axis_name=...)`.
    clop_weight: Weight of the CLOP loss (lambda in the paper). If 0, the loss
      is only logged.
    clop: CLOP loss, `(embeddings, labels, prototypes, axis_name=...)`.
    prototype_rule: Rule by which the prototypes change.
    pseudo_labels: Function `(embeddings, labels, prototypes, step) -> labels`
      that labels unlabelled examples for the CLOP loss, or None.
    log_every: Number of steps between two steps with diagnostics (norms,
      effective rank, ...), which are 0 on all other steps.
    bn_scope: 'global' or 'device', as in the networks. With 'device' the
      running statistics are averaged over the devices.
    num_micro_batches: Number of micro-batches of a shard, see `grad_cache`.
    predictor: Flax module from embeddings to predictions, or None.
    classifier: Flax module from features to logits, or None. Its cross-entropy
      on the labelled examples is added to the loss.
    cross_entropy_weight: Weight of that cross-entropy.
    target: 'none', 'stop_gradient' or 'moving_average', see `siamese`.
    target_momentum: Momentum of the moving average at a step.
  """

  backbone: Any
  projection_head: Any
  tx: optax.GradientTransformation
  schedule: optax.Schedule
  recipe: augment.Recipe
  contrastive: Callable[..., jax.Array]
  clop_weight: float | jax.Array
  clop: Callable[..., jax.Array] = loss.clop_loss
  prototype_rule: prototype_rules.Rule = dataclasses.field(
    default_factory=prototype_rules.Fixed
  )
  pseudo_labels: Callable[..., jax.Array] | None = None
  log_every: int = 1
  bn_scope: str = 'global'
  num_micro_batches: int = 1
  predictor: Any = None
  classifier: Any = None
  cross_entropy_weight: float = 0.0
  target: str = 'none'
  target_momentum: optax.Schedule | None = None

  def __post_init__(self):
    if self.target not in TARGETS:
      raise ValueError(
        f'target must be one of {list(TARGETS)}, got {self.target!r}'
      )
    if self.target == 'moving_average' and self.target_momentum is None:
      raise ValueError(
        "target_momentum must be a schedule for target='moving_average', got "
        'None'
      )


def train_step(
  state: train_state.TrainState,
  batch: dict[str, jax.Array],
  key: jax.Array,
  parts: Parts,
  *,
  axis_name: str | None = 'data',
  pmean_gradients: bool = False,
) -> tuple[train_state.TrainState, dict[str, jax.Array]]:
  r"""Takes one training step on two random views of each image.

  .. math:: L = L_{contrastive}(Z) + \lambda\, L_{CLOP}(Z, y, C)

  and, with a classifier, its weighted cross-entropy.

  The function sees one shard of the batch. `parallel.map_step` maps it over the
  devices. It also runs under `jax.pmap` (with `pmean_gradients=True`) and, with
  `axis_name=None`, on one device under `jax.jit`.

  With several micro-batches the loss and its gradient are still those of the
  global batch. Batch normalization uses the statistics of one micro-batch (of
  all devices if `bn_scope='global'`), and the new running statistics are the
  mean over the micro-batches.

  Args:
    state: Training state, equal on every device.
    batch: This shard's `image` `[batch, height, width, channels]` uint8 (or
      `[batch, 2, size, size, channels]`, one crop for each view), `label`
      `[batch]` (-1 is unlabelled) and `index` `[batch]`, the position of each
      example in the data set. With pseudo-labels also `true_label` `[batch]`
      (-1 is unknown), to measure their accuracy.
    key: PRNG key of the run, the same at every step and on every device.
    parts: Networks, losses and optimizer.
    axis_name: Name of the mapped axis, or None.
    pmean_gradients: If True, average the gradients over the axis. For
      `jax.pmap` only, see `clop_jax.loss`.

  Returns:
    The next state, and metrics: float32 scalars, equal on every device.

  Raises:
    ValueError: If `parts.num_micro_batches` does not divide the shard's batch.
  """
  value, outputs, batch_stats, gradients = grad_cache.value_and_grad(
    lambda params, examples: _outputs(parts, state, key, params, examples),
    lambda out, examples: _losses(parts, state, out, examples, axis_name),
    state.params,
    batch,
    num_micro_batches=parts.num_micro_batches,
    axis_name=None if pmean_gradients else axis_name,
  )
  total, (losses, clop_labels) = value
  embeddings = outputs['embeddings']
  if pmean_gradients:
    gradients = lax.pmean(gradients, axis_name)
  if axis_name is not None:
    batch_stats = train_state.averaged(
      batch_stats, axis_name, everything=parts.bn_scope == 'device'
    )
  with jax.named_scope('gradients'):
    gradients = optimizer.in_row_order(gradients)
  with jax.named_scope('optimizer'):
    updates, opt_state = parts.tx.update(
      gradients, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
  target = state.target
  if parts.target == 'moving_average':
    momentum: Any = parts.target_momentum
    newest = {name: params[name] for name in target}
    target = optax.incremental_update(newest, target, 1 - momentum(state.step))
  step = state.step + 1

  def prototype_gradient():
    gradient = jax.grad(parts.clop, argnums=2)(
      embeddings, clop_labels, state.prototypes, axis_name=axis_name
    )
    return lax.pmean(gradient, axis_name) if pmean_gradients else gradient

  with jax.named_scope('prototypes'):
    prototypes, prototype_statistics = parts.prototype_rule.update(
      state.prototypes,
      state.prototype_statistics,
      step=step,
      embeddings=embeddings,
      labels=batch['label'],
      gradient=prototype_gradient,
      axis_name=axis_name,
    )
  metrics = {
    'loss': total,
    **losses,
    'learning_rate': jnp.asarray(parts.schedule(state.step), jnp.float32),
  }
  if parts.pseudo_labels is not None:
    metrics |= _pseudo_label_metrics(batch, clop_labels, axis_name)

  def diagnostics():
    labels = jnp.broadcast_to(batch['label'], embeddings.shape[:-1])
    norms = optimizer.global_norms(gradients, updates, params)
    return {
      **collapse.batch_measures(
        embeddings, labels, state.prototypes, axis_name=axis_name
      ),
      **dict(zip(_NORMS, norms, strict=True)),
      'orthonormality_error': prototypes_lib.orthonormality_error(prototypes),
    }

  metrics |= _sometimes(step % parts.log_every == 0, diagnostics)
  state = dataclasses.replace(
    state,
    step=step,
    params=params,
    batch_stats=batch_stats,
    opt_state=opt_state,
    prototypes=prototypes,
    prototype_statistics=prototype_statistics,
    target=target,
  )
  return state, metrics


_NORMS = ('gradient_norm', 'update_norm', 'parameter_norm')


def _outputs(parts, state, key, params, examples):
  """Returns what the networks make of random views, and batch_stats.

  The outputs are `[2, batch, ...]`: embeddings and, if there are any,
  predictions, targets of the moving average, and logits.
  """
  with jax.named_scope('augmentation'):
    keys = augment.example_keys(key, state.step, examples['index'])
    images = examples['image']
    if images.ndim == 5:
      # Two crops of each example, made by the loader.
      images = images.swapaxes(0, 1)
    views = augment.two_views(keys, images, parts.recipe)
  num_views, batch_size = views.shape[:2]
  # One pass for both views: half the launches, and common batch statistics.
  images = views.reshape(num_views * batch_size, *views.shape[2:])
  keys = train_state.keys_of_views(keys, num_views)

  def apply_networks(params):
    return train_state.apply_networks(
      parts.backbone,
      parts.projection_head,
      params,
      state.batch_stats,
      images,
      train=True,
      keys=keys,
    )

  with jax.named_scope('networks'):
    features, embeddings, batch_stats = apply_networks(params)
    outputs = {'embeddings': embeddings}

    def add(name, network, network_name, x):
      if network is not None:
        outputs[name], batch_stats[network_name] = train_state.apply_network(
          network, network_name, params, state.batch_stats, x, train=True
        )

    add('predictions', parts.predictor, 'predictor', embeddings)
    add('logits', parts.classifier, 'classifier', features)
    if parts.target == 'moving_average':
      # In training mode, too: it normalizes over the batch.
      outputs['targets'] = apply_networks(state.target)[1]
  outputs = {
    name: x.reshape(num_views, batch_size, -1) for name, x in outputs.items()
  }
  return outputs, batch_stats


@jax.named_scope('losses')
def _losses(parts, state, outputs, examples, axis_name):
  """Returns the total loss, its terms by name and the labels of CLOP."""
  labels = examples['label']
  embeddings = outputs['embeddings']
  terms = {
    'contrastive_loss': _contrastive_loss(parts, outputs, labels, axis_name)
  }
  clop_labels = labels
  if parts.pseudo_labels is not None:
    clop_labels = parts.pseudo_labels(
      embeddings, labels, state.prototypes, state.step
    )
  terms['clop_loss'] = parts.clop(
    embeddings, clop_labels, state.prototypes, axis_name=axis_name
  )
  weight = parts.clop_weight * parts.prototype_rule.clop_factor(state.step)
  total = terms['contrastive_loss'] + weight * terms['clop_loss']
  if parts.classifier is not None:
    terms['cross_entropy'] = loss.cross_entropy_loss(
      outputs['logits'], labels, axis_name=axis_name
    )
    total += parts.cross_entropy_weight * terms['cross_entropy']
  return total, (terms, clop_labels)


def _contrastive_loss(parts, outputs, labels, axis_name):
  embeddings = outputs['embeddings']
  if parts.predictor is None and parts.target == 'none':
    return parts.contrastive(embeddings, labels, axis_name=axis_name)
  predictions = outputs.get('predictions', embeddings)
  targets = outputs.get('targets', embeddings)
  if parts.target != 'none':
    targets = lax.stop_gradient(targets)
  return siamese.asymmetric_loss(
    parts.contrastive, predictions, targets, labels, axis_name=axis_name
  )


def _sometimes(condition, measure):
  """Returns `measure()` if the condition is true, else zeros.

  The singular values of a large batch cost more than a small network's step.
  """
  shapes = jax.eval_shape(measure)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  with jax.named_scope('diagnostics'):
    return lax.cond(condition, measure, lambda: zeros)


def _pseudo_label_metrics(batch, labels, axis_name):
  """Returns the share of pseudo-labelled examples and their accuracy."""
  given = (batch['label'] < 0) & (labels >= 0)
  known = given & (batch['true_label'] >= 0)
  right = known & (labels == batch['true_label'])
  counts = [batch['label'] < 0, given, known, right]
  counts = jnp.stack([jnp.sum(x, dtype=jnp.float32) for x in counts])
  if axis_name is not None:
    counts = lax.psum(counts, axis_name)
  unlabelled, given, known, right = counts
  return {
    'pseudo_label_share': given / unlabelled,
    # NaN if there is none.
    'pseudo_label_accuracy': right / known,
  }
