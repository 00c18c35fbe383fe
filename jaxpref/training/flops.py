"""What the work costs, counted from programs' shapes: matrix products and convolutions.

A multiplication with its addition counts as two, as is usual; all else is left out, a few
per cent. Recomputation by `model.remat` is no part of what a method costs.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from jaxpref.models import unet as unet_lib
from jaxpref.models.pipeline import Pipeline, abstract_params
from jaxpref.training import rollout as rollout_lib
from jaxpref.training.programs import has_own_targets
from jaxpref.training.setup import Checked


def count(jaxpr: Any) -> float:
  """FLOPs of a program, over all devices.

  Args:
    jaxpr: as `jax.make_jaxpr` returns it. Of a conditional the costlier branch counts; the
      body of a `while`, which has no number of turns, counts once. Custom kernels, cuDNN's
      attention for one, cannot be looked into.
  """
  return sum(map(_count_equation, getattr(jaxpr, "jaxpr", jaxpr).eqns))


def of_forward(pipeline: Pipeline) -> float:
  """FLOPs of the UNet's prediction for one latent."""
  told = unet_lib.abstract_cond(pipeline.modules, 1)
  if pipeline.is_improver:
    told["image"] = jax.ShapeDtypeStruct((1, *pipeline.latent_shape), jnp.float32)
  shapes = tuple((name, leaf.shape) for name, leaf in told.items())
  return _of_forward(pipeline.modules["unet"], pipeline.latent_shape, shapes)


@functools.cache  # iterations and campaigns ask for the same again
def _of_forward(unet: Any, latent_shape: tuple[int, ...], told: tuple) -> float:
  x_t = jax.ShapeDtypeStruct((1, *latent_shape), jnp.float32)
  t = jax.ShapeDtypeStruct((1,), jnp.int32)
  cond = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in told}
  denoise = unet_lib.make_denoise(unet, attention="stock", norm="stock")
  return count(jax.make_jaxpr(denoise)(abstract_params(unet), x_t, t, cond))


def of_update(checked: Checked, forward: float) -> dict[str, float]:
  """FLOPs of one update over all devices, by phase: 'rollout', 'reference', 'policy'.

  A backward pass counts as two forward passes; where only additions to the weights are
  trained as one, since the weights need no gradients (and those of the first layers not even
  that: a few per cent less).

  Args:
    checked: the run's configuration and models.
    forward: FLOPs of a prediction, see `of_forward`.
  """
  config, needs = checked.config, checked.loss.needs
  rows, states = config.train.batch_size, config.rollout.states if needs.rollout else 1
  trained = len(checked.arms) - has_own_targets(checked)
  passes = 2 if config.lora.rank else 3
  cost = {"policy": passes * rows * states * trained * forward}
  if needs.reference and not config.data.noise_draws:
    cost["reference"] = rows * states * len(checked.arms) * forward
  if needs.rollout:
    guided = 2 if config.rollout.guidance > 1 else 1
    lot = rollout_lib.rows_at_once(rows, config.rollout.batch_size, devices=checked.mesh.size)
    cost["rollout"] = (
      rows
      * guided
      * forward
      * expected_steps(rows, config.rollout.num_steps, states=states, at_once=lot)
    )
  return cost


def expected_steps(rows: int, num_steps: int, *, states: int, at_once: int) -> float:
  """Solver steps that a rollout takes, mean over its rows and its draws.

  A lot of rows goes as far as the last state that any of them keeps; of rows in order that
  is an order statistic of where rows keep their last.

  Args:
    rows: of an update.
    num_steps: of a whole trajectory.
    states: kept of each, see `rollouts.make_rollout`.
    at_once: rows of a lot.
  """
  first, kept = np.arange(num_steps)[:, None], np.arange(states)
  last = ((first + num_steps // states * kept) % num_steps).max(axis=1)
  reached = np.searchsorted(np.sort(last), np.arange(num_steps), side="right") / num_steps
  # The r-th of the rows lies beyond step k where fewer than r lie at k or before.
  ranks = np.arange(at_once, rows + 1, at_once)[:, None]
  beyond = stats.binom.cdf(ranks - 1, rows, reached)
  return float(1 + beyond.sum(axis=1).mean())


def _count_equation(equation: Any) -> float:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2.0 * np.prod(out, dtype=float) * np.prod([left[i] for i in contracted], dtype=float)
  if name == "conv_general_dilated":
    kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    features = kernel[params["dimension_numbers"].rhs_spec[0]]
    # Zeros between the numbers, as in a strided convolution's gradient, are not counted.
    holes = np.prod(params["lhs_dilation"], dtype=float)
    return 2.0 * np.prod(out, dtype=float) * np.prod(kernel, dtype=float) / features / holes
  if name == "cond":
    return max(map(count, params["branches"]))
  times = params["length"] if name == "scan" else 1
  if name == "shard_map":
    # Its body is what each device does; the parameter's name has changed between versions.
    axes = params.get("newly_manual_axes") or params.get("manual_axes", ())
    times = np.prod([params["mesh"].shape[axis] for axis in axes])
  return float(times) * sum(map(count, _inner(params)))


def _inner(params: dict[str, Any]) -> Iterator[Any]:
  for value in params.values():
    for part in value if isinstance(value, tuple | list) else [value]:
      if hasattr(getattr(part, "jaxpr", part), "eqns"):
        yield part
