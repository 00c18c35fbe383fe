"""The model that a run has trained: its base pipeline with the denoiser of a checkpoint."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from jaxpref import base_config, scorers, sharding
from jaxpref.errors import UserError
from jaxpref.evaluation import best_checkpoint as best_checkpoint_lib
from jaxpref.models import denoiser, hub, lora, reward_model, step_reward
from jaxpref.models import pipeline as pipeline_lib
from jaxpref.runtime import checkpoint, checkpoint_files
from jaxpref.runtime.paths import number_of, user_path
from jaxpref.runtime.workdir import CONFIG, STARTS, read_json, read_starts

# Folders of an iterative run: the pairs, and the training run, of each iteration.
PAIRS, ITERATIONS = "pairs", "iterations"
# Required sections of a run's configuration, and types of the fields that are read here.
_NEEDED = ("model", "train")
_READ: dict[str, Any] = {
  **dict.fromkeys(("model.path", "model.variant", "train.checkpoints"), str),
  **dict.fromkeys(("model.start", "lora.targets", "data.good_prefix", "data.score"), str),
  **dict.fromkeys(("steps.judge", "judge.scorer"), str),
  **dict.fromkeys(("lora.rank", "model.image_size", "judge.width"), int),
}
_NUMBERS = (
  "lora.alpha",
  "evaluate.guidance",
  "improve.text_guidance",
  "improve.image_guidance",
  "judge.guidance",
)


def load(
  name: str,
  *,
  ema: bool = True,
  step: int | str | None = None,
  dtype: Any = jnp.float32,
  mesh: Mesh | None = None,
  variant: str = "",
  unet: str = "",
  vae: str = "",
  clip_skip: int = 0,
  image_size: int = 0,
  merged: bool = True,
) -> pipeline_lib.Pipeline:
  """Loads the model of a run, or a pipeline.

  Args:
    name: a run's workdir, or a name for `load_pipeline`.
    ema: load the EMA weights of a run, which its report compares; else the last update's.
    step: number of updates of a run's checkpoint, or 'best' (see
      `evaluation.best_checkpoint`); None for the newest good one.
    dtype: of the computation.
    mesh: of the devices to place parameters on; see `load_pipeline`.
    variant: of a pipeline's weights. A run's configuration says this for its base, as it
      does for the following four.
    unet: the denoiser to use instead of a pipeline's own; '' for its own.
    vae: the VAE to use instead of a pipeline's own; '' for its own.
    clip_skip: number of last text encoder layers to skip.
    image_size: height and width of a pipeline's images, in pixels; 0 for its own.
    merged: whether to add LoRA matrices to the weights; else the denoiser's parameters are a
      `lora.Adapted`.

  Raises:
    UserError: the model is missing or damaged, the base pipeline is not the one that the run
      began with, or an argument does not apply.
  """
  if not is_run(name):
    if step is not None or not ema:
      raise UserError(
        f"--step and --no-ema only apply to a run's workdir; {name} is a pipeline"
      )
    return pipeline_lib.load_pipeline(
      name,
      dtype=dtype,
      mesh=mesh,
      variant=variant,
      unet=unet,
      vae=vae,
      clip_skip=clip_skip,
      image_size=image_size,
    )
  workdir = trained_in(user_path(name))
  own = {"variant": variant, "unet": unet, "vae": vae, "clip-skip": clip_skip}
  own["image-size"] = image_size
  if given := [flag for flag, value in own.items() if value]:
    raise UserError(f"--{given[0]} only applies to pipelines; the run {workdir} has its own")
  config = _read_config(workdir)
  if "judge" in config:
    kind, method = (
      ("step-aware", "spo") if base_config.judges_images(config) else ("latent", "lpo")
    )
    raise UserError(
      f"{workdir} has trained a {kind} reward model, which makes no images: give it as "
      f"steps.judge to a run of configs/{method}.py"
    )
  wanted = best_checkpoint_lib.read(workdir).update if isinstance(step, str) else step
  directory = checkpoint.directory_of(workdir, config)
  found = checkpoint_files.find_good(directory, step=wanted)
  rank = config.get("lora", {}).get("rank", 0)
  pipeline = _load_base(workdir, config["model"], dtype, mesh, without_denoiser=not rank)
  layer = f"params/{pipeline.family.input_layer}/kernel"
  kernel = checkpoint_files.stored(directory, found.step).get(layer)
  if kernel and kernel.shape[2] > pipeline.latent_shape[0]:
    pipeline = pipeline_lib.widen(pipeline)
  _check_base(workdir, pipeline, found.metadata)
  field, fixed = "ema" if ema else "params", pipeline.family.fixed
  abstract = pipeline.abstract_denoiser()
  if rank:
    init = functools.partial(lora.init_lora, rank=rank, targets=config["lora"]["targets"])
    abstract = jax.eval_shape(lambda p: init(p, key=jax.random.key(0)), abstract)
  elif fixed:
    abstract = denoiser.split_fixed(abstract, fixed)[0]
  trained = restored = _restore(directory, found.step, field, abstract, mesh)
  if rank:
    trained = lora.Adapted(pipeline.denoiser_params, trained, config["lora"]["alpha"] / rank)
  elif fixed:
    trained = denoiser.join_fixed(trained, pipeline.denoiser_params, fixed)
  pipeline = pipeline.with_denoiser_params(lora.merge(trained) if merged else trained)
  # A digest of the weights: files of checkpoints with equal weights differ in their bytes.
  scale = f" {trained.scale}" if rank else ""
  weights = pipeline_lib.fingerprint(restored, of=pipeline.digest + scale)
  digest = f"{field}-{found.step}-{weights}"
  return dataclasses.replace(pipeline, digest=digest)


class RewardModel(NamedTuple):
  """The model of a run of `configs/latent_reward.py`.

  Attributes:
    pipeline: whose denoiser it began with.
    params: its averaged parameters, on the host.
    width: see `reward_model.init_params`.
    guidance: see `reward_model.make_score`.
    digest: of the parameters.
  """

  pipeline: pipeline_lib.Pipeline
  params: Any
  width: int
  guidance: float
  digest: str


class StepReward(NamedTuple):
  """The model of a run of `configs/step_reward.py`.

  Attributes:
    pipeline: whose VAE has decoded what it learned from.
    scorer: that it began as, with its parameters' shapes.
    params: its averaged parameters, on the host, see `step_reward.init_params`.
    digest: of the parameters.
  """

  pipeline: pipeline_lib.Pipeline
  scorer: scorers.Reward
  params: Any
  digest: str


def load_reward_model(name: str, *, dtype: Any = jnp.float32) -> RewardModel | StepReward:
  """Loads the reward model of a run's newest good checkpoint.

  Args:
    name: the run's workdir.
    dtype: of the computation.

  Raises:
    UserError: it is not a run that has trained a reward model, its checkpoints are damaged, or
      the base pipeline is not the one that it began with.
  """
  workdir, config = check_reward_model(name)
  directory = checkpoint.directory_of(workdir, config)
  found = checkpoint_files.find_good(directory, step=None)
  pipeline = _load_base(workdir, config["model"], dtype, None, without_denoiser=True)
  _check_base(workdir, pipeline, found.metadata)
  judge, scorer = config["judge"], None
  if base_config.judges_images(config):
    scorer = describe_scorer(judge["scorer"], jnp.dtype(dtype).name)
    abstract = step_reward.abstract_params(scorer)
  else:
    abstract = reward_model.abstract_params(pipeline, width=judge["width"])
  params = sharding.to_host(_restore(directory, found.step, "ema", abstract, None))
  digest = pipeline_lib.fingerprint(params, of=pipeline.digest)
  if scorer:
    return StepReward(pipeline, scorer, params, digest)
  return RewardModel(pipeline, params, judge["width"], judge["guidance"], digest)


def check_reward_model(name: str) -> tuple[Path, dict[str, Any]]:
  """Returns the workdir and the configuration of a run that has trained a reward model.

  Args:
    name: the run's workdir.

  Raises:
    UserError: it is not such a run.
  """
  workdir, config = _config_of(name)
  if "judge" not in config:
    raise UserError(
      f"steps.judge: {name!r} is not the workdir of a reward model: train one with "
      "--config=configs/latent_reward.py, for LPO, or configs/step_reward.py, for SPO"
    )
  return workdir, config


def describe_scorer(name: str, dtype: str) -> scorers.Reward:
  """Loads a scorer that a reward model began as, with its parameters' shapes only."""
  return step_reward.without_params(scorers.load_reward(name, dtype=dtype))


