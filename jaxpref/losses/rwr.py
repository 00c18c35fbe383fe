"""Reward-weighted regression: fine-tuning on the policy's samples, weighted by their rewards.

The baseline of DDPO's authors (Black et al., 2023, https://arxiv.org/abs/2305.13301).
"""

import jax
import numpy as np

from jaxpref.losses.base import Needs, Terms
from jaxpref.rewards.advantages import softmax_weights

NEEDS = Needs(rows="scored")


def rwr_loss(err: jax.Array, weight: jax.Array) -> jax.Array:
  """Returns the weighted denoising error.

  Args:
    err: denoising errors of samples, [B].
    weight: of the samples, with mean 1 over a round, [B].

  Returns:
    Losses, [B].
  """
  return weight * err


def label(rewards: np.ndarray, *, beta: float) -> dict[str, np.ndarray]:
  """Returns a round's weights, proportional to exp(beta reward), with mean 1.

  Args:
    rewards: of the images, [N].
    beta: inverse temperature.
  """
  return {"weight": softmax_weights(rewards, beta=beta)}


def objective(terms: Terms):
  """Returns the loss and metrics, as `jaxpref.losses.base` describes."""
  weight = terms.labels["weight"]
  return rwr_loss(terms.err["x"], weight), {"rwr/square_weight": weight**2}
