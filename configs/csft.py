"""Conditional fine-tuning: all images, with their quality as a prefix of the prompt.

  python -m jaxpref.main --config=configs/csft.py

This is a baseline of the KTO papers. The evaluation and `jaxpref.generate` then use the good
prefix; in other programs, add it to the prompts of an exported model. On the shapes world,
whose tokenizer has no words for quality, the prefixes are single signs. `sd15` and `sdxl` use
Diffusion-DPO's optimizer; `sd35m`, `sana` and `flux` that of their preset, because no recipe is
published. An image is good if it ever won a pair; half of the sampled images are good
(`data.desirable_share`).
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("csft", preset)
  if preset in ("shapes", "tiny"):
    c.data.good_prefix, c.data.bad_prefix = "+ ", "- "
  else:
    c.data.good_prefix, c.data.bad_prefix = "good image, ", "bad image, "
  c.data.desirable_share = 0.5
  return c
