"""SPIN-Diffusion: real images over those that the previous iterate draws.

  python -m jaxpref.main --config=configs/spin.py

After Yuan et al. 2024 (https://arxiv.org/abs/2402.10210): each iteration draws an image for
the caption of each of the data's, trains with DPO's loss to prefer the data's, with the model
before it as reference, and begins the next from the averaged result. `sd15` and `sdxl`:
learning rate 2e-5, batch 2048 and 500 updates an iteration, each with a linear schedule of its
own after 200 updates of warm-up, are those of the published models' cards. They give no beta:
2000 throughout is ours (2000 in the first iteration and 5000 in later ones could not be
confirmed). So are guidance 7.5 and 50 steps of DPM-Solver++ for the opponents, the number of
pairs, and `data.min_change`.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """The run's configuration."""
  c = base_config.base("spin", preset)
  c.loss.beta = 2000.0  # how much the policy is bound to the previous iterate
  base_config.iterate(c, winners="data")
  if preset == "shapes":  # the best of six settings, see docs/methods.md
    c.optim.lr = 1e-4
    c.loss.beta = 200.0
    c.train.num_updates = 50
  if preset in ("sd15", "sdxl"):
    c.data.experts = "winners"
    c.data.num_experts = 0  # all that memory holds: set it, see docs/losses.md
    c.optim.lr = 2e-5
    c.optim.schedule = "linear"  # in each iteration anew
    c.optim.warmup_updates = 200
    c.train.num_updates = 500
    c.iterate.num_pairs = 100_000
    c.iterate.shard_size = 1024
  return c
