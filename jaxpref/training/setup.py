"""Everything that a run reads, checked before it writes anything."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpref import base_config, losses, rng, sharding
from jaxpref.data import built_rows, sources
from jaxpref.data import rows as rows_lib
from jaxpref.data.bad_rows import Tally
from jaxpref.data.row_set import RowSet, hold_out
from jaxpref.diffusion import levels, sampler
from jaxpref.diffusion import timesteps as timesteps_lib
from jaxpref.diffusion.flow import Density
from jaxpref.diffusion.schedule import Schedule
from jaxpref.errors import UserError
from jaxpref.evaluation import evaluate, prompt_sets
from jaxpref.models import denoiser
from jaxpref.models import lora as lora_lib
from jaxpref.models import pipeline as pipeline_lib
from jaxpref.runtime import checkpoint, jax_setup
from jaxpref.training import (
  judge_settings,
  load_run,
  pathwise_settings,
  rounds_settings,
  step_rows,
)
from jaxpref.training.judge import Judge
from jaxpref.training.latent_judge import LatentJudge
from jaxpref.training.step_judge import StepJudge


@dataclasses.dataclass(frozen=True)
class Checked:
  """A run's configuration, loss and models, without its data rows.

  Attributes:
    config: of the run.
    mesh: of the run's devices.
    loss: with its hyper-parameters.
    arms: names of the errors, see `train_step.make_train_step`.
    pipeline: the base; `programs` need only its modules and schedule.
    start: 'params' and 'digest' of `model.start`; empty without it.
    reference: see `reference_of`.
    judge: of a run whose updates sample, see `pathwise_step`, or whose steps have candidates;
      else None.
  """

  config: ConfigDict
  mesh: Mesh
  loss: losses.Loss
  arms: tuple[str, ...]
  pipeline: pipeline_lib.Pipeline
  start: dict[str, Any]
  reference: str | None
  judge: Judge | LatentJudge | StepJudge | None

  @property
  def schedule(self) -> Schedule:
    """The pipeline's schedule, with the training levels of the section `noise`."""
    return _training_schedule(self.config, self.pipeline)


@dataclasses.dataclass(frozen=True)
class Prepared(Checked):
  """A run's whole input, read and checked.

  Attributes:
    inputs: digests of the data and the models.
    data: counts of the rows that were left out, by reason.
    rows: the training rows; images of a built data set are read when they are needed.
    prompts: of the evaluation.
    scorers: names of the scorers that can judge these prompts.
    held_out: rows on which a reward model is tested; None in other runs.
  """

  inputs: dict[str, str]
  data: Tally
  rows: RowSet
  prompts: list[str]
  scorers: tuple[str, ...]
  held_out: RowSet | None = None


def prepare(config: ConfigDict) -> Prepared:
  """Reads and checks everything that a run needs.

  Raises:
    UserError: a setting, a model or the data is unusable. Nothing has been written then.
  """
  checked = check(config)
  kind = rows_kind(config, checked.loss)
  rows, tally, prompts = read_data(config, kind, image_size=checked.pipeline.image_size)
  held_out = None
  if checked.loss.needs.judges:
    rows, held_out = hold_out(rows, config.judge.held_out, seed=config.seed)
  check_data(checked, rows)
  evaluate.check_count(len(prompts), config.evaluate.images_per_prompt)
  scorers = dict.fromkeys((*config.evaluate.scorers, *base_config.reward_scorers(config)))
  usable = evaluate.usable_scorers(tuple(scorers), prompts)
  for section in ("rounds", "pathwise"):
    if section in config:
      rounds_settings.check_scorers(config[section], rows.used_captions())
  inputs = {"data": rows.digest, "pipeline": checked.pipeline.digest}
  if checked.start:
    inputs["start"] = checked.start["digest"]
  if isinstance(checked.judge, LatentJudge | StepJudge):
    inputs["judge"] = checked.judge.reward.digest
  if checked.pipeline.scorer:
    inputs["scorer"] = pipeline_lib.fingerprint(checked.pipeline.params["scorer"])
  return Prepared(
    **vars(checked),
    inputs=inputs,
    data=tally,
    rows=rows,
    prompts=prompts,
    scorers=usable,
    held_out=held_out,
  )


