"""PRDP: pairs of the policy's trajectories, by the difference of their rewards.

  python -m jaxpref.main --config=configs/prdp.py

After Deng et al. 2024 (https://arxiv.org/abs/2402.08714), who train Stable Diffusion 1.4. Their
code is unpublished, and all numbers here are ours: DDIM with eta 1 and all of its steps, as in
DDPO, pairs of images of a prompt, and a beta for rewards that are divided by the deviation of
all of them. Log-probabilities are means over a latent's elements, so a beta of 5000 for Stable
Diffusion's 16,384 elements stands for 0.3 of their sum, and 30 for the 256 of `shapes` for 0.1.
With 300 and a learning rate of 3e-4 instead of 3e-5, the loss of `shapes` grows.
`loss.clip` is DDPO's; it matters only with `rounds.updates` above 1.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("prdp", preset)
  base_config.rounds(c)
  base_config.steps(c)
  c.loss.beta = 5000.0 if preset in base_config.PUBLISHED else 30.0  # strength of the tie
  c.loss.clip = 1e-4  # largest change of a step's log-ratio in a round
  c.rounds.scale = "global"
  c.rounds.clip = 0.0  # rewards are not clipped
  if preset == "tiny":
    c.rollout.num_steps = 2
    c.train.batch_size = 4  # pairs
  if preset == "shapes":
    c.rollout.guidance = c.evaluate.guidance
    c.rollout.num_steps = 10
    c.rounds.num_prompts, c.rounds.images_per_prompt = 32, 2
    c.train.batch_size = 32
    c.optim.lr = 3e-5
  if preset in base_config.PUBLISHED:
    c.rounds.num_prompts, c.rounds.images_per_prompt = 64, 2
    c.rollout.num_steps = 50
    c.rollout.guidance = 5.0
    c.train.batch_size, c.train.accumulate = 64, 16
  if preset in base_config.FLOWS:
    base_config.sample_as_flow_grpo(c)
    c.loss.beta = 20_000.0
  return c
