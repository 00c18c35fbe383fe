"""The sampler: one loop over a grid for every solver.

A solver is a table of coefficients (`grid.Coefficients`); this file applies it. Call it
inside `jax.jit` with the denoiser's parameters as arguments of the jitted function.
"""

import flax.struct
import jax
import jax.numpy as jnp

from jaxpref.base_config import SOLVERS
from jaxpref.diffusion import ddim, ddpm, dpm_solver
from jaxpref.diffusion.guidance import Denoise
from jaxpref.diffusion.schedule import NoiseSchedule, per_sample, split_at
from jaxpref.diffusion.timesteps import Coefficients, Grid
from jaxpref.errors import UserError


@flax.struct.dataclass
class Trajectory:
  """What the denoiser saw and said at each step.

  Attributes:
    states: inputs x_t of the steps, float32 [N, B, ...].
    predictions: the denoiser's outputs there, in its dtype [N, B, ...].
    timesteps: int32 [N, B].
  """

  states: jax.Array
  predictions: jax.Array
  timesteps: jax.Array


def sample(
  denoise: Denoise,
  x_T: jax.Array,  # noqa: N803
  grid: Grid,
  schedule: NoiseSchedule,
  *,
  solver: str = "dpm_solver",
  order: int = 2,
  lower_order_final: bool = True,
  eta: float = 0.0,
  key: jax.Array | None = None,
  trajectory: bool = False,
):
  """Integrates from noise to images.

  Args:
    denoise: (x_t float32 [B, ...], t int32 [B]) -> prediction [B, ...].
    x_T: standard normal noise [B, ...].
    grid: the levels to visit, for each sample its own.
    schedule: says what the denoiser predicts; the levels are the grid's.
    solver: 'dpm_solver', 'ddim' or 'ddpm'.
    order: of DPM-Solver++, 1, 2 or 3.
    lower_order_final: DPM-Solver++ only, see `dpm_solver.coefficients`.
    eta: DDIM only, see `ddim.coefficients`.
    key: typed keys [B], one a sample, for ddpm and for ddim with eta > 0. A sample's
      noise depends on its key and the step alone, not on the batch around it (with
      JAX's default threefry keys).
    trajectory: also return every step's input and prediction; without it, memory does
      not grow with the number of steps.

  Returns:
    x0 float32 [B, ...], or (x0, Trajectory).

  Raises:
    UserError: unknown solver, bad order or eta.
    ValueError: a stochastic solver without keys [B].
  """
  start, step, rows = _prepare(
    denoise, x_T, grid, schedule, solver, order, lower_order_final, eta, key
  )

  def scanned(carry, row):
    carry, seen = step(carry, row)
    return carry, seen if trajectory else None

  (x0, _), seen = jax.lax.scan(scanned, start, rows)
  if not trajectory:
    return x0
  return x0, Trajectory(states=seen[0], predictions=seen[1], timesteps=grid.timesteps)


def sample_until(
  denoise: Denoise,
  x_T: jax.Array,  # noqa: N803
  grid: Grid,
  schedule: NoiseSchedule,
  kept: jax.Array,
  *,
  solver: str = "dpm_solver",
  order: int = 2,
  lower_order_final: bool = True,
  eta: float = 0.0,
  key: jax.Array | None = None,
) -> Trajectory:
  """Integrates no further than the last of the steps that are asked for.

  Takes what `sample` takes, and `kept`: which of each sample's steps to return, int32 [S, B].
  The batch goes on until all have theirs.

  Returns:
    What `sample` would have as trajectory, at these steps: [S, B, ...] in place of
    [N, B, ...].
  """
  start, step, rows = _prepare(
    denoise, x_T, grid, schedule, solver, order, lower_order_final, eta, key
  )
  first = jax.tree.map(lambda x: x[0], rows)
  none = jax.tree.map(
    lambda s: jnp.zeros((kept.shape[0], *s.shape), s.dtype),
    jax.eval_shape(lambda: step(start, first)[1]),
  )

  def body(carry):
    k, inner, held = carry
    inner, seen = step(inner, jax.tree.map(lambda x: x[k], rows))

    def hold(one, now):
      return jnp.where((kept == k).reshape(kept.shape + (1,) * (now.ndim - 1)), now, one)

    return k + 1, inner, jax.tree.map(hold, held, seen)

  last = kept.max()
  _, _, (states, predictions) = jax.lax.while_loop(
    lambda carry: carry[0] <= last, body, (jnp.zeros_like(last), start, none)
  )
  return Trajectory(states, predictions, jnp.take_along_axis(grid.timesteps, kept, axis=0))


def initial_noise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Standard normal x_T [B, *shape] from typed keys [B], one a sample."""
  return _noise(key, 0, shape)


def step_noise(key: jax.Array, k: int | jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Standard normal noise [B, *shape] of step k, independent of `initial_noise`."""
  return _noise(key, k + 1, shape)


def _noise(key, purpose, shape):
  folded = jax.vmap(jax.random.fold_in, in_axes=(0, None))(key, purpose)
  return jax.vmap(lambda one: jax.random.normal(one, shape))(folded)


def _coefficients(
  grid: Grid, solver: str, order: int, lower_order_final: bool, eta: float
) -> Coefficients:
  if solver not in SOLVERS:
    raise UserError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
  if eta and solver != "ddim":
    raise UserError(f"eta is a setting of the solver ddim, not of {solver}")
  if solver == "ddim":
    return ddim.coefficients(grid, eta=eta)
  if solver == "ddpm":
    return ddpm.coefficients(grid)
  return dpm_solver.coefficients(grid, order=order, lower_order_final=lower_order_final)


def _prepare(denoise, x_T, grid, schedule, solver, order, lower_order_final, eta, key):  # noqa: N803
  """What loops over steps share: the carry before the first, the step, and its inputs [N, ...].

  A step's output is what the denoiser was shown and what it answered.
  """
  batch = x_T.shape[0]
  if grid.timesteps.shape[1] != batch:
    raise ValueError(f"grid of {grid.timesteps.shape[1]} samples for a batch of {batch}")
  table = _coefficients(grid, solver, order, lower_order_final, eta)
  if table.noise is not None and (key is None or key.shape != (batch,)):
    raise ValueError(f"{solver} with noise needs one key a sample, shape ({batch},)")

  def step(carry, row):
    x_t, history = carry
    k, t, log_snr, weights = row
    prediction = denoise(x_t, t)
    x0, _ = split_at(schedule.prediction_type, prediction, x_t, log_snr)
    history = (x0, *history)
    x_next = per_sample(weights.state, x_t) * x_t
    for weight, past in zip(weights.data, history, strict=True):
      x_next += per_sample(weight, x_t) * past
    if weights.noise is not None:
      z = step_noise(key, k, x_t.shape[1:])
      x_next += per_sample(weights.noise, x_t) * z
    return (x_next, history[:-1]), (x_t, prediction)

  x_t = x_T.astype(jnp.float32)
  history = (jnp.zeros_like(x_t),) * (table.data.shape[1] - 1)
  rows = (jnp.arange(grid.num_steps), grid.timesteps, grid.log_snr[:-1], table)
  return (x_t, history), step, rows
