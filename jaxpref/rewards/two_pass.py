"""Gradients of losses on whole trajectories, with the memory of one step.

A loss of the sums of steps' log-ratios, such as PRDP's, has the sum inside, so that a backward
pass through it would keep the activations of all steps. The first of two passes only computes
the log-ratios; the second one adds up the steps' gradients, each weighted by the loss's
derivative.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def two_pass_gradient(
  log_ratios: Callable[[Any, Any], tuple[jax.Array, Any]],
  params: Any,
  steps: Any,
  loss: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
  *,
  log_probs: Callable[[Any, Any], jax.Array] | None = None,
) -> tuple[jax.Array, Any, Any]:
  """Computes the mean of losses on trajectories, and its gradient.

  Args:
    log_ratios: (params, one step of B rows of A trajectories) -> the step's log-ratios of
      policy and reference, [A, B], and what else the loss needs of the step.
    params: the policy's parameters.
    steps: what `log_ratios` needs of each step, a tree of [K, ...].
    loss: (log-ratios of all steps [K, A, B], the rest, a tree of [K, ...]) -> losses [B] and
      further results.
    log_probs: the policy's log-probabilities in one step, [A, B], if they cost less than their
      ratios; both have the same gradient.

  Returns:
    Losses [B], the further results, and the gradient of the losses' mean.
  """
  _, (ratios, rest) = jax.lax.scan(
    lambda _, step: (None, log_ratios(params, step)), None, steps
  )

  def mean_loss(ratios):
    values, more = loss(ratios, rest)
    return values.mean(), (values, more)

  weights, (values, more) = jax.grad(mean_loss, has_aux=True)(ratios)
  of_policy = log_probs or (lambda params, step: log_ratios(params, step)[0])

  def add(total, row):
    step, weight = row
    weighted = lambda params: jnp.sum(weight * of_policy(params, step))  # noqa: E731
    return jax.tree.map(jnp.add, total, jax.grad(weighted)(params)), None

  zeros = jax.tree.map(jnp.zeros_like, params)
  gradient, _ = jax.lax.scan(add, zeros, (steps, weights))
  return values, more, gradient
