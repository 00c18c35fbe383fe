"""SimPO for diffusion: DPO without a reference, with a target margin (Meng et al., 2024).

https://arxiv.org/abs/2405.14734. The negative denoising error takes the role of SimPO's average
log-likelihood.
"""

import jax
import jax.numpy as jnp

from jaxpref.losses.base import Needs, Terms

NEEDS = Needs(rows="pairs")


def simpo_loss(
  err_w: jax.Array, err_l: jax.Array, *, beta: float, target_margin: float
) -> jax.Array:
  """Computes -log sigmoid(beta / 2 (err_l - err_w) - target_margin).

  Args:
    err_w: the policy's errors on the preferred images, [B].
    err_l: the policy's errors on the other images, at the same timestep and noise, [B].
    beta: scale of the difference, as in `dpo_loss`.
    target_margin: gamma, the lead that the scaled difference should have.

  Returns:
    Losses, [B].
  """
  return -jax.nn.log_sigmoid(0.5 * beta * (err_l - err_w) - target_margin)


def objective(terms: Terms, *, beta, target_margin):
  """Returns the loss and metrics, as `jaxpref.losses.base` describes."""
  err_w, err_l = terms.err["w"], terms.err["l"]
  loss = simpo_loss(err_w, err_l, beta=beta, target_margin=target_margin)
  return loss, {
    "rewards/margin": err_l - err_w,
    "rewards/accuracy": (err_l > err_w).astype(jnp.float32),
  }
