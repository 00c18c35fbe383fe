"""The sampling loop, which is the same for every solver.

A solver is a table of coefficients (`timesteps.Coefficients`), which this loop applies. Call it
inside `jax.jit`, with the denoiser's parameters as arguments of the jitted function.
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.base_config import FLOW_STEPS, SOLVERS
from jaxpref.diffusion import ddim, ddpm, dpm_solver, flow_steps
from jaxpref.diffusion.flow import FlowSchedule
from jaxpref.diffusion.guidance import Denoise
from jaxpref.diffusion.schedule import Schedule, per_sample, split_at, timestep_input
from jaxpref.diffusion.timesteps import Coefficients, Grid
from jaxpref.errors import UserError


@flax.struct.dataclass
class Trajectory:
  """The denoiser's inputs and outputs at each step.

  Attributes:
    states: inputs x_t, float32 [N, B, ...].
    predictions: the denoiser's outputs, in its dtype, [N, B, ...].
    timesteps: the grid's, [N, B].
  """

  states: jax.Array
  predictions: jax.Array
  timesteps: jax.Array


def sample(
  denoise: Denoise,
  x_T: jax.Array,  # noqa: N803
  grid: Grid,
  schedule: Schedule,
  *,
  solver: str = "dpm_solver",
  order: int = 2,
  lower_order_final: bool = True,
  eta: float | Sequence[float] | jax.Array = 0.0,
  key: jax.Array | None = None,
  trajectory: bool = False,
):
  """Samples by integrating from noise to clean latents.

  Args:
    denoise: (x_t float32 [B, ...], t [B]) -> prediction [B, ...], with t from
      `schedule.timestep_input`.
    x_T: standard normal noise [B, ...].
    grid: the noise levels to visit, per sample.
    schedule: its `prediction_type` says how to read predictions; the levels are the grid's.
    solver: 'dpm_solver', 'ddim' or 'ddpm'; a flow has the first, and the stochastic steps of
      `flow_steps.coefficients`.
    order: order of DPM-Solver++, 1, 2 or 3.
    lower_order_final: for DPM-Solver++, see `dpm_solver.coefficients`.
    eta: for DDIM, see `ddim.coefficients`, and for the stochastic steps of a flow.
    key: typed keys [B], one per sample, for solvers with noise. A sample's noise
      depends only on its key and the step, not on the rest of the batch (with JAX's default
      threefry keys).
    trajectory: also return every step's input and prediction; otherwise memory does not grow
      with the number of steps.

  Returns:
    x0 float32 [B, ...], or (x0, Trajectory).

  Raises:
    UserError: the solver is unknown, or the order or eta is out of range.
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
  schedule: Schedule,
  kept: jax.Array,
  *,
  solver: str = "dpm_solver",
  order: int = 2,
  lower_order_final: bool = True,
  eta: float | Sequence[float] | jax.Array = 0.0,
  key: jax.Array | None = None,
) -> Trajectory:
  """Samples up to the last step in `kept`, and returns the kept steps.

  Args:
    denoise: as for `sample`.
    x_T: as for `sample`.
    grid: as for `sample`.
    schedule: as for `sample`.
    kept: which of each sample's steps to return, int32 [S, B]. The loop ends after the last of
      them in the batch.
    solver: as for `sample`.
    order: as for `sample`.
    lower_order_final: as for `sample`.
    eta: as for `sample`.
    key: as for `sample`.

  Returns:
    The trajectory of `sample` at the kept steps: [S, B, ...] instead of [N, B, ...].
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
  """Samples standard normal x_T [B, *shape] from typed keys [B], one per sample."""
  return _noise(key, 0, shape)


def step_noise(key: jax.Array, k: int | jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Samples standard normal noise [B, *shape] of step k, independent of `initial_noise`."""
  return _noise(key, k + 1, shape)


def _noise(key, purpose, shape):
  folded = jax.vmap(jax.random.fold_in, in_axes=(0, None))(key, purpose)
  return jax.vmap(lambda one: jax.random.normal(one, shape))(folded)


def check_solver(schedule: Schedule, solver: str) -> None:
  """Refuses solvers that a schedule does not have.

  Raises:
    UserError: the schedule is a flow's, and the solver is for variance-preserving schedules,
      or the other way round.
  """
  is_flow = isinstance(schedule, FlowSchedule)
  if is_flow and solver in ("ddim", "ddpm"):
    raise UserError(
      f"the solver {solver} is for variance-preserving models, and this model is trained with "
      "flow matching: use dpm_solver, whose order 1 is Euler's method"
    )
  if not is_flow and solver in FLOW_STEPS:
    raise UserError(
      f"the solver {solver} is for flow-matching models, and this model is not one: use "
      "ddim, whose eta is the strength of its noise"
    )


def coefficients(
  grid: Grid,
  *,
  solver: str,
  order: int = 2,
  lower_order_final: bool = True,
  eta: float | Sequence[float] | jax.Array = 0.0,
) -> Coefficients:
  """Computes a solver's coefficients on a grid; the arguments are those of `sample`.

  Raises:
    UserError: the solver is unknown or not the grid's, or the order or eta is out of range.
  """
  if solver not in (known := (*SOLVERS, *FLOW_STEPS)):
    raise UserError(f"solver must be one of {', '.join(known)} (got {solver!r})")
  if solver in FLOW_STEPS:
    by_step = jnp.broadcast_to(jnp.asarray(eta, jnp.float32), (grid.num_steps,))
    return flow_steps.coefficients(grid, solver, eta=by_step)
  if solver == "ddim":
    return ddim.coefficients(grid, eta=eta)
  if isinstance(eta, jax.Array) or np.any(eta):
    raise UserError(f"eta is a setting of the solver ddim, not of {solver}: set eta to 0")
  if solver == "ddpm":
    return ddpm.coefficients(grid)
  return dpm_solver.coefficients(grid, order=order, lower_order_final=lower_order_final)


def _prepare(denoise, x_T, grid, schedule, solver, order, lower_order_final, eta, key):  # noqa: N803
  """Builds the parts of the loop: the first carry, the step function, and the steps' inputs.

  A step returns the denoiser's input and output.
  """
  batch = x_T.shape[0]
  if grid.timesteps.shape[1] != batch:
    raise ValueError(f"grid of {grid.timesteps.shape[1]} samples for a batch of {batch}")
  check_solver(schedule, solver)
  table = coefficients(
    grid, solver=solver, order=order, lower_order_final=lower_order_final, eta=eta
  )
  if table.noise is not None and (key is None or key.shape != (batch,)):
    raise ValueError(f"{solver} with noise needs one key per sample, shape ({batch},)")

  def step(carry, row):
    x_t, history = carry
    k, t, log_snr, weights = row
    prediction = denoise(x_t, timestep_input(schedule, t))
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