def scorer_of(name: str) -> str:
  """Returns the scorer that a step-aware reward model began as; '' for other workdirs.

  Args:
    name: a workdir.
  """
  _, config = _config_of(name)
  return str(config.get("judge", {}).get("scorer", ""))


def _config_of(name: str) -> tuple[Path, dict[str, Any]]:
  """Returns a workdir and the configuration of its run; an empty one if it has no run."""
  workdir = user_path(name)
  return workdir, _read_config(workdir) if _has_run(workdir) else {}


def _restore(directory: Path, step: int, field: str, abstract: Any, mesh: Mesh | None) -> Any:
  """Restores one tree of a checkpoint's state onto the mesh, or onto one device."""
  if mesh is None:
    host = SingleDeviceSharding(jax.local_devices()[0])
    where = jax.tree.map(lambda _: host, abstract)
  else:
    where = sharding.params_sharding(mesh, abstract)
  target = jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, where
  )
  return checkpoint_files.restore_subtree(directory, step, {field: target})[field]


def _check_base(workdir: Path, pipeline: pipeline_lib.Pipeline, metadata: Any) -> None:
  if metadata.get("pipeline") != pipeline.digest:
    raise UserError(f"the weights in {pipeline.path} are not those that {workdir} began with")


def prompt_prefix(name: str) -> str:
  """Returns the prefix of every prompt of a run's model; '' for other models."""
  if not is_run(name):
    return ""
  data = _read_config(trained_in(user_path(name))).get("data", {})
  return str(data.get("good_prefix", ""))


