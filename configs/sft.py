"""Supervised fine-tuning on the experts: what preference methods are measured against.

  python -m jaxpref.main --config=configs/sft.py

The same experts, batch, learning rate and number of updates as configs/dro.py, with the
denoising error alone as the loss; also for `sd15` and `sdxl`.
"""

from ml_collections import ConfigDict

from configs import common

PRESETS = common.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """The run's configuration."""
  c = common.base("sft", preset)
  if preset in ("sd15", "sdxl"):
    c.data.flip = True
    c.optim.lr = 1e-4
    c.optim.warmup_updates = 0
    c.optim.ema_decay = 0.9999
    c.train.batch_size = 256
    c.train.accumulate = 16
    c.train.num_updates = 1600
  return c
