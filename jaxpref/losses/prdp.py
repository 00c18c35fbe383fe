"""PRDP: regression of reward differences on log-ratios of whole trajectories.

Deng et al., 2024, https://arxiv.org/abs/2402.08714. With u the sum of a trajectory's
log-ratios of policy and reference, the loss of two trajectories a and b of one prompt is
(beta (u_a - u_b) - (r_a - r_b))^2. It is 0 for all pairs exactly where the policy is the
reference times exp(r / beta), normalised. With several updates a round, the loss of a pair is
the larger of two: of its log-ratios, and of log-ratios clipped, step by step, to within `clip`
of those of the policy that has sampled.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxpref.losses.base import Needs, Terms

NEEDS = Needs(rows="paths", reference=True)


def refine(needs: Needs, updates: int) -> Needs:
  """Adds the policy that has sampled, if several updates learn from its trajectories."""
  return dataclasses.replace(needs, old=updates > 1)


def prdp_loss(
  u_a: jax.Array, u_b: jax.Array, reward_a: jax.Array, reward_b: jax.Array, *, beta: float
) -> jax.Array:
  """Computes the squared difference of rewards and scaled log-ratios.

  Args:
    u_a: log-ratio of policy and reference of the first trajectory, summed over steps, [B].
    u_b: of the second one, [B].
    reward_a: of the first trajectory's image, [B].
    reward_b: of the second trajectory's, [B].
    beta: strength of the tie to the reference.

  Returns:
    Losses, [B].
  """
  return jnp.square(beta * (u_a - u_b) - (reward_a - reward_b))


def objective(terms: Terms, *, beta, clip):
  """Returns the loss and metrics, as `jaxpref.losses.base` describes."""
  rewards = terms.labels["advantage"].T
  u_a, u_b = terms.err["a"].sum(axis=0), terms.err["b"].sum(axis=0)
  loss = prdp_loss(u_a, u_b, *rewards, beta=beta)
  metrics = {}
  if terms.old:
    near = {
      arm: jnp.clip(u, terms.old[arm] - clip, terms.old[arm] + clip)
      for arm, u in terms.err.items()
    }
    sums = (u.sum(axis=0) for u in near.values())
    loss = jnp.maximum(loss, prdp_loss(*sums, *rewards, beta=beta))
    moved = [jnp.abs(terms.err[arm] - terms.old[arm]) > clip for arm in near]
    metrics["prdp/far"] = jnp.stack(moved).mean(axis=(0, 1), dtype=jnp.float32)
  gap, wanted = beta * (u_a - u_b), rewards[0] - rewards[1]
  return loss, {
    "prdp/log_ratio": gap * jnp.sign(wanted),
    "prdp/reward": jnp.abs(wanted),
    **metrics,
  }
