"""Diffusion-DPO: prefer, against a frozen reference, the image that people chose.

  python -m jaxpref.main --config=configs/dpo.py

tunes the bundled pipeline on the shapes world's pairs. `loss.variant` is 'sigmoid' (Wallace
et al. 2023), 'hinge' or 'ipo', see `jaxpref.losses.dpo`. `sd15` and `sdxl` are the authors'
launchers (https://github.com/SalesforceAIResearch/DiffusionDPO): beta 5000, learning rate
1e-8 a row, batch 2048, 2000 updates; AdamW here for both, where they use Adafactor for SDXL.
'hinge' and 'ipo' have no published recipe for diffusion models: 5000 is not a recommendation
for IPO, whose target for the margin is 1 / (2 beta).

`--config.model.start=W` begins with another run's model, such as SFT's, which then is the
reference, too, as with the authors' `--unet_init`; `--config.loss.reference=base` keeps
the base.

`sd35m` is Flow-GRPO's DPO (https://github.com/yifan123/flow_grpo): beta 100 on errors of the
velocity. At noise level sigma these are 1 / (1 - sigma)^2 times those of the noise, so 5000
does not carry over. `sana` and `flux` have no published recipe: beta is that of `sd35m`, the
optimizer Diffusion-DPO's for `sana` and that of `sd35m` for `flux`.
`jaxpref.base_config.presets` has the other numbers.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("dpo", preset)
  c.loss.beta = 5000.0  # strength of the tie to the reference
  c.loss.variant = "sigmoid"  # or 'hinge' or 'ipo'
  if preset in base_config.FLOWS:
    c.loss.beta = 100.0
  return c
