"""Advantage-weighted matching: the policy's samples, weighted by how good they are.

  python -m jaxpref.main --config=configs/awm.py

After Xue et al. 2025 (https://arxiv.org/abs/2509.25050), who train SD 3.5 Medium and Flux; no
numbers for SD 1.5, SDXL and SANA are published. From the authors' code are 24 prompts of 24
images, sampled without guidance in 14 steps, advantages by the deviation of all rewards,
clipped at 5 and divided by 5, the ratio's clip of 1, the weights 0.001 of the reference and 1
of the average, whose decay is 0.3, and LoRA with the learning rate 3e-4. They train several
timesteps of each image and weight errors by the noise level; here each image has one random
timestep at each update, and no weight. Number of updates, scorer, LoRA's rank and the scale 3.5
that Flux is given are our choices.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("awm", preset)
  base_config.rounds(c)
  c.loss.strength = 0.2  # factor of the advantages
  c.loss.clip = 1.0  # half the width of the ratio's range
  c.loss.weight_reference = 0.001  # of the squared distance to the reference's predictions
  c.loss.weight_old = 1.0  # of the squared distance to the lagging average's predictions
  c.rounds.scale = "global"
  c.rounds.old_decay = 0.3
  c.rounds.old_rate = 1.0
  if preset in base_config.PUBLISHED:
    c.rollout.num_steps = 14
  return c
