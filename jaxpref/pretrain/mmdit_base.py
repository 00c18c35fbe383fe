"""The base with Stable Diffusion 3's transformer: configuration files and initial weights.

It has both CLIP text encoders that the family asks for, small ones, and no T5: the 256 tokens
that stand for it would be three quarters of all tokens of this small model. The transformer is
trained without them, see `SD3Transformer.t5_tokens`.
"""

from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxpref.models.families import sd3
from jaxpref.pretrain import clip_encoder

FAMILY = sd3.FAMILY
TITLE = "MMDiT and text encoders"  # of what is trained, for the model card
NOTE = """
diffusers runs it without T5 and without tokens in place of T5's:

    pipe = StableDiffusion3Pipeline.from_pretrained(path, text_encoder_3=None, tokenizer_3=None)
    pipe("a red circle", height=32, width=32, guidance_scale=2.0, max_sequence_length=0)
"""
ENCODERS = ("text_encoder", "text_encoder_2")  # all that are trained; no T5
# Layers that begin as zeros, so that every block begins as the identity and the prediction as
# 0 (adaLN-Zero; Peebles and Xie, arXiv 2212.09748).
_ZERO = ("norm1", "norm1_context", "norm_out", "proj_out")


def part_configs(settings: ConfigDict, *, vocab_size: int) -> dict[str, dict[str, Any]]:
  """Returns the files `config.json` of denoiser and text encoders, by part."""
  texts = {
    part: clip_encoder.text_config(
      width,
      layers=settings.text.layers,
      heads=width // settings.text.head_dim,
      tokens=settings.tokenizer.max_length,
      vocab_size=vocab_size,
      projects=True,
    )
    for part, width in zip(ENCODERS, settings.text.widths, strict=True)
  }
  return {FAMILY.denoiser: denoiser_config(settings), **texts}


def denoiser_config(settings: ConfigDict) -> dict[str, Any]:
  """Returns the transformer's `config.json` for the shapes world."""
  network = settings.mmdit
  size = settings.corpus.image_size // 2 ** (len(settings.vae.channels) - 1)
  return {
    "_class_name": "SD3Transformer2DModel",
    "_t5_tokens": 0,
    "attention_head_dim": network.head_dim,
    "caption_projection_dim": network.heads * network.head_dim,
    "dual_attention_layers": [],
    "in_channels": settings.vae.latent_channels,
    "joint_attention_dim": sum(settings.text.widths),
    "num_attention_heads": network.heads,
    "num_layers": network.layers,
    "out_channels": settings.vae.latent_channels,
    "patch_size": network.patch_size,
    "pooled_projection_dim": sum(settings.text.widths),
    "pos_embed_max_size": size // network.patch_size,
    "qk_norm": "rms_norm",
    "sample_size": size,
  }


def scheduler_config(settings: ConfigDict) -> dict[str, Any]:
  """Returns diffusers' `scheduler/scheduler_config.json`."""
  return {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": settings.noise.shift,
  }


def init_denoiser(modules: Mapping[str, Any], key: jax.Array) -> Any:
  """Initializes the transformer."""
  return begin_as_identity(jax.jit(modules[FAMILY.denoiser].init_weights)(key))


def begin_as_identity(params: Mapping[str, Any]) -> Any:
  """Returns a transformer's parameters with zeros in the layers that begin as zeros."""
  flat = flax.traverse_util.flatten_dict(params)
  zeroed = {k: jnp.zeros_like(v) if set(k) & set(_ZERO) else v for k, v in flat.items()}
  return flax.traverse_util.unflatten_dict(zeroed)
