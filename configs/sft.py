"""Supervised fine-tuning on the experts: what preference methods are measured against.

  python -m jaxpref.main --config=configs/sft.py

The same experts, batch, learning rate and number of updates as configs/dro.py, with the
denoising error alone as the loss.
"""

from ml_collections import ConfigDict

from configs import common

PRESETS = common.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """The run's configuration."""
  return common.base("sft", preset)
