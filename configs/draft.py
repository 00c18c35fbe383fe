"""DRaFT-K: maximise a differentiable scorer through the last K steps of the sampler.

  python -m jaxpref.main --config=configs/draft.py
  python -m jaxpref.main --config=configs/draft.py --config.pathwise.last=5

After Clark et al. 2023 (https://arxiv.org/abs/2309.17400). Their code is not public: all
numbers are our choices, those of the optimizer as in AlignProp's code, see `alignprop`.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.NO_FLOWS  # DDIM does not sample flow matching


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("draft", preset)
  base_config.pathwise(c)
  if preset in base_config.PUBLISHED:
    base_config.align_by_lora(c)
  return c
