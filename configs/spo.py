"""SPO: the best and the worst of several candidates from one state.

  python -m jaxpref.main --config=configs/spo.py

After Liang et al. 2024 (https://arxiv.org/abs/2406.04314). A scorer judges each candidate by
the model's own prediction of the clean image from there; a random candidate goes on. In the
paper the scorer is PickScore, trained further on such predictions, with the timestep as an
input: `steps.judge` takes the workdir of such a run of `configs/step_reward.py`. By default it
is any differentiable scorer as it is: `rounds.scorers`.

`sd15` has the numbers of https://github.com/RockeyCoss/SPO but for the scorer: DDIM of 20 steps
with eta 1 and guidance 5, 4 candidates from step 4 on, pairs whose probabilities differ by more
than 0.3, beta 10, ratios clipped at 0.1, AdamW at 6e-5 with a weight decay of 1e-4, LoRA of
rank 4, 40 prompts a round and 40 pairs an update on four devices, 10 epochs of 4000 prompts.
There a pair that is not decided takes no place in an update. `sdxl` differs as there: 2
candidates that are compared after four steps, 0.4, LoRA of rank 64, 1e-5, 8 prompts a round and
16 pairs an update. `shapes` has numbers of its own. `sd35m`, `sana` and `flux` have the sampler
of Flow-GRPO (`configs/ppo.py`).
"""

from ml_collections import ConfigDict

from jaxpref import base_config

PRESETS = base_config.PRESETS


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  c = base_config.base("spo", preset)
  base_config.rounds(c)
  base_config.steps(c)
  base_config.candidates(c)
  c.loss.beta = 10.0  # strength of the tie
  rounds = 1000  # ten epochs
  if preset == "shapes":
    c.steps.first = 2
    c.train.batch_size = 224  # seven steps of each image
  if preset in base_config.PUBLISHED:
    c.steps.first, c.steps.gap = 2 if preset in base_config.FLOWS else 4, 0.3
    c.rounds.updates = 7 if preset in base_config.FLOWS else 16  # as many steps of 40 images
    c.train.batch_size, c.train.accumulate = 40, 4
  if preset == "sdxl":
    c.steps.candidates, c.steps.apart, c.steps.gap = 2, 4, 0.4
    c.rounds.num_prompts = c.rounds.updates = c.rollout.batch_size = 8
    c.train.batch_size, rounds = 16, 5000
  if preset in base_config.PUBLISHED:
    c.train.num_updates = rounds * c.rounds.updates
    c.train.updates_per_iteration = rounds // 50 * c.rounds.updates
  if preset in base_config.FLOWS:
    base_config.sample_as_flow_grpo(c)
  return c
