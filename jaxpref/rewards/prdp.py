"""PRDP: regression of reward differences on log-ratios of whole trajectories.

Deng et al., 2024, https://arxiv.org/abs/2402.08714. With u the sum of a trajectory's
log-ratios of policy and reference, the loss of two trajectories a and b of one prompt is
(beta (u_a - u_b) - (r_a - r_b))^2. It is 0 for all pairs exactly where the policy is the
reference times exp(r / beta), normalised.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# (params, one step of B pairs) -> log-ratios of policy and reference of both steps, [2, B].
LogRatios = Callable[[Any, Any], jax.Array]


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


def two_pass_gradient(
  log_ratios: LogRatios,
  params: Any,
  steps: Any,
  reward_a: jax.Array,
  reward_b: jax.Array,
  *,
  beta: float,
) -> tuple[jax.Array, Any]:
  """Computes the mean of `prdp_loss` and its gradient with the memory of one step.

  The sum over steps is inside the square, so a backward pass through the loss would keep the
  activations of all steps. The first pass only sums; the second one adds up the steps'
  gradients, each weighted by what the first has found.

  Args:
    log_ratios: of one step.
    params: the policy's parameters.
    steps: what `log_ratios` needs of each step, a tree of [K, ...].
    reward_a: see `prdp_loss`.
    reward_b: see `prdp_loss`.
    beta: see `prdp_loss`.

  Returns:
    Losses [B] and the gradient of their mean.
  """
  zero = jnp.zeros((2, *reward_a.shape), reward_a.dtype)
  (u_a, u_b), _ = jax.lax.scan(
    lambda u, step: (u + log_ratios(params, step), None), zero, steps
  )
  residual = beta * (u_a - u_b) - (reward_a - reward_b)
  weight = 2.0 * beta * residual / residual.shape[0]

  def weighted(params, step):
    ratio_a, ratio_b = log_ratios(params, step)
    return jnp.sum(weight * (ratio_a - ratio_b))

  def add(total, step):
    return jax.tree.map(jnp.add, total, jax.grad(weighted)(params, step)), None

  gradient, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), steps)
  return jnp.square(residual), gradient
