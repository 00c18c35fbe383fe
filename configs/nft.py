"""DiffusionNFT: learn from good samples, and from bad ones mirrored at the sampling policy.

  python -m jaxpref.main --config=configs/nft.py

After Zheng et al. 2025 (https://arxiv.org/abs/2509.16117), who train SD 3.5 Medium; no numbers
for SD 1.5, SDXL, SANA and Flux are published. From the authors' code are 48 prompts of 24
images, sampled without guidance in 10 steps by the lagging average, one update of all of them,
beta 1, the clip of 5, the weight 0.0001 of the reference, the average's decay of 0.001 times
the updates done, at most 0.5, EMA weights of 0.9, and LoRA with the learning rate 3e-4. They
train all timesteps of the sampler, with errors of the clean image; here each image has one
random timestep at each update, and errors are of the network's prediction. Number of updates,
scorer, LoRA's rank and the deviation of all rewards are our choices. Flux is given the scale
3.5.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("nft", preset)
  base_config.rounds(c)
  c.loss.beta = 1.0  # how far the two predictions are from the sampling policy's
  c.loss.clip = 5.0  # advantages of this size are the best and the worst
  c.loss.weight_reference = 1e-4  # of the squared distance to the reference's predictions
  c.rounds.sampler = "old"
  c.rounds.scale = "global"
  c.rounds.old_decay = 0.5
  if preset in base_config.PUBLISHED:
    c.rounds.num_prompts = 48
    c.rollout.num_steps = 10
    c.train.batch_size, c.train.accumulate = 1152, 18
  return c