def check_data(checked: Checked, rows: RowSet) -> None:
  """Refuses settings of the data that do not suit the rows or each other.

  Args:
    checked: the run's configuration, loss and models.
    rows: of the run.

  Raises:
    UserError: a setting does not suit the rows or another setting.
  """
  config, data = checked.config, checked.config.data
  is_built = isinstance(rows.images, built_rows.StoredImages)
  usual = {"crop": "center", "original_sizes": False, "buckets": False}
  given = [f"data.{name} = {data[name]!r}" for name in usual if data[name] != usual[name]]
  if data.cache == "disk":
    given.append("data.cache = 'disk'")
  if given and not is_built:
    raise UserError(
      f"{given[0]} needs a built data set at data.path: see python -m jaxpref.data --help"
    )
  if data.cache == "disk" and rows.prefixes[0] != rows.prefixes[1]:
    raise UserError("data.cache = 'disk' holds captions without prefixes: set 'memory'")
  if data.original_sizes and not checked.pipeline.family.takes_sizes:
    raise UserError("data.original_sizes is for SDXL, which is conditioned on sizes")
  if data.crop == "random" and data.cache not in ("auto", "ahead"):
    raise UserError("data.crop = 'random' is new at each update: set data.cache to ahead")
  if data.noise_draws and (data.cache == "ahead" or data.crop == "random"):
    raise UserError("data.noise_draws needs encoded rows: set data.cache to memory or disk")
  if data.buckets:
    if data.noise_draws or config.rollout.replay:
      raise UserError("data.buckets cannot be combined with data.noise_draws, rollout.replay")
    if checked.loss.needs.rows == "singles":
      raise UserError("data.buckets is for losses that learn from experts, pairs or lists")
    scale = checked.pipeline.classifier_free_scale(config.rollout.guidance)
    if checked.loss.needs.rollout and scale > 1:
      raise UserError("data.buckets needs rollout.guidance = 1")
    if len(rows) * (1 + data.flip) < config.train.batch_size:
      raise UserError(
        f"data.buckets needs at least train.batch_size = {config.train.batch_size} rows, and "
        f"the data has {len(rows)}"
      )


def read_data(
  config: ConfigDict, kind: str, *, image_size: int
) -> tuple[RowSet, Tally, list[str]]:
  """Reads the training rows and chooses the evaluation's prompts.

  Args:
    config: of the run.
    kind: of the rows, see `rows.load_rows`.
    image_size: height and width of the rows' images, in pixels.

  Returns:
    The rows, the counts of those that were left out, and the prompts.

  Raises:
    UserError: the data or the prompts cannot be used.
  """
  tally = rows_lib.make_tally(config.data)
  rows = rows_lib.load_rows(
    kind, config.data, image_size=image_size, seed=config.seed, tally=tally
  )
  prompts = prompt_sets.choose_prompts(
    prompts_source(config),
    config.evaluate.num_prompts,
    rows.used_captions(),
    seed=config.evaluate.seed,
  )
  return rows, tally, prompts


def check(config: ConfigDict, *, mesh: Any = None) -> Checked:
  """Reads the models and refuses settings that do not fit them.

  Args:
    config: of the run.
    mesh: a mesh to plan for, which may be abstract: no weights are read then. None for a
      mesh of this machine's devices.

  Raises:
    UserError: a setting or a model is unusable.
  """
  jax_setup.cache_programs()
  plans = mesh is not None
  if not plans:
    mesh = sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    _check_attention(config.model.attention)
    checkpoint.directory_of(Path(), config)  # refuses an unusable train.checkpoints
  sharding.check_batch(config.train.batch_size, mesh, accumulate=config.train.accumulate)
  loss = losses.make_loss(
    config.loss, updates=config.rounds.updates if "rounds" in config else 1
  )
  of_rows = rows_lib.arms_of(loss.needs.rows, list_size(config))
  arms = (*(loss.needs.arms or of_rows), *(("p",) if loss.needs.rollout else ()))
  _check_needs(loss, config)
  losses.check_loss(loss, arms, images=len(of_rows))
  model = {"dtype": jnp.dtype(config.model.dtype), **pipeline_lib.source_of(config.model)}
  if plans:
    pipeline = pipeline_lib.describe_pipeline(config.model.path, **model)
  else:
    pipeline = pipeline_lib.load_pipeline(config.model.path, mesh=mesh, **model)
  if loss.needs.condition == "image":
    if "improve" not in config:
      raise UserError("a loss with an input image needs a section improve in its config file")
    pipeline = pipeline_lib.widen(pipeline)
    check_steps(pipeline, "improve.num_steps", config.improve.num_steps)
  elif pipeline.is_improver:
    raise UserError(
      f"{config.model.path} is an improver: only --config=improver can train it further"
    )
  _check_guidance(config, pipeline)
  if loss.needs.judges:
    judge_settings.check_model(config, pipeline)
  if base_config.judges_images(config):
    pipeline = judge_settings.with_scorer(config, pipeline)
  _check_levels(loss, config, pipeline)
  check_steps(pipeline, "evaluate.num_steps", config.evaluate.num_steps)
  start = {}
  if config.model.start and not plans:
    start = _load_start(config, pipeline, mesh)
  if rank := config.lora.rank:  # also refuses a pattern without a match
    shapes = pipeline.abstract_denoiser()
    targets, usual = config.lora.targets, pipeline.family.lora_targets
    lora_lib.check_rank(shapes, rank=rank, targets=targets, usual=usual)
    abstract_trained(config, pipeline)
  judge = judge_settings.load(config, pipeline, None if plans else mesh)
  reference = reference_of(loss, config)
  return Checked(config, mesh, loss, arms, pipeline, start, reference, judge)


