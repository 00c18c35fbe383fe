"""Best of n: fine-tuning on the best of each prompt's samples.

  python -m jaxpref.main --config=configs/best_of.py

Each round samples `rounds.images_per_prompt` images for each prompt, and trains on the one with
the highest reward with SFT's loss. A method without a source: the numbers are our choices.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("best_of", preset)
  base_config.rounds(c)
  c.loss.name = "sft"
  c.rollout.guidance = c.evaluate.guidance
  if preset == "shapes":
    c.rounds.num_prompts = 64
    c.rounds.updates = 5
    c.optim.lr = 1e-4
  if preset in base_config.PUBLISHED:
    c.rounds.num_prompts, c.rounds.images_per_prompt = 256, 8
    c.rounds.updates = 5
    c.optim.lr = 1e-4
    c.train.batch_size, c.train.accumulate = 256, 8
  return c
