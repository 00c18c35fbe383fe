"""The scheduler's configuration: the schedule, and a sampler's timesteps."""

from collections.abc import Mapping
from typing import Any

from jaxpref.diffusion import flow
from jaxpref.diffusion import schedule as schedule_lib
from jaxpref.diffusion import timesteps as timesteps_lib
from jaxpref.errors import UserError

# Spacings of timesteps that the samplers do not support, and the choices that they support.
_OTHER_SPACINGS = ("use_beta_sigmas", "use_exponential_sigmas", "use_lu_lambdas")
_SPACING = {
  "timestep_spacing": timesteps_lib.SPACINGS,
  "final_sigmas_type": timesteps_lib.FINALS,
}
_SCHEDULERS = {
  "dpm_solver": "DPMSolverMultistepScheduler",
  "ddim": "DDIMScheduler",
  "ddpm": "DDPMScheduler",
}
# Fields of diffusers' schedulers.
FIELDS = frozenset(
  (
    *("base_image_seq_len", "base_shift", "max_image_seq_len", "max_shift", "shift"),
    *("algorithm_type", "beta_end", "beta_schedule", "beta_start", "clip_sample"),
    *(
      "clip_sample_range",
      "corrector_order",
      "disable_corrector",
      "dynamic_thresholding_ratio",
    ),
    *("eta", "euler_at_final", "final_sigmas_type", "flow_shift", "interpolation_type"),
    *("invert_sigmas", "lambda_min_clipped", "lower_order_final", "num_train_timesteps"),
    *("original_inference_steps", "predict_x0", "prediction_type", "predictor_order"),
    *("rescale_betas_zero_snr", "rho", "s_noise", "sample_max_value", "scaler"),
    *(
      "set_alpha_to_one",
      "shift_terminal",
      "sigma_data",
      "sigma_max",
      "sigma_min",
      "skip_prk_steps",
    ),
    *("snr_shift_scale", "solver_order", "solver_p", "solver_type", "steps_offset"),
    *("stochastic_sampling", "tau_func", "thresholding", "time_shift_type", "timestep_scaling"),
    *("timestep_spacing", "timestep_type", "trained_betas", "use_beta_sigmas"),
    *("use_dynamic_shifting", "use_exponential_sigmas", "use_flow_sigmas", "use_karras_sigmas"),
    *("use_lu_lambdas", "variance_type"),
  )
)
# Fields without which the defaults describe another schedule than was trained; a flow has its
# own, see `flow.needed_fields`.
NEEDED = ("beta_end", "beta_schedule", "beta_start", "num_train_timesteps")


def read_schedule(config: Mapping[str, Any]) -> schedule_lib.Schedule:
  """Makes the noise schedule of a `scheduler_config.json`.

  Raises:
    UserError: a field of it is not supported; the message names it.
  """
  schedule = schedule_lib.schedule_from_config(config)
  if flow.is_flow(config):  # fields of spacing have no effect
    return schedule
  if odd := [f for f in _OTHER_SPACINGS if config.get(f)]:
    raise UserError(f"{odd[0]} = {config[odd[0]]!r} is not supported")
  for field, known in _SPACING.items():
    if (value := config.get(field)) is not None and value not in known:
      raise UserError(f"{field} must be one of {', '.join(known)} (got {value!r})")
  offset = config.get("steps_offset")
  if offset is not None and (type(offset) is not int or not 0 <= offset < 1000):
    raise UserError(f"steps_offset must be at least 0 and below 1,000 (got {offset!r})")
  return schedule


def read_spacing(config: Mapping[str, Any], solver: str, *, corrected: bool) -> dict[str, Any]:
  """Returns the spacing of timesteps of a `scheduler_config.json`, for `uniform_grid`.

  Missing fields get the defaults of diffusers' scheduler for `solver`, whichever scheduler
  wrote the file. A missing offset is 0, or 1 if `solver`'s own scheduler wrote the file and
  diffusers' pipeline corrects it. The files of flow matching have one spacing each.

  Args:
    config: the file's contents.
    solver: 'dpm_solver', 'ddim' or 'ddpm'.
    corrected: whether diffusers' pipeline corrects old files.
  """
  if flow.is_flow(config):
    return {"spacing": "linspace", "visit_lowest": not config.get("use_flow_sigmas")}
  multistep = solver == "dpm_solver"
  ends_clean = solver != "ddim" or config.get("set_alpha_to_one", True)
  own_final = "zero" if ends_clean else "sigma_min"
  unsaid = int(corrected and config.get("_class_name") == _SCHEDULERS[solver])
  offset = config.get("steps_offset")
  return {
    "spacing": config.get("timestep_spacing") or ("linspace" if multistep else "leading"),
    "steps_offset": unsaid if offset is None else offset,
    "visit_lowest": not multistep,
    "karras": multistep and bool(config.get("use_karras_sigmas")),
    "final": config.get("final_sigmas_type") or "zero" if multistep else own_final,
  }