def _check_guidance(config: ConfigDict, pipeline: pipeline_lib.Pipeline) -> None:
  """Refuses scales of guidance that the model is not given, or not in the same way."""
  if config.model.guidance != 1 and not pipeline.takes_guidance:
    raise UserError(
      f"model.guidance = {config.model.guidance} has no effect: {config.model.path} is not "
      "given a scale of guidance, as Flux.1-dev is"
    )
  both = config.model.guidance, config.rollout.guidance
  if "steps" in config and pipeline.takes_guidance and both[0] != both[1]:
    raise UserError(
      "steps are trained with the guidance that has sampled them: set model.guidance = "
      f"rollout.guidance (got {both[0]} and {both[1]})"
    )


def rows_kind(config: ConfigDict, loss: losses.Loss) -> str:
  """Returns the kind of rows that a run reads, see `rows.load_rows`."""
  samples = "rounds" in config or "pathwise" in config
  return "captions" if samples else loss.needs.rows


def list_size(config: ConfigDict) -> int:
  """Returns the number of images of a row of lists or groups."""
  return config.rounds.images_per_prompt if "rounds" in config else config.data.list_size


def _check_levels(
  loss: losses.Loss, config: ConfigDict, pipeline: pipeline_lib.Pipeline
) -> None:
  """Refuses settings of the training levels and rollouts that the model does not have."""
  schedule = _training_schedule(config, pipeline)
  if loss.needs.rollout and config.noise.density != "uniform":
    raise UserError(
      f"noise.density = {config.noise.density!r} has no effect: {config.loss.name} trains on "
      "the levels of its rollouts, which are uniform before the shift"
    )
  sampler.check_solver(schedule, config.rollout.solver)
  if loss.needs.of_steps:
    plan = step_rows.check(config, pipeline, loss.needs.rows)
    # A trajectory is a row for each of its steps; a pair of trajectories has those of one.
    of_image = 1 if loss.needs.rows == "paths" else plan.trained
    alone = loss.needs.rows == "steps" or config.steps.candidates
    images = config.rounds.images_per_prompt // (1 if alone else 2)
    rounds_settings.check_rows(config, images * of_image)
  # Refuses more steps than the schedule has here, not at the first rollout.
  timesteps_lib.offset_grid(
    *(schedule, config.rollout.num_steps, jnp.zeros(1, jnp.int32)),
    tokens=timesteps_lib.image_tokens(pipeline.latent_shape),
  )


def _training_schedule(config: ConfigDict, pipeline: pipeline_lib.Pipeline) -> Schedule:
  noise = config.noise
  density = Density(noise.density, noise.mean, noise.std, noise.scale)
  return levels.training_schedule(pipeline.schedule, density, shift=noise.shift)


def reference_of(loss: losses.Loss, config: ConfigDict) -> str | None:
  """Returns the model whose errors are the reference.

  Returns:
    'start' for the model that training begins with, 'base' for that of `model.path`, None
    where the loss has no reference. Without a `model.start` both are the same, 'base'.
  """
  if not loss.needs.reference:
    return None
  return config.loss.reference if config.model.start else "base"


def _check_attention(kernel: str) -> None:
  """Refuses attention kernels of other devices than this machine's."""
  needed = {"cudnn": "gpu", "splash": "tpu"}.get(kernel)
  if needed and needed != (platform := jax.default_backend()):
    raise UserError(
      f"model.attention = {kernel!r} needs a {needed.upper()}, and this machine has a "
      f"{platform.upper()}; 'auto' chooses the kernel"
    )


def check_steps(pipeline: pipeline_lib.Pipeline, field: str, num_steps: int) -> None:
  """Refuses more solver steps than the pipeline's schedule has."""
  tokens = timesteps_lib.image_tokens(pipeline.latent_shape)
  try:
    timesteps_lib.uniform_grid(
      pipeline.schedule, num_steps, 1, **pipeline.spacing(), tokens=tokens
    )
  except UserError as error:
    raise UserError(f"{field}: {error}") from error


