"""Sections of online training: by rewards of samples, or through the sampler."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxpref.base_config import presets


def rounds(c: ConfigDict) -> None:
  """Adds the section for online training on scored samples of the policy.

  The section `rollout` says how images are sampled.
  """
  c.data.num_rows = 0  # rows are made of samples; data.num_experts is the number of prompts
  c.data.latents = "mode"  # samples have no posterior
  _alarms(c)
  c.rounds = ConfigDict()
  c.rounds.num_prompts = 8  # prompts of a round
  c.rounds.images_per_prompt = 8  # images of each prompt, a group
  c.rounds.updates = 1  # updates on the images of a round, between two checkpoints
  c.rounds.sampler = "policy"  # samples with the 'policy' or its lagging average ('old')
  c.rounds.scorers = ("shapes.correct",)  # whose weighted sum is the reward, FAMILY.NAME
  c.rounds.weights = (1.0,)  # of the scorers
  c.rounds.scale = "group"  # whose deviation divides advantages: 'group', 'global' or 'none'
  c.rounds.ddof = 0  # divide its sum of squares by their number less this, 0 or 1
  c.rounds.eps = 1e-4  # added to the deviation
  c.rounds.clip = 5.0  # largest absolute advantage; 0: no clip
  c.rounds.window = 0  # compare with as many last rewards of the prompt; 0: with the group
  c.rounds.window_least = 16  # fewer rewards in a window: compare with the round
  c.rounds.old_decay = 0.0  # largest share of itself that the average keeps after a round
  c.rounds.old_rate = 0.001  # rise of that share with each update
  c.rounds.old_start = 0  # updates before the rise
  c.rollout.batch_size = c.evaluate.batch_size  # images sampled at once
  c.rollout.num_steps = c.evaluate.num_steps
  if c.preset == "shapes":
    c.train.batch_size, c.train.num_updates = 64, 100  # all images of a round
  if c.preset == "tiny":
    c.rounds.num_prompts, c.rounds.images_per_prompt = 2, 4
    c.rounds.scorers = ("shapes.quality",)
  if c.preset in presets.PUBLISHED:  # of SANA, too, no other recipe is published than LoRA's
    c.data.num_experts = 10_000  # prompts, whose encodings are kept in memory
    c.lora.rank, c.lora.alpha = 32, 64.0
    c.rounds.num_prompts = c.rounds.images_per_prompt = 24
    c.rounds.scorers = ("pickscore.v1",)
    c.optim.lr = 3e-4
    c.optim.warmup_updates = 0
    c.optim.weight_decay = 1e-4
    c.optim.ema_decay = 0.9
    c.train.batch_size, c.train.accumulate = 576, 9
    c.train.num_updates = 1000
    c.rollout.num_steps = 20
  if c.preset == "flux":  # as MixGRPO, in sampling and training
    c.model.guidance = c.rollout.guidance = 3.5


def steps(c: ConfigDict) -> None:
  """Adds the section for training on steps of the policy's sampler; call `rounds` first.

  The section `rollout` says how images are sampled, also with which guidance.
  """
  c.data.prompt_dropout = 0.0  # steps keep the prompts that have sampled them
  c.loss.space = "model"
  c.noise.density = "uniform"  # the levels are the sampler's
  c.rollout.solver = "ddim"  # or 'flow_sde', 'dance_sde', 'cps' for flow-matching models
  c.steps = ConfigDict()
  c.steps.eta = 1.0  # strength of a step's noise: DDIM's eta, or that of a flow's solver
  c.steps.trained = 0  # steps of each image to train on, random ones; 0: all with noise
  c.steps.window = 0  # consecutive steps that have noise in a round; 0: all
  c.steps.hold = 0  # rounds until the window moves by a step; 0: random in the first half
  c.steps.guided = True  # train the guided prediction, which has sampled, or the plain one
  c.steps.candidates = 0  # samples from one state that are compared; 0: no
  c.steps.judge = ""  # a run of latent_reward or step_reward that compares; '': rounds.scorers
  c.steps.first = 0  # first step that has candidates
  c.steps.apart = 1  # steps that candidates take before they are compared
  c.steps.gap = 0.0  # least difference of the probabilities of best and worst
  c.steps.gap_noisy = 0.0  # the same of the step with the most noise; 0: as of all others
  c.steps.common_start = False  # sample all images of a prompt from the same noise


def candidates(c: ConfigDict) -> None:
  """Sets what SPO and LPO have in common: pairs of a step's candidates; call `steps` first."""
  c.loss.name = "step_pairs"
  c.loss.clip = 0.1  # largest distance of a step's ratio from 1
  c.rounds.images_per_prompt = 1
  c.steps.candidates = 4
  if c.preset not in presets.PUBLISHED:
    c.rounds.scorers = ("shapes.preference",)
  if c.preset == "tiny":
    c.rounds.num_prompts = 4
    c.rollout.num_steps = 3
    c.steps.candidates = 2
    c.train.batch_size = 8  # steps: two of each image
  if c.preset == "shapes":
    c.rollout.guidance = c.evaluate.guidance
    c.rollout.num_steps = 10
    c.rounds.num_prompts = 32
  if c.preset in presets.PUBLISHED:
    c.data.num_experts = 4000
    c.rounds.num_prompts = 40
    c.rollout.num_steps = 20
    c.rollout.guidance = 5.0
    c.rollout.batch_size = 10
    c.lora.rank, c.lora.alpha = 4, 4.0
    c.optim.lr = 6e-5
  if c.preset == "sdxl":
    c.lora.rank, c.lora.alpha = 64, 64.0
    c.optim.lr = 1e-5


