"""SPIN-Diffusion: real images over those that the previous iterate draws.

  python -m jaxpref.main --config=configs/spin.py

After Yuan et al. 2024 (https://arxiv.org/abs/2402.10210): reference and opponent are the
policy as it was `rollout.refresh_every` updates ago, at each such step. Learning rate 2e-5,
batch 2048, 200 updates of warm-up and 500 updates an iterate are those of the published
models' cards; beta is 2000 in the first iterate there and 5000 in later ones, here 2000
throughout, and the warm-up is not repeated for each iterate. The opponents' images are drawn
anew for each batch, which for as many rows as the data has costs what drawing them beforehand
does. How the authors sampled them is not said: guidance 7.5 and 20 steps of DPM-Solver++ are
ours.
"""

from ml_collections import ConfigDict

from configs import common

PRESETS = common.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """The run's configuration."""
  c = common.base("spin", preset)
  c.loss.beta = 2000.0  # how much the policy is bound to the previous iterate
  c.rollout.refresh_every = 100
  c.rollout.guidance = 2.0
  if preset in ("sd15", "sdxl"):
    c.rollout.refresh_every = 500
    c.rollout.guidance = 7.5
    c.data.experts = "winners"
    c.data.num_experts = 0  # all that memory holds: set it, see docs/losses.md
    c.optim.lr = 2e-5
    c.optim.warmup_updates = 200
    c.train.num_updates = 1500  # three iterates
  if preset == "tiny":
    c.rollout.refresh_every = 2
  return c
