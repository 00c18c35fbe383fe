"""DSPO: score matching towards the winner, away from the reference.

  python -m jaxpref.main --config=configs/dspo.py

After Zhu et al., ICLR 2025, in the form and with the beta of 1e-3 of Fu et al.'s code
(https://github.com/AIDC-AI/Diffusion-SDPO), whose `sd15` optimizer is Diffusion-DPO's and
whose `sdxl` learning rate is 1e-9 a row. (For SDXL that code trains another, thresholded
form; it is not taken over.)

`sd35m`, `sana` and `flux`: no published recipe. Beta is that of `sd15`, the optimizer the
preset's.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("dspo", preset)
  c.loss.beta = 0.001  # weight of the step away from the reference
  if preset == "sdxl":
    c.optim.lr = 2.048e-6
    c.optim.warmup_updates = 500
  return c
