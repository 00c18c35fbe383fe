"""The base with Stable Diffusion's UNet: configuration files and initial weights."""

from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxpref.diffusion import flow
from jaxpref.models.families import stable_diffusion
from jaxpref.pretrain import clip_encoder

FAMILY = stable_diffusion.FAMILY
TITLE = "UNet and text encoder"  # of what is trained, for the model card
NOTE = ""  # what the model card says of its use
ENCODERS = ("text_encoder",)


def part_configs(settings: ConfigDict, *, vocab_size: int) -> dict[str, dict[str, Any]]:
  """Returns the files `config.json` of denoiser and text encoder, by part."""
  text = clip_encoder.text_config(
    settings.text.width,
    layers=settings.text.layers,
    heads=settings.text.heads,
    tokens=settings.tokenizer.max_length,
    vocab_size=vocab_size,
  )
  return {FAMILY.denoiser: denoiser_config(settings), ENCODERS[0]: text}


def denoiser_config(settings: ConfigDict) -> dict[str, Any]:
  """Returns the UNet's `config.json` for the shapes world."""
  blocks = ["CrossAttn" if attend else "" for attend in settings.unet.attention]
  return {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    # diffusers' historical name for the number of heads.
    "attention_head_dim": list(settings.unet.heads),
    "block_out_channels": list(settings.unet.channels),
    "center_input_sample": False,
    "cross_attention_dim": settings.text.width,
    "down_block_types": [f"{b}DownBlock2D" for b in blocks],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": settings.vae.latent_channels,
    "layers_per_block": settings.unet.layers_per_block,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": settings.vae.latent_channels,
    "sample_size": settings.corpus.image_size // 2 ** (len(settings.vae.channels) - 1),
    "up_block_types": [f"{b}UpBlock2D" for b in reversed(blocks)],
  }


def scheduler_config(settings: ConfigDict) -> dict[str, Any]:
  """Returns diffusers' `scheduler/scheduler_config.json`.

  The schedule is Stable Diffusion's, or a flow's.
  """
  solver = {
    "_class_name": "DPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "num_train_timesteps": 1000,
    "prediction_type": settings.unet.prediction_type,
    "solver_order": 2,
    "solver_type": "midpoint",
  }
  if settings.unet.prediction_type == flow.PREDICTION_TYPE:
    # diffusers' StableDiffusionPipeline runs this scheduler, and not FlowMatchEuler's.
    return solver | {"flow_shift": settings.noise.shift, "use_flow_sigmas": True}
  return solver | {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "steps_offset": 1,
    "timestep_spacing": "leading",
  }


def init_denoiser(modules: Mapping[str, Any], key: jax.Array) -> Any:
  """Initializes the UNet."""
  return jax.jit(modules[FAMILY.denoiser].init_weights)(key)
