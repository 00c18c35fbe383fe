"""DPO without a reference and with a target margin, after SimPO (Meng et al., 2024).

https://arxiv.org/abs/2405.14734, whose average log-likelihood is here the negative
denoising error.
"""

import jax
import jax.numpy as jnp

from jaxpref.losses.base import Needs, Terms

NEEDS = Needs(rows="pairs")


def simpo_loss(
  err_w: jax.Array, err_l: jax.Array, *, beta: float, target_margin: float
) -> jax.Array:
  """-log sigmoid(beta / 2 (err_l - err_w) - target_margin).

  Args:
    err_w: the policy's errors on preferred images, [B].
    err_l: on the others, at the same timestep and noise, [B].
    beta: scale of the difference, as in `dpo_loss`.
    target_margin: gamma, by which the scaled difference should lead.

  Returns:
    Losses, [B].
  """
  return -jax.nn.log_sigmoid(0.5 * beta * (err_l - err_w) - target_margin)


def objective(terms: Terms, *, beta, target_margin):
  """Loss and metrics; the contract is in `jaxpref.losses.base`."""
  err_w, err_l = terms.err["w"], terms.err["l"]
  loss = simpo_loss(err_w, err_l, beta=beta, target_margin=target_margin)
  return loss, {
    "rewards/margin": err_l - err_w,
    "rewards/accuracy": (err_l > err_w).astype(jnp.float32),
  }
