"""Noise schedules, training targets, and conversion of predictions, for two processes.

A `NoiseSchedule` is variance-preserving and has levels at integer timesteps. A `FlowSchedule`
is a rectified flow, whose levels are numbers in [0, 1]. The functions below take either.

Levels of the first, and a sampler's levels of both, are stored as log signal-to-noise ratios,
`log(alpha_bar / (1 - alpha_bar))`. float32 would lose `1 - alpha_bar` where `alpha_bar` is near
1, and both ends of the log ratio are harmless: `+inf` is a clean image, `-inf` pure noise.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.diffusion import flow
from jaxpref.diffusion.flow import FlowSchedule
from jaxpref.errors import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

# diffusers' defaults for fields that a scheduler_config.json does not have.
_CONFIG_DEFAULTS = {
  "beta_schedule": "linear",
  "beta_start": 0.0001,
  "beta_end": 0.02,
  "num_train_timesteps": 1000,
  "prediction_type": "epsilon",
}
# Prefixes of schedulers whose training process is neither variance-preserving nor a flow.
_OTHER_PROCESSES = ("EDM", "VE", "VQDiffusion", "Consistency", "LCM")


@flax.struct.dataclass
class NoiseSchedule:
  """A variance-preserving process: the noise level of each training timestep.

  Attributes:
    log_snr: `log(alpha_bar / (1 - alpha_bar))` of timesteps 0..T-1, float32 [T].
    prediction_type: what the denoiser predicts, 'epsilon' or 'v_prediction'.
  """

  log_snr: jax.Array
  prediction_type: str = flax.struct.field(pytree_node=False)

  @property
  def alpha_bar(self) -> jax.Array:
    """The share of the signal in the variance, float32 [T]."""
    return jax.nn.sigmoid(self.log_snr)

  @property
  def num_timesteps(self) -> int:
    """T, the number of training timesteps."""
    return self.log_snr.shape[0]


Schedule = NoiseSchedule | FlowSchedule


def make_schedule(
  *,
  beta_schedule: str = "scaled_linear",
  beta_start: float = 0.00085,
  beta_end: float = 0.012,
  num_train_timesteps: int = 1000,
  prediction_type: str = "epsilon",
  trained_betas: Any = None,
  rescale_betas_zero_snr: bool = False,
) -> NoiseSchedule:
  """Makes a schedule from betas; the defaults are Stable Diffusion's.

  The computation is in float64 on the host; the result is cast to float32.

  Args:
    beta_schedule: 'linear', 'scaled_linear' (linear in the square root) or
      'squaredcos_cap_v2' (cosine, arXiv 2102.09672 eq. 17; ignores both ends).
    beta_start: variance added by the first timestep, in (0, 1).
    beta_end: variance added by the last timestep, in (0, 1).
    num_train_timesteps: T.
    prediction_type: 'epsilon' or 'v_prediction' (arXiv 2202.00512).
    trained_betas: betas [T] to use instead of a named schedule.
    rescale_betas_zero_snr: shift the schedule so that the last timestep is (almost)
      pure noise (arXiv 2305.08891, algorithm 1).

  Raises:
    UserError: a field is not supported; the message names it.
  """
  if prediction_type not in PREDICTION_TYPES:
    raise UserError(
      f"prediction_type must be one of {', '.join(PREDICTION_TYPES)} (got {prediction_type!r})"
    )
  if trained_betas is not None:
    try:
      betas = np.asarray(trained_betas, np.float64)
    except (TypeError, ValueError):
      raise UserError("trained_betas must be a list of numbers") from None
    if betas.ndim != 1 or not betas.size:
      raise UserError(f"trained_betas must be a flat list (got shape {betas.shape})")
  else:
    betas = _named_betas(beta_schedule, beta_start, beta_end, num_train_timesteps)
  if not ((betas > 0) & (betas < 1)).all():
    raise UserError("every beta of the noise schedule must lie between 0 and 1")

  log_alpha_bar = np.cumsum(np.log1p(-betas))
  if rescale_betas_zero_snr:
    if prediction_type == "epsilon":
      raise UserError(
        "rescale_betas_zero_snr needs prediction_type 'v_prediction': at zero SNR the noise "
        "does not determine x0"
      )
    log_alpha_bar = _rescaled_to_zero_snr(log_alpha_bar)
  log_snr = log_alpha_bar - np.log(-np.expm1(log_alpha_bar))
  return NoiseSchedule(
    log_snr=jnp.asarray(log_snr, jnp.float32), prediction_type=prediction_type
  )


def schedule_from_config(config: Mapping[str, Any]) -> Schedule:
  """Makes the schedule of a diffusers scheduler_config.json.

  Fields that only choose the timesteps a sampler visits (spacing, offset, Karras sigmas, ...)
  are not part of the schedule and are not read.

  Args:
    config: the file's content.

  Raises:
    UserError: a field is not supported; the message names it.
  """
  name = str(config.get("_class_name", ""))
  if name.startswith(_OTHER_PROCESSES):
    raise UserError(
      f"scheduler _class_name {name} is not supported: only variance-preserving schedules "
      "(DDPM, DDIM, PNDM, DPM-Solver, Euler, ...) and flow matching are"
    )
  if flow.is_flow(config):
    return flow.flow_from_config(config)
  for field in ("thresholding", "clip_sample"):
    if config.get(field):
      raise UserError(f"scheduler field {field} = true is not supported")
  if str(config.get("variance_type") or "").startswith("learned"):
    raise UserError(
      f"scheduler field variance_type {config['variance_type']!r} is not supported"
    )
  known = {k: config.get(k, default) for k, default in _CONFIG_DEFAULTS.items()}
  return make_schedule(
    **known,
    trained_betas=config.get("trained_betas"),
    rescale_betas_zero_snr=bool(config.get("rescale_betas_zero_snr")),
  )


def per_sample(values: jax.Array, like: jax.Array) -> jax.Array:
  """Reshapes values [B] to [B, 1, ...], with as many axes as `like`."""
  return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def scales(log_snr: jax.Array, *, is_flow: bool = False) -> tuple[jax.Array, jax.Array]:
  """Computes the amplitudes alpha of the signal and sigma of the noise.

  They are `(sqrt(alpha_bar), sqrt(1 - alpha_bar))`, or `(1 - sigma, sigma)` for a flow.
  """
  if is_flow:
    return jax.nn.sigmoid(0.5 * log_snr), jax.nn.sigmoid(-0.5 * log_snr)
  return jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))


def level_dtype(schedule: Schedule) -> Any:
  """Returns the dtype of levels t: int32 timesteps, or float32 for a flow's sigma."""
  return jnp.float32 if isinstance(schedule, FlowSchedule) else jnp.int32


