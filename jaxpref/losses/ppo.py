"""Policy gradients on steps of a stochastic sampler: DDPO, DPOK and the variants of GRPO.

DDPO: Black et al., 2023, https://arxiv.org/abs/2305.13301. DPOK: Fan et al., 2023,
https://arxiv.org/abs/2305.16381. Flow-GRPO: Liu et al., 2025, https://arxiv.org/abs/2505.05470.
DanceGRPO: Xue et al., 2025, https://arxiv.org/abs/2505.07818. MixGRPO: Li et al., 2025,
https://arxiv.org/abs/2507.21802. They share this loss and differ in the sampler, the
advantages, and the tie to the reference.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxpref.errors import UserError
from jaxpref.losses.base import Needs, Terms, squares
from jaxpref.rewards import likelihood, policy_gradient

NEEDS = Needs(rows="steps", residuals=True)
VARIANTS = ("score", "clipped", "dpok")
TIES = ("step", "scaled", "prediction")
DENSITIES = ("gaussian", "square")


def refine(needs: Needs, updates: int, *, weight_reference: float) -> Needs:
  """Adds the reference for a tie to it, and the policy that has sampled for several updates."""
  return dataclasses.replace(needs, reference=weight_reference > 0, old=updates > 1)


def log_prob_of(residual: jax.Array, std: jax.Array, *, density: str) -> jax.Array:
  """Computes log-probabilities of steps, [B].

  Args:
    residual: the steps' outputs less their means, [B, ...].
    std: of the steps, [B].
    density: 'gaussian', see `likelihood.gaussian_log_prob`, or 'square': the negative mean
      square alone, as coefficient-preserving sampling compares steps.
  """
  if density == "square":
    return -squares(residual)
  return likelihood.gaussian_log_prob(residual, jnp.zeros_like(residual), std)


def tie_of(
  difference: jax.Array, std: jax.Array, gain: jax.Array, length: jax.Array, *, tie: str
) -> jax.Array:
  """Computes the distance of the policy's and the reference's steps, [B].

  Args:
    difference: of their means, [B, ...].
    std: of the steps, [B].
    gain: how much a mean changes with the prediction, [B].
    length: how much the noise level falls, [B].
    tie: 'step': the divergence of the steps; 'scaled': times the length, as in Flow-GRPO's
      code; 'prediction': the mean square of the predictions' difference, as in DPOK's code.
  """
  if tie == "prediction":
    return squares(difference) / jnp.square(gain)
  kl = likelihood.gaussian_kl(difference, jnp.zeros_like(difference), std)
  return kl * length if tie == "scaled" else kl


def objective(terms: Terms, *, variant, clip, density, tie, weight_reference):
  """Returns the loss and metrics, as `jaxpref.losses.base` describes."""
  for name, given, known in (
    ("variant", variant, VARIANTS),
    ("density", density, DENSITIES),
    ("tie", tie, TIES),
  ):
    if given not in known:
      raise UserError(f"loss.{name} must be one of {', '.join(known)} (got {given!r})")
  labels, now = terms.labels, terms.err["x"]
  std, advantage = labels["std"], labels["advantage"]
  log_prob = log_prob_of(now, std, density=density)
  # Without a policy of its own, the sampling policy is this one: the ratio is 1.
  old = jax.lax.stop_gradient(log_prob)
  if terms.old:
    old = log_prob_of(terms.old["x"], std, density=density)
  if variant == "score":
    if terms.old:
      raise UserError("loss.variant = 'score' needs rounds.updates = 1: it has no ratio")
    fit = policy_gradient.score_function_loss(log_prob, advantage)
  elif variant == "clipped":
    fit = policy_gradient.ppo_loss(log_prob, old, advantage, clip=clip)
  else:
    fit = policy_gradient.dpok_loss(log_prob, old, advantage, clip=clip)
  metrics = policy_gradient.ratio_metrics(log_prob, old, clip=clip)
  if not weight_reference:
    return fit, metrics
  difference = now - terms.ref["x"]
  distance = tie_of(difference, std, labels["gain"], labels["length"], tie=tie)
  return fit + weight_reference * distance, {**metrics, "distance/steps": distance}
