"""DRaFT-LV: DRaFT with a gradient of low variance, through one step that is repeated.

  python -m jaxpref.main --config=configs/draft_lv.py

After Clark et al. 2023 (https://arxiv.org/abs/2309.17400): the sample is noised again to the
level of the last step, several times, and denoised; only that step has a gradient. Their code
is not public: all numbers are our choices, those of the optimizer as in AlignProp's code, see
`alignprop`.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.NO_FLOWS  # DDIM does not sample flow matching


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("draft_lv", preset)
  base_config.pathwise(c)
  c.pathwise.method = "renoised"
  if preset in base_config.PUBLISHED:
    base_config.align_by_lora(c)
  return c
