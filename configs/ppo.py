"""Policy gradients on the steps of a stochastic sampler: DDPO.

  python -m jaxpref.main --config=configs/ppo.py

After Black et al. 2023 (https://arxiv.org/abs/2305.13301). From the authors' code in PyTorch
(https://github.com/kvablack/ddpo-pytorch), which trains Stable Diffusion 1.4, are for `sd15`
and `sdxl`: DDIM of 50 steps with eta 1 and guidance 5, all of whose steps are trained with that
guidance, 256 images a round for 4 updates, the ratio's clip of 1e-4, advantages clipped at 5,
LoRA of rank 4, and AdamW at 3e-4 with a weight decay of 1e-4. There prompts are few, and a
reward is compared with the last ones of its prompt (`rounds.window=16`); here each round has 16
images of each of 16 prompts, which are compared with each other. Number of updates and scorer
are our choices. No numbers for SDXL are published.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("ppo", preset)
  base_config.rounds(c)
  base_config.steps(c)
  c.loss.variant = "clipped"  # or 'score': the score function, or 'dpok': no maximum
  c.loss.clip = 1e-4  # largest distance of a step's ratio from 1
  c.loss.density = "gaussian"  # or 'square', for coefficient-preserving steps
  c.loss.weight_reference = 0.0  # of the distance to the reference's steps
  c.loss.tie = "step"  # that distance: 'step', 'scaled' by its length, 'prediction'
  if preset == "tiny":
    c.rollout.num_steps = 4
    c.train.batch_size = 24  # 8 images, 3 of whose 4 steps have noise
  if preset == "shapes":
    c.rollout.guidance = c.evaluate.guidance
    c.steps.trained = 4
    c.train.batch_size, c.train.accumulate = 256, 4
  if preset in base_config.PUBLISHED:
    c.rounds.num_prompts = c.rounds.images_per_prompt = 16
    c.rounds.updates = 4
    c.rollout.num_steps = 50
    c.rollout.guidance = 5.0
    c.lora.rank, c.lora.alpha = 4, 4.0
    c.train.batch_size, c.train.accumulate = 64 * 50, 200
    c.train.num_updates = 400
  return c
