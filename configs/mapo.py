"""MaPO: the winner's error and a bonus for the margin of each pair, without a reference.

  python -m jaxpref.main --config=configs/mapo.py

After Hong et al. 2024 (https://arxiv.org/abs/2406.06424). beta 0.1 and k 0.5 are the defaults
of the authors' code (https://github.com/mapo-t2i/mapo). The learning rate 1e-5 without warm-up
and the 2000 updates of 16 rows per device in `sdxl` are those of its README's example, which
does not drop prompts. The authors tune only SDXL; `sd15` uses the same numbers.

`sd35m`, `sana` and `flux`: no published recipe. `sana` uses the same numbers, `sd35m` and
`flux` the optimizer of the preset.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("mapo", preset)
  c.loss.beta = 0.1  # weight of the bonus
  c.loss.snr = 0.5  # k, a constant instead of the signal-to-noise ratio
  if preset in base_config.PUBLISHED:
    c.data.prompt_dropout = 0.0
  if preset in ("sd15", "sdxl", "sana"):
    c.optim.lr = 1e-5
    c.optim.warmup_updates = 0
    c.train.batch_size = 128  # 16 per device on eight devices
    c.train.accumulate = 4
  return c
