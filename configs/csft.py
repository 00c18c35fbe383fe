"""Conditional fine-tuning: every image, with its quality said in the prompt.

  python -m jaxpref.main --config=configs/csft.py

A baseline of the KTO papers; the evaluation and `jaxpref.generate` then draw with the good
prefix, which other programs must be told with an exported model. On the shapes
world, whose tokenizer has no words for it, the prefixes are single signs. `sd15` and `sdxl`
take over Diffusion-DPO's optimizer. An image is good if it ever won a pair; half of
those sampled are (`data.desirable_share`).
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """The run's configuration."""
  c = base_config.base("csft", preset)
  if preset in ("shapes", "tiny"):
    c.data.good_prefix, c.data.bad_prefix = "+ ", "- "
  else:
    c.data.good_prefix, c.data.bad_prefix = "good image, ", "bad image, "
  c.data.desirable_share = 0.5
  return c
