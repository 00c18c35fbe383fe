"""The variance-preserving noise schedule, training targets, and conversion of predictions.

Noise levels are stored as log signal-to-noise ratios, `log(alpha_bar / (1 - alpha_bar))`.
float32 would lose `1 - alpha_bar` where `alpha_bar` is near 1, and both ends of the log ratio
are harmless: `+inf` is a clean image, `-inf` pure noise.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

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
# Prefixes of schedulers whose training process is not variance-preserving.
_OTHER_PROCESSES = ("FlowMatch", "EDM", "VE", "VQDiffusion", "Consistency", "LCM")


@flax.struct.dataclass
class NoiseSchedule:
  """The noise level of each training timestep.

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


def schedule_from_config(config: Mapping[str, Any]) -> NoiseSchedule:
  """Makes the noise schedule of a diffusers scheduler_config.json.

  Fields that only choose the timesteps a sampler visits (spacing, offset, Karras sigmas, ...)
  are not part of the schedule and are not read.

  Args:
    config: the file's content.

  Raises:
    UserError: a field is not supported; the message names it.
  """
  name = str(config.get("_class_name", ""))
  if name.startswith(_OTHER_PROCESSES) or config.get("use_flow_sigmas"):
    field = f"_class_name {name}" if not config.get("use_flow_sigmas") else ""
    raise UserError(
      f"scheduler {field or 'use_flow_sigmas'} is not supported: only "
      "variance-preserving schedules (DDPM, DDIM, PNDM, DPM-Solver, Euler, ...) are"
    )
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


def scales(log_snr: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Computes the amplitudes `(sqrt(alpha_bar), sqrt(1 - alpha_bar))` of signal and noise."""
  return jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))


def add_noise(
  schedule: NoiseSchedule, x0: jax.Array, eps: jax.Array, t: jax.Array
) -> jax.Array:
  """Adds noise to clean latents (arXiv 2006.11239 eq. 4): `x_t = alpha x0 + sigma eps`.

  Args:
    schedule: the noise schedule.
    x0: clean latents [B, ...].
    eps: standard normal noise [B, ...].
    t: timesteps, int [B].

  Returns:
    x_t: noisy latents, float32 [B, ...].
  """
  alpha, sigma = _scales_at(schedule, t, x0)
  return alpha * x0.astype(jnp.float32) + sigma * eps.astype(jnp.float32)


def target(schedule: NoiseSchedule, x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
  """Computes the denoiser's target at `add_noise(schedule, x0, eps, t)`.

  That is `eps`, or `v = alpha eps - sigma x0` (arXiv 2202.00512, appendix D).

  Args:
    schedule: the noise schedule.
    x0: clean latents [B, ...].
    eps: standard normal noise [B, ...].
    t: timesteps, int [B].

  Returns:
    The target, float32 [B, ...].
  """
  if schedule.prediction_type == "epsilon":
    return eps.astype(jnp.float32)
  alpha, sigma = _scales_at(schedule, t, x0)
  return alpha * eps.astype(jnp.float32) - sigma * x0.astype(jnp.float32)


def split_prediction(
  schedule: NoiseSchedule, prediction: jax.Array, x_t: jax.Array, t: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Converts a prediction to the clean latents and the noise that it implies.

  Args:
    schedule: the noise schedule.
    prediction: the denoiser's output at (x_t, t) [B, ...].
    x_t: noisy latents [B, ...].
    t: timesteps, int [B].

  Returns:
    (x0, eps), float32 [B, ...] each.
  """
  return split_at(schedule.prediction_type, prediction, x_t, schedule.log_snr[t])


def split_at(
  prediction_type: str, prediction: jax.Array, x_t: jax.Array, log_snr: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Computes `split_prediction` at any noise levels log_snr [B], also between timesteps."""
  alpha, sigma = scales(per_sample(log_snr, x_t))
  prediction, x_t = prediction.astype(jnp.float32), x_t.astype(jnp.float32)
  if prediction_type == "epsilon":
    return (x_t - sigma * prediction) / alpha, prediction
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


def _scales_at(schedule, t, like):
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
