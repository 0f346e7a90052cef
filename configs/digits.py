"""SimCLR with CLOP on 1,797 real handwritten digits (8x8): minutes on a CPU.

python -m clop_jax.train --config=configs/digits.py --workdir=runs/digits
python -m clop_jax.evaluate --workdir=runs/digits

Needs no download. Override any field of clop_jax/defaults.py, as
--config.loss.clop_weight=0
"""

import ml_collections

from clop_jax import defaults


def get_config() -> ml_collections.ConfigDict:
  """The defaults are this experiment."""
  config = defaults.get_config()
  config.data.label_fraction = 0.1
  return config.lock()
