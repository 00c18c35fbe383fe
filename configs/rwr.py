"""Reward-weighted regression: fine-tuning on samples, weighted by exp(beta reward).

  python -m jaxpref.main --config=configs/rwr.py

The baseline of DDPO (Black et al., 2023, https://arxiv.org/abs/2305.13301). `sd15` and `sdxl`:
10,240 images for each round, ten rounds of five passes, all parameters, the learning rate 1e-5
and beta 0.2 are those of the authors' code for SD 1.4. There, the prediction with guidance
is fitted to the noise; here the plain one, as in fine-tuning. Beta has the unit of an inverse
reward, so it fits the scorer. The batch of 256 is our choice.

`sd35m`, `sana` and `flux`: no published recipe. They use these numbers, with the steps and
guidance of their evaluation; `sd35m` and `flux` train LoRA at the learning rate of the preset.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("rwr", preset)
  base_config.rounds(c)
  c.loss.beta = 0.2 if preset in base_config.PUBLISHED else 3.0  # inverse temperature
  if preset == "shapes":
    c.rounds.num_prompts = 32
    c.rounds.updates = 20
    c.optim.lr = 1e-4
  if preset in base_config.PUBLISHED:
    c.rounds.num_prompts, c.rounds.images_per_prompt = 10_240, 1
    c.rounds.updates = 200
    c.rollout.num_steps = c.evaluate.num_steps
    c.rollout.guidance = c.evaluate.guidance if preset in base_config.FLOWS else 5.0
    if preset not in base_config.LORA_FLOWS:
      c.lora.rank = 0
      c.optim.lr = 1e-5
    c.train.batch_size, c.train.accumulate = 256, 8
    c.train.num_updates = 2000
  return c