def timestep_input(schedule: Schedule, t: jax.Array) -> jax.Array:
  """Returns what the denoiser is given for levels t: timesteps, or a flow's scaled sigma."""
  return flow.timestep_input(schedule, t) if isinstance(schedule, FlowSchedule) else t


def add_noise(schedule: Schedule, x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
  """Adds noise to clean latents (arXiv 2006.11239 eq. 4): `x_t = alpha x0 + sigma eps`.

  Args:
    schedule: the noise schedule.
    x0: clean latents [B, ...].
    eps: standard normal noise [B, ...].
    t: levels [B]: timesteps, int, or a flow's sigma, float.

  Returns:
    x_t: noisy latents, float32 [B, ...].
  """
  alpha, sigma = _scales_at(schedule, t, x0)
  return alpha * x0.astype(jnp.float32) + sigma * eps.astype(jnp.float32)


def target(schedule: Schedule, x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
  """Computes the denoiser's target at `add_noise(schedule, x0, eps, t)`.

  That is `eps`, `v = alpha eps - sigma x0` (arXiv 2202.00512, appendix D), or a flow's
  `v = eps - x0`.

  Args:
    schedule: the noise schedule.
    x0: clean latents [B, ...].
    eps: standard normal noise [B, ...].
    t: levels [B], as for `add_noise`.

  Returns:
    The target, float32 [B, ...].
  """
  if isinstance(schedule, FlowSchedule):
    return eps.astype(jnp.float32) - x0.astype(jnp.float32)
  if schedule.prediction_type == "epsilon":
    return eps.astype(jnp.float32)
  alpha, sigma = _scales_at(schedule, t, x0)
  return alpha * eps.astype(jnp.float32) - sigma * x0.astype(jnp.float32)


def split_prediction(
  schedule: Schedule, prediction: jax.Array, x_t: jax.Array, t: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Converts a prediction to the clean latents and the noise that it implies.

  Args:
    schedule: the noise schedule.
    prediction: the denoiser's output at (x_t, t) [B, ...].
    x_t: noisy latents [B, ...].
    t: levels [B], as for `add_noise`.

  Returns:
    (x0, eps), float32 [B, ...] each.
  """
  log_snr = flow.log_snr_of(t) if isinstance(schedule, FlowSchedule) else schedule.log_snr[t]
  return split_at(schedule.prediction_type, prediction, x_t, log_snr)


def split_at(
  prediction_type: str, prediction: jax.Array, x_t: jax.Array, log_snr: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Computes `split_prediction` at any noise levels log_snr [B], also between timesteps."""
  is_flow = prediction_type == flow.PREDICTION_TYPE
  alpha, sigma = scales(per_sample(log_snr, x_t), is_flow=is_flow)
  prediction, x_t = prediction.astype(jnp.float32), x_t.astype(jnp.float32)
  if prediction_type == "epsilon":
    return (x_t - sigma * prediction) / alpha, prediction
  if is_flow:
    return x_t - sigma * prediction, x_t + alpha * prediction
  return alpha * x_t - sigma * prediction, alpha * prediction + sigma * x_t


def denoising_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
  """Computes the mean squared error of each sample over all its axes.

  Args:
    prediction: the denoiser's output [B, ...], any float dtype.
    target: its target [B, ...].

  Returns:
    float32 [B]. The difference is in float32 as well: two errors in bfloat16 would differ by
    more than a preference margin.
  """
  difference = prediction.astype(jnp.float32) - target.astype(jnp.float32)
  return jnp.mean(jnp.square(difference), axis=tuple(range(1, difference.ndim)))


def error_scale(schedule: Schedule, space: str, t: jax.Array) -> jax.Array | None:
  """Computes the factor of residuals in another space than the denoiser's.

  At a given x_t, a change d of a prediction of v is a change `alpha d` of eps and `-sigma d` of
  x0, for both processes. Squared errors therefore have the factors `alpha^2` and `sigma^2`,
  which are `(1 - sigma)^2` and `sigma^2` for a flow.

  Args:
    schedule: the noise schedule.
    space: 'v', 'eps' or 'x0'; 'model' is the space of the denoiser's prediction.
    t: levels [R].

  Returns:
    The factor of residuals [R] (of x0 without its sign), or None where it is 1.
  """
  own = "eps" if schedule.prediction_type == "epsilon" else "v"
  if space in ("model", own):
    return None
  alpha, sigma = _scales_at(schedule, t, t)
  of_v = {"v": jnp.ones_like(alpha), "eps": alpha, "x0": sigma}
  return of_v[space] / alpha if own == "eps" else of_v[space]


def _scales_at(schedule, t, like):
  if isinstance(schedule, FlowSchedule):
    sigma = per_sample(t, like)
    return 1.0 - sigma, sigma
  return scales(per_sample(schedule.log_snr[t], like))


def _named_betas(
  beta_schedule: str, beta_start: float, beta_end: float, num_train_timesteps: int
) -> np.ndarray:
  steps = num_train_timesteps
  if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
    raise UserError(f"num_train_timesteps must be a positive integer (got {steps!r})")
  if beta_schedule == "squaredcos_cap_v2":
    times = np.arange(steps + 1) / steps
    alpha_bar = np.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
  for field, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
    if not isinstance(beta, int | float) or not 0 < beta < 1:
      raise UserError(f"{field} must be a number between 0 and 1 (got {beta!r})")
  if beta_schedule == "linear":
    return np.linspace(beta_start, beta_end, steps)
  if beta_schedule == "scaled_linear":
    return np.linspace(beta_start**0.5, beta_end**0.5, steps) ** 2
  raise UserError(
    f"beta_schedule must be one of {', '.join(BETA_SCHEDULES)} (got {beta_schedule!r})"
  )


def _rescaled_to_zero_snr(log_alpha_bar: np.ndarray) -> np.ndarray:
  root = np.exp(0.5 * log_alpha_bar)
  rescaled = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
  # Exactly zero would start every solver at an infinite log-SNR. diffusers uses 2**-24, too,
  # but on some schedules that is above the level before it.
  rescaled[-1] = np.min([2.0**-24, *rescaled[-2:-1] / 2])
  return np.log(rescaled)
