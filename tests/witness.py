"""Outputs of PyTorch's diffusers and transformers for a reduced pipeline.

`test_families.py` compares with them directly. `golden/make_families.py` stores a part of them
for machines without PyTorch.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import (
  DPMSolverMultistepScheduler,
  StableDiffusionPipeline,
  StableDiffusionXLPipeline,
)

STEPS = 20
GUIDANCE = 5.0


def load(directory: Path):
  """Loads a pipeline and gives it DPM-Solver++ on the pipeline's own schedule."""
  xl = (directory / "text_encoder_2").exists()
  kind = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
  pipe = kind.from_pretrained(directory)
  pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
  pipe.set_progress_bar_config(disable=True)
  return pipe


@torch.no_grad()
def outputs(directory: Path, inputs: dict[str, np.ndarray], prompts: list[str]):
  """Returns the outputs of every part, float32, by name.

  Args:
    directory: the pipeline.
    inputs: from `test_families.make_inputs`.
    prompts: texts to encode and to sample images for.
  """
  pipe = load(directory)
  tensors = {k: torch.tensor(v) for k, v in inputs.items()}
  posterior = pipe.vae.encode(tensors["image"]).latent_dist
  out = {
    "vae_mean": posterior.mean,
    "vae_logvar": posterior.logvar,
    "vae_decoded": pipe.vae.decode(tensors["latent"]).sample,
  }
  if hasattr(pipe, "text_encoder_2"):
    text, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    out["pooled"] = pooled
  else:
    text, _ = pipe.encode_prompt(prompts, "cpu", 1, False)
  out["text"] = text
  added = {}
  if "time_ids" in tensors:
    added = {"text_embeds": tensors["pooled"], "time_ids": tensors["time_ids"]}
  out["unet"] = pipe.unet(
    tensors["latent"], tensors["t"], tensors["text"], added_cond_kwargs=added
  ).sample
  out["latents"] = pipe(
    prompts,
    latents=tensors["noise"],
    num_inference_steps=STEPS,
    guidance_scale=GUIDANCE,
    output_type="latent",
  ).images
  return {name: value.numpy() for name, value in out.items()}
