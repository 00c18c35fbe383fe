"""PRDP: regression of reward differences on log-ratios of whole trajectories.

Deng et al., 2024, https://arxiv.org/abs/2402.08714. With u the sum of a trajectory's
log-ratios of policy and reference, the loss of two trajectories a and b of one prompt is
(beta (u_a - u_b) - (r_a - r_b))^2. It is 0 for all pairs exactly where the policy is the
reference times exp(r / beta), normalised. The paper also clips log-ratios near those of the
policy that has sampled; here they are not clipped.
"""

import jax
import jax.numpy as jnp

from jaxpref.losses.base import Needs, Terms

NEEDS = Needs(rows="paths", reference=True)


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


def objective(terms: Terms, *, beta):
  """Returns the loss and metrics, as `jaxpref.losses.base` describes."""
  u_a, u_b = terms.err["a"], terms.err["b"]
  reward_a, reward_b = terms.labels["advantage"].T
  gap, wanted = beta * (u_a - u_b), reward_a - reward_b
  return prdp_loss(u_a, u_b, reward_a, reward_b, beta=beta), {
    "prdp/log_ratio": gap * jnp.sign(wanted),
    "prdp/reward": jnp.abs(wanted),
  }
