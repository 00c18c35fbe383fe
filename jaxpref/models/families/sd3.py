"""Stable Diffusion 3 and 3.5: an MMDiT, two CLIP text encoders and T5, which is optional."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxpref.errors import UserError
from jaxpref.models import single_file, t5, text
from jaxpref.models.dit import forward, original_names, sd3_transformer
from jaxpref.models.families import parts
from jaxpref.models.families.family import Family, Modules, Part, Tokenizer

_CLIPS = ("text_encoder", "text_encoder_2")
_T5 = "text_encoder_3"
# Where ComfyUI finds the text encoders in a single file.
_ENCODERS_IN_FILE = {
  "text_encoder": "text_encoders.clip_l.transformer.",
  "text_encoder_2": "text_encoders.clip_g.transformer.",
  "text_encoder_3": "text_encoders.t5xxl.transformer.",
}


def _encode(modules: Modules, params: Any, ids: Any, *, clip_skip: int) -> dict[str, Any]:
  encoders, weights = ([of[part] for part in _CLIPS] for of in (modules, params))
  clip, pooled = text.encode_text_pair(encoders, weights, ids[:2], clip_skip=clip_skip)
  if _T5 in modules:
    long = t5.encode(modules[_T5], params[_T5], ids[2])
  else:
    network = modules["transformer"]
    shape = (len(clip), network.t5_tokens, network.joint_attention_dim)
    long = jnp.zeros(shape, clip.dtype)
  return {"text": text.join_texts(clip, long), "pooled": pooled}


def _abstract_cond(modules: Modules, rows: int) -> dict[str, Any]:
  clips = [modules[part] for part in _CLIPS]
  network = modules["transformer"]
  tokens = clips[0].config.max_position_embeddings + network.t5_tokens
  pooled = sum(clip.config.projection_dim for clip in clips)
  shape = lambda *of: jax.ShapeDtypeStruct((rows, *of), clips[0].dtype)  # noqa: E731
  return {"text": shape(tokens, network.joint_attention_dim), "pooled": shape(pooled)}


def _check_fit(places: Mapping[str, Path], modules: Modules) -> None:
  """Refuses a transformer whose inputs are not what the other parts make."""
  network, where = modules["transformer"], places["transformer"]
  clips = [modules[part].config for part in _CLIPS]
  width = network.joint_attention_dim
  hidden, pooled = (
    sum(getattr(c, of) for c in clips) for of in ("hidden_size", "projection_dim")
  )
  if _T5 in modules and (made := modules[_T5].config.d_model) != width:
    raise UserError(
      f"{where} takes texts of width {width}, but text_encoder_3 makes {made}: they do not "
      "belong together"
    )
  if _T5 in modules and not network.t5_tokens:
    raise UserError(
      f"{where} was trained without T5 (_t5_tokens is 0), but there is a text_encoder_3: they "
      "do not belong together"
    )
  if hidden > width or pooled != network.pooled_projection_dim:
    raise UserError(
      f"{where} takes texts of width {width} and pooled texts of "
      f"{network.pooled_projection_dim}, but both CLIP encoders make {hidden} and {pooled}: "
      "they do not belong together"
    )
  if network.in_channels != (made := modules["vae"].latent_channels):
    raise UserError(
      f"{where} takes latents of {network.in_channels} channels, but the VAE makes {made}: "
      "they do not belong together"
    )


def _attentions(
  config: Mapping[str, Any], latent_shape: Sequence[int]
) -> list[tuple[int, int]]:
  """Returns (heads, tokens) of the joint attention; CLIP's part of the text has 77 tokens."""
  patches = [n // config["patch_size"] for n in latent_shape[1:]]
  text = 77 + config.get("_t5_tokens", sd3_transformer.T5_TOKENS)
  return [(config["num_attention_heads"], patches[0] * patches[1] + text)]


def _to_single_file(
  tensors: Mapping[str, single_file.Tensors],
  modules: Modules,
  config: Mapping[str, Any],
) -> single_file.Tensors:
  out = original_names.to_original(tensors["transformer"], original_names.SD3)
  out |= single_file.vae_tensors(tensors["vae"], modules["vae"])
  for part, prefix in _ENCODERS_IN_FILE.items():
    out |= single_file.prefixed(prefix, tensors.get(part, {}))
  return out


FAMILY = Family(
  name="Stable Diffusion 3",
  pipelines=("StableDiffusion3",),
  index={
    "_class_name": "StableDiffusion3Pipeline",
    "_diffusers_version": "0.39.0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
  },
  parts={
    "transformer": Part(
      build=sd3_transformer.build_sd3_transformer,
      fields=sd3_transformer.FIELDS,
      needed=sd3_transformer.NEEDED,
      stem=parts.DIFFUSERS_STEM,
    ),
    "vae": parts.KL_VAE,
    "text_encoder": parts.clip_encoder("tokenizer", projects=True),
    "text_encoder_2": parts.clip_encoder("tokenizer_2", projects=True),
    _T5: Part(
      build=t5.build_t5,
      fields=t5.FIELDS,
      needed=(),  # it refuses files without them
      stem=parts.TRANSFORMERS_STEM,
      is_optional=True,
      tokenizer=Tokenizer(
        "tokenizer_3",
        parts.piece_loader("t5", max_length=sd3_transformer.T5_TOKENS),
        parts.tokenize,
      ),
    ),
  },
  denoiser="transformer",
  scheduler=parts.scheduler(),
  check_fit=_check_fit,
  encode=_encode,
  abstract_cond=_abstract_cond,
  make_denoise=forward.make_denoise,
  latent_unit=lambda module: module.patch_size,
  attentions=_attentions,
  lora_targets=forward.JOINT_LAYERS,
  export_lora=parts.export_transformer_lora,
  to_single_file=_to_single_file,
  skippable=lambda modules: min(modules[part].config.num_hidden_layers for part in _CLIPS),
  fixed=forward.POSITIONS,
  unrounded=forward.POSITIONS,
  guidance=lambda module: 7.0,
)
