"""SimCLR with CLOP on 1,797 handwritten digits (8x8), minutes on a CPU.

python -m clop_jax.train --config=configs/digits.py --workdir=runs/digits
python -m clop_jax.evaluate --workdir=runs/digits

Needs no download. Any field of clop_jax/defaults.py can be overridden, as in
--config.loss.clop_weight=0
"""

import ml_collections

from clop_jax import defaults


def get_config() -> ml_collections.ConfigDict:
  """Returns the defaults with the changes of this experiment."""
  config = defaults.get_config()
  config.data.label_fraction = 0.1
  return config.lock()
