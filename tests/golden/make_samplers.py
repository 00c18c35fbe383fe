"""Trajectories of PyTorch diffusers' schedulers, as numbers to hold the samplers to.

    python tests/golden/make_samplers.py     # rewrites samplers.npz beside this file

Needs torch and diffusers. Made with diffusers 0.39.0 and torch 2.13.0.
"""

from pathlib import Path
from unittest import mock

import numpy as np

PATH = Path(__file__).with_name("samplers.npz")
SHAPE = (2, 2, 3)  # [B, rows, channels]
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LINEAR = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
V = {"prediction_type": "v_prediction"}


def _dpm(schedule, steps, **options):
  return {"solver": "dpm_solver", "schedule": schedule, "steps": steps, **options}


def _other(solver, schedule, steps, spacing, **options):
  options = {"timestep_spacing": spacing, **options}
  return {"solver": solver, "schedule": schedule, "steps": steps, **options}


# The options are named as the schedulers of diffusers name them.
CASES = {
  "dpm1": _dpm(SD, 10, solver_order=1),
  "dpm2_sd": _dpm(SD, 20, timestep_spacing="leading", steps_offset=1),
  "dpm2_few": _dpm(SD, 10, timestep_spacing="trailing"),
  "dpm2_no_lower": _dpm(SD, 10, lower_order_final=False),
  "dpm2_linear_v": _dpm(LINEAR | V, 10),
  "dpm2_cosine_v": _dpm(COSINE | V, 20),
  "dpm2_cosine": _dpm(COSINE, 20, timestep_spacing="leading"),
  "dpm2_sigma_min": _dpm(SD, 10, final_sigmas_type="sigma_min"),
  "dpm2_karras": _dpm(SD, 10, use_karras_sigmas=True),
  "dpm2_karras_min": _dpm(
    LINEAR | V, 20, use_karras_sigmas=True, final_sigmas_type="sigma_min"
  ),
  "dpm2_zero_snr": _dpm(
    SD | V | {"rescale_betas_zero_snr": True}, 10, timestep_spacing="trailing"
  ),
  "dpm3": _dpm(SD, 20, solver_order=3),
  "dpm3_few": _dpm(LINEAR, 10, solver_order=3, timestep_spacing="leading"),
  "dpm3_sigma_min": _dpm(COSINE | V, 20, solver_order=3, final_sigmas_type="sigma_min"),
  "ddim": _other("ddim", SD, 20, "leading", steps_offset=1),
  "ddim_v": _other("ddim", COSINE | V, 10, "trailing"),
  "ddim_sigma_min": _other("ddim", SD, 10, "leading", set_alpha_to_one=False),
  "ddim_eta": _other("ddim", SD, 10, "leading", eta=0.7),
  "ddim_eta_v": _other("ddim", LINEAR | V, 10, "trailing", eta=1.0),
  "ddpm": _other("ddpm", SD, 20, "leading"),
  "ddpm_v": _other("ddpm", COSINE | V, 10, "trailing"),
}


def denoise(x_t, t, tanh, mixing):
  """A stand-in denoiser that numpy, torch and jax compute alike.

  Args:
    x_t: [B, rows, channels].
    t: timesteps as floats [B, 1, 1].
    tanh: the array library's.
    mixing: `MIXING` as one of its arrays.
  """
  u = t / 1000.0
  return 0.6 * u * x_t + tanh(x_t @ mixing + 2.0 * u - 0.5)


MIXING = np.array([[0.5, -0.3, 0.2], [0.1, 0.4, -0.6], [-0.7, 0.2, 0.3]], dtype=np.float32)


def start_and_noise(name):
  """x_T [B, ...] and the noise of every step [N, B, ...] of a case."""
  rng = np.random.default_rng(list(CASES).index(name))
  steps = CASES[name]["steps"]
  return (
    rng.standard_normal(SHAPE).astype(np.float32),
    rng.standard_normal((steps, *SHAPE)).astype(np.float32),
  )


def run_diffusers(name):
  """Runs a case: the timesteps [N] and all states [N + 1, B, ...] of diffusers."""
  import diffusers
  import torch
  from diffusers.schedulers import scheduling_ddpm

  case = dict(CASES[name])
  solver, steps, eta = case.pop("solver"), case.pop("steps"), case.pop("eta", 0.0)
  config = case.pop("schedule") | case
  if solver == "dpm_solver":
    scheduler = diffusers.DPMSolverMultistepScheduler(**config)
  elif solver == "ddim":
    scheduler = diffusers.DDIMScheduler(clip_sample=False, **config)
  else:
    scheduler = diffusers.DDPMScheduler(clip_sample=False, **config)
  scheduler.set_timesteps(steps)

  x_t, noise = map(torch.from_numpy, start_and_noise(name))
  mixing = torch.from_numpy(MIXING)
  states = [x_t]
  for k, t in enumerate(scheduler.timesteps):
    times = torch.full((SHAPE[0], 1, 1), float(t))
    prediction = denoise(x_t, times, torch.tanh, mixing)
    options = {"eta": eta, "variance_noise": noise[k]} if solver == "ddim" else {}
    with mock.patch.object(scheduling_ddpm, "randn_tensor", lambda *_, k=k, **__: noise[k]):
      x_t = scheduler.step(prediction, t, x_t, **options).prev_sample
    states.append(x_t)
  return scheduler.timesteps.numpy(), torch.stack(states).numpy()


def main():
  """Writes samplers.npz."""
  arrays = {}
  for name in CASES:
    timesteps, states = run_diffusers(name)
    arrays[f"{name}/timesteps"] = timesteps.astype(np.int32)
    arrays[f"{name}/states"] = states.astype(np.float32)
    print(f"{name:16s} max |x| {np.abs(states).max():.3g}")
  np.savez_compressed(PATH, **arrays)


if __name__ == "__main__":
  main()
