"""A step-aware preference model: a scorer of predicted images that also reads their level.

  python -m jaxpref.main --config=configs/step_reward.py
  python -m jaxpref.main --config=configs/spo.py --config.steps.judge=runs/step_reward-shapes

After SPO, Liang et al. 2024 (https://arxiv.org/abs/2406.04314). Both images of a pair get the
same noise, the frozen denoiser predicts each clean image in one guided call, and a scorer whose
image tower is also given the timestep (`jaxpref.models.step_reward`) should rate the preferred
one higher. The run ends with its accuracy on pairs that were held out. `configs/spo.py` uses
the run.

`sd15` and `sdxl` have the numbers of https://github.com/RockeyCoss/SPO: PickScore as the start,
guidance 5, AdamW at 3e-6 and 1e-6 with weight decay 0.3, 500 updates of warm-up and a linear
fall to zero, 8000 and 7000 updates of 64 pairs, 16 for each of four devices: the accelerate
that it names replaces DeepSpeed's 16 steps of accumulation by one. What differs: the warm-up is
linear, there it is DeepSpeed's, logarithmic; ties are left out, there they have the label 1/2;
all pairs weigh the same, there the pairs of a prompt share a weight of one; and the labels of
`sdxl` are those of the data, there they are PickScore's. There, both learn from Pick-a-Pic v1.
`shapes` has numbers of its own.

The presets `sd35m`, `sana` and `flux` are missing, because no such model is published for
flow-matching models.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.NO_FLOWS


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("step_reward", preset)
  base_config.step_judge(c)
  c.loss.name = "latent_reward"  # the same loss, of other rewards
  c.data.prompt_dropout = 0.0
  if preset == "shapes":
    c.optim.lr = 3e-5
    c.optim.ema_decay = 0.99
    c.train.batch_size = 16
    c.train.num_updates = 200
    c.train.updates_per_iteration = 50
  if preset in base_config.PUBLISHED:
    c.optim.lr = 3e-6
    c.optim.warmup_updates = 500
    c.optim.weight_decay = 0.3
    c.optim.schedule = "linear"
    c.train.batch_size, c.train.accumulate = 64, 4
    c.train.num_updates = 8000
    c.train.updates_per_iteration = 500
  if preset == "sdxl":
    c.optim.lr = 1e-6
    c.train.num_updates = 7000
  return c