def prompts_source(config: ConfigDict) -> str:
  """Returns the source of an evaluation's prompts, for `prompt_sets.choose_prompts`."""
  if config.evaluate.prompts != "auto":
    return config.evaluate.prompts
  return "shapes" if sources.name_of(config.data) == "shapes" else "captions"


def abstract_trained(config: ConfigDict, pipeline: pipeline_lib.Pipeline) -> Any:
  """Returns the shapes of the trained parameters."""
  scorer = pipeline.scorer
  base = scorer.params if scorer else pipeline.abstract_denoiser()
  return jax.eval_shape(lambda params: init_trained(config, pipeline, params), base)


def init_trained(config: ConfigDict, pipeline: pipeline_lib.Pipeline, base: Any) -> Any:
  """Returns the initial trained parameters.

  These are the base's but the fixed, or LoRA matrices, or those of a reward model.

  Args:
    config: of the run.
    pipeline: of the run.
    base: the denoiser's parameters, or the scorer's that a reward model begins as; arrays or
      shapes.
  """
  lora, fixed = config.lora, pipeline.family.fixed
  if "judge" in config:
    return judge_settings.init_params(config, pipeline, base)
  if not lora.rank:
    return denoiser.split_fixed(base, fixed)[0] if fixed else base
  key = rng.key_of(config.seed, "lora", 0)
  return lora_lib.init_lora(base, rank=lora.rank, targets=lora.targets, key=key)


def _load_start(
  config: ConfigDict, pipeline: pipeline_lib.Pipeline, mesh: Mesh
) -> dict[str, Any]:
  """Loads the parameters of `model.start`, with which training begins."""
  name, rank = config.model.start, config.lora.rank
  start = load_run.load(name, dtype=jnp.dtype(config.model.dtype), mesh=mesh, merged=not rank)
  params, wanted = start.denoiser_params, abstract_trained(config, pipeline)
  if rank:
    if not isinstance(params, lora_lib.Adapted):
      raise UserError(f"model.start: {name} is not a LoRA run, which lora.rank > 0 requires")
    params = params.lora
  elif fixed := pipeline.family.fixed:
    params = denoiser.split_fixed(params, fixed)[0]
  if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, wanted):
    raise UserError(f"model.start: the parameters of {name} do not fit model.path and lora")
  return {"params": params, "digest": start.digest}


def _check_needs(loss: losses.Loss, config: ConfigDict) -> None:
  """Refuses settings that this loss would ignore."""
  needs = loss.needs
  judge_settings.check(config, needs)
  rounds_settings.check(config, loss)
  pathwise_settings.check(config, needs)
  if config.loss.reference == "base" and not needs.reference:
    raise UserError(f"loss.reference = 'base', but {config.loss.name} has no reference")
  rollout, draws = config.rollout, config.data.noise_draws
  if draws and needs.rollout:
    raise UserError(
      "data.noise_draws fixes timesteps and noise, but rollouts sample them at each update"
    )
  if needs.condition and config.lora.rank:
    raise UserError("lora.rank leaves out the input's new weights, which this loss must train")
  if draws and loss.arrange:
    raise UserError("data.noise_draws is for losses that take images as the rows have them")
  if needs.rollout and loss.arrange:
    raise UserError(
      f"{config.loss.name} has both a rollout and arrange, which cannot be combined"
    )
  if draws and needs.residuals:
    raise UserError("data.noise_draws keeps errors, and this loss needs predictions")
  if draws and needs.reference and config.model.dtype != "float32":
    raise UserError(
      "data.noise_draws needs model.dtype=float32: in bfloat16, the errors of its separate "
      "program would differ by more than preference margins"
    )
  if needs.rows != "singles" and (config.data.good_prefix or config.data.bad_prefix):
    raise UserError("data.good_prefix and data.bad_prefix are for losses that learn singles")
  if needs.rows == "experts" and config.data.num_rows:
    raise UserError(
      "this loss learns from experts: set data.num_experts, and data.num_rows = 0 in its "
      f"config file (got data.num_rows = {config.data.num_rows})"
    )
  if needs.rows != "pairs" and config.data.min_change:
    raise UserError("data.min_change is for losses that learn from pairs")
  if not needs.rollout and (rollout.states > 1 or rollout.replay):
    raise UserError("rollout.states and rollout.replay are for losses that take states")
  if rollout.states > rollout.num_steps:
    raise UserError(
      f"a trajectory has rollout.num_steps = {rollout.num_steps} states, of which "
      f"rollout.states = {rollout.states} cannot be kept"
    )
