"""Diffusion-DRO: rank expert images above the policy's own samples (Wu et al., 2025).

Max-margin inverse reinforcement learning. The reward is the log-ratio of policy and reference,
so a single network is trained. The reference drops out of the gradient but decides, in the
hinge, which samples still count.
"""

import jax
import jax.numpy as jnp

from jaxpref.losses.base import Needs, Terms

NEEDS = Needs(rows="experts", rollout="states", reference=True)


def dro_loss(
  err_e: jax.Array,
  err_p: jax.Array,
  ref_e: jax.Array,
  ref_p: jax.Array,
  *,
  margin: float,
) -> jax.Array:
  """Computes a hinge on how much more the policy improved on its own samples than on experts.

  max((err_e - ref_e) - (err_p - ref_p) + margin, 0), the per-sample form of Diffusion-DRO's
  objective. Exactly at the kink half of the gradient passes: with a margin of 0, training can
  still leave the reference, where every sample is at the kink.

  Args:
    err_e: the policy's errors on noised expert images, [B].
    err_p: the policy's errors on its own samples, relative to the prediction that made them,
      [B].
    ref_e: the reference's errors on the expert images, [B].
    ref_p: the reference's errors on the policy's samples, [B].
    margin: m, the lead that the experts must have.

  Returns:
    Losses, [B].
  """
  return jnp.maximum((err_e - ref_e) - (err_p - ref_p) + margin, 0.0)


def objective(terms: Terms, *, margin):
  """Returns the loss and metrics, as `jaxpref.losses.base` describes."""
  err, ref = terms.err, terms.ref
  loss = dro_loss(err["e"], err["p"], ref["e"], ref["p"], margin=margin)
  # The implicit rewards: reference error minus policy error.
  reward_e, reward_p = ref["e"] - err["e"], ref["p"] - err["p"]
  return loss, {
    "rewards/expert": reward_e,
    "rewards/policy": reward_p,
    "rewards/margin": reward_e - reward_p,
    "rewards/accuracy": (reward_e > reward_p).astype(jnp.float32),
    "dro/active": (loss > 0).astype(jnp.float32),
  }
