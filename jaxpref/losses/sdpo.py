"""Diffusion-SDPO: DPO or DSPO with a guard for the winners (Fu et al., 2025).

https://arxiv.org/abs/2511.03317: the loser's gradient is scaled so that, to first order, in
the space of predictions and with all pairs of the batch weighing alike, an update does not
raise the winners' error.
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
  """lambda, by which the loser's gradient is scaled: one number for a batch, 0 to 1.

  A step of -g_w + lambda g_l, with g the gradients of the errors with respect to the
  predictions (which are proportional to the residuals), lowers the winner's error by at
  least mu |g_w|^2 to first order if lambda <= (1 - mu) |g_w|^2 / (g_w . g_l). Where the two
  point apart the loser's gradient helps, and is left whole.

  Args:
    residual_w: predictions minus targets on preferred images, [B, ...].
    residual_l: on the others, [B, ...].
    mu: share of the winner's descent that must remain, 0 to 1.
    mean: of an array over the batch of all devices. (The authors' code takes each device's
      own part of the batch.)

  Returns:
    A scalar that carries no gradient.

  Raises:
    UserError: mu is not a share.
  """
  if not 0.0 <= mu <= 1.0:
    raise UserError(f"loss.mu must be between 0 and 1, got {mu}")
  square, along = mean(jnp.square(residual_w)), mean(residual_w * residual_l)
  # The safe denominator keeps the branch that is not taken finite.
  cap = (1.0 - mu) * square / jnp.where(along > 0, along, 1.0)
  scale = jnp.where(along > 0, jnp.minimum(cap, 1.0), 1.0)
  return jax.lax.stop_gradient(scale)


def safeguard(err_l: jax.Array, scale: jax.Array) -> jax.Array:
  """The loser's errors as they are, their gradients times `scale`; any loss can take them."""
  held = jax.lax.stop_gradient(err_l)
  return held + scale * (err_l - held)


def objective(terms: Terms, *, beta, mu, guarded):
  """Loss and metrics; the contract is in `jaxpref.losses.base`."""
  err, ref = to_errors(terms.err), to_errors(terms.ref)
  scale = sdpo_scale(terms.err["w"], terms.err["l"], mu=mu, mean=terms.mean)
  err_l = safeguard(err["l"], scale)
  if guarded == "dpo":
    loss = dpo_loss(err["w"], err_l, ref["w"], ref["l"], beta=beta)
  elif guarded == "dspo":
    loss = dspo_loss(terms.err["w"], terms.ref["w"], err_l, ref["l"], beta=beta)
  else:
    raise UserError(f"loss.guarded is one of {', '.join(GUARDED)}, not {guarded!r}")
  metrics = reward_metrics(err["w"], err["l"], ref["w"], ref["l"])
  return loss, metrics | {"sdpo/scale": scale}
