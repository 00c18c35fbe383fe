"""Fields that the configurations of all methods share.

`shapes` trains the bundled pipeline on the embedded shapes world in minutes, without an
accelerator. `tiny` is a version of `shapes` that takes seconds, for tests. The others train
published models on local Pick-a-Pic files (`--config.data.path=DIR`), see `presets`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxpref.base_config import online_sections, presets
from jaxpref.errors import UserError

PRESETS = presets.PRESETS
PUBLISHED = presets.PUBLISHED
FLOWS = presets.FLOWS
NO_FLOWS = presets.NO_FLOWS
LORA_FLOWS = presets.LORA_FLOWS
rounds, steps = online_sections.rounds, online_sections.steps
sample_as_flow_grpo = online_sections.sample_as_flow_grpo
candidates = online_sections.candidates
have_candidates, judge = online_sections.have_candidates, online_sections.judge
step_judge, judges_images = online_sections.step_judge, online_sections.judges_images
trained_scorers = online_sections.trained_scorers
reward_scorers = online_sections.reward_scorers
share_inputs, comparisons = online_sections.share_inputs, online_sections.comparisons
pathwise, align_by_lora = online_sections.pathwise, online_sections.align_by_lora

# Choices of fields; the modules that implement them import them from here.
DTYPES = ("float32", "bfloat16")
ATTENTION = ("stock", "xla", "cudnn", "splash")  # or 'auto'
NORMS = ("stock", "lean")  # or 'auto'
REMAT = ("none", "attention", "transformer", "blocks", "full")  # from fast to small
SOLVERS = ("dpm_solver", "ddim", "ddpm")
FLOW_STEPS = ("flow_sde", "dance_sde", "cps")  # stochastic steps of flow-matching models
# Densities of a flow's training levels, with the fields of `noise` that they read.
DENSITIES = {"uniform": (), "logit_normal": ("mean", "std"), "mode": ("scale",)}
SPACES = ("model", "v", "eps", "x0")
SCHEDULES = ("constant", "linear", "cosine", "trapezoid")


def base(name: str, preset: str) -> ConfigDict:
  """Returns all fields with their defaults for a preset.

  Args:
    name: the method, which is the default of `loss.name`.
    preset: one of `PRESETS`.

  Raises:
    UserError: no preset has this name.
  """
  if preset not in PRESETS:
    raise UserError(f"no preset {preset!r}; choose {', '.join(PRESETS)}")
  c = ConfigDict()
  c.name = name  # name of the run and of its default workdir
  c.preset = preset  # set with the file, as in --config=dro:tiny
  c.seed = 0  # seed of all random numbers; equal seeds give equal numbers
  c.profile = 0  # number of updates to trace, from the third on, into <workdir>/profile
  for add_section in (_add_model, _add_data, _add_loss, _add_optim, _add_train, _add_evaluate):
    add_section(c)
  presets.apply(c)
  return c


def _add_model(c: ConfigDict) -> None:
  c.model = ConfigDict()
  c.model.path = "shapes"  # 'shapes', a directory in diffusers' layout, or a Hub id
  c.model.variant = ""  # variant of the weight files, such as fp16; '': full weights if any
  c.model.unet = ""  # a directory or Hub id: replaces the pipeline's denoiser
  c.model.vae = ""  # a directory or Hub id: replaces the pipeline's VAE
  c.model.clip_skip = 0  # last text encoder layers to skip for prompts, as in diffusers
  c.model.guidance = 1.0  # scale that Flux.1-dev is given in training; others do not take one
  c.model.image_size = 0  # height and width of images in pixels; 0: what the model was made for
  c.model.start = ""  # run or pipeline that training starts from; '': the base
  c.model.dtype = "float32"  # dtype of the computation; trained parameters, moments: float32
  c.model.frozen_dtype = "float32"  # dtype of the frozen weights, base and reference
  c.model.attention = "auto"  # 'stock', 'xla', 'cudnn', 'splash'; 'auto': by platform
  c.model.norm = "auto"  # 'stock'; 'lean' keeps less for the backward pass; 'auto'
  c.model.remat = "none"  # recompute activations: 'attention', 'transformer', 'blocks', 'full'


def _add_data(c: ConfigDict) -> None:
  c.data = ConfigDict()
  c.data.source = "shapes"  # or pickapic, folder, hpd, mjhq, kto, webdataset, prompts, online
  c.data.path = ""  # path of a built data set, of the folder, files or generated pairs
  c.data.split = "train"  # split to read, if files or folders are named by split; 'all': all
  c.data.follow_links = False  # follow links that lead out of a folder
  c.data.max_bad_share = 0.25  # largest share of unusable rows; the run refuses data with more
  c.data.num_experts = 500  # the best K images by score; K random images of a folder; 0: all
  c.data.experts = "top"  # 'top': by score; 'winners': the preferred image of every pair
  c.data.score = ""  # scorer that chooses experts of a built set; '': the data's own scores
  c.data.num_rows = 0  # pairs, singles or lists, for losses that learn from them; 0: all
  c.data.min_change = 0.0  # skip generated pairs with a smaller distance (RMS) of their latents
  c.data.desirable_share = 0.8  # expected share of liked images in a batch of singles
  c.data.good_prefix = ""  # put before prompts of liked singles and of the tuned model's images
  c.data.bad_prefix = ""  # put before prompts of the other singles
  c.data.list_size = 4  # images per ranked list
  c.data.noise_draws = 0  # fixed noise samples per row, with cached reference errors; 0: fresh
  c.data.prompt_dropout = 0.2  # share of rows trained with an empty prompt
  c.data.dropped_prompt = "empty"  # 'empty': encodes ""; 'unconditional': as guidance does
  c.data.latents = "mode"  # the VAE posterior's 'mode', or a 'sample' at each update
  c.data.cache = "auto"  # encode rows once in 'memory', on 'disk', or 'ahead'; 'auto': by size
  c.data.crop = "center"  # images that are not square: 'center', 'random', 'none': squeezed
  c.data.buckets = False  # batches of images of one shape, by their proportions, not squares
  c.data.original_sizes = False  # SDXL: condition on the images' own sizes and on the crop
  c.data.flip = False  # add mirrored images; not for images in which left and right matter


def _add_loss(c: ConfigDict) -> None:
  c.loss = ConfigDict()
  c.loss.name = c.name  # a file of jaxpref/losses, a registered name, or an importable module
  c.loss.reference = "start"  # 'start': the model that training starts from; 'base': the base
  c.loss.space = "model"  # errors of 'v', 'eps' or 'x0'; 'model': of what the model predicts

  c.noise = ConfigDict()  # levels that flow-matching models are trained on; others: uniform
  c.noise.density = "uniform"  # before the shift: 'uniform', 'logit_normal' or 'mode'
  c.noise.mean = 0.0  # of logit_normal's logits; above 0: more noise
  c.noise.std = 1.0  # of logit_normal's logits
  c.noise.scale = 1.29  # of 'mode'; above 0: more levels in the middle
  c.noise.shift = 0.0  # above 1: more noise, also in rollouts; 0: the model's own shift

  c.rollout = ConfigDict()  # samples of the policy, for losses that train on them
  c.rollout.solver = "dpm_solver"  # 'dpm_solver' (++, multistep), 'ddim' or 'ddpm'
  c.rollout.order = 2  # order of the DPM-Solver, 1 to 3
  c.rollout.num_steps = 10  # solver steps from noise to image
  c.rollout.guidance = 1.0  # guidance scale; at most 1: none; Flux.1-dev is given it instead
  c.rollout.refresh_every = 1  # updates between refreshes of the sampling copy of the policy
  c.rollout.states = 1  # states per trajectory to train on, evenly spaced
  c.rollout.batch_size = 8  # rows per chunk, which stops at its last kept state; 0: all rows
  c.rollout.replay = 0  # past updates whose samples are trained on again (an ablation)

  c.lora = ConfigDict()  # train low-rank additions instead of all parameters
  c.lora.rank = 0  # rank of the additions; 0: train all parameters
  c.lora.alpha = 8.0  # the additions are scaled by alpha / rank
  c.lora.targets = r"attn[12]\.(to_q|to_k|to_v|to_out\.0)$"  # layers, by PyTorch's names


def _add_optim(c: ConfigDict) -> None:
  c.optim = ConfigDict()
  c.optim.lr = 3e-4  # peak learning rate
  c.optim.schedule = "constant"  # 'constant', 'linear', 'cosine' or 'trapezoid'
  c.optim.warmup_updates = 0  # linear warm-up from lr / warmup_updates to lr
  c.optim.weight_decay = 0.01  # AdamW's weight decay
  c.optim.b1 = 0.9  # decay rate of AdamW's first moment
  c.optim.b2 = 0.999  # decay rate of AdamW's second moment
  c.optim.eps = 1e-8  # added to the root of AdamW's second moment
  c.optim.clip_norm = 1.0  # largest global norm of the gradient
  c.optim.ema_decay = 0.9999  # limit of the EMA decay (1 + n) / (10 + n) after n updates


def _add_train(c: ConfigDict) -> None:
  c.train = ConfigDict()
  c.train.batch_size = 32  # rows per update, over all devices and micro-batches
  c.train.accumulate = 1  # micro-batches per update
  c.train.num_updates = 300  # optimizer steps; a higher number resumes a finished run
  c.train.updates_per_iteration = 50  # updates between checkpoints
  c.train.log_every = 10  # updates between logged metrics
  c.train.keep = 2  # number of newest checkpoints to keep
  c.train.checkpoints = ""  # a directory or gs://... for checkpoints; '': in the workdir
  c.train.max_skipped = 10  # number of non-finite updates that a run may skip before it stops
  c.train.hang_minutes = 30.0  # a process exits after this long without progress; 0: never
  c.train.wandb = ""  # a project of Weights & Biases that gets the metrics; '': none

  c.mesh = ConfigDict()
  c.mesh.data = -1  # devices that split the batch; -1: all that remain
  c.mesh.fsdp = 1  # devices that also shard large parameters


def _add_evaluate(c: ConfigDict) -> None:
  c.evaluate = ConfigDict()  # compares tuned and base model on the same prompts and noise
  c.evaluate.every = 0  # also evaluate every N checkpoints and keep the best; 0: at the end
  c.evaluate.prompts = "auto"  # or 'shapes' (held-out), 'captions', a prompt set or a file
  c.evaluate.num_prompts = 150  # largest number of prompts
  c.evaluate.images_per_prompt = 2  # of each model, from the same noise for both models
  c.evaluate.scorers = ("shapes.correct", "shapes.quality")  # FAMILY.NAME, see jaxpref/scorers
  c.evaluate.num_steps = 20  # solver steps of DPM-Solver++ (2M)
  c.evaluate.guidance = 2.0  # guidance scale; at most 1: none; Flux.1-dev is given it instead
  c.evaluate.batch_size = 50  # images generated at once
  c.evaluate.seed = 3000  # seed of the noise and of the choice of prompts
  c.evaluate.num_examples = 24  # pairs of images shown in the report


def improve(c: ConfigDict) -> None:
  """Adds the section for generation with an improver."""
  c.improve = ConfigDict()
  c.improve.text_guidance = 3.5  # s_T, the guidance scale towards the prompt
  c.improve.image_guidance = 3.0  # s_I, the guidance scale towards the input image
  c.improve.num_steps = c.evaluate.num_steps  # solver steps of DPM-Solver++ (2M)


def iterate(c: ConfigDict, *, winners: str) -> None:
  """Adds the section for training on generated pairs, in several iterations.

  The updates and the learning rate schedule of the configuration are those of one iteration.

  Args:
    c: the configuration.
    winners: the default of `iterate.winners`.
  """
  c.data.num_rows = 0  # at most this many pairs of an iteration; 0: all
  c.data.min_change = 0.05  # without a published source
  c.iterate = ConfigDict()
  c.iterate.num_iterations = 3  # each generates pairs with the last model and trains on them
  c.iterate.num_pairs = 500  # pairs to generate per iteration
  c.iterate.winners = winners  # 'data': images of the data; 'improved': the losers, improved
  c.iterate.improver = ""  # a run of configs/improver.py or a pipeline, for improved winners
  c.iterate.guidance = c.evaluate.guidance  # for the losers; at most 1: no guidance
  c.iterate.num_steps = c.evaluate.num_steps  # solver steps of DPM-Solver++ (2M)
  c.iterate.batch_size = c.evaluate.batch_size  # images generated at once
  c.iterate.shard_size = 250  # pairs per file; an interrupted file is generated again
  improve(c)
  if c.preset == "tiny":
    c.iterate.num_iterations = 2
    c.iterate.num_pairs = 12
    c.iterate.shard_size = 8


def train_on_experts(c: ConfigDict) -> None:
  """Sets the Diffusion-DRO paper's recipe for SD 1.5, which it also uses for SFT.

  It trains all parameters; the learning rate of LoRA stays that of the preset.
  """
  c.data.flip = True
  if not c.lora.rank:
    c.optim.lr = 1e-4
  c.optim.warmup_updates = 0
  c.optim.ema_decay = 0.9999
  c.train.batch_size = 256
  c.train.accumulate = 16
  c.train.num_updates = 1600


# What the values of fields must be. A field that is not here is checked where it is used.

Rules = Mapping[str, tuple[Callable[[Any], bool], str]]


def _at_least(low: float) -> tuple[Callable[[Any], bool], str]:
  return lambda value: value >= low, f"at least {low}"


def _one_of(*choices: str | int) -> tuple[Callable[[Any], bool], str]:
  return lambda value: value in choices, "one of " + ", ".join(map(str, choices))


_POSITIVE = (lambda value: 0 < value < math.inf, "positive and finite")
_NOT_NEGATIVE = (lambda value: 0 <= value < math.inf, "at least 0 and finite")
_DECAY = (lambda value: 0 <= value < 1, "at least 0 and below 1")
_SEED = (lambda value: 0 <= value < 2**31, "at least 0 and below 2^31")
_SHARE = (lambda value: 0 <= value <= 1, "between 0 and 1")
_MINUTES = (
  lambda value: value == 0 or 0.001 <= value < math.inf,
  "0, or at least 0.001 and finite",
)
_AXIS = (lambda value: value >= 1 or value == -1, "at least 1, or -1 for the rest")

# Fields of the section `loss` that the train step reads; the others are hyper-parameters.
FIELDS_OF_ALL_LOSSES = ("name", "reference", "space")

RULES: Rules = {
  **dict.fromkeys(("model.dtype", "model.frozen_dtype"), _one_of(*DTYPES)),
  **dict.fromkeys(("model.clip_skip", "model.image_size"), _at_least(0)),
  "model.attention": _one_of("auto", *ATTENTION),
  "model.norm": _one_of("auto", *NORMS),
  "model.remat": _one_of(*REMAT),
  "data.desirable_share": (lambda value: 0 < value < 1, "above 0 and below 1"),
  **dict.fromkeys(("data.max_bad_share", "data.prompt_dropout", "loss.mu"), _SHARE),
  "data.list_size": _at_least(2),
  "data.experts": _one_of("top", "winners"),
  "data.latents": _one_of("mode", "sample"),
  "data.crop": _one_of("center", "random", "none"),
  "data.cache": _one_of("auto", "memory", "disk", "ahead"),
  "data.dropped_prompt": _one_of("empty", "unconditional"),
  "loss.reference": _one_of("start", "base"),
  "loss.space": _one_of(*SPACES),
  "noise.density": _one_of(*DENSITIES),
  "noise.mean": (lambda value: -20 <= value <= 20, "between -20 and 20"),
  "loss.target": (lambda value: -1e6 <= value <= 1e6, "between -1e6 and 1e6"),  # a reward
  "noise.std": _POSITIVE,
  "noise.scale": (lambda value: -1 <= value <= 1.75, "between -1 and 1.75"),
  "noise.shift": _NOT_NEGATIVE,
  **dict.fromkeys(
    ("data.num_rows", "data.noise_draws", "rollout.batch_size", "rollout.replay", "profile"),
    _at_least(0),
  ),
  "lora.rank": _at_least(0),
  **dict.fromkeys(
    ("lora.alpha", "loss.beta", "loss.snr", "loss.strength", "loss.clip"), _POSITIVE
  ),
  **dict.fromkeys(("loss.margin", "loss.target_margin"), _NOT_NEGATIVE),
  **dict.fromkeys(
    (
      *("loss.weight_desirable", "loss.weight_undesirable", "loss.weight_winning"),
      *("loss.weight_reconstruction", "loss.weight_unconditional"),
      *("loss.weight_reference", "loss.weight_old"),
    ),
    _NOT_NEGATIVE,
  ),
  **dict.fromkeys(
    (
      *("iterate.num_iterations", "iterate.num_pairs", "iterate.shard_size"),
      *("iterate.num_steps", "iterate.batch_size"),
    ),
    _at_least(1),
  ),
  **dict.fromkeys(("iterate.guidance", "data.min_change"), _NOT_NEGATIVE),
  "iterate.winners": _one_of("data", "improved"),
  **dict.fromkeys(("improve.text_guidance", "improve.image_guidance"), _NOT_NEGATIVE),
  "improve.num_steps": _at_least(1),
  **dict.fromkeys(
    ("rounds.num_prompts", "rounds.images_per_prompt", "rounds.updates"), _at_least(1)
  ),
  "rounds.sampler": _one_of("policy", "old"),
  "rounds.scale": _one_of("group", "global", "none"),
  "rounds.ddof": _one_of(0, 1),
  **dict.fromkeys(("rounds.eps", "rounds.clip", "rounds.old_rate"), _NOT_NEGATIVE),
  **dict.fromkeys(("rounds.window", "rounds.window_least", "rounds.old_start"), _at_least(0)),
  "rounds.old_decay": _DECAY,
  "steps.eta": _POSITIVE,
  **dict.fromkeys(("steps.trained", "steps.window", "steps.hold"), _at_least(0)),
  **dict.fromkeys(("steps.candidates", "steps.first"), _at_least(0)),
  "steps.apart": _at_least(1),
  **dict.fromkeys(("steps.gap", "steps.gap_noisy"), _SHARE),
  **dict.fromkeys(("judge.width", "judge.at_once"), _at_least(1)),
  "judge.held_out": _at_least(2),  # one has no interval
  "judge.guidance": _NOT_NEGATIVE,
  "pathwise.method": _one_of("last", "renoised", "predicted"),
  **dict.fromkeys(
    (
      *("pathwise.last", "pathwise.repeats", "pathwise.at_once"),
      "pathwise.end",
    ),
    _at_least(1),
  ),
  "pathwise.first": _at_least(0),
  **dict.fromkeys(("pathwise.mean", "pathwise.std"), _NOT_NEGATIVE),
  "pathwise.eta": _SHARE,
  "loss.scale": _POSITIVE,
  "alarms.every": _at_least(0),
  **dict.fromkeys(("alarms.num_prompts", "alarms.images_per_prompt"), _at_least(1)),
  "rollout.solver": _one_of(*SOLVERS, *FLOW_STEPS),
  "optim.schedule": _one_of(*SCHEDULES),
  "rollout.order": (lambda value: value in (1, 2, 3), "1, 2 or 3"),
  "optim.clip_norm": (lambda value: value > 0, "positive"),
  **dict.fromkeys(("optim.lr", "optim.eps"), _POSITIVE),
  **dict.fromkeys(("optim.b1", "optim.b2", "optim.ema_decay"), _DECAY),
  **dict.fromkeys(("mesh.data", "mesh.fsdp"), _AXIS),
  **dict.fromkeys(("seed", "evaluate.seed"), _SEED),
  **dict.fromkeys(("evaluate.num_examples", "evaluate.every"), _at_least(0)),
  **dict.fromkeys(
    ("model.guidance", "rollout.guidance", "evaluate.guidance", "optim.weight_decay"),
    _NOT_NEGATIVE,
  ),
  "optim.warmup_updates": _at_least(0),
  "train.num_updates": _at_least(0),
  "train.max_skipped": _at_least(0),
  "train.hang_minutes": _MINUTES,
  **dict.fromkeys(
    ("rollout.num_steps", "rollout.refresh_every", "rollout.states"), _at_least(1)
  ),
  **dict.fromkeys(("train.batch_size", "train.accumulate", "train.keep"), _at_least(1)),
  **dict.fromkeys(("train.updates_per_iteration", "train.log_every"), _at_least(1)),
  **dict.fromkeys(("evaluate.images_per_prompt", "evaluate.num_steps"), _at_least(1)),
  "evaluate.num_prompts": _at_least(1),
  "evaluate.batch_size": _at_least(1),
  "data.num_experts": _at_least(0),
}

# Largest numbers by type, and smaller limits where more would fill the memory or fail late.
LARGEST = {int: 2**31 - 1, float: 1e9}
LIMITS: Mapping[str, float] = {
  **dict.fromkeys(("model.guidance", "rollout.guidance", "evaluate.guidance"), 1000),
  "iterate.guidance": 1000,
  **dict.fromkeys(("improve.text_guidance", "improve.image_guidance"), 1000),
  **dict.fromkeys(("data.noise_draws", "rollout.replay"), 10_000),
  **dict.fromkeys(("evaluate.images_per_prompt", "iterate.num_iterations"), 10_000),
  "model.image_size": 16_384,
  "data.list_size": 100,
  "iterate.num_pairs": 10_000_000,
  **dict.fromkeys(("rounds.num_prompts", "rounds.updates", "rounds.window"), 1_000_000),
  "rounds.images_per_prompt": 1000,
  "judge.width": 65_536,
  "judge.guidance": 1000,
  **dict.fromkeys(("pathwise.repeats", "pathwise.at_once", "judge.at_once"), 1000),
  "alarms.images_per_prompt": 1000,
  "train.batch_size": 2**20,
  "train.hang_minutes": 1_000_000,  # two years
}
