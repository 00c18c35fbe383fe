"""Reference-free DPO with a target margin, after SimPO.

  python -m jaxpref.main --config=configs/simpo.py

A recipe for diffusion models is not published. `sd15` and `sdxl` use Diffusion-DPO's optimizer
and beta; the target margin is a first value to tune.
`sd35m`, `sana` and `flux`: no published recipe; beta is that of `configs/dpo.py`.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("simpo", preset)
  c.loss.beta = 5000.0  # scale of the difference of errors
  if preset in base_config.FLOWS:
    c.loss.beta = 100.0
  c.loss.target_margin = 0.5  # of the scaled difference of errors
  return c
