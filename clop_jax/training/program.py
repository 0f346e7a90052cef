"""The train step, compiled for dispatches of one or more steps."""

import jax
from jax import lax

from clop_jax.data import loader
from clop_jax.runtime import parallel


class Program:
  """Traces, lowers and compiles the train step for each length of a dispatch.

  A dispatch is a `lax.scan` over its steps, so that the host does not have to
  keep up with the devices.
  """

  def __init__(self, step, mesh, data, state, shared):
    """Prepares the program; nothing is traced yet.

    Args:
      step: Function `(state, batch, key, numbers) -> (state, metrics)`.
      mesh: Mesh of the devices, see `parallel.make_mesh`.
      data: Loader whose `structure` the batches have.
      state: Training state, or its shapes.
      shared: Arguments of every dispatch, or their shapes: `resident`, `key`,
        `numbers` and, with pseudo-labels, `true_label`.
    """
    self.arguments = (state, shared)
    self._data = data
    self._traced, self._compiled = {}, {}

    def steps(state, shared, batches):
      def one(state, batch):
        examples = loader.unpack(shared['resident'], batch)
        if 'true_label' in shared:
          index = examples['index']
          examples = examples | {'true_label': shared['true_label'][index]}
        return step(state, examples, shared['key'], shared['numbers'])

      if jax.tree.leaves(batches)[0].shape[0] > 1:
        return lax.scan(one, state, batches)
      # The compiler optimizes less inside a loop, even of one round.
      state, metrics = one(state, jax.tree.map(lambda x: x[0], batches))
      return state, jax.tree.map(lambda x: x[None], metrics)

    self._steps = parallel.map_step(steps, mesh, batch_axes=(None, None, 1))

  def trace(self, count: int):
    """Returns the traced dispatch of `count` steps."""
    if count not in self._traced:
      structure = self._data.structure(count)
      self._traced[count] = self._steps.trace(*self.arguments, structure)
    return self._traced[count]

  def metric_names(self, count: int) -> list[str]:
    """Returns the names of the metrics of a dispatch of `count` steps."""
    _, metrics = self.trace(count).out_info
    return sorted(metrics)

  def __call__(self, count: int):
    """Returns `(state, shared, batches) -> (state, metrics)`, compiled."""
    if count not in self._compiled:
      self._compiled[count] = self.trace(count).lower().compile()
    return self._compiled[count]
