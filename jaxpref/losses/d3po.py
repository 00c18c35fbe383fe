"""D3PO: which of two steps of the sampler leads to the better image.

Yang et al., 2024, https://arxiv.org/abs/2311.13231. The policy samples two images of a prompt,
and a scorer says which is better. At every step, the log-ratio of policy and reference for the
better image's step shall exceed that of the other's. Ratios are clipped: a step that has moved
further from the reference than that has no gradient.
"""

import jax
import jax.numpy as jnp

from jaxpref.losses.base import Needs, Terms
from jaxpref.rewards import likelihood, step_pairs

NEEDS = Needs(rows="step_pairs", reference=True, residuals=True)


def objective(terms: Terms, *, beta, clip):
  """Returns the loss and metrics, as `jaxpref.losses.base` describes."""
  labels = terms.labels

  def log_prob(residual: jax.Array, side: int) -> jax.Array:
    std = labels["std"][:, side]
    return likelihood.gaussian_log_prob(residual, jnp.zeros_like(residual), std)

  both = [log_prob(of[arm], k) for of in (terms.err, terms.ref) for k, arm in enumerate("wl")]
  reward_w, reward_l = labels["reward"].T
  # A pair of equally good images teaches nothing.
  loss = jnp.where(
    reward_w > reward_l, step_pairs.step_pair_loss(*both, beta=beta, clip=clip or None), 0.0
  )
  ahead_w, ahead_l = both[0] - both[2], both[1] - both[3]
  stopped = sum(jnp.abs(jnp.expm1(of)) > clip for of in (ahead_w, ahead_l)) / 2
  return loss, {
    "rewards/margin": beta * (ahead_w - ahead_l),
    "rewards/accuracy": (ahead_w > ahead_l).astype(jnp.float32),
    **({"d3po/stopped": stopped} if clip else {}),
  }
