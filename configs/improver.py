"""The improvement model: draws the better version of a picture that it is shown.

  python -m jaxpref.main --config=configs/improver.py

widens the bundled pipeline's UNet by the latents of a clean picture and trains it on the
shapes world's pairs, three tasks in one batch (`jaxpref.losses.improver`); at the end it
improves the base's own pictures of held-out prompts, and the report compares the two. The run
then is what `jaxpref.generate --improver` and `configs/iterative_dpo.py` take.

`sd15` and `sdxl`: AdamW at 1e-4, batch 2048, up to 200,000 updates, guidance 3.5 and 3.0 are
the paper's; it gives no weights of the tasks, and half of the rows to the first is ours.
The shown latents are scaled like all others; InstructPix2Pix leaves its own unscaled, 5.5 times
larger for SD 1.5. Rows need no prompt dropout: two of the tasks have no prompt.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """The run's configuration."""
  c = base_config.base("improver", preset)
  c.loss.weight_winning = 0.5  # how often a row is: shown the loser, told the prompt
  c.loss.weight_reconstruction = 0.25  # shown the target itself, told nothing
  c.loss.weight_unconditional = 0.25  # shown and told nothing
  c.data.prompt_dropout = 0.0
  c.data.dropped_prompt = "unconditional"  # what it is sampled with, for SDXL zeros
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
