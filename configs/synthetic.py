"""SimCLR with CLOP on classes in orthogonal subspaces, seconds on a CPU.

python -m clop_jax.train --config=configs/synthetic.py --workdir=runs/synthetic
python -m clop_jax.evaluate --workdir=runs/synthetic

Needs no download. The views are not cropped, because each pixel is a
coordinate. They differ in brightness and contrast.
"""

import ml_collections

from clop_jax import defaults


def get_config() -> ml_collections.ConfigDict:
  """Returns the defaults with the changes of this experiment."""
  config = defaults.get_config()

  config.data.name = 'synthetic'
  config.data.num_classes = 10
  config.data.label_fraction = 0.1
  options = config.data.options  # see clop_jax/data/synthetic.py
  options.num_classes = 10
  options.num_examples = 2000
  options.size = 8  # pixels
  options.subspace_dim = 2
  options.noise = 0.3  # standard deviation relative to the signal
  options.seed = 0

  config.augment.mean = (0.5,)
  config.augment.std = (0.157,)
  config.augment.crop_probability = 0.0
  return config.lock()
