"""A run, ready to go: its data, networks and compiled step."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np

from clop_jax import defaults
from clop_jax import fields
from clop_jax.data import reader as reader_lib
from clop_jax.data import sources
from clop_jax.experiment import build
from clop_jax.experiment import inputs
from clop_jax.runtime import parallel
from clop_jax.training import program as program_lib
from clop_jax.training import train_state


@dataclasses.dataclass(frozen=True)
class Examples:
  """Training examples and their labels.

  Attributes:
    source: Examples with the labels of the data set.
    is_named: True if the config names the source, so that the run can be
      evaluated from its workdir alone.
    true_labels: Labels of the data set, `[n]` int32.
    labels: Labels that training sees, `[n]` int32; -1 is unlabelled.
    reader: Reader of the training images.
  """

  source: sources.Source
  is_named: bool
  true_labels: np.ndarray
  labels: np.ndarray
  reader: reader_lib.Reader


@dataclasses.dataclass(frozen=True)
class Setup:
  """A run that is ready to go; see `prepare` and `plan`.

  Attributes:
    config: Config with the number of classes.
    mesh: Mesh of the devices.
    data: Loader of the training batches, or only their shapes.
    experiment: Networks, optimizer and train step.
    total_steps: Number of steps of the whole run.
    state: Shapes, dtypes and shardings of the training state.
    shared: Arguments of every dispatch, see `program.Program`.
    program: Train step, to be compiled for each length of a dispatch.
    examples: Training examples, see `Examples`; None for a plan.
  """

  config: ml_collections.ConfigDict
  mesh: Mesh
  data: Any
  experiment: build.Experiment
  total_steps: int
  state: train_state.TrainState
  shared: dict[str, Any]
  program: program_lib.Program
  examples: Any = None

  @property
  def save_every(self) -> int:
    """Number of steps between two checkpoints."""
    epochs = self.config.train.checkpoint_every_epochs
    return epochs * self.data.steps_per_epoch

  def chunks(self, start: int = 0) -> list[range]:
    """Returns the steps from `start` on, as one range for each dispatch."""
    train = self.config.train
    boundaries = (train.log_every_steps, self.save_every)
    chunks = []
    while start < self.total_steps:
      ends = [(start // every + 1) * every for every in boundaries]
      end = min(start + train.steps_per_dispatch, self.total_steps, *ends)
      chunks.append(range(start, end))
      start = end
    return chunks

  @property
  def longest(self) -> int:
    """Number of steps of the longest dispatch."""
    return max(map(len, self.chunks()))


def prepare(
  config: ml_collections.ConfigDict,
  *,
  source: sources.Source | None = None,
  backbone: Any = None,
  contrastive: Callable[..., jax.Array] | None = None,
  devices=None,
  load: bool = True,
) -> Setup:
  """Prepares a run, and checks the config and the data.

  Nothing is written or compiled. The train step is traced, which finds the
  remaining wrong values.

  Args:
    config: Config of the run, see `defaults`.
    source: Training examples to use instead of those that `config.data` names.
    backbone: Backbone to use instead of `config.model.name`, see
      `models.adapters`.
    contrastive: Loss `(embeddings, labels, *, axis_name) -> scalar` to use
      instead of `config.loss.contrastive`, see `clop_jax.loss`.
    devices: Devices to train on; None is all.
    load: If False, do not read the images, for checks and previews.

  Returns:
    The setup.

  Raises:
    ValueError: If a field of the config is invalid, the data do not fit it, or
      the devices cannot share the batch.
    OSError: If the data cannot be read.

  Example:
    >>> import jax
    >>> from clop_jax import defaults
    >>> from clop_jax.experiment import setup
    >>> config = defaults.get_config()
    >>> config.data.name = 'synthetic'
    >>> run = setup.prepare(config, devices=jax.devices()[:1], load=False)
    >>> run.total_steps == config.train.num_epochs * run.data.steps_per_epoch
    True
  """
  config = _with_given(config, backbone, contrastive)
  defaults.check(config)
  mesh = parallel.make_mesh(devices)
  parallel.check_batch_size(config.train.batch_size, mesh)
  config, examples = read_labels(config, source)
  if examples.is_named:
    inputs.check_evaluation(config)
  shared = _shared(config, examples.true_labels)
  reader = examples.reader
  data: Any
  if load:
    data = inputs.training_loader(config, reader, mesh)
    shared = parallel.replicate(mesh, shared)
  else:
    data = inputs.abstract_loader(
      config, mesh, num_examples=len(reader), image_shape=reader.shape
    )
  given = {'backbone': backbone, 'contrastive': contrastive}
  setup = _setup(config, mesh, data, shared, given=given, examples=examples)
  _check_best(setup)
  return setup


def read_labels(
  config: ml_collections.ConfigDict, source: sources.Source | None = None
) -> tuple[ml_collections.ConfigDict, Examples]:
  """Reads the labels of the training examples, but no image.

  Arguments and errors are those of `prepare`.

  Returns:
    The config with the number of classes, and the examples.
  """
  is_named = source is None
  if source is None:
    source = inputs.training_source(config)
  config = inputs.with_num_classes(config, source)
  true_labels = sources.labels_of(source)
  labels = inputs.training_labels(config, true_labels)
  reader = inputs.training_reader(config, source, labels)
  return config, Examples(source, is_named, true_labels, labels, reader)


def plan(
  config: ml_collections.ConfigDict,
  mesh: Mesh,
  *,
  num_examples: int,
  image_shape: tuple[int, int, int],
  platform: str | None = None,
) -> Setup:
  """Returns the setup of a run on shapes instead of arrays.

  Its program can be traced, and lowered for another platform, but not called.

  Args:
    config: Config of the run; `data.num_classes` must be set.
    mesh: Mesh of the devices, which need not be attached to this process.
    num_examples: Number of training images.
    image_shape: `(height, width, channels)` of the images in the data set.
    platform: Platform whose defaults the config takes, see `build.build`.
      None is the mesh's.

  Raises:
    ValueError: If a field of the config is invalid, or the batch does not fit
      the devices or the data.
  """
  data = inputs.abstract_loader(
    config, mesh, num_examples=num_examples, image_shape=image_shape
  )
  true_labels = np.zeros(num_examples, np.int32)
  shared = build.abstract(lambda: _shared(config, true_labels), mesh)
  return _setup(config, mesh, data, shared, platform=platform)


def _with_given(config, backbone, contrastive):
  """Records in the config what was passed from Python."""
  if backbone is None and contrastive is None:
    return config
  config = ml_collections.ConfigDict(config.to_dict())
  if backbone is not None:
    config.model.name = fields.GIVEN
  if contrastive is not None:
    config.loss.contrastive = fields.GIVEN
  return config.lock()


def _setup(
  config, mesh, data, shared, *, given=None, platform=None, examples=None
):
  total_steps = count_steps(config, data.steps_per_epoch)
  experiment = build.build(
    config,
    total_steps=total_steps,
    steps_per_epoch=data.steps_per_epoch,
    platform=platform or mesh.devices.flat[0].platform,
    **(given or {}),
  )
  state = build.abstract_state(experiment, mesh)
  shared = shared | {'resident': data.resident}
  return Setup(
    config=config,
    mesh=mesh,
    data=data,
    experiment=experiment,
    total_steps=total_steps,
    state=state,
    shared=shared,
    program=program_lib.Program(experiment.step, mesh, data, state, shared),
    examples=examples,
  )


def _shared(config, true_labels):
  """Returns the arguments of every dispatch other than the data."""
  # Numbers are arguments, not constants, so that runs that differ only in them
  # share an entry of JAX's compilation cache.
  numbers = jax.tree.map(np.float32, build.numbers_of(config))
  shared = {'key': build.training_key(config), 'numbers': numbers}
  if config.loss.pseudo_label_threshold is not None:
    shared['true_label'] = true_labels.astype(np.int32)
  return shared


def count_steps(config: ml_collections.ConfigDict, steps_per_epoch: int) -> int:
  """Returns the number of steps of a run."""
  steps = config.train.num_epochs * steps_per_epoch
  if steps >= 2**31:
    raise ValueError(
      f'config.train.num_epochs={config.train.num_epochs} makes {steps:,} '
      f'steps, and at most {2**31 - 1:,} can be counted'
    )
  return steps


def _check_best(setup):
  """Raises ValueError if `train.keep_best` names no metric that is logged."""
  train = setup.config.train
  names = setup.program.metric_names(setup.longest)
  if train.keep_best is None:
    return
  if train.keep_best not in names:
    raise ValueError(
      f'config.train.keep_best must be one of {names}, or None; got '
      f'{train.keep_best!r}'
    )
  if train.log_every_steps > min(setup.save_every, setup.total_steps):
    raise ValueError(
      f'config.train.log_every_steps={train.log_every_steps} logs nothing '
      f'between two checkpoints ({setup.save_every} steps), and '
      f'config.train.keep_best={train.keep_best!r} needs the log; lower '
      'log_every_steps'
    )
