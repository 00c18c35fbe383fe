"""Stable Diffusion XL: a larger UNet, two CLIP text encoders, and sizes as conditioning."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxpref.models import lora, single_file, text
from jaxpref.models.families import stable_diffusion
from jaxpref.models.families.family import Modules, keep_configs
from jaxpref.models.families.parts import clip_encoder, scheduler


def _encode(modules: Modules, params: Any, ids: Any, *, clip_skip: int) -> dict[str, Any]:
  encoders, weights = (
    [of[part] for part in stable_diffusion.PARTS_OF_TEXT] for of in (modules, params)
  )
  hidden, pooled = text.encode_text_xl(encoders, weights, ids, clip_skip=clip_skip)
  return {"text": hidden, "pooled": pooled}


def _abstract_cond(modules: Modules, rows: int) -> dict[str, Any]:
  encoder = modules["text_encoder_2"]
  pooled = jax.ShapeDtypeStruct((rows, encoder.config.projection_dim), encoder.dtype)
  return stable_diffusion.abstract_text(modules, rows) | {"pooled": pooled}


def _export_lora(
  params: Any, modules: Modules, dtype: Any
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  base = {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}
  return lora.export_tensors(params, dtype), base | lora.export_metadata(params)


def _to_single_file(
  parts: Mapping[str, single_file.Tensors], modules: Modules, config: Mapping[str, Any]
) -> single_file.Tensors:
  out = single_file.unet_and_vae(parts, modules, config)
  first, second = parts["text_encoder"], single_file.open_clip(parts["text_encoder_2"])
  out |= single_file.prefixed("conditioner.embedders.0.transformer.", first)
  return out | single_file.prefixed("conditioner.embedders.1.model.", second)


FAMILY = dataclasses.replace(
  stable_diffusion.FAMILY,
  name="Stable Diffusion XL",
  pipelines=("StableDiffusionXL",),
  index={
    **{k: v for k, v in stable_diffusion.INDEX.items() if "safety" not in k},
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
  },
  parts={
    **stable_diffusion.FAMILY.parts,
    "text_encoder_2": clip_encoder("tokenizer_2", projects=True),
  },
  scheduler=scheduler(),
  encode=_encode,
  abstract_cond=_abstract_cond,
  export_lora=_export_lora,
  to_single_file=_to_single_file,
  v_note="",
  correct=keep_configs,
  takes_sizes=True,
  zeroes_uncond=lambda index: index.get("force_zeros_for_empty_prompt", True),
  skippable=lambda modules: min(
    modules[part].config.num_hidden_layers for part in stable_diffusion.PARTS_OF_TEXT
  ),
)
