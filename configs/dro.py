r"""Diffusion-DRO: rank expert images above the policy's own samples.

  python -m jaxpref.main --config=configs/dro.py

tunes the bundled pipeline on the 500 best images of the shapes world and compares it with its
base on held-out prompts. For your own images with captions beside them:

  python -m jaxpref.main --config=configs/dro.py \
    --config.data.source=folder --config.data.path=DIR --workdir=runs/mine

After Wu et al., "Ranking-based Preference Optimization for Diffusion Models from Implicit User
Feedback", 2025: DPM-Solver++, fresh samples at every update, prompt dropout 0.2, AdamW.
`shapes` has its own margin (1e-3 in the paper), 10 solver steps (20 in the paper), learning
rate, batch and number of updates, because the errors of this small model are larger: with the
published margin, the hinge soon closes for many of its pairs (`dro/active`).

`sd15` is the paper's recipe: margin 1e-3, 500 experts, batch 256, 1600 updates at 1e-4 without
warm-up, horizontal flips, EMA weights. The public code's solver integrates all samples of a
batch on the noise levels of the first sample; ours uses each sample's own, so gate values
differ (docs/dro.md). The paper's experts are Pick-a-Pic's best images by HPSv2: the scorer of
`score_0` and `score_1` in your parquet files is your choice. `sdxl` uses the same numbers; its
experts in the paper are the best 500 images of MJHQ-30k by PickScore:
`--config.data.source=folder`.

`sd35m`, `sana` and `flux`: no published recipe, because the paper has none for flow matching.
They use the paper's numbers for SD 1.5; the learning rate of LoRA is Flow-GRPO's. Errors are
those of the noise, in which the loss is the paper's and its margin has a meaning; those of the
velocity (`--config.loss.space=v`) need a larger one, because they are not damped at high noise.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("dro", preset)
  # Experts are chosen by data.num_experts instead.
  c.data.num_rows = 0
  c.loss.margin = 0.05  # m: margin of the experts, in mean squared error
  if preset in base_config.PUBLISHED:
    c.loss.margin = 1e-3
    base_config.train_on_experts(c)
  if preset in base_config.FLOWS:
    c.loss.space = "eps"
    c.noise.density = "uniform"  # a rollout's levels are evenly spaced before the shift
  return c
