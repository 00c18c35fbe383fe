"""Step pairs: which of two steps of the sampler is better, for D3PO and SPO.

D3PO: Yang et al., 2024, https://arxiv.org/abs/2311.13231. SPO: Liang et al., 2024,
https://arxiv.org/abs/2406.04314. The log-ratio of policy and reference for the better step
shall exceed that of the other one. Ratios are clipped: a step that has moved further from the
reference than that has no gradient.
"""

import math

import jax
import jax.numpy as jnp

from jaxpref.losses.base import Needs, Terms
from jaxpref.rewards import likelihood

NEEDS = Needs(rows="step_pairs", reference=True, residuals=True)


def step_pair_loss(
  log_prob_w: jax.Array,
  log_prob_l: jax.Array,
  ref_w: jax.Array,
  ref_l: jax.Array,
  *,
  beta: float,
  clip: float | None = None,
) -> jax.Array:
  """Computes DPO's loss on two steps.

  -log sigmoid(beta (log R_w - log R_l)) with the ratios R of policy and reference, clipped to
  1 - clip .. 1 + clip. Outside of that range a ratio has no gradient.

  Args:
    log_prob_w: the policy's log-probabilities of the preferred steps, [B].
    log_prob_l: of the other steps, [B].
    ref_w: the reference's log-probabilities of the preferred steps, [B].
    ref_l: of the other steps, [B].
    beta: strength of the tie to the reference.
    clip: of the ratios, below 1; None: no clip.

  Returns:
    Losses, [B]; ln 2 where policy and reference are equal.
  """
  ratio_w, ratio_l = log_prob_w - ref_w, log_prob_l - ref_l
  if clip is not None:
    low, high = math.log1p(-clip), math.log1p(clip)
    ratio_w, ratio_l = jnp.clip(ratio_w, low, high), jnp.clip(ratio_l, low, high)
  return -jax.nn.log_sigmoid(beta * (ratio_w - ratio_l))


def objective(terms: Terms, *, beta, clip):
  """Returns the loss and metrics, as `jaxpref.losses.base` describes."""
  # Steps from one state have one deviation, [B, 1].
  stds = jnp.broadcast_to(terms.labels["std"], terms.labels["reward"].shape).T

  def log_probs(residuals) -> list[jax.Array]:
    return [
      likelihood.gaussian_log_prob(residuals[arm], jnp.zeros_like(residuals[arm]), std)
      for arm, std in zip(("w", "l"), stds, strict=True)
    ]

  policy, reference = log_probs(terms.err), log_probs(terms.ref)
  loss = step_pair_loss(*policy, *reference, beta=beta, clip=clip or None)
  reward_w, reward_l = terms.labels["reward"].T
  decided = reward_w > reward_l  # equally good steps teach nothing
  ahead_w, ahead_l = (now - fixed for now, fixed in zip(policy, reference, strict=True))
  stopped = sum(jnp.abs(jnp.expm1(ahead)) > clip for ahead in (ahead_w, ahead_l)) / 2
  return jnp.where(decided, loss, 0.0), {
    "rewards/margin": beta * (ahead_w - ahead_l),
    "rewards/accuracy": (ahead_w > ahead_l).astype(jnp.float32),
    "step_pairs/decided": decided.astype(jnp.float32),
    **({"step_pairs/stopped": stopped} if clip else {}),
  }
