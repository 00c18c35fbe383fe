r"""Diffusion-DRO: rank expert images above the policy's own samples.

  python -m jaxpref.main --config=configs/dro.py

tunes the bundled pipeline on the 500 best images of the shapes world and compares it with
its base on held-out prompts. On images of your own, captions beside them:

  python -m jaxpref.main --config=configs/dro.py \
    --config.data.source=folder --config.data.path=DIR --workdir=runs/mine

After Wu et al., "Ranking-based Preference Optimization for Diffusion Models from Implicit
User Feedback", 2025: DPM-Solver++, fresh samples at every update, prompt dropout 0.2, AdamW.
The margin (1e-3 there), the solver's 10 steps (20 there), the learning rate, the batch and
the number of updates are this small model's own, whose errors are larger: with the
published margin the hinge soon closes for many of its pairs (`dro/active`).

`sd15` is the paper's recipe: margin 1e-3, 500 experts, batch 256, 1600 updates at 1e-4
without warm-up, horizontal flips, averaged weights. The public code's solver integrates
all samples of a batch on the first one's noise levels, ours each on its own, so gate values
differ (docs/dro.md). Their experts are Pick-a-Pic's best by
HPSv2: `score_0` and `score_1` in your parquet files are whatever scorer you choose. `sdxl`
takes over the same numbers, its experts in the paper being MJHQ-30k's best 500 by PickScore:
`--config.data.source=folder`.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """The run's configuration."""
  c = base_config.base("dro", preset)
  c.loss.margin = 0.05  # m: how far experts must lead, in mean squared error
  if preset in ("sd15", "sdxl"):
    c.loss.margin = 1e-3
    base_config.train_on_experts(c)
  return c
