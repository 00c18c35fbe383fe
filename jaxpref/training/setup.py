"""Everything that a run reads, checked before it writes anything."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpref import losses, rng, sharding
from jaxpref.data import prompt_files, sources
from jaxpref.data import rows as rows_lib
from jaxpref.data.bad_rows import Tally
from jaxpref.diffusion import timesteps as timesteps_lib
from jaxpref.errors import UserError
from jaxpref.evaluation import evaluate
from jaxpref.models import lora as lora_lib
from jaxpref.models import pipeline as pipeline_lib
from jaxpref.runtime import checkpoint, jax_setup
from jaxpref.training import load_run


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
  """

  config: Any
  mesh: Mesh
  loss: losses.Loss
  arms: tuple[str, ...]
  pipeline: pipeline_lib.Pipeline
  start: dict[str, Any]
  reference: str | None


@dataclasses.dataclass(frozen=True)
class Prepared(Checked):
  """A run's whole input, read and checked.

  Attributes:
    inputs: digests of the data and the models.
    data: counts of the rows that were left out, by reason.
    rows: the training rows.
    prompts: of the evaluation.
    scorers: names of the scorers that can judge these prompts.
  """

  inputs: dict[str, str]
  data: Tally
  rows: list[rows_lib.Row]
  prompts: list[str]
  scorers: tuple[str, ...]


def prepare(config: Any) -> Prepared:
  """Reads and checks everything that a run needs.

  Raises:
    UserError: a setting, a model or the data is unusable. Nothing has been written then.
  """
  checked = check(config)
  rows, tally, prompts = read_data(
    config, checked.loss.needs.rows, image_size=checked.pipeline.image_size
  )
  evaluate.check_count(len(prompts), config.evaluate.images_per_prompt)
  usable = evaluate.usable_scorers(config.evaluate.scorers, prompts)
  inputs = {"data": rows_lib.fingerprint(rows), "pipeline": checked.pipeline.digest}
  if checked.start:
    inputs["start"] = checked.start["digest"]
  return Prepared(
    **vars(checked), inputs=inputs, data=tally, rows=rows, prompts=prompts, scorers=usable
  )


def read_data(
  config: Any, kind: str, *, image_size: int
) -> tuple[list[rows_lib.Row], Tally, list[str]]:
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
  prompts = prompt_files.choose_prompts(
    prompts_source(config),
    config.evaluate.num_prompts,
    [row.caption for row in rows],
    seed=config.evaluate.seed,
  )
  return rows, tally, prompts


def check(config: Any, *, mesh: Any = None) -> Checked:
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
  loss = losses.make_loss(config.loss)
  of_rows = rows_lib.arms_of(loss.needs.rows, config.data.list_size)
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
  # Refuses more steps than the schedule has here, not at the first image.
  timesteps_lib.offset_grid(
    pipeline.schedule, config.rollout.num_steps, jnp.zeros(1, jnp.int32)
  )
  check_steps(pipeline, "evaluate.num_steps", config.evaluate.num_steps)
  start = {}
  if config.model.start and not plans:
    start = _load_start(config, pipeline, mesh)
  if rank := config.lora.rank:  # also refuses a pattern without a match
    unet = pipeline_lib.abstract_params(pipeline.modules["unet"])
    lora_lib.check_rank(unet, rank=rank, targets=config.lora.targets)
    abstract_trained(config, pipeline)
  reference = reference_of(loss, config)
  return Checked(config, mesh, loss, arms, pipeline, start, reference)


def reference_of(loss: losses.Loss, config: Any) -> str | None:
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
  try:
    timesteps_lib.uniform_grid(pipeline.schedule, num_steps, 1, **pipeline.spacing())
  except UserError as error:
    raise UserError(f"{field}: {error}") from error


def prompts_source(config: Any) -> str:
  """Returns the source of an evaluation's prompts, for `prompt_files.choose_prompts`."""
  if config.evaluate.prompts != "auto":
    return config.evaluate.prompts
  return "shapes" if sources.name_of(config.data) == "shapes" else "captions"


def abstract_trained(config: Any, pipeline: pipeline_lib.Pipeline) -> Any:
  """Returns the shapes of the trained parameters."""
  base = pipeline_lib.abstract_params(pipeline.modules["unet"])
  return jax.eval_shape(lambda params: init_trained(config, params), base)


def init_trained(config: Any, base: Any) -> Any:
  """Returns the initial trained parameters: the base's, or LoRA matrices."""
  lora = config.lora
  if not lora.rank:
    return base
  key = rng.key_of(config.seed, "lora", 0)
  return lora_lib.init_lora(base, rank=lora.rank, targets=lora.targets, key=key)


def _load_start(config: Any, pipeline: pipeline_lib.Pipeline, mesh: Mesh) -> dict[str, Any]:
  """Loads the parameters of `model.start`, with which training begins."""
  name, rank = config.model.start, config.lora.rank
  start = load_run.load(name, dtype=jnp.dtype(config.model.dtype), mesh=mesh, merged=not rank)
  params, wanted = start.params["unet"], abstract_trained(config, pipeline)
  if rank:
    if not isinstance(params, lora_lib.Adapted):
      raise UserError(f"model.start: {name} is not a LoRA run, which lora.rank > 0 requires")
    params = params.lora
  if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, wanted):
    raise UserError(f"model.start: the parameters of {name} do not fit model.path and lora")
  return {"params": params, "digest": start.digest}


def _check_needs(loss: losses.Loss, config: Any) -> None:
  """Refuses settings that this loss would ignore."""
  needs = loss.needs
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
      f"config file (got {config.data.num_rows})"
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
