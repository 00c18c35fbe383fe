"""Advantage-weighted matching: the denoising error stands for the log-probability (AWM).

Xue et al., 2025, https://arxiv.org/abs/2509.25050. A sample's error times its advantage is the
policy gradient, so that any sampler serves. Two squared distances between predictions keep the
policy near: to the reference, and to a lagging average of the policy, without which the errors
of bad samples would grow without bound.
"""

import jax
import jax.numpy as jnp

from jaxpref.losses.base import Needs, Terms, squares

NEEDS = Needs(rows="scored", reference=True, old=True, residuals=True)
_MOST = 20.0  # largest absolute log-ratio


def awm_loss(
  err: jax.Array, err_old: jax.Array, advantage: jax.Array, *, clip: float = 1.0
) -> jax.Array:
  """Computes max(-A rho, -A clip(rho, 1 - clip, 1 + clip)) with rho = exp(err_old - err).

  Where both errors are equal the gradient is A times that of the error.

  Args:
    err: the policy's errors, [B].
    err_old: the lagging policy's errors, at the same timestep and noise, [B].
    advantage: of the images, [B].
    clip: half the width of the ratio's range.

  Returns:
    Losses, [B].
  """
  # Beyond the limit the ratio is far outside of any range, and its exponential overflows.
  ratio = jnp.exp(jnp.clip(err_old - err, -_MOST, _MOST))
  inside = jnp.clip(ratio, 1 - clip, 1 + clip)
  return jnp.maximum(-advantage * ratio, -advantage * inside)


def objective(terms: Terms, *, strength, clip, weight_reference, weight_old):
  """Returns the loss and metrics, as `jaxpref.losses.base` describes."""
  now, ref, old = terms.err["x"], terms.ref["x"], terms.old["x"]
  advantage = strength * terms.labels["advantage"]
  fit = awm_loss(squares(now), squares(old), advantage, clip=clip)
  to_reference, to_old = squares(now - ref), squares(now - old)
  return fit + weight_reference * to_reference + weight_old * to_old, {
    "distance/reference": to_reference,
    "distance/old": to_old,
  }
