"""Diffusion-SDPO: DPO or DSPO with a guard for the preferred images (Fu et al., 2025).

https://arxiv.org/abs/2511.03317: the gradient of the other images' errors is scaled so that an
update does not raise the error of the preferred images. This holds to first order, in the space
of predictions, if all pairs of the batch have equal weight.
"""

import jax
import jax.numpy as jnp

from jaxpref.errors import UserError
from jaxpref.losses.base import Needs, Terms, to_errors
from jaxpref.losses.dpo import dpo_loss, reward_metrics
from jaxpref.losses.dspo import dspo_loss

NEEDS = Needs(rows="pairs", reference=True, residuals=True)
GUARDED = ("dpo", "dspo")


def sdpo_scale(
  residual_w: jax.Array, residual_l: jax.Array, *, mu: float, mean=jnp.mean
) -> jax.Array:
  """Computes lambda, the scale of the other images' gradient: one number per batch, 0 to 1.

  A step of -g_w + lambda g_l, with g the gradients of the errors with respect to the
  predictions (which are proportional to the residuals), lowers the preferred images' error by
  at least mu |g_w|^2 to first order if lambda <= (1 - mu) |g_w|^2 / (g_w . g_l). If
  g_w . g_l <= 0, g_l helps and lambda is 1.

  Args:
    residual_w: predictions minus targets on the preferred images, [B, ...].
    residual_l: predictions minus targets on the other images, [B, ...].
    mu: share of the preferred images' descent that must remain, 0 to 1.
    mean: averages an array over the batch of all devices. (The authors' code averages over
      each device's own part of the batch.)

  Returns:
    A scalar without gradient.

  Raises:
    UserError: mu is not between 0 and 1.
  """
  if not 0.0 <= mu <= 1.0:
    raise UserError(f"loss.mu must be between 0 and 1 (got {mu})")
  square, along = mean(jnp.square(residual_w)), mean(residual_w * residual_l)
  # The inner `where` keeps the unused branch finite, and so its gradient.
  cap = (1.0 - mu) * square / jnp.where(along > 0, along, 1.0)
  scale = jnp.where(along > 0, jnp.minimum(cap, 1.0), 1.0)
  return jax.lax.stop_gradient(scale)


def safeguard(err_l: jax.Array, scale: jax.Array) -> jax.Array:
  """Returns `err_l` unchanged, with its gradient times `scale`; works with any loss."""
  held = jax.lax.stop_gradient(err_l)
  return held + scale * (err_l - held)


def objective(terms: Terms, *, beta, mu, guarded):
  """Returns the loss and metrics, as `jaxpref.losses.base` describes."""
  err, ref = to_errors(terms.err), to_errors(terms.ref)
  scale = sdpo_scale(terms.err["w"], terms.err["l"], mu=mu, mean=terms.mean)
  err_l = safeguard(err["l"], scale)
  if guarded == "dpo":
    loss = dpo_loss(err["w"], err_l, ref["w"], ref["l"], beta=beta)
  elif guarded == "dspo":
    loss = dspo_loss(terms.err["w"], terms.ref["w"], err_l, ref["l"], beta=beta)
  else:
    raise UserError(f"loss.guarded must be one of {', '.join(GUARDED)} (got {guarded!r})")
  metrics = reward_metrics(err["w"], err["l"], ref["w"], ref["l"])
  return loss, metrics | {"sdpo/scale": scale}
