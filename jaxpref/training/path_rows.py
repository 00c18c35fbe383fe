"""Rows that are pairs of whole trajectories, and gradients of losses on them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpref.losses import Loss, Terms
from jaxpref.rewards import likelihood, two_pass
from jaxpref.training.batch import Arms


def make_arms(batch: Any) -> Arms:
  """Makes the train step's rows of a batch of R pairs of S steps each.

  Args:
    batch: 'latents' [R, 2, S, 2, C, h, w], inputs and outputs of both trajectories' steps;
      'cond', a tree of [R, ...]; and 'labels', those of the images [R, 2] and those of their
      steps [R, 2, S], see `step_rows`.
  """
  latents, labels = batch["latents"], batch["labels"]
  return Arms(
    latents[..., 0, :, :, :], latents[..., 1, :, :, :], labels["t"], batch["cond"], labels, {}
  )


def gradients(
  residuals_of: Callable[..., dict[str, jax.Array]],
  loss: Loss,
  arms: Sequence[str],
  adapt: Callable[[Any, Any], Any],
  trained: Any,
  fixed: Any,
  rows: Arms,
  mean: Callable[[jax.Array], jax.Array],
) -> tuple[Any, dict[str, jax.Array]]:
  """Computes a micro-batch's gradient and the means of its metrics, one step at a time.

  Args:
    residuals_of: (params, guide, rows, arms) -> {'x': outputs less means} of single steps.
    loss: on the steps' log-ratios of both trajectories.
    arms: their names.
    adapt: (trained parameters, base) -> the policy's parameters.
    trained: the trained parameters.
    fixed: a `train_step._Fixed`.
    rows: from `make_arms`.
    mean: averages an array over the micro-batches of all devices.
  """
  base, start, old, guide = fixed
  reference = base if start is None else adapt(start, base)
  sides = len(arms)
  cond = jax.tree.map(lambda x: jnp.repeat(x, sides, axis=0), rows.cond)

  def by_step(x):
    return jnp.moveaxis(x, 2, 0).reshape(x.shape[2], -1, *x.shape[3:])

  of_steps = {name: of for name, of in rows.labels.items() if of.ndim == 3}
  steps = jax.tree.map(by_step, (rows.x_t, rows.target, of_steps))

  def log_prob(params, step):
    x, after, labels = step
    single = Arms(x[:, None], after[:, None], labels["t"], cond, labels, {})
    residual = residuals_of(params, guide, single, ("x",))["x"]
    found = likelihood.gaussian_log_prob(residual, jnp.zeros_like(residual), labels["std"])
    return found.reshape(-1, sides).T

  def of_policy(trained, step):
    return log_prob(adapt(trained, base), step)

  def log_ratios(trained, step):
    of_reference = log_prob(reference, step)
    of_old = of_policy(old, step) - of_reference if loss.needs.old else None
    return of_policy(trained, step) - of_reference, of_old

  def by_arm(ratios):
    return {arm: ratios[:, i] for i, arm in enumerate(arms)}

  def objective(ratios, of_old):
    of_old = {} if of_old is None else by_arm(of_old)
    return loss.objective(Terms(by_arm(ratios), {}, rows.labels, mean, of_old))

  values, metrics, found = two_pass.two_pass_gradient(
    *(log_ratios, trained, steps, objective), log_probs=of_policy
  )
  return found, jax.tree.map(jnp.mean, {"loss": values, **metrics})
