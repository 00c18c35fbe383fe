"""Rectified flow: its schedule, shifts of noise levels, and diffusers' scheduler files of it.

A state is `x = (1 - sigma) x0 + sigma eps`, and the denoiser predicts the velocity
`v = eps - x0` (Liu et al. 2022, arXiv 2209.03003; Esser et al. 2024, arXiv 2403.03206). A noise
level is sigma in [0, 1]; its log-SNR is `2 log((1 - sigma) / sigma)`. A shift by s, which
`sigma = s u / (1 + (s - 1) u)` defines, subtracts `2 log s` from the log-SNR.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxpref.errors import UserError

PREDICTION_TYPE = "flow_prediction"
# What the denoiser is given for a level: T sigma, T sigma rounded down, or sigma.
INPUTS = ("scaled", "truncated", "sigma")

# Schedulers whose files are understood, with the name of their field for the shift.
_SHIFT_FIELDS = {
  "FlowMatchEulerDiscreteScheduler": "shift",
  "DPMSolverMultistepScheduler": "flow_shift",
}
# Fields that would change the levels, and are not supported.
_OTHER_LEVELS = (
  *("invert_sigmas", "shift_terminal", "stochastic_sampling", "thresholding"),
  *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
)


@dataclasses.dataclass(frozen=True)
class Density:
  """The density of training levels before the shift.

  Attributes:
    name: 'uniform', 'logit_normal' or 'mode', see `levels.level_at`.
    mean: of the logit of a level, for 'logit_normal'; above 0: more noise.
    std: of the logit of a level, for 'logit_normal'.
    scale: of 'mode', from -1 to 2 / (pi - 2); above 0: more levels in the middle.
  """

  name: str = "uniform"
  mean: float = 0.0
  std: float = 1.0
  scale: float = 1.29


@dataclasses.dataclass(frozen=True)
class DynamicShift:
  """A shift that grows with the image: `exp(mu)`, mu linear in the number of image tokens.

  Attributes:
    base_shift: mu at `base_tokens`.
    max_shift: mu at `max_tokens`.
    base_tokens: a number of image tokens.
    max_tokens: another, larger number.
  """

  base_shift: float = 0.5
  max_shift: float = 1.15
  base_tokens: int = 256
  max_tokens: int = 4096


@flax.struct.dataclass
class FlowSchedule:
  """A rectified flow; all fields are static.

  Attributes:
    num_timesteps: T, the scale of the denoiser's timesteps.
    shift: of training levels and, without `dynamic`, of a sampler's levels.
    dynamic: shift of a sampler's levels by the image's size, or None.
    inputs: what the denoiser is given for a level, one of `INPUTS`.
    density: of training levels before the shift.
  """

  num_timesteps: int = flax.struct.field(pytree_node=False, default=1000)
  shift: float = flax.struct.field(pytree_node=False, default=1.0)
  dynamic: DynamicShift | None = flax.struct.field(pytree_node=False, default=None)
  inputs: str = flax.struct.field(pytree_node=False, default="scaled")
  density: Density = flax.struct.field(pytree_node=False, default=Density())

  @property
  def prediction_type(self) -> str:
    """The denoiser predicts `eps - x0`."""
    return PREDICTION_TYPE

  def sampling_shift(self, tokens: int | None) -> float:
    """Returns the shift of a sampler's levels.

    Args:
      tokens: number of image tokens, which a dynamic shift needs.
    """
    if self.dynamic is None:
      return self.shift
    if tokens is None:
      raise ValueError("a dynamic shift needs the number of image tokens")
    d = self.dynamic
    slope = (d.max_shift - d.base_shift) / (d.max_tokens - d.base_tokens)
    return math.exp(d.base_shift + slope * (tokens - d.base_tokens))


def shifted(u: Any, shift: float) -> Any:
  """Computes `s u / (1 + (s - 1) u)`, the levels u shifted by s (arXiv 2403.03206 eq. 23)."""
  return shift * u / (1.0 + (shift - 1.0) * u)


def log_snr_of(sigma: jax.Array) -> jax.Array:
  """Computes the log-SNR of levels sigma: `-inf` at sigma = 1, `+inf` at 0."""
  return 2.0 * (jnp.log1p(-sigma) - jnp.log(sigma))


def timestep_input(schedule: FlowSchedule, sigma: jax.Array) -> jax.Array:
  """Returns what the denoiser is given for levels sigma, float32."""
  if schedule.inputs == "sigma":
    return sigma
  scaled = schedule.num_timesteps * sigma
  return jnp.floor(scaled) if schedule.inputs == "truncated" else scaled


def is_flow(config: Mapping[str, Any]) -> bool:
  """Tells whether a scheduler_config.json describes a rectified flow."""
  return (
    str(config.get("_class_name", "")).startswith("FlowMatch")
    or bool(config.get("use_flow_sigmas"))
    or config.get("prediction_type") == PREDICTION_TYPE
  )


def needed_fields(config: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns the fields that every file of a rectified flow has."""
  return ("flow_shift" if config.get("use_flow_sigmas") else "shift", "num_train_timesteps")


