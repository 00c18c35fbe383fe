"""MaPO: margin-aware, without a reference (Hong et al., 2024).

https://arxiv.org/abs/2406.06424: the winner's denoising error, and a bonus for every pair
in which it is lower than the loser's.
"""

import jax
import jax.numpy as jnp

from jaxpref.losses.base import Needs, Terms

NEEDS = Needs(rows="pairs")
NUM_TIMESTEPS = 1000  # of the noise schedule, by which the authors scale the log-odds


def mapo_loss(err_w: jax.Array, err_l: jax.Array, *, beta: float, snr: float) -> jax.Array:
  """err_w - beta log sigmoid(1000 (s(err_w) - s(err_l))), s(x) = k x / (exp(k x) - 1).

  Args:
    err_w: the policy's errors on preferred images, [B].
    err_l: on the others, at the same timestep and noise, [B].
    beta: weight of the bonus.
    snr: k, a constant in the place of the signal-to-noise ratio.

  Returns:
    Losses, [B].
  """
  lead = NUM_TIMESTEPS * (_score(snr * err_w) - _score(snr * err_l))
  return err_w - beta * jax.nn.log_sigmoid(lead)


def _score(x: jax.Array) -> jax.Array:
  """The function x / (exp(x) - 1): 1 at 0, 0 at infinity, finite with its gradient at both."""
  near = x < 1e-3
  inside = jnp.where(near, 1.0, x)
  # exp(-x) x / (1 - exp(-x)): nothing overflows for a large x.
  far = inside * jnp.exp(-inside) / -jnp.expm1(-inside)
  return jnp.where(near, 1.0 - x / 2.0 + x * x / 12.0, far)


def objective(terms: Terms, *, beta, snr):
  """Loss and metrics; the contract is in `jaxpref.losses.base`."""
  err_w, err_l = terms.err["w"], terms.err["l"]
  loss = mapo_loss(err_w, err_l, beta=beta, snr=snr)
  return loss, {
    "rewards/margin": err_l - err_w,
    "rewards/accuracy": (err_l > err_w).astype(jnp.float32),
    "mapo/bonus": err_w - loss,
  }