def sample_as_flow_grpo(c: ConfigDict) -> None:
  """Sets the stochastic sampler of Flow-GRPO, for flow-matching models."""
  c.rollout.solver = "flow_sde"
  c.rollout.num_steps = 10
  c.rollout.guidance = c.evaluate.guidance
  c.steps.eta = 0.7


def judge(c: ConfigDict) -> None:
  """Adds the section for the training of a latent reward model."""
  c.judge = ConfigDict()
  c.judge.width = 768  # of the space in which features and prompts are compared
  c.judge.guidance = 7.5  # guidance of the last layer's features; at most 1: none
  c.judge.held_out = 200  # pairs to test it on, at least, with captions of their own
  if c.preset in ("tiny", "shapes"):
    c.judge.width, c.judge.guidance = 64, c.evaluate.guidance
  if c.preset == "tiny":
    c.judge.held_out = 8


def step_judge(c: ConfigDict) -> None:
  """Adds the section for the training of a step-aware preference model."""
  c.judge = ConfigDict()
  c.judge.scorer = "shapes.preference"  # differentiable, FAMILY.NAME: what it begins as
  c.judge.guidance = c.evaluate.guidance  # of the predicted images; at most 1: none
  c.judge.at_once = 8  # images that a device decodes and scores at once
  c.judge.held_out = 200  # pairs to test it on, at least, with captions of their own
  if c.preset == "tiny":
    c.judge.held_out = 8
  if c.preset in presets.PUBLISHED:
    c.judge.scorer = "pickscore.v1"
    c.judge.guidance = 5.0
    c.judge.at_once = 1


def judges_images(c: Mapping[str, Any]) -> bool:
  """Tells whether a run trains a step-aware preference model."""
  return "scorer" in c.get("judge", {})


