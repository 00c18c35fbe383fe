"""MaPO: margin-aware preference optimization without a reference (Hong et al., 2024).

https://arxiv.org/abs/2406.06424: the denoising error of the preferred image, plus a bonus for
every pair in which it is lower than the other image's.
"""

import jax
import jax.numpy as jnp

from jaxpref.losses.base import Needs, Terms

NEEDS = Needs(rows="pairs")
NUM_TIMESTEPS = 1000  # of the noise schedule; the authors scale the log-odds by it


def mapo_loss(err_w: jax.Array, err_l: jax.Array, *, beta: float, snr: float) -> jax.Array:
  """Computes err_w - beta log sigmoid(1000 (s(err_w) - s(err_l))), s(x) = k x / (exp(k x) - 1).

  Args:
    err_w: the policy's errors on the preferred images, [B].
    err_l: the policy's errors on the other images, at the same timestep and noise, [B].
    beta: weight of the bonus.
    snr: k, a constant instead of the signal-to-noise ratio.

  Returns:
    Losses, [B].
  """
  lead = NUM_TIMESTEPS * (_score(snr * err_w) - _score(snr * err_l))
  return err_w - beta * jax.nn.log_sigmoid(lead)


def _score(x: jax.Array) -> jax.Array:
  """Computes x / (exp(x) - 1): 1 at 0, 0 at infinity; value and gradient are finite at both."""
  near = x < 1e-3
  inside = jnp.where(near, 1.0, x)
  # exp(-x) x / (1 - exp(-x)) does not overflow for a large x.
  far = inside * jnp.exp(-inside) / -jnp.expm1(-inside)
  return jnp.where(near, 1.0 - x / 2.0 + x * x / 12.0, far)


def objective(terms: Terms, *, beta, snr):
  """Returns the loss and metrics, as `jaxpref.losses.base` describes."""
  err_w, err_l = terms.err["w"], terms.err["l"]
  loss = mapo_loss(err_w, err_l, beta=beta, snr=snr)
  return loss, {
    "rewards/margin": err_l - err_w,
    "rewards/accuracy": (err_l > err_w).astype(jnp.float32),
    "mapo/bonus": err_w - loss,
  }
