"""The improvement model: generates a better version of its input image.

  python -m jaxpref.main --config=configs/improver.py

This adds the latents of a clean image to the inputs of the bundled pipeline's UNet and trains
it on the pairs of the shapes world, with three tasks in one batch (`jaxpref.losses.improver`).
At the end it improves the base's own images of held-out prompts, and the report compares the
two. `jaxpref.generate --improver` and `configs/iterative_dpo.py` use the run.

`sd15` and `sdxl`: AdamW at 1e-4, batch 2048, up to 200,000 updates, and guidance 3.5 and 3.0
are the paper's. It does not publish the weights of the tasks; one half of the rows for the
first task is our choice. The input's latents are scaled like all others; InstructPix2Pix does
not scale its own, which are then 5.5 times larger for SD 1.5. Rows need no prompt dropout: two
of the tasks have no prompt.

The presets `sd35m`, `sana` and `flux` are missing, because the inputs of these models are not
widened.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.NO_FLOWS


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("improver", preset)
  c.loss.weight_winning = 0.5  # share of rows with the loser as input, and the prompt
  c.loss.weight_reconstruction = 0.25  # share of rows with the target as input, no prompt
  c.loss.weight_unconditional = 0.25  # share of rows without an input image and prompt
  c.data.prompt_dropout = 0.0
  c.data.dropped_prompt = "unconditional"  # as in sampling; zeros for SDXL
  base_config.improve(c)
  if preset == "shapes":
    c.optim.lr = 1e-3
    c.train.batch_size = 64
    c.train.num_updates = 2000
    c.train.updates_per_iteration = 200
  if preset in ("sd15", "sdxl"):
    c.optim.lr = 1e-4
    c.optim.warmup_updates = 0
    c.optim.ema_decay = 0.9999
    c.train.num_updates = 200_000
    c.train.updates_per_iteration = 2000
  return c
