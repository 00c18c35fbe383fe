"""Stochastic steps of a rectified flow, and their means and standard deviations.

A flow's sampler is deterministic. With g the density of added noise, the stochastic process

  dx = (v - g^2 / 2 score) ds + g dw,   score = -(x + (1 - s) v) / s

from s = 1 to 0 has the same marginals (Song et al. 2021, arXiv 2011.13456). Published methods
take an Euler step of it, and differ in g. Coefficient-preserving sampling splits the state into
the clean image and the noise that the prediction implies, and replaces a part of that noise.
"""

import math

import jax
import jax.numpy as jnp

from jaxpref.base_config import FLOW_STEPS
from jaxpref.diffusion.schedule import per_sample, scales
from jaxpref.diffusion.timesteps import Coefficients, Grid
from jaxpref.errors import UserError


def coefficients(grid: Grid, solver: str, *, eta: jax.Array) -> Coefficients:
  """Computes the coefficients of stochastic steps on a flow's grid.

  The means below are linear in the state and in the clean image that the prediction implies.
  A step that ends at a clean image has no noise, and one with an eta of 0 is Euler's.

  Args:
    grid: N steps of B samples.
    solver: one of `FLOW_STEPS`: the steps of Flow-GRPO, of DanceGRPO, or those that preserve
      the coefficients.
    eta: strength of each step's noise, [N]: a of `flow_sde_noise`, the constant g, or a of
      `preserving_moments`.

  Raises:
    UserError: the grid is not a flow's, or the solver is unknown.
  """
  if not grid.is_flow or solver not in FLOW_STEPS:
    raise UserError(
      f"the solver {solver!r} is not for this model: steps of flow-matching models are "
      f"{', '.join(FLOW_STEPS)}"
    )
  _, levels = scales(grid.log_snr, is_flow=True)
  s, s_next = levels[:-1], levels[1:]
  noisy = (eta[:, None] > 0) & (s_next > 0)
  amount = jnp.where(noisy, eta[:, None], 0.0)

  def moments(x: float, x0: float) -> tuple[jax.Array, jax.Array]:
    """Returns the step of a state and a clean image of one element each, [N, B]."""
    state = jnp.full_like(s, x)
    velocity = (state - x0) / s
    if solver == "cps":
      return preserving_moments(state, velocity, s, s_next, a=amount)
    if solver == "flow_sde":
      second = jnp.broadcast_to(s[min(1, len(s) - 1)], s.shape)
      g = jnp.where(noisy, flow_sde_noise(s, second, a=amount), 0.0)
    else:
      g = amount
    return sde_moments(state, velocity, s, s_next, g)

  (state, noise), (data, _) = moments(1.0, 0.0), moments(0.0, 1.0)
  return Coefficients(state=state, data=data[:, None], noise=noise)


def flow_sde_noise(
  s: jax.Array, second: float | jax.Array, *, a: float | jax.Array = 0.7
) -> jax.Array:
  """Computes Flow-GRPO's g = a sqrt(s / (1 - s)) (arXiv 2505.05470).

  Args:
    s: noise levels of the steps' inputs, [B].
    second: the sampler's second level, which stands for the first one, where g is infinite.
    a: strength of the noise.
  """
  level = jnp.where(s < 1.0, s, second)
  return a * jnp.sqrt(level / (1.0 - level))


def sde_moments(
  x: jax.Array, v: jax.Array, s: jax.Array, s_next: jax.Array, g: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Computes mean and standard deviation of an Euler step of the stochastic process.

  With `flow_sde_noise` the step is Flow-GRPO's, with a constant g (0.3) DanceGRPO's.

  Args:
    x: states, [B, ...].
    v: predicted velocities, noise minus clean image, [B, ...].
    s: noise levels of the states, above 0, [B].
    s_next: the next, lower levels, [B].
    g: density of the noise, [B].

  Returns:
    The mean [B, ...] and the standard deviation [B].
  """
  step = s_next - s
  level, ds, square = (per_sample(of, x) for of in (s, step, jnp.square(g)))
  score = -(x + (1.0 - level) * v) / level
  return x + (v - 0.5 * square * score) * ds, g * jnp.sqrt(-step)


def preserving_moments(
  x: jax.Array,
  v: jax.Array,
  s: jax.Array,
  s_next: jax.Array,
  *,
  a: float | jax.Array = 0.8,
) -> tuple[jax.Array, jax.Array]:
  """Computes mean and standard deviation of a coefficient-preserving step.

  The step's noise keeps its level, of which the share sin(a pi / 2) is new. The methods that
  use it compare -mean (x - mean)^2, without the deviation, and not `gaussian_log_prob`.

  Args:
    x: states, [B, ...].
    v: predicted velocities, [B, ...].
    s: noise levels of the states, [B].
    s_next: the next levels, [B].
    a: strength of the noise, from 0 to 1.

  Returns:
    The mean [B, ...] and the standard deviation [B].
  """
  clean = x - per_sample(s, x) * v
  noise = x + (1.0 - per_sample(s, x)) * v
  angle = a * (math.pi / 2)
  kept = per_sample(s_next * jnp.cos(angle), x)
  mean = (1.0 - per_sample(s_next, x)) * clean + kept * noise
  return mean, s_next * jnp.sin(angle)
