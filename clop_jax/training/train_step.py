"""One training step, a pure function of (state, batch, key)."""

from collections.abc import Callable
import dataclasses

from flax import linen as nn
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
from clop_jax.training import train_state

_FIXED = prototype_rules.Fixed()


def train_step(
  state: train_state.TrainState,
  batch: dict[str, jax.Array],
  key: jax.Array,
  *,
  backbone: nn.Module,
  projection_head: nn.Module,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  recipe: dict,
  contrastive: Callable[..., jax.Array],
  clop_weight: float,
  clop: Callable[..., jax.Array] = loss.clop_loss,
  prototype_rule: prototype_rules.Rule = _FIXED,
  pseudo_labels: Callable[..., jax.Array] | None = None,
  log_every: int = 1,
  bn_scope: str = 'global',
  num_micro_batches: int = 1,
  axis_name: str | None = 'data',
  pmean_gradients: bool = False,
) -> tuple[train_state.TrainState, dict[str, jax.Array]]:
  r"""Two views, one forward pass, the sum of the losses, one update.

  .. math:: L = L_{contrastive}(Z) + \lambda\, L_{CLOP}(Z, y, C)

  With `num_micro_batches` above 1 the networks see a part of the shard at a
  time, in two passes (see `grad_cache`): memory for views and activations is
  one micro-batch's, the losses and their gradient are still those of the whole
  global batch. Batch normalization then takes its statistics over one
  micro-batch (with `bn_scope='global'` over all devices' m-th one, a part of
  the global batch), alike in both passes: the gradient is exact for that
  network, which is another one than the undivided batch gives. Each micro-batch
  starts from the old running statistics, and the mean of what they make of them
  are the new ones. Without batch normalization the step is the undivided one.

  Written for one shard of the batch; `parallel.map_step` maps it. It also runs
  under `jax.pmap` (with `pmean_gradients=True`) and, with `axis_name=None`, on
  one device under `jax.jit`.

  Args:
    state: the state, the same on every device.
    batch: this shard's `image` `[batch, height, width, channels]` uint8 (or
      `[batch, 2, size, size, channels]`: a crop for each view), `label`
      `[batch]` (-1: unlabelled) and `index` `[batch]`, the examples' numbers in
      the data set. With `pseudo_labels` also `true_label` `[batch]`, by which
      they are measured and nothing else; -1 where nobody knows it.
    key: the run's PRNG key, the same at every step and on every device.
    backbone: images to features; its `axis_name` is this one.
    projection_head: features to embeddings; likewise.
    tx: the Optax chain.
    schedule: learning rate as a function of the step, as `tx` has it; reported.
    recipe: keyword arguments of `augment.view`.
    contrastive: `(embeddings, labels, axis_name=...) -> loss`.
    clop_weight: lambda, the weight of the CLOP loss; 0 trains without it (it
      is still reported).
    clop: `(embeddings, labels, prototypes, axis_name=...) -> loss`.
    prototype_rule: how the prototypes change.
    pseudo_labels: `(embeddings, labels, prototypes, step) -> labels` for the
      CLOP loss; None: those of the batch alone.
    log_every: the diagnostics (norms, effective rank, ...) are made on steps
      that are a multiple of this; on others they are 0.
    bn_scope: as in the networks. With 'device' the running statistics are the
      mean of the devices' own.
    num_micro_batches: micro-batches of a shard; it divides `batch`.
    axis_name: the mapped axis, or None.
    pmean_gradients: average the gradients over the axis; for `jax.pmap` only,
      see `clop_jax.loss`.

  Returns:
    The next state, and metrics: float32 scalars, the same on every device.

  Raises:
    ValueError: if `num_micro_batches` is below 1 or does not divide the shard's
      batch.
  """

  def embed(params, examples):
    with jax.named_scope('augmentation'):
      keys = augment.example_keys(key, state.step, examples['index'])
      images = examples['image']
      if images.ndim == 5:
        # Two crops of each example, made by the loader.
        images = images.swapaxes(0, 1)
      views = augment.two_views(keys, images, **recipe)
    num_views, batch_size = views.shape[:2]
    # Both views in one pass: half the launches, and batch statistics over all.
    images = views.reshape(num_views * batch_size, *views.shape[2:])
    with jax.named_scope('networks'):
      _, embeddings, batch_stats = train_state.apply_networks(
        backbone, projection_head, params, state.batch_stats, images, train=True
      )
    return embeddings.reshape(num_views, batch_size, -1), batch_stats

  @jax.named_scope('losses')
  def loss_of(embeddings, examples):
    labels = examples['label']
    contrastive_loss = contrastive(embeddings, labels, axis_name=axis_name)
    if pseudo_labels is not None:
      labels = pseudo_labels(embeddings, labels, state.prototypes, state.step)
    clop_loss = clop(embeddings, labels, state.prototypes, axis_name=axis_name)
    weight = clop_weight * prototype_rule.clop_factor(state.step)
    total = contrastive_loss + weight * clop_loss
    return total, (contrastive_loss, clop_loss, labels)

  value, embeddings, batch_stats, gradients = grad_cache.value_and_grad(
    embed,
    loss_of,
    state.params,
    batch,
    num_micro_batches=num_micro_batches,
    axis_name=None if pmean_gradients else axis_name,
  )
  total, (contrastive_loss, clop_loss, clop_labels) = value
  if pmean_gradients:
    gradients = lax.pmean(gradients, axis_name)
  if bn_scope == 'device' and axis_name is not None:
    batch_stats = lax.pmean(batch_stats, axis_name)
  with jax.named_scope('gradients'):
    gradients = optimizer.in_row_order(gradients)
  with jax.named_scope('optimizer'):
    updates, opt_state = tx.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
  step = state.step + 1

  def prototype_gradient():
    gradient = jax.grad(clop, argnums=2)(
      embeddings, clop_labels, state.prototypes, axis_name=axis_name
    )
    return lax.pmean(gradient, axis_name) if pmean_gradients else gradient

  with jax.named_scope('prototypes'):
    prototypes, prototype_statistics = prototype_rule.update(
      state.prototypes,
      state.prototype_statistics,
      step=step,
      embeddings=embeddings,
      labels=batch['label'],
      gradient=prototype_gradient,
      axis_name=axis_name,
    )

  def diagnostics():
    labels = jnp.broadcast_to(batch['label'], embeddings.shape[:-1])
    of_embeddings = collapse.batch_measures(
      embeddings, labels, state.prototypes, axis_name=axis_name
    )
    gradient_norm, update_norm, parameter_norm = optimizer.global_norms(
      gradients, updates, params
    )
    return of_embeddings | {
      'gradient_norm': gradient_norm,
      'update_norm': update_norm,
      'parameter_norm': parameter_norm,
      'orthonormality_error': prototypes_lib.orthonormality_error(prototypes),
    }

  shapes = jax.eval_shape(diagnostics)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  # The singular values of a large batch cost more than a small network's step.
  with jax.named_scope('diagnostics'):
    metrics = lax.cond(step % log_every == 0, diagnostics, lambda: zeros)
  metrics |= {
    'loss': total,
    'contrastive_loss': contrastive_loss,
    'clop_loss': clop_loss,
    'learning_rate': jnp.asarray(schedule(state.step), jnp.float32),
  }
  if pseudo_labels is not None:
    metrics |= _pseudo_label_metrics(batch, clop_labels, axis_name)
  state = dataclasses.replace(
    state,
    step=step,
    params=params,
    batch_stats=batch_stats,
    opt_state=opt_state,
    prototypes=prototypes,
    prototype_statistics=prototype_statistics,
  )
  return state, metrics


def _pseudo_label_metrics(batch, labels, axis_name):
  """How many unlabelled examples were given a label, and how many rightly."""
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
    # NaN where there is none, which is not an accuracy of 0.
    'pseudo_label_accuracy': right / known,
  }
