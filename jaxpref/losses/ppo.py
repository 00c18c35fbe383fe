"""Policy gradients on steps of a stochastic sampler: DDPO, DPOK and the variants of GRPO.

DDPO: Black et al., 2023, https://arxiv.org/abs/2305.13301. DPOK: Fan et al., 2023,
https://arxiv.org/abs/2305.16381. Flow-GRPO: Liu et al., 2025, https://arxiv.org/abs/2505.05470.
DanceGRPO: Xue et al., 2025, https://arxiv.org/abs/2505.07818. MixGRPO: Li et al., 2025,
https://arxiv.org/abs/2507.21802. They share this loss and differ in the sampler, the
advantages, and the tie to the reference. GRPO-Guard and Flow-DPPO change what keeps a step near
the policy that has sampled it.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxpref.errors import UserError
from jaxpref.losses.base import Needs, Terms, squares
from jaxpref.rewards import likelihood, policy_gradient

NEEDS = Needs(rows="steps", residuals=True)
VARIANTS = ("score", "clipped", "dpok", "guarded", "region")
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


def surrogate(
  now: tuple[jax.Array, jax.Array],
  old: tuple[jax.Array, jax.Array],
  labels: Mapping[str, jax.Array],
  *,
  variant: str,
  clip: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Computes a loss of the steps' probabilities without a tie, [B], and its metrics.

  Args:
    now: the policy's log-probabilities, [B], and residuals, [B, ...].
    old: those of the policy that has sampled.
    labels: of the rows.
    variant: one of `VARIANTS`.
    clip: largest distance of a ratio from 1; of 'region', of the divergence from 0.
  """
  log_probs, advantage = (now[0], old[0]), labels["advantage"]
  ratio = policy_gradient.ratio_of(*log_probs)
  if variant == "region":
    kl = likelihood.gaussian_kl(now[1], old[1], labels["std"])
    kept = policy_gradient.keeps(kl, ratio, advantage, threshold=clip)
    metrics = policy_gradient.ratio_metrics(ratio, *log_probs, clip=jnp.inf)
    return jnp.where(kept, -advantage * ratio, 0.0), metrics | {"ratio/stopped": 1.0 - kept}
  if variant == "score":
    fit = policy_gradient.score_function_loss(now[0], advantage)
  elif variant == "dpok":
    fit = policy_gradient.dpok_loss(*log_probs, advantage, clip=clip)
  elif variant == "guarded":
    ratio = policy_gradient.guarded_ratio(*log_probs, now[1], old[1], labels["std"])
    fit = policy_gradient.clipped_loss(ratio, advantage, clip=clip) / labels["length"]
  else:
    fit = policy_gradient.ppo_loss(*log_probs, advantage, clip=clip)
  return fit, policy_gradient.ratio_metrics(ratio, *log_probs, clip=clip)


def objective(terms: Terms, *, variant, clip, density, tie, weight_reference):
  """Returns the loss and metrics, as `jaxpref.losses.base` describes."""
  for name, given, known in (
    ("variant", variant, VARIANTS),
    ("density", density, DENSITIES),
    ("tie", tie, TIES),
  ):
    if given not in known:
      raise UserError(f"loss.{name} must be one of {', '.join(known)} (got {given!r})")
  if variant == "score" and terms.old:
    raise UserError("loss.variant = 'score' needs rounds.updates = 1: it has no ratio")
  labels, now = terms.labels, terms.err["x"]
  std = labels["std"]
  # Without a policy of its own, the sampling policy is this one: the ratio is 1.
  before = terms.old["x"] if terms.old else jax.lax.stop_gradient(now)
  found, sampled = ((log_prob_of(of, std, density=density), of) for of in (now, before))
  fit, metrics = surrogate(found, sampled, labels, variant=variant, clip=clip)
  if not weight_reference:
    return fit, metrics
  difference = now - terms.ref["x"]
  distance = tie_of(difference, std, labels["gain"], labels["length"], tie=tie)
  return fit + weight_reference * distance, {**metrics, "distance/steps": distance}
