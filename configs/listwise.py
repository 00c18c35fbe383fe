"""Listwise DPO: the whole ranking of several images of a prompt.

  python -m jaxpref.main --config=configs/listwise.py

Plackett and Luce's model on Diffusion-DPO's rewards. On the shapes world lists of four; for
`sd15` and `sdxl`, which take over Diffusion-DPO's optimizer and beta, there is no source of
ranked lists yet: `data.source=pickapic` has pairs, and says so.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """The run's configuration."""
  c = base_config.base("listwise", preset)
  c.loss.beta = 5000.0  # how much the policy is bound to the reference
  return c
