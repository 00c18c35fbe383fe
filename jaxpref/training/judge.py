"""The reward of latents inside a program: decoded without rounding, then scored."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxpref import scorers, sharding
from jaxpref.models import vae as vae_lib
from jaxpref.models.pipeline import Pipeline, abstract_params
from jaxpref.scorers import Reward


@dataclasses.dataclass(frozen=True)
class Judge:
  """Differentiable scorers and their weights.

  Attributes:
    rewards: by the scorers' names.
    weights: of the scorers, in their order.
    vae: the module that decodes.
    at_once: images that are decoded and scored at once on a device.
  """

  rewards: dict[str, Reward]
  weights: tuple[float, ...]
  vae: Any
  at_once: int

  def place(self, pipeline: Pipeline, mesh: Any) -> dict[str, Any]:
    """Puts the VAE and the scorers on every device: the argument `params` of `score`."""
    trees = {name: reward.params for name, reward in self.rewards.items()}
    return sharding.replicate({"vae": pipeline.params["vae"], "scorers": trees}, mesh)

  def abstract_params(self) -> dict[str, Any]:
    """Returns the shapes of `place`."""
    trees = {name: reward.params for name, reward in self.rewards.items()}
    shapes = jax.eval_shape(lambda params: params, trees)
    return {"vae": abstract_params(self.vae), "scorers": shapes}

  def tokenize(self, prompts: Sequence[str]) -> dict[str, Any]:
    """Returns what the scorers read of prompts, numpy arrays [N, ...] by scorer."""
    return {name: reward.tokenize(prompts) for name, reward in self.rewards.items()}

  def score(self, params: Any, latents: jax.Array, tokens: Any) -> dict[str, jax.Array]:
    """Decodes and scores latents; images are clipped to the range of pixels, not rounded.

    The backward pass recomputes the decoder, `at_once` images at a time, so that its memory
    does not grow with the batch.

    Args:
      params: from `place`.
      latents: scaled, [B, C, h, w].
      tokens: from `tokenize`, [B, ...] by scorer.

    Returns:
      Scores by scorer, float32 [B].
    """
    once_more = jax.checkpoint(lambda row: self.score_one(params, *row))
    return jax.lax.map(once_more, (latents, tokens), batch_size=self.at_once)

  def score_one(self, params: Any, latent: jax.Array, tokens: Any) -> dict[str, jax.Array]:
    """Decodes and scores one latent, [C, h, w], see `score`; returns scores []."""
    unit = vae_lib.decode_clipped(self.vae, params["vae"], latent[None])
    return {
      name: reward.score(
        params["scorers"][name], unit, jax.tree.map(lambda x: x[None], tokens[name])
      )[0]
      for name, reward in self.rewards.items()
    }

  def total(self, scores: dict[str, jax.Array]) -> jax.Array:
    """Returns the weighted sum of scores, [B]."""
    return sum(
      (weight * scores[name] for name, weight in zip(self.rewards, self.weights, strict=True)),
      start=jnp.zeros(()),
    )


def load_judge(settings: ConfigDict, vae: Any, *, at_once: int, dtype: str) -> Judge:
  """Loads the scorers of the configuration's section `pathwise` or `rounds`.

  Args:
    settings: the section.
    vae: the pipeline's module.
    at_once: images that are decoded and scored at once on a device.
    dtype: of the scorers' computation.

  Raises:
    UserError: a scorer is unknown or not differentiable, or its weights are missing.
  """
  rewards = {name: scorers.load_reward(name, dtype=dtype) for name in settings.scorers}
  return Judge(rewards, tuple(settings.weights), vae, at_once)
