"""Advice for a run that is out of memory."""

import re

import jax
import ml_collections

_EXHAUSTED = re.compile(
  r'RESOURCE_EXHAUSTED|out[ _]of[ _]memory|ALLOC_FAILED|bad_alloc', re.I
)


def is_exhausted(error: Exception) -> bool:
  """Returns True for an error of XLA that is about a device's memory."""
  return isinstance(error, jax.errors.JaxRuntimeError) and bool(
    _EXHAUSTED.search(str(error))
  )


def device_advice(
  config: ml_collections.ConfigDict,
  *,
  has_data: bool = True,
  share: float = 1.0,
) -> str:
  """Returns the fields that lower the memory of a step, best first.

  Args:
    config: Config of the run.
    has_data: False if the data set is not on the devices.
    share: Share of a device's memory that JAX takes.
  """
  train, loss = config.train, config.loss
  is_blockable = loss.contrastive in ('nt_xent', 'supcon')
  advice = {
    f'raise config.train.num_micro_batches (now {train.num_micro_batches})': 1,
    f'lower config.train.batch_size (now {train.batch_size})': 1,
    "set config.model.dtype='bfloat16'": config.model.dtype == 'float32',
    'set config.loss.block_size=512': is_blockable and loss.block_size is None,
    "set config.data.loader='stream'": (
      has_data and config.data.loader != 'stream'
    ),
    'raise XLA_PYTHON_CLIENT_MEM_FRACTION in the environment (JAX takes '
    f'{share:g} of a GPU by default)': share < 1,
    'use more devices': 1,
  }
  return f'To make it fit: {", ".join(k for k, v in advice.items() if v)}'


def host_advice(config: ml_collections.ConfigDict) -> str:
  """Returns the fields that lower the memory of the host."""
  data = config.data
  return (
    f'To make it fit: lower config.data.num_workers (now {data.num_workers}), '
    f'config.data.prefetch (now {data.prefetch}), config.data.image_size (now '
    f'{data.image_size}) or config.train.batch_size (now '
    f"{config.train.batch_size}), set config.data.loader='stream' (now "
    f'{data.loader!r}), or use a machine with more memory'
  )
