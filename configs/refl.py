"""ReFL: maximise a differentiable scorer of the prediction at a random late step.

  python -m jaxpref.main --config=configs/refl.py

After Xu et al. 2023 (https://arxiv.org/abs/2304.05977). From the authors' code are 40 steps
without guidance, of which one from 30 to 39 is chosen, the loss 1e-3 max(2 - ImageReward, 0),
all parameters, the learning rate 1e-5, 64 images an update and 100 updates. Their sampler
adds noise (DDPM); this one is DDIM's. Their paper also has the loss of pretraining, which their
trainer leaves out, as this one does. One step is chosen for all images of an update; there each
device chooses. No numbers for SDXL are published; `sdxl` uses the same.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.NO_FLOWS  # DDIM does not sample flow matching


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("refl", preset)
  base_config.pathwise(c)
  c.pathwise.method = "predicted"
  c.pathwise.first, c.pathwise.end = 15, 20
  c.rollout.guidance = 1.0
  if preset == "tiny":
    c.pathwise.first, c.pathwise.end = 1, 2
  if preset in base_config.PUBLISHED:
    c.pathwise.first, c.pathwise.end = 30, 40
    c.pathwise.scorers = ("imagereward.v1",)
    c.loss.variant, c.loss.target, c.loss.scale = "hinge", 2.0, 1e-3
    c.rollout.num_steps = 40
    c.optim.lr = 1e-5
    c.train.batch_size, c.train.accumulate = 64, 8
    c.train.num_updates, c.train.updates_per_iteration = 100, 20
  return c
