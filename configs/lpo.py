"""LPO: the best and the worst of several candidates by a latent reward model.

  python -m jaxpref.main --config=configs/latent_reward.py
  python -m jaxpref.main --config=configs/lpo.py

After Zhang et al. 2025 (https://arxiv.org/abs/2502.01051). As SPO (`configs/spo.py`), but the
candidates themselves are rated, noised as they are, by the model of the first command:
without a prediction of the clean image for each, and without a decoder. Here it is given the
candidate's own level; the published code gives it the level before the step.

`sd15` has the numbers of https://github.com/Kwai-Kolors/LPO: DDIM of 20 steps with eta 1 and
guidance 5, 4 candidates of every step, pairs whose probabilities differ by more than 0.35 at
the step with the least noise and 0.5 at that with the most, beta 500, ratios clipped at 0.1,
AdamW at 6e-5 with a weight decay of 1e-4, LoRA of rank 4, 5 prompts and 10 pairs for each of
eight devices. `sdxl` differs as there: 0.45 and 0.6, LoRA of rank 64, 1e-5, 4 prompts and 4
pairs. The number of prompts is SPO's, 4000, for 5 epochs. `shapes` has numbers of its own.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.NO_FLOWS


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("lpo", preset)
  base_config.rounds(c)
  base_config.steps(c)
  base_config.candidates(c)  # its scorers rate whole images, for the alarms
  c.loss.beta = 500.0  # strength of the tie
  c.steps.judge = f"runs/latent_reward-{preset}"
  rounds = 500  # five epochs
  if preset == "shapes":
    c.train.batch_size = 288  # nine steps of each image
    c.loss.beta = 20.0  # more would follow noise: latents have few numbers
    c.optim.lr = 1e-4
  if preset in base_config.PUBLISHED:
    c.steps.gap, c.steps.gap_noisy = 0.35, 0.5
    c.rounds.updates = 10  # of 80 steps: all 20 of 40 images
    c.train.batch_size, c.train.accumulate = 80, 8
  if preset == "sdxl":
    c.rounds.num_prompts, c.train.batch_size, c.train.accumulate = 32, 32, 8
    c.steps.gap, c.steps.gap_noisy = 0.45, 0.6
    c.rounds.updates, rounds = 20, 625
  if preset in base_config.PUBLISHED:
    c.train.num_updates = rounds * c.rounds.updates
    c.train.updates_per_iteration = 20 * c.rounds.updates
  return c
