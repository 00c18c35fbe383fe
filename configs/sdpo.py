"""Diffusion-SDPO: DPO, or DSPO, with a guard for the winners.

  python -m jaxpref.main --config=configs/sdpo.py

After Fu et al. 2025 (https://arxiv.org/abs/2511.03317) and their launchers
(https://github.com/AIDC-AI/Diffusion-SDPO): `loss.mu` 0.9 for SD1.5 and 0.6 for SDXL with
DPO's beta 5000, SDXL's learning rate 1e-9 a row. `loss.guarded=dspo` guards DSPO, there with
beta 0.001 and mu 0.2.

`sd35m`, `sana` and `flux`: no published recipe. Beta is that of `configs/dpo.py`, mu that of
`sd15`.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("sdpo", preset)
  c.loss.guarded = "dpo"  # or 'dspo'
  c.loss.beta = 5000.0  # as in the guarded loss
  c.loss.mu = 0.6 if preset == "sdxl" else 0.9  # share of the winners' descent that stays
  if preset in base_config.FLOWS:
    c.loss.beta = 100.0
  if preset == "sdxl":
    c.optim.lr = 2.048e-6
    c.optim.warmup_updates = 500
  return c
