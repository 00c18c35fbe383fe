"""AlignProp: maximise a differentiable scorer through a random number of the last steps.

  python -m jaxpref.main --config=configs/alignprop.py

After Prabhudesai et al. 2023 (https://arxiv.org/abs/2310.03739). From the authors' code are 50
steps of DDIM with eta 1 and guidance 5, a first step with a gradient from N(42, 5), so 8 steps
on average, the loss 0.01 (1 - cosine) of HPSv2, which is 1e-4 |100 - score| here, LoRA with
AdamW at 1e-3, weight decay 1e-4 and clipping at 1, 128 images an update, and 25 updates.
More than 20 steps are cut here, which is rare. HPSv2's version and the rank of LoRA are our
choices. No numbers for SDXL are published; `sdxl` uses the same.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.NO_FLOWS  # DDIM does not sample flow matching


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("alignprop", preset)
  base_config.pathwise(c)
  c.pathwise.eta = 1.0
  c.pathwise.last, c.pathwise.mean, c.pathwise.std = 8, 3.0, 2.0
  if preset == "tiny":
    c.pathwise.last, c.pathwise.mean, c.pathwise.std = 2, 1.5, 1.0
  if preset in base_config.PUBLISHED:
    base_config.align_by_lora(c)
    c.pathwise.last, c.pathwise.mean, c.pathwise.std = 20, 8.0, 5.0
    c.pathwise.scorers = ("hpsv2.v2_1",)
    c.loss.variant, c.loss.target, c.loss.scale = "distance", 100.0, 1e-4
    c.rollout.guidance = 5.0
  return c