def setting(name: str, section: str, field: str, default: float) -> float:
  """Returns a field of a run's configuration; `default` for other models."""
  if not is_run(name):
    return default
  return _read_config(trained_in(user_path(name))).get(section, {}).get(field, default)


def learned_from(config: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns the scorers, as names or keys, that judge a run's images with a bias.

  They are those of its reward, that which a trained judge began as, that which has chosen its
  experts, and those of the run that it starts from.

  Args:
    config: of the run.
  """
  chosen, start = config.get("data", {}).get("score", ""), config["model"].get("start", "")
  if chosen.endswith(".parquet"):  # a file of scores, named by its key
    chosen = Path(chosen).stem
  judge = config.get("steps", {}).get("judge", "")
  began_as = scorer_of(judge) if judge else ""
  before = deciding_scorers(start) if start else ()
  return (*base_config.reward_scorers(config), *filter(None, (began_as, chosen)), *before)


def deciding_scorers(name: str, *, best: bool = False) -> tuple[str, ...]:
  """Returns the scorers, as names or keys, that judge a model's images with a bias.

  Args:
    name: of the model; only a run's has such scorers.
    best: whether the run's best checkpoint is judged, which a scorer has chosen as well.
  """
  if not is_run(name):
    return ()
  workdir = trained_in(user_path(name))
  chosen = [best_checkpoint_lib.read(workdir).scorer] if best else []
  # As its last start has found it: other runs may have been moved since.
  learned = [start.get("learned_from") for start in read_starts(workdir)[-1:]]
  if learned and isinstance(learned[0], list):
    return (*map(str, learned[0]), *chosen)
  return (*learned_from(_read_config(workdir)), *chosen)


def is_run(name: str) -> bool:
  """Tells whether a name is a run's workdir, and not a pipeline's."""
  return _has_run(trained_in(user_path(name)))


def _has_run(path: Path) -> bool:
  if not (path / CONFIG).is_file():
    return False
  # Parts of pipelines also have a `config.json`.
  return (path / STARTS).is_file() or any(
    (path / folder).is_dir() for folder in ("checkpoints", ITERATIONS)
  )


def trained_in(path: Path) -> Path:
  """Returns the workdir with the training: a run's own, or that of its last iteration.

  Raises:
    UserError: the run has iterations, and the first is not finished yet.
  """
  if not _has_run(path) or "iterate" not in _read_config(path):
    return path
  finished = [p.parent for p in (path / ITERATIONS).glob("*/report.html")]
  numbers = [n for p in finished if (n := number_of(p.name)) is not None]
  if not numbers:
    raise UserError(
      f"no iteration of the run {path} is finished yet; start it again to finish one"
    )
  return path / ITERATIONS / str(max(numbers))


def _read_config(workdir: Path) -> dict[str, Any]:
  try:
    return read_json(workdir / CONFIG, _is_config)
  except UserError as error:
    raise UserError(f"{workdir / CONFIG} is not a run's configuration: {error}") from error


def _is_config(found: Any) -> bool:
  """Tells whether the fields that are read here have the types that a run writes."""
  if not (isinstance(found, dict) and all(isinstance(found.get(s), dict) for s in _NEEDED)):
    return False
  for path, kind in _READ.items():
    section, name = path.split(".")
    values = found.get(section, {})
    if not isinstance(values, dict) or not isinstance(values.get(name, kind()), kind):
      return False
  for path in _NUMBERS:
    section, name = path.split(".")
    values = found.get(section, {})
    number = values.get(name, 0.0) if isinstance(values, dict) else None
    if not isinstance(number, int | float) or not math.isfinite(number):
      return False
  for section in ("rounds", "pathwise"):
    values = found.get(section, {"scorers": []})
    names = values.get("scorers") if isinstance(values, dict) else None
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
      return False
  rank = found.get("lora", {}).get("rank", 0)
  if not 0 <= rank < 2**31 or (rank and not {"alpha", "targets"} <= found["lora"].keys()):
    return False
  return "path" in found["model"]


def _load_base(
  workdir: Path, model: Any, dtype: Any, mesh: Mesh | None, *, without_denoiser: bool
) -> pipeline_lib.Pipeline:
  """Loads the run's base; reads an unneeded denoiser only for its digest."""
  base = model["path"]
  try:
    return pipeline_lib.load_pipeline(
      base,
      dtype=dtype,
      mesh=mesh,
      **pipeline_lib.source_of(model),
      without_denoiser=without_denoiser,
    )
  except UserError as error:
    anywhere = base in hub.BUNDLED or Path(base).is_absolute()
    where = repr(base) if anywhere else f"{base!r} as seen from where it ran"
    raise UserError(f"the base of the run {workdir}, {where}: {error}") from error
