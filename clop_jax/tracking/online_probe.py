"""Probe of a running training by the evaluation protocol."""

from collections.abc import Callable
import functools
import os
from typing import Any

from clop_jax.evaluation import protocol
from clop_jax.experiment import metrics_log
from clop_jax.experiment import setup as setup_lib
from clop_jax.runtime import parallel

FILE = 'probe.jsonl'
_MEASURES: dict[str, tuple[Callable, ...]] = {
  'knn': (protocol.knn,),
  'linear': (protocol.linear,),
  'both': (protocol.knn, protocol.linear),
}


class Probe:
  """Evaluates the state of a training, and writes `probe.jsonl`."""

  def __init__(self, setup: setup_lib.Setup, workdir: str, frozen: Callable):
    """Checks the data and writes nothing; see `Pictures` for the arguments.

    Raises:
      ValueError: If there is no test split, or the evaluation batch does not
        fit the devices.
    """
    self._config, self._mesh, self._frozen = setup.config, setup.mesh, frozen
    self._path = os.path.join(workdir, FILE)
    self._lines: metrics_log.JsonLines | None = None
    self._readers = _readers(setup)

  def check(self) -> None:
    """Raises ValueError if `probe.jsonl` is damaged."""
    metrics_log.check(self._path)

  def open(self, start: int) -> int:
    """Cuts `probe.jsonl` back to the step `start`.

    Returns:
      Step of the last probe before, 0 if there is none.
    """
    self._lines = metrics_log.JsonLines(self._path, start=start)
    return self._lines.last_step

  def measure(self, step: int, variables: Any) -> dict[str, float | None]:
    """Measures and writes the accuracies; every process must call it.

    Args:
      step: Step of the variables.
      variables: Variables of the networks, not changed and not kept.

    Returns:
      Results by name; None for measures that do not exist.

    Raises:
      FloatingPointError: If features are not finite.
    """
    apply = functools.partial(self._frozen, variables)
    features, labels = {}, {}
    for split, reader in self._readers.items():
      features[split], _, labels[split] = protocol.extract(
        self._config, reader, apply, self._mesh
      )
    results = {}
    for measure in _MEASURES[self._config.watch.probe]:
      results |= measure(self._config, features, labels)
    if self._lines is not None:
      self._lines.write(step, results)
      shown = ', '.join(
        f'{name} {results[name]:.4f}'
        for name in ('knn_top1', 'linear_top1')
        if name in results
      )
      metrics_log.say(f'step {step}: {shown}')
    return results

  def close(self) -> None:
    if self._lines is not None:
      self._lines.close()


def _readers(setup):
  """Returns the readers of the protocol's splits."""
  config = setup.config
  field = f'config.watch.probe_every_epochs={config.watch.probe_every_epochs}'
  reason = ''
  if not setup.examples.is_named:
    reason = 'a custom source has none'
  elif not config.data.test_split:
    reason = 'config.data.test_split is empty'
  if reason:
    raise ValueError(
      f'{field} needs a test split, but {reason}; set it to 0 and evaluate '
      'after the training'
    )
  try:
    parallel.check_batch_size(config.eval.batch_size, setup.mesh)
    return protocol.readers(config)
  except ValueError as error:
    raise ValueError(f'{field}: {error}') from error
