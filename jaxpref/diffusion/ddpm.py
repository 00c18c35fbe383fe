"""The DDPM solver, ancestral sampling: Ho et al. 2020, arXiv 2006.11239, eq. 6 and 7."""

import jax
import jax.numpy as jnp

from jaxpref.diffusion.ddim import fresh_variance
from jaxpref.diffusion.timesteps import Coefficients, Grid


def coefficients(grid: Grid) -> Coefficients:
  """Computes mean and standard deviation of `q(x_t | x_s, x0)` for each step s -> t of a grid.

  The variance is the posterior's ("fixed small"); it is 0 for a step to a clean image.

  Args:
    grid: N steps of B samples; its levels need not be adjacent timesteps.
  """
  beta = fresh_variance(grid)
  variance_s = jax.nn.sigmoid(-grid.log_snr[:-1])
  variance_t = jax.nn.sigmoid(-grid.log_snr[1:])
  state = jnp.sqrt(1.0 - beta) * variance_t / variance_s
  data = jnp.sqrt(jax.nn.sigmoid(grid.log_snr[1:])) * beta / variance_s
  noise = jnp.sqrt(beta * variance_t / variance_s)
  return Coefficients(state=state, data=data[:, None], noise=noise)
