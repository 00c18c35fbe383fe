"""D3PO: pairs of the policy's steps, by which of two images of a prompt has the larger reward.

  python -m jaxpref.main --config=configs/d3po.py

`sd15` is D3PO (Yang et al. 2024, https://arxiv.org/abs/2311.13231), from
https://github.com/yk7333/d3po: DDIM of 20 steps with eta 1 and guidance 5, two images of each
of 20 prompts a round from a common starting noise, an update for each pair with all of its
steps, beta 0.1, ratios clipped at 0.1, LoRA of rank 4, AdamW at 3e-5 with a weight decay of
1e-4, 400 rounds. Scorers are our choice. With that beta and clip the loss stays between 0.683
and 0.703: it is nearly linear in the log-ratios.

`sdxl` has the numbers of `sd15`. `shapes` has its own beta, rounds, learning rate and number of
steps. `sd35m`, `sana` and `flux` have the sampler of Flow-GRPO (`configs/ppo.py`), whose step
to a clean image has no noise and is not trained.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("d3po", preset)
  c.loss.name = "step_pairs"
  base_config.rounds(c)
  base_config.steps(c)
  c.loss.beta = 10.0  # strength of the tie
  c.loss.clip = 0.1  # largest distance of a step's ratio from 1
  c.rounds.images_per_prompt = 2
  c.steps.common_start = True
  if preset == "tiny":
    c.rollout.num_steps = 3
    c.train.batch_size = 8  # pairs of steps: of 4 pairs of images, whose last step has no noise
  if preset == "shapes":
    c.rollout.guidance = c.evaluate.guidance
    c.rounds.num_prompts = 32
    c.steps.trained = 4
    c.train.batch_size = 128
  if preset in base_config.PUBLISHED:
    c.loss.beta = 0.1
    c.rounds.num_prompts, c.rounds.updates = 20, 20
    c.train.batch_size = 9 if preset in base_config.FLOWS else 20  # steps of a pair
    c.train.accumulate = c.train.batch_size
    c.train.num_updates = 400 * c.rounds.updates
    c.train.updates_per_iteration = 20 * c.rounds.updates
    c.rollout.num_steps = 20
    c.rollout.guidance = 5.0
    c.lora.rank, c.lora.alpha = 4, 4.0
    c.optim.lr = 3e-5
  if preset in base_config.FLOWS:
    base_config.sample_as_flow_grpo(c)
  return c
