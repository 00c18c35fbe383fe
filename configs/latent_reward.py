"""A latent reward model: it judges noised latents, by preference pairs.

  python -m jaxpref.main --config=configs/latent_reward.py

After LPO, Zhang et al. 2025 (https://arxiv.org/abs/2502.01051). The first half of the UNet,
with its level and prompt as inputs, rates latents without a decoder
(`jaxpref.models.reward_model`). It learns from the pairs of the data, at all noise levels, with
equal noise for both images. The run ends with its accuracy on pairs that were held out.
`configs/lpo.py` uses the run.

`sd15` and `sdxl` have the learning rate of https://github.com/Kwai-Kolors/LPO, 1e-5, its 4000
updates and its batch, 8 devices with 16 pairs; all timesteps, where its code takes every 50th.
There the pairs are filtered by three scorers, which is left to the data here. The pooled text
of SD 1.5 is the mean of the encoded tokens; there it is CLIP's. `shapes` has numbers of its
own.

The presets `sd35m`, `sana` and `flux` are missing, because no such model is published for
transformers.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.NO_FLOWS


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("latent_reward", preset)
  base_config.judge(c)
  c.data.prompt_dropout = 0.0
  if preset == "shapes":
    c.optim.lr = 1e-4
    c.optim.ema_decay = 0.99
    c.train.batch_size = 32
    c.train.num_updates = 300
    c.train.updates_per_iteration = 50
  if preset in base_config.PUBLISHED:
    c.optim.lr = 1e-5
    c.optim.warmup_updates = 0
    c.optim.ema_decay = 0.99
    c.train.batch_size, c.train.accumulate = 128, 8
    c.train.num_updates = 4000
    c.train.updates_per_iteration = 500
  return c
