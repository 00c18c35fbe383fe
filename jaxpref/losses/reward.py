"""Rewards as a loss: for samples with a gradient, as in DRaFT, AlignProp and ReFL.

The published methods differ in how a reward becomes a loss: DRaFT (Clark et al. 2023,
https://arxiv.org/abs/2309.17400) maximises it, AlignProp (Prabhudesai et al. 2023,
https://arxiv.org/abs/2310.03739) minimises its distance from a target, and ReFL (Xu et al.
2023, https://arxiv.org/abs/2304.05977) maximises it up to a target.
"""

import jax
import jax.numpy as jnp

from jaxpref.errors import UserError
from jaxpref.losses.base import Needs, Terms

NEEDS = Needs(rows="prompts")
VARIANTS = ("linear", "distance", "hinge")


def reward_loss(
  reward: jax.Array, *, variant: str = "linear", target: float = 0.0, scale: float = 1.0
) -> jax.Array:
  """Computes a loss that falls with the reward.

  Args:
    reward: of samples, [B].
    variant: 'linear': -r; 'distance': |r - target|; 'hinge': max(target - r, 0).
    target: of 'distance' and 'hinge'.
    scale: factor of the loss.

  Returns:
    Losses, [B].

  Raises:
    UserError: the variant is unknown.
  """
  if variant not in VARIANTS:
    raise UserError(f"loss.variant must be one of {', '.join(VARIANTS)} (got {variant!r})")
  found = {
    "linear": -reward,
    "distance": jnp.abs(reward - target),
    "hinge": jnp.maximum(target - reward, 0.0),
  }
  return scale * found[variant]


def objective(terms: Terms, *, variant, target, scale):
  """Returns the loss and metrics, as `jaxpref.losses.base` describes."""
  reward = terms.labels["reward"]
  return reward_loss(reward, variant=variant, target=target, scale=scale), {}
