"""Iterative DPO: the policy's own images against their improved versions.

  python -m jaxpref.main --config=configs/improver.py
  python -m jaxpref.main --config=configs/iterative_dpo.py

Each iteration generates losers with the previous model from the training prompts, improves
each of them with the improver that the first command trains, and trains Diffusion-DPO on the
pairs. The reference stays the base. `--config.model.start=W` begins with another run's model,
as the paper does with SPIN's third iterate; without it, training begins with the base.

`sd15` and `sdxl`: three iterations of 38,400 pairs and 5000 updates, batch 2048, learning rate
1e-4, beta 2000, s_T = 3.5 and s_I = 3.0 are the paper's. `data.min_change` and the guidance
for the losers are our choices.

`sd35m`, `sana` and `flux`: no published recipe, and no improver. Their winners are the images
of the data (`iterate.winners=data`), beta is that of `configs/dpo.py`, the number of pairs and
updates the paper's, and the learning rate the preset's.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("iterative_dpo", preset)
  c.loss.name = "dpo"
  c.loss.beta = 2000.0  # strength of the tie to the reference
  c.loss.reference = "base"  # not the previous iterate
  c.loss.variant = "sigmoid"  # or 'hinge' or 'ipo'
  base_config.iterate(c, winners="improved")
  c.iterate.improver = f"runs/improver-{preset}"  # the workdir of configs/improver.py
  c.data.experts = "winners"  # only the captions of the data are used, here all
  c.data.num_experts = 0
  if preset == "shapes":  # the best of six settings, see docs/online/results.json
    c.optim.lr = 1e-4
    c.loss.beta = 200.0
    c.train.num_updates = 50
  if preset in ("sd15", "sdxl"):
    c.optim.lr = 1e-4
    c.optim.warmup_updates = 0
  if preset in base_config.FLOWS:
    c.loss.beta = 100.0
    c.iterate.winners = "data"
    c.iterate.improver = ""
  if preset in base_config.PUBLISHED:
    c.train.num_updates = 5000
    c.iterate.num_pairs = 38_400
    c.iterate.shard_size = 1024
  if preset == "tiny":
    c.data.num_experts = 16
  return c