def flow_from_config(config: Mapping[str, Any]) -> FlowSchedule:
  """Makes the schedule of a diffusers scheduler_config.json for which `is_flow` holds.

  `FlowMatchEulerDiscreteScheduler` gives the denoiser T sigma, `DPMSolverMultistepScheduler`
  with `use_flow_sigmas` the same rounded down.

  Args:
    config: the file's content.

  Raises:
    UserError: a field is not supported; the message names it.
  """
  name = str(config.get("_class_name", ""))
  if name not in _SHIFT_FIELDS:
    raise UserError(
      f"scheduler _class_name {name!r} is not supported for flow matching: only "
      f"{' and '.join(_SHIFT_FIELDS)} are"
    )
  multistep = name.startswith("DPM")
  if multistep:
    for field, wanted in (("use_flow_sigmas", True), ("prediction_type", PREDICTION_TYPE)):
      if config.get(field) != wanted:
        raise UserError(
          f"scheduler field {field} = {config.get(field)!r} is not supported for flow "
          f"matching: only {wanted!r} is"
        )
    if config.get("final_sigmas_type", "zero") != "zero":
      raise UserError(
        f"scheduler field final_sigmas_type = {config['final_sigmas_type']!r} is not supported "
        "for flow matching: only 'zero' is"
      )
  if odd := [field for field in _OTHER_LEVELS if config.get(field)]:
    raise UserError(
      f"scheduler field {odd[0]} = {config[odd[0]]!r} is not supported for flow matching"
    )
  steps = config.get("num_train_timesteps", 1000)
  if type(steps) is not int or steps < 1:
    raise UserError(f"num_train_timesteps must be a positive integer (got {steps!r})")
  field = _SHIFT_FIELDS[name]
  shift, dynamic = config.get(field, 1.0), None
  if type(shift) not in (int, float) or not 0 < shift < math.inf:
    raise UserError(f"scheduler field {field} must be a positive number (got {shift!r})")
  if config.get("use_dynamic_shifting"):
    if multistep:
      raise UserError(
        "scheduler field use_dynamic_shifting = True is not supported for "
        f"{name}: only for FlowMatchEulerDiscreteScheduler"
      )
    # As in diffusers, training levels are then not shifted.
    shift, dynamic = 1.0, _dynamic_shift(config)
  return FlowSchedule(
    num_timesteps=steps,
    shift=float(shift),
    dynamic=dynamic,
    inputs="truncated" if multistep else "scaled",
  )


def _dynamic_shift(config: Mapping[str, Any]) -> DynamicShift:
  if (kind := config.get("time_shift_type", "exponential")) != "exponential":
    raise UserError(
      f"scheduler field time_shift_type = {kind!r} is not supported: only 'exponential' is"
    )
  usual = DynamicShift()
  names = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
  values = [
    default if (value := config.get(name)) is None else value
    for name, default in zip(names, dataclasses.astuple(usual), strict=True)
  ]
  for name, value in zip(names, values, strict=True):
    if type(value) not in (int, float) or not -100 < value < 2**31:
      raise UserError(f"scheduler field {name} must be a number (got {value!r})")
  if values[2] >= values[3]:
    raise UserError(
      f"scheduler field base_image_seq_len must be below max_image_seq_len (got {values[2]!r} "
      f"and {values[3]!r})"
    )
  return DynamicShift(*values)
