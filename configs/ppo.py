"""Policy gradients on the steps of a stochastic sampler: DDPO, DPOK and variants of GRPO.

  python -m jaxpref.main --config=configs/ppo.py
  python -m jaxpref.main --config=configs/ppo.py:sd15_dance

Numbers are from the authors' code unless they are said to be ours. Scorers (but for DPOK and
DanceGRPO), numbers of updates and averages of the weights (but for Flow-GRPO) are our choices,
and so are all of `sdxl`, which has those of `sd15`, and of `sana` and `flux`, which have those
of `sd35m`; Flux is given the scale 3.5. What is added to a deviation is Flow-GRPO's 1e-4, but
for DanceGRPO.

`sd15` is DDPO (Black et al. 2023, https://arxiv.org/abs/2305.13301), from
https://github.com/kvablack/ddpo-pytorch for SD 1.4: DDIM of 50 steps with eta 1, guidance 5,
all of whose steps are trained with that guidance, 256 images a round for 4 updates, the ratio's
clip of 1e-4, advantages clipped at 5, LoRA of rank 4, AdamW at 3e-4 with a weight decay of
1e-4. There prompts are few, and a reward is compared with the last ones of its prompt
(`rounds.window=16`); here a round has 16 images of each of 16 prompts, which are compared.

`sd15_dpok` is DPOK (Fan et al. 2023, https://arxiv.org/abs/2305.16381), from google-research's
code: guidance 7.5, 6 prompts a round, of each GPU there, 5 updates of 24 random steps each, no
maximum in the loss, ImageReward, the weight 0.01 of the predictions' distance to the base and
gradients clipped at 0.1, both of a loss whose advantages have the factor 100, LoRA of rank 4,
1e-5 without weight decay. There a learned value is subtracted from a reward; here it is the
mean of 5 images of its prompt.

`sd15_dance` is DanceGRPO (Xue et al. 2025, https://arxiv.org/abs/2505.07818) for SD 1.4: DDIM
of 50 steps with guidance 5, 16 images of each of 4 prompts, of each GPU there, for 2 updates, a
common starting noise (here of a prompt's images), advantages by the group's deviation, 49 of
the steps (there the first ones, here random ones), HPSv2.1, all parameters, 1e-5. `flux_dance`
has what it publishes for Flux: 16 steps with noise of the constant 0.3, 60 % of which are
trained, 12 images of a prompt, 3 updates; the number of prompts and LoRA are ours, and the
levels are the scheduler's, there with a shift of 3. `sd35m_dance` has the same for SD 3.5.

`sd35m` is Flow-GRPO (Liu et al. 2025, https://arxiv.org/abs/2505.05470), at 512 pixels: 10
steps with a = 0.7 and guidance 4.5, 9 of which are trained, 24 images of each of 48 prompts for
2 updates, advantages by the deviation of all rewards, the weight 0.01 of the distance to the
base (0.04 for GenEval and OCR), LoRA of rank 32. The last step, to a clean image, has noise
there and none here. `sd35m_fast` is its later variant: coefficient-preserving steps with a =
0.8 without guidance, only 3 of 10 steps with noise, which begin at random in the first half,
the ratio's clip of 1e-5, and no distance.

`flux_mix` is MixGRPO (Li et al. 2025, https://arxiv.org/abs/2507.21802) as published for Flux:
25 steps, 4 of which have noise and are trained, moved by one every 25 rounds, 12 images of a
prompt from a common starting noise, 4 updates. The number of prompts is ours. There 1e-5 trains
all parameters and levels have a shift of 3; here 3e-4 trains LoRA and levels are the
scheduler's. `sd35m_mix` has the same for SD 3.5, and guidance 4.5, which is ours.
"""

from ml_collections import ConfigDict

from jaxpref import base_config

VARIANTS = (
  *("sd15_dpok", "sd15_dance", "sd35m_fast", "sd35m_dance", "sd35m_mix"),
  *("flux_dance", "flux_mix"),
)
PRESETS = (*base_config.PRESETS, *VARIANTS)


