"""Listwise DPO: the whole ranking of several images of a prompt.

  python -m jaxpref.main --config=configs/listwise.py

This applies Plackett and Luce's model to Diffusion-DPO's rewards. The shapes world has lists
of four images. `sd15` and `sdxl` use Diffusion-DPO's optimizer and beta, but there is not yet
a source of ranked lists for them: `data.source=pickapic` has pairs, and refuses lists.
`sd35m`, `sana` and `flux`: no published recipe; the numbers are those of `configs/dpo.py`.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("listwise", preset)
  c.loss.beta = 5000.0  # strength of the tie to the reference
  if preset in base_config.FLOWS:
    c.loss.beta = 100.0
  return c
