"""Online DPO: the best of a prompt's samples is preferred to the worst.

  python -m jaxpref.main --config=configs/online_dpo.py

Diffusion-DPO's loss on pairs that each round samples and scores. `sd15` and `sdxl`: the best
and the worst of 24 images, beta 100 and the learning rate 3e-4 of LoRA, with the base as
reference, are those of Flow-GRPO's code (https://github.com/yifan123/flow_grpo), there for the
error of the velocity of SD 3.5 Medium: `sd35m`, with 40 solver steps. `sana` and `flux` have
the same numbers with 20 and 28 steps; no recipe is published for them. Number of prompts,
updates and scorer are our choices; LoRA's rank is, too, except for `sd35m`.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("online_dpo", preset)
  base_config.rounds(c)
  c.loss.name = "dpo"
  c.loss.reference = "base"
  c.loss.beta = 100.0 if preset in base_config.PUBLISHED else 5000.0  # strength of the tie
  c.loss.variant = "sigmoid"  # or 'hinge' or 'ipo'
  c.rollout.guidance = c.evaluate.guidance
  if preset == "shapes":
    c.rounds.num_prompts = 32
    c.train.batch_size = 32
    c.optim.lr = 1e-4
  if preset in base_config.PUBLISHED:
    c.train.batch_size, c.train.accumulate = 24, 3
  if preset in base_config.FLOWS:
    c.rollout.num_steps = c.evaluate.num_steps
  return c
