"""The DDIM solver: Song et al. 2020, arXiv 2010.02502, eq. 12 and 16."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.diffusion.schedule import scales
from jaxpref.diffusion.timesteps import Coefficients, Grid
from jaxpref.errors import UserError


def coefficients(grid: Grid, *, eta: float | Sequence[float] | jax.Array = 0.0) -> Coefficients:
  """Computes the coefficients of DDIM's steps on a grid.

  Args:
    grid: N steps of B samples.
    eta: noise added at each step, in [0, 1]: 0 is deterministic, 1 has the same distribution
      of steps as DDPM. A sequence has one number for each step, and so has a JAX array,
      whose values are not checked because they may be traced.

  Raises:
    UserError: eta is not in [0, 1], or a sequence is not as long as the grid.
  """
  traced = isinstance(eta, jax.Array)
  amount: Any = eta if traced else np.asarray(eta, np.float32)
  if not (traced or ((amount >= 0) & (amount <= 1)).all()):
    raise UserError(f"eta must be in [0, 1] (got {eta})")
  if amount.ndim and amount.shape != (grid.num_steps,):
    raise UserError(f"eta must have {grid.num_steps} numbers, one for each step (got {eta})")
  alpha_s, sigma_s = scales(grid.log_snr[:-1])
  alpha_t, sigma_t = scales(grid.log_snr[1:])
  beta = fresh_variance(grid)
  by_step = jnp.asarray(amount[:, None] if amount.ndim else amount)
  # sqrt(sigma_t^2 - noise^2), factored so that eta = 1 cannot round below zero.
  kept = sigma_t * jnp.sqrt(jnp.maximum(1.0 - by_step**2 * beta / sigma_s**2, 0.0))
  state = kept / sigma_s
  data = alpha_t - alpha_s * state
  noisy = traced or amount.any()
  noise = by_step * sigma_t / sigma_s * jnp.sqrt(beta) if noisy else None
  return Coefficients(state=state, data=data[:, None], noise=noise)


def fresh_variance(grid: Grid) -> jax.Array:
  """Computes `1 - alpha_bar_s / alpha_bar_t`: the noise between a step's two levels [N, B]."""
  log_alpha_bar = jax.nn.log_sigmoid(grid.log_snr)
  return -jnp.expm1(log_alpha_bar[:-1] - log_alpha_bar[1:])
