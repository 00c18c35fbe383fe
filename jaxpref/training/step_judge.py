"""The judge of candidates by a trained step-aware preference model (SPO)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from jaxpref import sharding
from jaxpref.models import denoiser, step_reward
from jaxpref.models.pipeline import Pipeline, abstract_params
from jaxpref.training import load_run

_AT_ONCE = 1  # images that a device decodes and scores at once, as for scorers of candidates


@dataclasses.dataclass(frozen=True)
class StepJudge:
  """A reward model of predicted clean images and their levels.

  Attributes:
    reward: as its run has trained it.
    score_images: its function.
    frozen_dtype: of the scorer's matrices on the devices.
  """

  reward: load_run.StepReward
  score_images: step_reward.ScoreImages
  frozen_dtype: Any

  def place(self, pipeline: Pipeline, mesh: Mesh) -> dict[str, Any]:
    """Puts the VAE and the model on every device: the argument `params` of `score`.

    Args:
      pipeline: of the policy, with the parameters of its VAE.
      mesh: of the devices.
    """
    model = self._freeze(self.reward.params)
    return sharding.replicate({"vae": pipeline.params["vae"], "model": model}, mesh)

  def abstract_params(self) -> dict[str, Any]:
    """Returns the shapes of `place`."""
    vae = abstract_params(self.reward.pipeline.modules["vae"])
    return {"vae": vae, "model": jax.eval_shape(self._freeze, self.reward.params)}

  def _freeze(self, params: Any) -> Any:
    return {**params, "model": denoiser.freeze(params["model"], self.frozen_dtype)}

  def tokenize(self, prompts: Sequence[str]) -> Any:
    """Returns the scorer's token ids of prompts, int32 [N, L]."""
    return self.reward.scorer.tokenize(prompts)

  def score(self, params: Any, x0: jax.Array, t: jax.Array, tokens: Any) -> jax.Array:
    """Rates predicted clean latents, on one device.

    Args:
      params: from `place`.
      x0: predicted clean latents, [B, C, h, w].
      t: levels at which they are predicted, as the denoiser is given them, [B].
      tokens: from `tokenize`, [B, L].

    Returns:
      Rewards, float32 [B].
    """
    vae = self.reward.pipeline.modules["vae"]
    rate = step_reward.make_score_latents(self.score_images, vae, at_once=_AT_ONCE)
    return rate(params["model"], params["vae"], x0, t, tokens)


def make_step_judge(reward: load_run.StepReward, *, frozen_dtype: Any) -> StepJudge:
  """Makes the judge of a trained model.

  Args:
    reward: from `load_run.load_reward_model`.
    frozen_dtype: of the scorer's matrices on the devices.
  """
  score_images = step_reward.make_score_images(reward.scorer)
  weightless = dataclasses.replace(reward.pipeline, params={})  # its modules are all it needs
  return StepJudge(reward._replace(pipeline=weightless), score_images, frozen_dtype)
