"""Trajectories of PyTorch diffusers' flow-matching schedulers, to hold the samplers to.

    python tests/golden/make_flow.py     # rewrites flow.npz beside this file

Needs torch and diffusers. Made with diffusers 0.39.0 and torch 2.13.0.
"""

from pathlib import Path

import numpy as np

try:
  from golden import make_samplers
except ImportError:  # run as a program
  import make_samplers

PATH = Path(__file__).with_name("flow.npz")
SHAPE, MIXING = make_samplers.SHAPE, make_samplers.MIXING
TOKENS = 4096  # of a Flux image of 1024 x 1024 pixels

SD3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
SD3 |= {"shift": 3.0, "use_dynamic_shifting": False}
FLUX_DEV = SD3 | {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
FLUX_DEV |= {"base_image_seq_len": 256, "max_image_seq_len": 4096}
FLUX_SCHNELL = FLUX_DEV | {"shift": 1.0, "use_dynamic_shifting": False}
SANA = {"_class_name": "DPMSolverMultistepScheduler", "num_train_timesteps": 1000}
SANA |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}

# Scheduler file, number of steps, and the order of DPM-Solver++, or 'euler'.
CASES = {
  "sd3": (SD3, 10, "euler"),
  "sd3_28": (SD3, 28, "euler"),
  "flux_dev": (FLUX_DEV, 4, "euler"),
  "flux_schnell": (FLUX_SCHNELL, 4, "euler"),
  "sana": (SANA, 10, 2),
  "sana_20": (SANA, 20, 2),
  "sana_order_1": (SANA, 10, 1),
  "sana_order_3": (SANA, 20, 3),
  "sana_order_3_few": (SANA, 10, 3),
}


def start(name):
  """x_T [B, ...] of a case."""
  rng = np.random.default_rng(list(CASES).index(name))
  return rng.standard_normal(SHAPE).astype(np.float32)


def run_diffusers(name):
  """Runs a case: what the denoiser is given [N], sigmas [N + 1], states [N + 1, B, ...]."""
  import diffusers
  import torch

  config, steps, order = CASES[name]
  kind = getattr(diffusers, config["_class_name"])
  options = {} if order == "euler" else {"solver_order": order}
  scheduler = kind.from_config(config, **options)
  given = {"num_inference_steps": steps}
  if name.startswith("flux"):  # as Flux's pipeline does
    given = {"sigmas": np.linspace(1.0, 1.0 / steps, steps)}
  if config.get("use_dynamic_shifting"):
    slope = (config["max_shift"] - config["base_shift"]) / (4096 - 256)
    given["mu"] = TOKENS * slope + config["base_shift"] - slope * 256
  scheduler.set_timesteps(**given)
  x_t = torch.from_numpy(start(name))
  mixing = torch.from_numpy(MIXING)
  states = [x_t]
  for t in scheduler.timesteps:
    times = torch.full((SHAPE[0], 1, 1), float(t))
    prediction = make_samplers.denoise(x_t, times, torch.tanh, mixing)
    x_t = scheduler.step(prediction, t, x_t).prev_sample
    states.append(x_t)
  numbers = scheduler.timesteps, scheduler.sigmas, torch.stack(states)
  return tuple(x.numpy().astype(np.float32) for x in numbers)


def main():
  """Writes flow.npz."""
  arrays = {}
  for name in CASES:
    found = zip(("inputs", "sigmas", "states"), run_diffusers(name), strict=True)
    arrays |= {f"{name}/{key}": array for key, array in found}
  np.savez_compressed(PATH, **arrays)


if __name__ == "__main__":
  main()
