"""A reward model: its rewards of noised images explain the preferences of pairs.

LPO: Zhang et al., 2025, https://arxiv.org/abs/2502.01051. The Bradley-Terry model, as for
reward models of language: the preferred image of a pair has the larger reward, where both have
the same noise and level. `jaxpref.models.reward_model` has the model. `step_reward` there is
SPO's, which rates the clean images that a frozen denoiser predicts from the noised ones.
"""

import jax

from jaxpref.losses.base import Needs, Terms

NEEDS = Needs(rows="pairs", judges=True)


def pair_loss(reward_w: jax.Array, reward_l: jax.Array) -> jax.Array:
  """Computes -log sigmoid(r_w - r_l).

  Args:
    reward_w: of the preferred images, [B].
    reward_l: of the other images, [B].

  Returns:
    Losses, [B]; ln 2 where both rewards are equal.
  """
  return -jax.nn.log_sigmoid(reward_w - reward_l)


def objective(terms: Terms):
  """Returns the loss and metrics, as `jaxpref.losses.base` describes."""
  reward_w, reward_l = terms.err["w"], terms.err["l"]
  return pair_loss(reward_w, reward_l), {
    "judge/margin": reward_w - reward_l,
    "judge/accuracy": (reward_w > reward_l).astype(reward_w.dtype),
  }
