"""Sampling with a gradient through its last steps: DRaFT and ReFL.

The loss is the negative reward of the decoded result. Steps before the last ones, and the
parameters there, carry no gradient, and nothing of them is kept for the backward pass; the
others are recomputed in it. The steps are DDIM's, with or without noise.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpref.diffusion import sampler
from jaxpref.diffusion.schedule import NoiseSchedule, per_sample, scales, split_at
from jaxpref.diffusion.timesteps import Grid

Denoise = Callable[[Any, jax.Array, jax.Array], jax.Array]  # (params, x_t, t) -> prediction


def sample_last(
  denoise: Denoise,
  params: Any,
  x_T: jax.Array,  # noqa: N803
  grid: Grid,
  schedule: NoiseSchedule,
  *,
  last: int,
  learns: jax.Array | None = None,
  eta: float = 0.0,
  key: jax.Array | None = None,
) -> jax.Array:
  """Samples clean latents with a gradient through the last steps (DRaFT-K, arXiv 2309.17400).

  With `learns` the number of steps may be random, as in AlignProp (arXiv 2310.03739): only the
  predictions of the last `learns` steps have a gradient. The backward pass costs `last` steps.

  Args:
    denoise: (params, x_t float32 [B, ...], t int32 [B]) -> prediction [B, ...].
    params: its parameters.
    x_T: standard normal noise, [B, ...].
    grid: the noise levels to visit.
    schedule: says how to read predictions.
    last: K, the number of steps with a gradient, from 1 to all steps of the grid.
    learns: number of the last steps whose predictions have a gradient, from 1 to `last`, a
      scalar, which may be traced; None: all of them.
    eta: strength of the steps' noise, see `ddim.coefficients`.
    key: typed keys [B] of that noise.

  Returns:
    Clean latents, [B, ...].

  Raises:
    ValueError: `last` is out of range.
  """
  if not 1 <= last <= grid.num_steps:
    raise ValueError(f"last must be between 1 and {grid.num_steps} (got {last})")
  first = grid.num_steps - last
  keys = [None, None] if key is None else [_folded(key, part) for part in (0, 1)]
  noise: list[dict[str, Any]] = [{"eta": eta, "key": of} for of in keys]
  x_t = _sample_fixed(denoise, params, x_T, _part(grid, 0, first), schedule, **noise[0])
  once_more = jax.checkpoint(denoise)
  earliest = None if learns is None else grid.timesteps[grid.num_steps - learns]

  def predict(x, t):
    found = once_more(params, x, t)
    if earliest is None:
      return found
    return jnp.where(per_sample(t <= earliest, found), found, jax.lax.stop_gradient(found))

  return sampler.sample(
    *(predict, x_t, _part(grid, first, grid.num_steps), schedule), solver="ddim", **noise[1]
  )


def sample_renoised(
  denoise: Denoise,
  params: Any,
  x_T: jax.Array,  # noqa: N803
  grid: Grid,
  schedule: NoiseSchedule,
  noise: jax.Array,
) -> jax.Array:
  """Samples clean latents, then denoises them again from the last step's level (DRaFT-LV).

  Only the last denoising has a gradient. The mean of the rewards' gradients over several
  noises varies less than the gradient of DRaFT-1.

  Args:
    denoise: see `sample_last`.
    params: its parameters.
    x_T: standard normal noise, [B, ...].
    grid: the noise levels to visit.
    schedule: says how to read predictions.
    noise: standard normal noise of n repetitions, [n, B, ...].

  Returns:
    Clean latents, [n, B, ...].
  """
  x0 = _sample_fixed(denoise, params, x_T, grid, schedule)
  alpha, sigma = scales(per_sample(grid.log_snr[-2], x0))
  final = _part(grid, grid.num_steps - 1, grid.num_steps)
  once_more = jax.checkpoint(denoise)

  def again(eps):
    x_t = alpha * x0 + sigma * eps
    return sampler.sample(
      lambda x, t: once_more(params, x, t), x_t, final, schedule, solver="ddim"
    )

  return jax.lax.map(again, noise)


def predict_at(
  denoise: Denoise,
  params: Any,
  x_T: jax.Array,  # noqa: N803
  grid: Grid,
  schedule: NoiseSchedule,
  step: jax.Array,
) -> jax.Array:
  """Predicts clean latents from a state inside the trajectory (ReFL, arXiv 2304.05977).

  Args:
    denoise: see `sample_last`.
    params: its parameters.
    x_T: standard normal noise, [B, ...].
    grid: the noise levels to visit.
    schedule: says how to read predictions.
    step: number of the step whose prediction is used, a scalar, which may be traced. The steps
      before it carry no gradient.

  Returns:
    Clean latents, [B, ...].
  """
  frozen = jax.lax.stop_gradient(params)
  seen = sampler.sample_until(
    lambda x, t: denoise(frozen, x, t),
    *(x_T, grid, schedule, jnp.full((1, x_T.shape[0]), step, jnp.int32)),
    solver="ddim",
  )
  x_t = jax.lax.stop_gradient(seen.states[0])
  prediction = denoise(params, x_t, seen.timesteps[0])
  return split_at(schedule.prediction_type, prediction, x_t, grid.log_snr[step])[0]


def _sample_fixed(denoise, params, x_t, grid, schedule, **noise):
  """Samples along a grid, which may have no steps, without a gradient."""
  if not grid.num_steps:
    return jax.lax.stop_gradient(x_t)
  frozen = jax.lax.stop_gradient(params)
  x0 = sampler.sample(
    lambda x, t: denoise(frozen, x, t), x_t, grid, schedule, solver="ddim", **noise
  )
  return jax.lax.stop_gradient(x0)


def _folded(key: jax.Array, number: int) -> jax.Array:
  """Returns other keys [B], so that both parts of a trajectory have their own noise."""
  return jax.vmap(jax.random.fold_in, in_axes=(0, None))(key, number)


def _part(grid: Grid, first: int, end: int) -> Grid:
  return Grid(grid.timesteps[first:end], grid.log_snr[first : end + 1])
