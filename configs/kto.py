"""Diffusion-KTO: images that are liked or not, without pairs.

  python -m jaxpref.main --config=configs/kto.py

After Li et al. 2024 (https://arxiv.org/abs/2404.04465): 80 % desirable images, learning rate
1e-7 with 200 updates of warm-up and 20,000 updates are those of the authors' example
(https://github.com/jacklishufan/diffusion-kto); beta is 5000 in the paper, 1000 by default in
the code. An image is liked if it ever won a pair, and images are sampled with replacement so
that four of five are liked (`data.desirable_share`). `loss.utility` is 'kt', 'loss_averse' or
'risk_seeking'. Their example trains two images on each of four devices; the batch of 128 here
is ours.

`sd35m`, `sana` and `flux`: no published recipe. Beta is DPO's on errors of the velocity, as the
paper's is DPO's on those of the noise. `sana` uses the numbers of the example otherwise,
`sd35m` and `flux` the optimizer of the preset.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("kto", preset)
  c.loss.beta = 5000.0  # scale of the implicit reward
  c.loss.utility = "kt"  # or 'loss_averse' or 'risk_seeking'
  c.loss.weight_desirable = 1.0  # of liked images
  c.loss.weight_undesirable = 1.0  # of the others
  if preset in base_config.FLOWS:
    c.loss.beta = 100.0
  if preset in ("sd15", "sdxl", "sana"):
    c.optim.lr = 1e-7
    c.optim.warmup_updates = 200
    c.train.batch_size = 128
    c.train.accumulate = 4
    c.train.num_updates = 20_000
  return c
