"""Preferences between single steps: D3PO, SPO and LPO.

Of two steps from one state, or of the steps with the same number of two trajectories, one is
preferred: by the reward of the final image (D3PO, arXiv 2311.13231), or by a judge of noised
images (SPO, arXiv 2406.04314).
"""

import math

import jax
import jax.numpy as jnp


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
