"""The noise levels that a sampler visits, and the coefficients of a solver's steps.

For a variance-preserving model a level is a timestep, for a flow it is sigma.

Grids are per sample: column b of a batch may visit other timesteps than column c, at no extra
cost. Differences from diffusers 0.39: `trailing` always gives exactly `num_steps` timesteps;
Karras timesteps are rounded for every schedule (diffusers truncates those of the cosine one).
"""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.diffusion.flow import FlowSchedule, shifted
from jaxpref.diffusion.schedule import NoiseSchedule, Schedule
from jaxpref.errors import UserError

SPACINGS = ("leading", "linspace", "trailing")
FINALS = ("zero", "sigma_min")
_FLOW_SPACINGS = ("linspace", "trailing")
_KARRAS_RHO = 7.0


@flax.struct.dataclass
class Grid:
  """The noise levels of a sampler's steps, from noise to image.

  Attributes:
    timesteps: the noise level of step k's input: the timestep, int32 [N, B], or a flow's
      sigma, float32 [N, B]. `schedule.timestep_input` is what the denoiser is given for it.
    log_snr: the same level as log-SNR; row N is the level of the last step's output, `+inf` for
      a clean image. float32 [N + 1, B].
    is_flow: whether these are the levels of a flow.
  """

  timesteps: jax.Array
  log_snr: jax.Array
  is_flow: bool = flax.struct.field(pytree_node=False, default=False)

  @property
  def alpha_bar(self) -> jax.Array:
    """The share of the signal in the variance at each level, float32 [N + 1, B]."""
    return jax.nn.sigmoid(self.log_snr)

  @property
  def num_steps(self) -> int:
    """The number of steps, N."""
    return self.timesteps.shape[0]


@flax.struct.dataclass
class Coefficients:
  """A solver on a grid: `x_{k+1} = state x_k + sum_j data_j x0_{k-j} + noise z_k`.

  `x0_{k-j}` is the clean image predicted j steps before step k.

  Attributes:
    state: float32 [N, B].
    data: float32 [N, J, B] with J the solver's order; 0 where step k - j does not exist.
    noise: float32 [N, B], or None for a deterministic solver.
  """

  state: jax.Array
  data: jax.Array
  noise: jax.Array | None = None


def uniform_grid(
  schedule: Schedule,
  num_steps: int,
  batch: int,
  *,
  spacing: str = "leading",
  steps_offset: int = 0,
  visit_lowest: bool = False,
  karras: bool = False,
  final: str = "zero",
  tokens: int | None = None,
) -> Grid:
  """Makes a grid of evenly spaced timesteps, the same for every sample (arXiv 2305.08891).

  Levels of a flow are evenly spaced before the schedule's shift, see `_flow_spaced`.

  Args:
    schedule: the noise schedule.
    num_steps: N, the number of denoiser calls.
    batch: B.
    spacing: 'leading', 'linspace' or 'trailing', as in table 2 of the paper.
    steps_offset: added to the timesteps of 'leading' (Stable Diffusion uses 1).
    visit_lowest: for 'leading' and 'linspace', split 0..T-1 into N points and call the
      denoiser at the lowest one as well, as diffusers' DDIM and DDPM do. By default they take
      N + 1 points and leave the lowest one out, as diffusers' DPM-Solver does.
    karras: space the levels as Karras et al. (arXiv 2206.00364 eq. 5, rho = 7), and give the
      denoiser the nearest timestep; spacing and offset then have no effect.
    final: the level of the last step's output: 'zero' noise, or 'sigma_min', the level of
      timestep 0.
    tokens: number of image tokens, which a flow's dynamic shift needs.

  Raises:
    UserError: the spacing is unknown, or does not have `num_steps` distinct timesteps.
  """
  total = schedule.num_timesteps
  _check_steps(num_steps, total)
  if isinstance(schedule, FlowSchedule):
    if spacing not in _FLOW_SPACINGS or karras or final != "zero":
      raise UserError(
        f"flow matching has the spacings {' and '.join(_FLOW_SPACINGS)}, no Karras levels and "
        f"the final 'zero' (got {spacing!r}, karras = {karras}, final = {final!r})"
      )
    levels = _flow_spaced(schedule, num_steps, spacing, visit_lowest)[:, None]
    repeated = np.broadcast_to(levels, (num_steps, batch))
    return _flow_grid(schedule, repeated, tokens)
  if final not in FINALS:
    raise UserError(f"final must be one of {', '.join(FINALS)} (got {final!r})")
  if karras:
    timesteps, log_snr = _karras(schedule, num_steps)
  else:
    timesteps = jnp.asarray(_spaced(total, num_steps, spacing, steps_offset, visit_lowest))
    log_snr = schedule.log_snr[timesteps]
  last = schedule.log_snr[:1] if final == "sigma_min" else jnp.full((1,), jnp.inf)
  log_snr = jnp.concatenate([log_snr, last])
  return Grid(
    timesteps=jnp.broadcast_to(timesteps[:, None], (num_steps, batch)),
    log_snr=jnp.broadcast_to(log_snr[:, None], (num_steps + 1, batch)),
  )