def trained_scorers(c: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns the scorers whose sum is the reward of an online run, or stands for it."""
  for section in ("rounds", "pathwise"):
    if section in c:
      return tuple(c[section]["scorers"])
  return ()


def reward_scorers(c: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns the scorers that an online run learns from; none if its judge is a trained one."""
  return () if "steps" in c and c["steps"].get("judge") else trained_scorers(c)


def have_candidates(c: ConfigDict) -> bool:
  """Tells whether a run's steps have candidates, which a judge compares."""
  return "steps" in c and c.steps.candidates > 0


def share_inputs(c: ConfigDict) -> bool:
  """Tells whether the steps of each pair begin at one state."""
  return have_candidates(c) and c.steps.apart == 1


def comparisons(c: ConfigDict) -> int:
  """Counts how often the candidates of an image are compared."""
  return -((c.steps.first - c.rollout.num_steps) // c.steps.apart)


def pathwise(c: ConfigDict) -> None:
  """Adds the section for training through the sampler and a differentiable scorer.

  The sampler is DDIM; `rollout` has its number of steps and guidance.
  """
  c.data.num_rows = 0  # updates sample; data.num_experts is the number of prompts
  c.data.latents = "mode"  # samples have no posterior
  c.data.prompt_dropout = 0.0
  c.loss.name = "reward"
  c.loss.variant = "linear"  # -r; 'distance': |r - target|; 'hinge': max(target - r, 0)
  c.loss.target = 0.0  # of 'distance' and 'hinge'
  c.loss.scale = 1.0  # factor of the loss
  _alarms(c)
  c.pathwise = ConfigDict()
  c.pathwise.method = "last"  # gradient through 'last' steps, 'renoised', or one 'predicted'
  c.pathwise.last = 1  # steps with a gradient; at most, if their number is random
  c.pathwise.mean = 0.0  # mean of their number, random at each update; 0: always `last`
  c.pathwise.std = 0.0  # standard deviation of their number
  c.pathwise.repeats = 2  # noises of 'renoised'
  c.pathwise.first = 0  # first step that 'predicted' may choose
  c.pathwise.end = 1  # step after the last that 'predicted' may choose
  c.pathwise.eta = 0.0  # noise of the steps, 0 to 1
  c.pathwise.scorers = ("shapes.preference",)  # differentiable, FAMILY.NAME
  c.pathwise.weights = (1.0,)  # of the scorers
  c.pathwise.at_once = 8  # images that a device decodes and scores at once
  c.rollout.solver = "ddim"
  c.rollout.num_steps = c.evaluate.num_steps
  c.rollout.guidance = c.evaluate.guidance
  if c.preset == "tiny":
    c.train.batch_size = 2  # decoded and scored with a gradient, in seconds each
  if c.preset == "shapes":
    c.optim.lr = 1e-4
    c.train.num_updates = 100
  if c.preset in presets.PUBLISHED:
    c.data.num_experts = 10_000  # prompts, whose encodings are kept in memory
    c.pathwise.scorers = ("pickscore.v1",)
    c.pathwise.at_once = 1
    c.rollout.num_steps = 50
    c.optim.warmup_updates = 0


def _alarms(c: ConfigDict) -> None:
  """Adds the section for looks at what an online reward does not measure."""
  c.train.stop_on_hacking = False  # stop, saved, where the reward rises and others fall
  c.alarms = ConfigDict()  # samples of the policy for the evaluation's prompts and scorers
  c.alarms.every = 10  # updates between two looks; 0: none
  c.alarms.num_prompts = 24  # at most as many as the evaluation has
  c.alarms.images_per_prompt = 2  # from the noise of the base's images
  if c.preset == "tiny":
    c.alarms.every, c.alarms.num_prompts, c.alarms.images_per_prompt = 2, 2, 1
  if c.preset in presets.PUBLISHED:
    c.alarms.every, c.alarms.num_prompts = 50, 32


def align_by_lora(c: ConfigDict) -> None:
  """Sets the optimizer of AlignProp's code, with LoRA; the rank is our choice."""
  c.lora.rank, c.lora.alpha = 8, 8.0
  c.optim.lr = 1e-3
  c.optim.weight_decay = 1e-4
  c.train.batch_size, c.train.accumulate = 128, 16
  c.train.num_updates = c.train.updates_per_iteration = 25
