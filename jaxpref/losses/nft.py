"""DiffusionNFT: good samples attract the policy, bad ones its mirror image.

Zheng et al., 2025, https://arxiv.org/abs/2509.16117. Both are predictions on the line through
those of the policy and of the lagging policy that samples: one beyond the policy, one on the
other side. Each learns the same target, weighted by how good the sample is.
"""

import jax
import jax.numpy as jnp

from jaxpref.losses.base import Needs, Terms, squares

NEEDS = Needs(rows="scored", reference=True, old=True, residuals=True)
_LEAST = 1e-5  # of the errors' mean absolute value, by which they are divided


def nft_loss(
  residual: jax.Array,
  residual_old: jax.Array,
  optimality: jax.Array,
  *,
  beta: float,
  adaptive: bool = True,
) -> jax.Array:
  """Computes (r L(v+) + (1 - r) L(v-)) / beta.

  v+ = beta v + (1 - beta) v_old and v- = (1 + beta) v_old - beta v, with v the policy's
  prediction. Where v = v_old the gradient is that of (2 r - 1) L.

  Args:
    residual: the policy's predictions minus targets, [B, ...].
    residual_old: those of the policy that sampled, [B, ...].
    optimality: r, from 0 for the worst samples to 1 for the best, [B].
    beta: how far v+ and v- are from v_old, in units of v - v_old.
    adaptive: divide each error by the mean of its residual's absolute values, without a
      gradient, as published.

  Returns:
    Losses, [B].
  """

  def error(of):
    if not adaptive:
      return squares(of)
    size = jnp.mean(jnp.abs(of), axis=tuple(range(1, of.ndim)))
    return squares(of) / jax.lax.stop_gradient(jnp.maximum(size, _LEAST))

  old = jax.lax.stop_gradient(residual_old)
  better = error(beta * residual + (1 - beta) * old)
  worse = error((1 + beta) * old - beta * residual)
  return (optimality * better + (1 - optimality) * worse) / beta


def optimality(advantage: jax.Array, *, clip: float) -> jax.Array:
  """Maps advantages from -clip .. clip to 0 .. 1, [B]."""
  return 0.5 + 0.5 * jnp.clip(advantage / clip, -1.0, 1.0)


def objective(terms: Terms, *, beta, clip, weight_reference):
  """Returns the loss and metrics, as `jaxpref.losses.base` describes."""
  now, ref, old = terms.err["x"], terms.ref["x"], terms.old["x"]
  good = optimality(terms.labels["advantage"], clip=clip)
  to_reference = squares(now - ref)
  loss = clip * nft_loss(now, old, good, beta=beta) + weight_reference * to_reference
  return loss, {
    "distance/reference": to_reference,
    "distance/old": squares(now - old),
    "nft/optimality": good,
  }