def offset_grid(
  schedule: Schedule, num_steps: int, offsets: jax.Array, *, tokens: int | None = None
) -> Grid:
  """Makes a grid of evenly spaced timesteps, shifted by an offset per sample.

  `t_k = T - (T // N) (k + 1) + offset`, so random offsets train every timestep (Diffusion-DRO's
  rollouts): 950, 900, ..., 0 plus 0..49 for N = 20. A flow has `sigma_k = shift(u_k)` with
  `u_k = (N - k - 1 + offset) / N`, which trains every sigma. Sampling starts from pure noise,
  although the first level is less noisy, by at most one step.

  Args:
    schedule: the noise schedule.
    num_steps: N, the number of denoiser calls.
    offsets: [B], from `sample_offsets`. They may be traced, so their range is not checked.
    tokens: as for `uniform_grid`.

  Raises:
    UserError: num_steps is not in 1..T.
  """
  total = schedule.num_timesteps
  _check_steps(num_steps, total)
  if isinstance(schedule, FlowSchedule):
    rest = np.arange(num_steps, dtype=np.float32)[::-1, None]
    return _flow_grid(schedule, (rest + offsets) / num_steps, tokens)
  base = total - (total // num_steps) * np.arange(1, num_steps + 1, dtype=np.int32)
  timesteps = jnp.asarray(base)[:, None] + offsets[None, :].astype(jnp.int32)
  clean = jnp.full((1, offsets.shape[0]), jnp.inf)
  return Grid(timesteps, jnp.concatenate([schedule.log_snr[timesteps], clean]))


def sample_offsets(schedule: Schedule, num_steps: int, key: jax.Array, rows: int) -> jax.Array:
  """Samples offsets [B] for `offset_grid`: int32 in [0, T // N), or float32 in (0, 1]."""
  if isinstance(schedule, FlowSchedule):
    return 1.0 - jax.random.uniform(key, (rows,))  # 0 would be a step from a clean image
  return jax.random.randint(key, (rows,), 0, schedule.num_timesteps // num_steps)


def image_tokens(latent_shape: tuple[int, ...]) -> int:
  """Returns the number of image tokens [C, h, w] latents have, in patches of 2 x 2."""
  return latent_shape[-2] * latent_shape[-1] // 4


def _flow_spaced(
  schedule: FlowSchedule, num_steps: int, spacing: str, visit_lowest: bool
) -> np.ndarray:
  """Returns N levels before the shift, float64, which begin at pure noise or just below.

  'linspace' is N points down to the lowest training level, which the shift has moved already
  (as in `FlowMatchEulerDiscreteScheduler`). Without `visit_lowest`, it splits [0, 1 - 1 / T]
  into N steps (as `DPMSolverMultistepScheduler`). 'trailing' is 1 - k / N (as Flux's pipeline).
  """
  if spacing == "trailing":
    return 1.0 - np.arange(num_steps) / num_steps
  if visit_lowest:
    return np.linspace(1.0, shifted(1.0 / schedule.num_timesteps, schedule.shift), num_steps)
  return np.linspace(1.0 - 1.0 / schedule.num_timesteps, 0.0, num_steps + 1)[:-1]


def _flow_grid(schedule: FlowSchedule, levels: Any, tokens: int | None) -> Grid:
  """Shifts levels u [N, B] in (0, 1]; the last step ends at a clean image."""
  shift = schedule.sampling_shift(tokens)
  numbers = np if isinstance(levels, np.ndarray) else jnp
  with np.errstate(divide="ignore"):  # pure noise has log-SNR -inf
    log_snr = 2.0 * (numbers.log1p(-levels) - numbers.log(levels) - math.log(shift))
  clean = jnp.full((1, levels.shape[1]), jnp.inf)
  return Grid(
    timesteps=jnp.asarray(shifted(levels, shift), jnp.float32),
    log_snr=jnp.concatenate([jnp.asarray(log_snr, jnp.float32), clean]),
    is_flow=True,
  )


def _check_steps(num_steps: int, total: int) -> None:
  if not 1 <= num_steps <= total:
    raise UserError(f"sampling steps must be between 1 and {total} (got {num_steps})")


def _spaced(
  total: int, num_steps: int, spacing: str, steps_offset: int, visit_lowest: bool
) -> np.ndarray:
  points = num_steps if visit_lowest else num_steps + 1
  spaced: np.ndarray
  if spacing == "leading":
    spaced = np.arange(points)[::-1] * (total // points) + steps_offset
  elif spacing == "linspace":
    spaced = np.linspace(0, total - 1, points).round()[::-1]
  elif spacing == "trailing":
    spaced = np.round(total - np.arange(num_steps) * (total / num_steps)) - 1
  else:
    raise UserError(f"spacing must be one of {', '.join(SPACINGS)} (got {spacing!r})")
  timesteps = spaced[:num_steps].astype(np.int32)
  if timesteps[0] >= total or timesteps[-1] < 0 or (np.diff(timesteps) >= 0).any():
    raise UserError(
      f"{spacing!r} spacing with steps_offset {steps_offset} does not have {num_steps} "
      f"distinct timesteps below {total}: use fewer steps"
    )
  return timesteps


def _karras(schedule: NoiseSchedule, num_steps: int) -> tuple[jax.Array, jax.Array]:
  log_sigma = -0.5 * schedule.log_snr
  low, high = jnp.exp(log_sigma[jnp.array([0, -1])] / _KARRAS_RHO)
  ramp = jnp.linspace(0.0, 1.0, num_steps)
  visited = _KARRAS_RHO * jnp.log(high + ramp * (low - high))
  timesteps = jnp.interp(visited, log_sigma, jnp.arange(schedule.num_timesteps))
  return jnp.round(timesteps).astype(jnp.int32), -2.0 * visited
