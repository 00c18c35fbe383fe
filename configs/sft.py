"""Supervised fine-tuning on the experts: what preference methods are measured against.

  python -m jaxpref.main --config=configs/sft.py

The same experts, batch, learning rate and number of updates as configs/dro.py, with the
denoising error alone as the loss; also for `sd15` and `sdxl`. `sd35m`, `sana` and `flux`: no
published recipe, so the same numbers, on errors of the velocity and logit-normal levels.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("sft", preset)
  # Experts are chosen by data.num_experts instead.
  c.data.num_rows = 0
  if preset in base_config.PUBLISHED:
    base_config.train_on_experts(c)
  return c