def get_config(preset: str = "shapes") -> ConfigDict:
  """Returns the run's configuration."""
  model, _, variant = preset.partition("_")
  c = base_config.base("ppo", model)
  base_config.rounds(c)
  base_config.steps(c)
  c.loss.variant = "clipped"  # or 'score', 'dpok', 'guarded', 'region': see docs/rewards.md
  c.loss.clip = 1e-4  # largest distance of a step's ratio from 1; of 'region', a divergence
  c.loss.density = "gaussian"  # or 'square', for coefficient-preserving steps
  c.loss.weight_reference = 0.0  # of the distance to the reference's steps
  c.loss.tie = "step"  # that distance: 'step', 'scaled' by its length, 'prediction'
  if model == "tiny":
    c.rollout.num_steps = 4
    c.train.batch_size = 24  # 8 images, 3 of whose 4 steps have noise
  if model == "shapes":
    c.rollout.guidance = c.evaluate.guidance
    c.steps.trained = 4
    c.train.batch_size = 256
  if model in base_config.FLOWS:
    _set_flow_grpo(c)
  elif model in base_config.PUBLISHED:
    _set_ddpo(c)
  if variant:
    {"dpok": _set_dpok, "dance": _set_dance, "fast": _set_fast, "mix": _set_mix}[variant](c)
  return c


def _set_round(
  c: ConfigDict, *, prompts: int, images: int, updates: int, trained: int, at_once: int
) -> None:
  """Sets a round's size; `trained` steps an image are trained, `at_once` in a micro-batch."""
  c.rounds.num_prompts, c.rounds.images_per_prompt = prompts, images
  c.rounds.updates = updates
  c.train.batch_size = prompts * images * trained // updates
  c.train.accumulate = c.train.batch_size // at_once


def _set_ddpo(c: ConfigDict) -> None:
  _set_round(c, prompts=16, images=16, updates=4, trained=50, at_once=16)
  c.rollout.num_steps = 50
  c.rollout.guidance = 5.0
  c.lora.rank, c.lora.alpha = 4, 4.0
  c.train.num_updates = 400


def _set_dpok(c: ConfigDict) -> None:
  _set_round(c, prompts=6, images=5, updates=5, trained=4, at_once=2)
  c.steps.trained = 4
  c.rollout.guidance = 7.5
  c.loss.variant = "dpok"
  c.loss.tie = "prediction"
  c.loss.weight_reference = 1e-4
  c.rounds.scorers = ("imagereward.v1",)
  c.rounds.scale = "none"
  c.rounds.clip = 0.0
  c.optim.lr = 1e-5
  c.optim.weight_decay = 0.0
  c.optim.clip_norm = 0.1 / 100
  c.train.num_updates = 1000


def _set_flow_grpo(c: ConfigDict) -> None:
  _set_round(c, prompts=48, images=24, updates=2, trained=9, at_once=16)
  base_config.sample_as_flow_grpo(c)
  c.rounds.scale = "global"
  c.loss.tie = "scaled"
  c.loss.weight_reference = 0.01
  c.optim.ema_decay = 0.987


def _set_fast(c: ConfigDict) -> None:
  _set_round(c, prompts=48, images=24, updates=2, trained=3, at_once=16)
  c.rollout.solver = "cps"
  c.rollout.guidance = 1.0
  c.steps.eta = 0.8
  c.steps.window = 3
  c.loss.density = "square"
  c.loss.clip = 1e-5
  c.loss.weight_reference = 0.0


def _set_dance(c: ConfigDict) -> None:
  c.steps.common_start = True
  c.rounds.scale, c.rounds.ddof, c.rounds.eps = "group", 1, 1e-8
  c.rounds.scorers = ("hpsv2.v2_1",)
  c.loss.weight_reference = 0.0
  if c.preset == "sd15":
    _set_round(c, prompts=4, images=16, updates=2, trained=49, at_once=16)
    c.steps.trained = 49
    c.lora.rank = 0
    c.optim.lr = 1e-5
  else:
    _set_round(c, prompts=24, images=12, updates=3, trained=9, at_once=16)
    c.rollout.solver = "dance_sde"
    c.rollout.num_steps = 16
    c.steps.eta = 0.3
    c.steps.trained = 9
    c.train.num_updates = 900


def _set_mix(c: ConfigDict) -> None:
  _set_round(c, prompts=32, images=12, updates=4, trained=4, at_once=16)
  c.rollout.num_steps = 25
  c.steps.window = 4
  c.steps.hold = 25
  c.steps.common_start = True
  c.rounds.scale = "group"
  c.loss.weight_reference = 0.0
