"""Gradients of losses on whole trajectories, with the memory of one step.

A loss of the sums of steps' log-ratios, such as PRDP's, has the sum inside, so that a backward
pass through it would keep the activations of all steps. The first of two passes only sums; the
second one adds up the steps' gradients, each weighted by what the first has found.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# (params, one step of B rows of A trajectories) -> numbers [A, B].
OfStep = Callable[[Any, Any], jax.Array]


def two_pass_gradient(
  log_ratios: OfStep,
  params: Any,
  steps: Any,
  loss: Callable[[jax.Array], tuple[jax.Array, Any]],
  *,
  log_probs: OfStep | None = None,
) -> tuple[jax.Array, Any, Any]:
  """Computes the mean of losses on trajectories, and its gradient.

  Args:
    log_ratios: log-ratios of policy and reference in one step.
    params: the policy's parameters.
    steps: what `log_ratios` needs of each step, a tree of [K, ...].
    loss: from log-ratios summed over the steps, [A, B], to losses [B] and further results.
    log_probs: the policy's log-probabilities in one step, if they cost less than their ratios;
      both have the same gradient.

  Returns:
    Losses [B], the further results, and the gradient of the losses' mean.
  """
  first = jax.tree.map(lambda x: x[0], steps)
  shape = jax.eval_shape(log_ratios, params, first)
  sums, _ = jax.lax.scan(
    lambda u, step: (u + log_ratios(params, step), None),
    jnp.zeros(shape.shape, shape.dtype),
    steps,
  )

  def mean_loss(u):
    values, more = loss(u)
    return values.mean(), (values, more)

  weight, (values, more) = jax.grad(mean_loss, has_aux=True)(sums)

  def weighted(params, step):
    return jnp.sum(weight * (log_probs or log_ratios)(params, step))

  def add(total, step):
    return jax.tree.map(jnp.add, total, jax.grad(weighted)(params, step)), None

  gradient, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), steps)
  return values, more, gradient
