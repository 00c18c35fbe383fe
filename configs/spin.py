"""SPIN-Diffusion: real images against samples of the previous iterate.

  python -m jaxpref.main --config=configs/spin.py

After Yuan et al. 2024 (https://arxiv.org/abs/2402.10210). Each iteration generates an image
for the caption of each real image, trains with DPO's loss to prefer the real ones with the
previous model as reference, and starts the next iteration from the EMA weights. `sd15` and
`sdxl`: the learning rate 2e-5, batch 2048 and 500 updates per iteration, each iteration with a
new linear schedule after 200 updates of warm-up, are those of the published models' cards. The
cards give no beta: 2000 in all iterations is our choice (2000 in the first and 5000 in later
ones could not be confirmed). Guidance 7.5 and 50 steps of DPM-Solver++ for the losers, the
number of pairs, and `data.min_change` are our choices, too.

`sd35m`, `sana` and `flux`: no published recipe. Beta is that of `configs/dpo.py`; `sd35m` and
`flux` have the batch and learning rate of the preset; all other numbers are those of `sd15`.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("spin", preset)
  c.loss.beta = 2000.0  # strength of the tie to the previous iterate
  base_config.iterate(c, winners="data")
  if preset == "shapes":  # the best of six settings, see docs/methods.md
    c.optim.lr = 1e-4
    c.loss.beta = 200.0
    c.train.num_updates = 50
  if preset in base_config.FLOWS:
    c.loss.beta = 100.0
  if preset in base_config.PUBLISHED:
    c.data.experts = "winners"
    c.data.num_experts = 0  # 0 reads all; set what memory holds, see docs/losses.md
    if preset not in base_config.LORA_FLOWS:
      c.optim.lr = 2e-5
    c.optim.schedule = "linear"  # starts again in each iteration
    c.optim.warmup_updates = 200
    c.train.num_updates = 500
    c.iterate.num_pairs = 100_000
    c.iterate.shard_size = 1024
  return c
