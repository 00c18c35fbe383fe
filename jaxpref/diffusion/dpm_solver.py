"""The multistep DPM-Solver++ of order 1, 2 (2M, midpoint) and 3, with data prediction.

For a flow, order 1 is Euler's method.

Lu et al. 2022, arXiv 2211.01095. With `l = log(alpha / sigma)` the step from s to t is
`x_t = sigma_t / sigma_s x_s + sigma_t int_{l_s}^{l_t} e^l x0(l) dl`. Order p replaces x0 under
the integral by the polynomial through its last p predictions.

Order 3 gives its quadratic term half the weight that this polynomial needs, as in the authors'
code and diffusers. Its error is a quarter of order 2's, but falls at order 2's rate for very
short steps.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.diffusion.schedule import scales
from jaxpref.diffusion.timesteps import Coefficients, Grid
from jaxpref.errors import UserError

# diffusers lowers the order of the last steps only when there are few of them.
_FEW_STEPS = 15


def coefficients(grid: Grid, *, order: int = 2, lower_order_final: bool = True) -> Coefficients:
  """Computes the coefficients of the solver's steps on a grid.

  Args:
    grid: N steps of B samples.
    order: 1, 2 or 3; the first steps have a lower order, because they have no history.
    lower_order_final: with fewer than 15 steps, lower the order of the last steps.

  Raises:
    UserError: order is not 1, 2 or 3.
  """
  if order not in (1, 2, 3):
    raise UserError(f"the order of DPM-Solver++ must be 1, 2 or 3 (got {order!r})")
  lam = 0.5 * grid.log_snr
  alpha, sigma = scales(grid.log_snr[1:], is_flow=grid.is_flow)
  state = sigma / scales(grid.log_snr[:-1], is_flow=grid.is_flow)[1]
  h = lam[1:] - lam[:-1]
  # A step that lands on a clean image is x = x0, whatever the order: h is infinite,
  # and finite differences scaled to it have no meaning. So is h of a step from pure noise.
  unbounded = jnp.isinf(h)
  planned = _step_orders(grid.num_steps, order, lower_order_final)[:, None]
  orders = jnp.where(unbounded, 1, planned)
  if grid.is_flow:  # nor is the prediction at pure noise, infinitely far back, a history
    orders = jnp.where(jnp.isinf(_step_back(lam, 0)), 1, orders)
  first = -alpha * jnp.expm1(-h)

  h = jnp.where(unbounded, 1.0, h)
  # Steps back from k to k - 1 and from k - 1 to k - 2; 1 without history,
  # so that the unused branch stays finite.
  h_0 = jnp.where(orders >= 2, _step_back(lam, 0), 1.0)
  h_1 = jnp.where(orders >= 3, _step_back(lam, 1), 1.0)

  # Weights of the divided differences h [x0_k, x0_{k-1}] and h [x0_{k-1}, x0_{k-2}].
  phi_3 = _phi_3(h)
  phi_2 = h * (phi_3 + 0.5)
  bend = alpha * (phi_2 * h_0 - phi_3 * h) / (h_0 + h_1)
  newer = jnp.where(orders >= 3, alpha * phi_2 + bend, 0.5 * first)
  newer = jnp.where(orders >= 2, newer, 0.0) * h / h_0
  older = jnp.where(orders >= 3, -bend, 0.0) * h / h_1

  data = [first + newer, older - newer, -older][:order]
  return Coefficients(state=state, data=jnp.stack(data, axis=1))


def _step_back(lam: jax.Array, steps: int) -> jax.Array:
  # Length of the step taken `steps + 1` before each one [N, B]; 0 before the first.
  padding = jnp.zeros((steps + 1,) + lam.shape[1:])
  return jnp.concatenate([padding, jnp.diff(lam, axis=0)])[: lam.shape[0] - 1]


def _step_orders(num_steps: int, order: int, lower_order_final: bool) -> np.ndarray:
  orders = np.minimum(np.arange(num_steps) + 1, order)
  if lower_order_final and num_steps < _FEW_STEPS:
    orders = np.minimum(orders, num_steps - np.arange(num_steps))
  return orders


def _phi_3(h: jax.Array) -> jax.Array:
  # (exp(-h) - 1 + h) / h^2 - 1/2 cancels for short steps: its Taylor series there.
  short = jnp.minimum(h, 0.5)
  series = sum((-1) ** n * short ** (n - 2) / math.factorial(n) for n in range(3, 9))
  long = jnp.maximum(h, 0.5)
  return jnp.where(h < 0.5, series, (jnp.expm1(-long) + long) / long**2 - 0.5)
