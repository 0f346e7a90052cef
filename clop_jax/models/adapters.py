"""The backbone protocol of the trainer, and adapters for Flax modules.

A backbone is any object with two methods:

* `init(key, images) -> variables`
* `apply(variables, images, train) -> (features, variables)`

`variables` is a dict with `params`, which are trained, and optionally
`batch_stats`, which `apply` updates in training. `features` are `[batch,
feature_dim]`. If `apply` has a parameter `keys`, it receives one PRNG key for
each image in training, for dropout and the like, else None.
"""

from collections.abc import Callable
import dataclasses
import inspect
from typing import Any, Protocol

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp


class Backbone(Protocol):
  """Maps images to features; see the module's docstring."""

  def init(self, key: jax.Array, images: jax.Array) -> dict[str, Any]:
    """Returns the initial variables for images `[1, height, width, c]`."""
    ...

  def apply(
    self, variables: dict[str, Any], images: jax.Array, train: bool
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Returns features `[batch, feature_dim]` and the variables after it."""
    ...


@dataclasses.dataclass(frozen=True)
class Linen:
  """Adapter for a `flax.linen` module called as `module(images, train=...)`.

  For batch statistics over the global batch, give the module's `nn.BatchNorm`
  the axis name 'data'. Otherwise each device normalizes over its own images.

  Attributes:
    module: The module. If it has a parameter `keys`, it receives one key for
      each image. If not, `rngs` gets the first image's key.
    rngs: Names of the random number streams of the module, such as 'dropout'.
  """

  module: nn.Module
  rngs: tuple[str, ...] = ()

  def init(self, key, images):
    """Returns the module's initial variables."""
    return dict(self.module.init(key, images, train=False))

  def apply(self, variables, images, train, keys=None):
    """Applies the module; returns features and variables."""
    options = {}
    if train and keys is not None:
      if _takes_keys(type(self.module).__call__):
        options['keys'] = keys
      options['rngs'] = {
        name: jax.random.fold_in(keys[0], i) for i, name in enumerate(self.rngs)
      }
    features, updated = self.module.apply(
      variables,
      images,
      train=train,
      mutable=['batch_stats'] if train else [],
      **options,
    )
    return features, {**variables, **updated}


@dataclasses.dataclass(frozen=True)
class NNX:
  """Adapter for a `flax.nnx` module called as `module(images)`.

  The module's `train()` or `eval()` is called before. For batch statistics over
  the global batch, give its `nnx.BatchNorm` the axis name 'data'.

  Attributes:
    create: Function `(rngs: nnx.Rngs) -> module`.
  """

  create: Callable[[nnx.Rngs], nnx.Module]

  def init(self, key, images):
    """Returns the initial variables of a new module."""
    del images
    _, params, _, rest = _split(self.create(nnx.Rngs(key)))
    return {
      'params': nnx.to_pure_dict(params),
      'batch_stats': nnx.to_pure_dict(rest),
    }

  def apply(self, variables, images, train, keys=None):
    """Applies the module; returns features and variables."""
    key = jax.random.key(0) if keys is None else keys[0]
    # Its own random state is replaced, so it is in no checkpoint.
    module = self.create(nnx.Rngs(key))
    graph, params, random, rest = _split(module)
    nnx.replace_by_pure_dict(params, variables['params'])
    nnx.replace_by_pure_dict(rest, variables['batch_stats'])
    module = nnx.merge(graph, params, random, rest)
    module.train() if train else module.eval()
    features = module(images)
    _, _, _, rest = _split(module)
    return features, {**variables, 'batch_stats': nnx.to_pure_dict(rest)}


def _split(module):
  return nnx.split(module, nnx.Param, nnx.RngState, ...)


@dataclasses.dataclass(frozen=True)
class Checked:
  """A backbone whose inputs and outputs are checked while tracing.

  Attributes:
    backbone: See `Backbone`.
    name: Name for errors.
  """

  backbone: Any
  name: str

  def init(self, key, images):
    """Returns the initial variables, or raises a ValueError."""
    variables = self.backbone.init(key, images)
    if not isinstance(variables, dict) or 'params' not in variables:
      raise ValueError(
        f"{self.name}.init must return a dict with 'params', got "
        f'{_described(variables)}'
      )
    unknown = sorted({*variables} - {'params', 'batch_stats'})
    if unknown:
      raise ValueError(
        f"{self.name}.init must return only 'params' and 'batch_stats', got "
        f'{unknown} too; move what changes in training to batch_stats'
      )
    return {'batch_stats': {}, **variables}

  def apply(self, variables, images, train, keys=None):
    """Returns float32 features and the variables, or raises a ValueError."""
    options = {'keys': keys} if _takes_keys(self.backbone.apply) else {}
    result = self.backbone.apply(variables, images, train, **options)
    if not isinstance(result, tuple) or len(result) != 2:
      raise ValueError(
        f'{self.name}.apply must return (features, variables), got '
        f'{_described(result)}'
      )
    features, updated = result
    shape, batch = getattr(features, 'shape', ()), images.shape[0]
    if len(shape) != 2 or shape[0] != batch:
      raise ValueError(
        f'{self.name}.apply must return features of shape [batch, '
        f'feature_dim]=[{batch}, *], got {_described(features)}; pool '
        'or flatten the other axes'
      )
    return features.astype(jnp.float32), updated


def adapt(backbone: Any, name: str = 'backbone') -> Checked:
  """Returns a backbone of any supported kind as one that the trainer calls.

  Args:
    backbone: A `flax.linen` module, or an object as in the module's docstring.
    name: Name for errors.

  Raises:
    ValueError: If the object lacks `init` or `apply`.
  """
  if isinstance(backbone, Checked):
    return backbone
  if isinstance(backbone, nn.Module):
    backbone = Linen(backbone)
  for method in ('init', 'apply'):
    if not callable(getattr(backbone, method, None)):
      raise ValueError(
        f'{name} must be a flax.linen module or have init and apply (see '
        f'clop_jax.models.adapters), got {type(backbone).__name__}'
      )
  return Checked(backbone, name)


def _takes_keys(function):
  return 'keys' in inspect.signature(function).parameters


def _described(value):
  shape = getattr(value, 'shape', None)
  return type(value).__name__ if shape is None else f'shape {tuple(shape)}'
