"""DGPO: preferences within a group of samples of one prompt.

  python -m jaxpref.main --config=configs/dgpo.py

After Luo et al. 2025 (https://arxiv.org/abs/2510.08425), who train SD 3.5 Medium; no numbers
for SD 1.5, SDXL, SANA and Flux are published. From the authors' code for PickScore are groups
of 24 (24 groups, which it recommends; it has 8), timestep and noise shared within a group,
samples of 10 steps with guidance 4.5 and training without, advantages by the deviation of all
rewards, beta 10, the ratio's clip of 0.05, the weight 0.001 of the reference, and the average's
decay of 0.001 times the updates done, at most 0.3. For GenEval and OCR it has beta 100, the
clip of 0.01 and the weight 0.02. They train 4 of the noisiest timesteps; here each group has
one random timestep at each update. Learning rate, LoRA's rank and number of updates are our
choices; Flux is given the scale 3.5 in both. `shapes` has the beta and the clip of GenEval.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("dgpo", preset)
  base_config.rounds(c)
  c.loss.beta = 100.0  # strength of the tie to the reference
  c.loss.clip = 0.01  # half the width of the ratio's range
  c.loss.weight_reference = 0.001  # of the squared distance to the reference's predictions
  c.rounds.old_decay = 0.3
  c.rollout.guidance = c.evaluate.guidance
  if preset in base_config.PUBLISHED and preset != "flux":
    c.rollout.guidance = 4.5
  if preset == "shapes":
    c.train.batch_size = 8  # groups per update, over all devices and micro-batches
  if preset in base_config.PUBLISHED:
    c.loss.beta, c.loss.clip = 10.0, 0.05
    c.rounds.scale = "global"
    c.rollout.num_steps = 10
    c.train.batch_size, c.train.accumulate = 24, 3
  return c
