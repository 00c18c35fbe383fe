"""MaPO: the winner's error and a bonus for each pair told apart, no reference.

  python -m jaxpref.main --config=configs/mapo.py

After Hong et al. 2024 (https://arxiv.org/abs/2406.06424): beta 0.1 and k 0.5 are defaults of
the authors' code (https://github.com/mapo-t2i/mapo); `sdxl`'s learning rate 1e-5 without
warm-up and 2000 updates of 16 rows a device are those of its README's example, which does not
drop prompts. They tune SDXL alone, `sd15` takes over the same numbers.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """The run's configuration."""
  c = base_config.base("mapo", preset)
  c.loss.beta = 0.1  # weight of the bonus
  c.loss.snr = 0.5  # k, a constant in the place of the signal-to-noise ratio
  if preset in ("sd15", "sdxl"):
    c.optim.lr = 1e-5
    c.optim.warmup_updates = 0
    c.data.prompt_dropout = 0.0
    c.train.batch_size = 128  # 16 a device on eight
    c.train.accumulate = 4
  return c
