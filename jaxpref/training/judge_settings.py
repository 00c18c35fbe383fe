"""Judges of a run: which one it trains, or which one compares its samples."""

import dataclasses
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpref import base_config, rng, scorers
from jaxpref.diffusion.schedule import NoiseSchedule
from jaxpref.errors import UserError
from jaxpref.losses import Needs
from jaxpref.models import reward_model, step_reward
from jaxpref.models.pipeline import Pipeline
from jaxpref.training import load_run, pathwise_settings
from jaxpref.training.judge import Judge, load_judge
from jaxpref.training.latent_judge import LatentJudge, make_latent_judge
from jaxpref.training.step_judge import StepJudge, make_step_judge


def check(config: ConfigDict, needs: Needs) -> None:
  """Refuses settings that do not suit the training of a reward model.

  Args:
    config: of the run.
    needs: of its loss.

  Raises:
    UserError: the section judge and the loss do not fit, or a setting would have no effect.
  """
  if needs.judges != ("judge" in config):
    raise UserError(
      f"loss {config.loss.name!r} and the section judge do not fit: it is for the losses that "
      "train a reward model, which need it"
    )
  if needs.judges and ("rounds" in config or "pathwise" in config):
    raise UserError("a reward model learns from pairs of the data: it has no samples")
  if needs.judges and (config.lora.rank or config.model.start):
    raise UserError(
      "lora.rank and model.start do not apply to a reward model, which begins as the first "
      "half of the denoiser or as a scorer, and is trained whole"
    )
  if base_config.judges_images(config) and config.data.prompt_dropout:
    raise UserError("data.prompt_dropout must be 0: a scorer judges images for their prompts")
  if needs.judges and config.loss.space != "model":
    raise UserError("loss.space must be 'model': a reward model has no errors")


def check_model(config: ConfigDict, pipeline: Pipeline) -> None:
  """Refuses pipelines of which no reward model is made.

  Args:
    config: of a run that trains one.
    pipeline: of the run.

  Raises:
    UserError: the family has no such model.
  """
  if not base_config.judges_images(config):
    reward_model.check(pipeline)
  elif not isinstance(pipeline.schedule, NoiseSchedule):
    raise UserError(
      f"{config.model.path} is a flow-matching model: step-aware preference models are for "
      "models with timesteps"
    )


def with_scorer(config: ConfigDict, pipeline: Pipeline) -> Pipeline:
  """Returns the pipeline with the scorer that a step-aware preference model begins as.

  Its parameters are float32, and it computes in `model.dtype`.

  Raises:
    UserError: the scorer is not differentiable, its weights are missing, or its image tower or
      its token ids are of a kind that is not supported.
  """
  name, dtype = config.judge.scorer, config.model.dtype
  scorer = scorers.load_reward(name)
  ids = scorer.tokenize([""])
  if not isinstance(ids, np.ndarray) or not ids.size:
    raise UserError(f"judge.scorer = {name!r} must read a prompt as one array of token ids")
  if dtype != "float32":
    scorer = scorer._replace(score=scorers.load_reward(name, dtype=dtype).score)
  step_reward.find_blocks(scorer)
  return dataclasses.replace(
    pipeline,
    scorer=step_reward.without_params(scorer),
    params={**pipeline.params, "scorer": scorer.params},
  )


def init_params(config: ConfigDict, pipeline: Pipeline, base: Any) -> Any:
  """Returns the initial parameters of a reward model.

  Args:
    config: of the run.
    pipeline: of the run.
    base: parameters that it begins with, arrays or shapes: the denoiser's or the scorer's.
  """
  key = rng.key_of(config.seed, "judge", 0)
  if base_config.judges_images(config):
    return step_reward.init_params(pipeline.scorer, base, key)
  return reward_model.init_params(pipeline, base, key, width=config.judge.width)


def make_score(config: ConfigDict, pipeline: Pipeline, **options: Any) -> reward_model.Score:
  """Makes the function of a reward model that a run trains.

  Args:
    config: of the run.
    pipeline: of the run.
    **options: of `Pipeline.make_denoise`.
  """
  guidance = config.judge.guidance
  if base_config.judges_images(config):
    return step_reward.make_score(
      pipeline, guidance=guidance, at_once=config.judge.at_once, **options
    )
  return reward_model.make_score(pipeline, guidance=guidance, **options)


def load(
  config: ConfigDict, pipeline: Pipeline, mesh: Mesh | None
) -> Judge | LatentJudge | StepJudge | None:
  """Loads what judges a run's samples, if anything does.

  Args:
    config: of the run.
    pipeline: of the run.
    mesh: of the devices; None for a plan, which reads no trained judge, but the scorer that a
      step-aware one began as.

  Raises:
    UserError: it is missing, or does not fit the run.
  """
  vae, dtype = pipeline.modules["vae"], config.model.dtype
  if "pathwise" in config:
    pathwise_settings.check_model(config, pipeline)
    return load_judge(config.pathwise, vae, at_once=config.pathwise.at_once, dtype=dtype)
  if not base_config.have_candidates(config):
    return None
  if not (name := config.steps.judge):
    return load_judge(config.rounds, vae, at_once=1, dtype=dtype)
  if mesh is None:
    return _plan_judge(config, pipeline)
  reward = load_run.load_reward_model(name, dtype=pipeline.denoiser.dtype)
  _check_parts(name, pipeline, reward)
  if isinstance(reward, load_run.StepReward):
    return make_step_judge(reward, frozen_dtype=config.model.frozen_dtype)
  return make_latent_judge(reward, mesh, frozen_dtype=config.model.frozen_dtype)


def _plan_judge(config: ConfigDict, pipeline: Pipeline) -> StepJudge | None:
  """Returns a step-aware judge without parameters; None if the run's judge is a latent one.

  Raises:
    UserError: the run of the judge of another method than LPO is missing.
  """
  name = config.steps.judge
  if not (began_as := load_run.scorer_of(name)):
    if config.name != "lpo":
      load_run.check_reward_model(name)  # it says which kind of judge it is
    return None
  scorer = load_run.describe_scorer(began_as, config.model.dtype)
  params = step_reward.abstract_params(scorer)
  planned = load_run.StepReward(pipeline, scorer, params, digest="")
  return make_step_judge(planned, frozen_dtype=config.model.frozen_dtype)


def _check_parts(
  name: str, pipeline: Pipeline, reward: load_run.RewardModel | load_run.StepReward
) -> None:
  """Refuses a reward model that was trained on other latents, levels or prompts.

  A step-aware one has a text encoder of its own.
  """
  latent = isinstance(reward, load_run.RewardModel)
  ours, theirs = pipeline.part_digests, reward.pipeline.part_digests
  for part in ("vae", *(pipeline.encoders if latent else ())):
    if ours.get(part) != theirs.get(part):
      raise UserError(
        f"steps.judge: {name} was trained with another {part} than that of {pipeline.path}, so "
        f"it cannot read its {'latents' if part == 'vae' else 'prompts'}"
      )
  others: dict[str, tuple[Any, Any]] = {
    "scheduler": (pipeline.configs["scheduler"], reward.pipeline.configs["scheduler"])
  }
  if latent:
    others["model.clip_skip"] = pipeline.clip_skip, reward.pipeline.clip_skip
  for what, (own, of_judge) in others.items():
    if own != of_judge:
      raise UserError(f"steps.judge: {name} was trained with another {what} than this run's")
