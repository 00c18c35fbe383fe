"""DGPO: a group's images learn together, the more the less their order is learned.

Direct group preference optimization (Luo et al., 2025, https://arxiv.org/abs/2510.08425), after
the authors' code. The images of a prompt share timestep and noise. The weight of a group is
the logistic function of its preference loss, as in DPO for groups of two.
"""

import jax
import jax.numpy as jnp

from jaxpref.losses.base import Needs, Terms, squares

NEEDS = Needs(rows="groups", reference=True, old=True, residuals=True)


def dgpo_loss(
  err: jax.Array,
  err_old: jax.Array,
  err_ref: jax.Array,
  advantage: jax.Array,
  *,
  beta: float,
  clip: float,
) -> jax.Array:
  """Computes sigmoid(S) mean(A err) with S = beta mean(A (err - err_ref)), without a gradient.

  An image's error keeps its gradient while exp(err_old - err) is within 1 - clip .. 1 + clip
  or on the side from which its advantage leads back.

  Args:
    err: the policy's errors on the G images of each group, [B, G].
    err_old: the errors of the lagging policy, [B, G].
    err_ref: the reference's errors, [B, G].
    advantage: of the images, [B, G].
    beta: strength of the tie to the reference.
    clip: half the width of the ratio's range.

  Returns:
    Losses, [B].
  """
  fixed = jax.lax.stop_gradient
  weight = jax.nn.sigmoid(beta * jnp.mean(advantage * fixed(err - err_ref), axis=1))
  learns = advantage * jnp.where(has_moved(err, err_old, advantage, clip=clip), fixed(err), err)
  return weight * jnp.mean(learns, axis=1)


def has_moved(
  err: jax.Array, err_old: jax.Array, advantage: jax.Array, *, clip: float
) -> jax.Array:
  """Tells which errors have left the range the way that their advantage leads, bool."""
  ratio = jnp.exp(err_old - err)
  return jnp.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip)


def objective(terms: Terms, *, beta, clip, weight_reference):
  """Returns the loss and metrics, as `jaxpref.losses.base` describes."""
  arms = sorted(terms.err, key=int)
  by_group = lambda of: jnp.stack([squares(of(arm)) for arm in arms], axis=1)  # noqa: E731
  err, ref, old = (by_group(of.__getitem__) for of in (terms.err, terms.ref, terms.old))
  advantage = terms.labels["advantage"]
  fit = dgpo_loss(err, old, ref, advantage, beta=beta, clip=clip)
  to_reference = by_group(lambda arm: terms.err[arm] - terms.ref[arm]).mean(axis=1)
  return fit + weight_reference * to_reference, {
    "distance/reference": to_reference,
    "dgpo/preference": beta * jnp.mean(advantage * (err - ref), axis=1),
    "dgpo/stopped": has_moved(err, old, advantage, clip=clip).mean(axis=1),
  }
