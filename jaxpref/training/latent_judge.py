"""The judge of candidates that reads their latents: a trained latent reward model (LPO)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from jaxpref import sharding
from jaxpref.data import encode
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


def make_latent_judge(
  reward: load_run.RewardModel, mesh: Mesh, *, frozen_dtype: Any
) -> LatentJudge:
  """Makes the judge of a trained model.

  Args:
    reward: from `load_run.load_reward_model`.
    mesh: of the devices.
    frozen_dtype: of its encoder's weights on the devices.
  """
  model = reward_model.make_score(reward.pipeline, guidance=reward.guidance, mesh=mesh)
  weightless = dataclasses.replace(reward.pipeline, params={})  # its modules are all it needs
  return LatentJudge(reward._replace(pipeline=weightless), model, frozen_dtype)
