"""The judge of candidates that reads their latents: a trained latent reward model (LPO)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpref import sharding
from jaxpref.data import encode
from jaxpref.errors import UserError
from jaxpref.losses import Needs
from jaxpref.models import reward_model
from jaxpref.models.pipeline import Pipeline
from jaxpref.training import load_run


@dataclasses.dataclass(frozen=True)
class LatentJudge:
  """A reward model of noised latents.

  Attributes:
    reward: as its run has trained it.
    model: its function.
    frozen_dtype: of its encoder's weights on the devices.
  """

  reward: load_run.RewardModel
  model: reward_model.Score
  frozen_dtype: Any

  def place(self, pipeline: Pipeline, mesh: Mesh) -> dict[str, Any]:
    """Puts what it needs on the devices: the argument `params` of `score`.

    The VAE and the conditioning that its guidance leads away from are on every device; its own
    parameters are sharded as the denoiser's.

    Args:
      pipeline: of the policy, with the parameters of its VAE and text encoders.
      mesh: of the devices.
    """
    encoder = pipeline.freeze(self.reward.params["encoder"], self.frozen_dtype)
    model = sharding.place_params({**self.reward.params, "encoder": encoder}, mesh)
    shared = {"vae": pipeline.params["vae"], "uncond": encode.encode_no_prompt(pipeline, mesh)}
    return {"model": model, **sharding.replicate(shared, mesh)}

  def tokenize(self, prompts: Sequence[str]) -> dict[str, Any]:  # noqa: ARG002
    """Returns nothing: it reads the conditioning of the policy."""
    return {}

  def score(self, params: Any, x_t: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
    """Rates noised latents.

    Args:
      params: from `place`.
      x_t: noised latents, [B, C, h, w].
      t: what the denoiser is given for their levels, [B].
      cond: conditioning of their prompts, a tree of [B, ...].

    Returns:
      Rewards, float32 [B].
    """
    return self.model(params["model"], x_t, t, cond, params["uncond"])


def check_training(config: ConfigDict, needs: Needs) -> None:
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
      "train a latent reward model, which need it"
    )
  if needs.judges and ("rounds" in config or "pathwise" in config):
    raise UserError("a latent reward model learns from pairs of the data: it has no samples")
  if needs.judges and (config.lora.rank or config.model.start):
    raise UserError(
      "lora.rank and model.start do not apply to a latent reward model, which begins as the "
      "first half of the denoiser, and is trained whole"
    )
  if needs.judges and config.loss.space != "model":
    raise UserError("loss.space must be 'model': a latent reward model has no errors")


def load_latent_judge(
  name: str, pipeline: Pipeline, mesh: Mesh, *, frozen_dtype: Any
) -> LatentJudge:
  """Loads the model of a run of `configs/latent_reward.py`.

  Args:
    name: the run's workdir.
    pipeline: of the policy, which must encode images and prompts, and noise latents, as the
      judge's own.
    mesh: of the devices.
    frozen_dtype: of its encoder's weights on the devices.

  Returns:
    The judge, with parameters on the host.

  Raises:
    UserError: it is not such a run, or its VAE, text encoders or noise schedule are others.
  """
  found = load_run.load_reward_model(name, dtype=pipeline.denoiser.dtype)
  ours, theirs = pipeline.part_digests, found.pipeline.part_digests
  for part in ("vae", *pipeline.encoders):
    if ours.get(part) != theirs.get(part):
      raise UserError(
        f"steps.judge: {name} was trained with another {part} than that of {pipeline.path}, so "
        "it cannot read its latents and prompts"
      )
  skips = pipeline.clip_skip, found.pipeline.clip_skip
  schedules = pipeline.configs["scheduler"], found.pipeline.configs["scheduler"]
  for what, (own, of_judge) in {"model.clip_skip": skips, "scheduler": schedules}.items():
    if own != of_judge:
      raise UserError(f"steps.judge: {name} was trained with another {what} than this run's")
  model = reward_model.make_score(found.pipeline, guidance=found.guidance, mesh=mesh)
  weightless = dataclasses.replace(found.pipeline, params={})  # its modules are all it needs
  return LatentJudge(found._replace(pipeline=weightless), model, frozen_dtype)
