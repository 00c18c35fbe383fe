"""Stable Diffusion 1.x and 2.x: a UNet and one CLIP text encoder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpref.errors import UserError
from jaxpref.models import corrections, lora, single_file, text, unet
from jaxpref.models.families.family import Family, Modules
from jaxpref.models.families.parts import KL_VAE, UNET, clip_encoder, scheduler

PARTS_OF_TEXT = ("text_encoder", "text_encoder_2")  # the second is SDXL's
INDEX = {
  "_class_name": "StableDiffusionPipeline",
  "_diffusers_version": "0.39.0",
  "feature_extractor": [None, None],
  "requires_safety_checker": False,
  "safety_checker": [None, None],
  "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
  "text_encoder": ["transformers", "CLIPTextModel"],
  "tokenizer": ["transformers", "CLIPTokenizer"],
  "unet": ["diffusers", "UNet2DConditionModel"],
  "vae": ["diffusers", "AutoencoderKL"],
}


def check_fit(places: Mapping[str, Path], modules: Modules) -> None:
  """Refuses a UNet whose inputs are not what the other parts make; for SDXL's, too."""
  network, where = modules["unet"], places["unet"]
  encoders = [modules[part].config for part in PARTS_OF_TEXT if part in modules]
  xl = network.addition_embed_type == "text_time"
  if xl != (len(encoders) == 2):
    raise UserError(
      f"{where} takes {'two texts' if xl else 'one text'}, but the pipeline has "
      f"{len(encoders)} text encoder(s): they do not belong together"
    )
  taken = network.cross_attention_dim, network.in_channels
  given = sum(c.hidden_size for c in encoders), modules["vae"].latent_channels
  # An improver has twice as many channels, for the clean image.
  if taken[0] != given[0] or taken[1] not in (given[1], 2 * given[1]):
    raise UserError(
      f"{where} takes texts of width {taken[0]} and latents of {taken[1]} channels, "
      f"but text encoder and VAE make {given[0]} and {given[1]}: they do not belong together"
    )
  if xl:
    width = 6 * network.addition_time_embed_dim + encoders[1].projection_dim
    if (wanted := network.projection_class_embeddings_input_dim) != width:
      raise UserError(
        f"{where} takes {wanted} numbers beside the text, but its second text encoder "
        f"and six sizes make {width}: they do not belong together"
      )


def _encode(modules: Modules, params: Any, ids: Any, *, clip_skip: int) -> dict[str, Any]:
  encoder, weights = modules["text_encoder"], params["text_encoder"]
  return {"text": text.encode_text(encoder, weights, ids[0], clip_skip=clip_skip)}


def abstract_text(modules: Modules, rows: int) -> dict[str, Any]:
  """Returns the shape of the conditioning's 'text', in the encoders' dtype; SDXL's, too."""
  encoders = [modules[part] for part in PARTS_OF_TEXT if part in modules]
  tokens = encoders[0].config.max_position_embeddings
  width = sum(encoder.config.hidden_size for encoder in encoders)
  return {"text": jax.ShapeDtypeStruct((rows, tokens, width), encoders[0].dtype)}


def _version(modules: Modules) -> int:
  """Returns 1 or 2; Stable Diffusion 2 has OpenCLIP's text encoder, with another activation."""
  return 2 if modules["text_encoder"].config.hidden_act == "gelu" else 1


def _export_lora(
  params: Any, modules: Modules, dtype: Any
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  version = _version(modules)
  base = {"ss_base_model_version": f"sd_v{version}", "ss_v2": str(version == 2)}
  return lora.export_tensors(params, dtype), base | lora.export_metadata(params)


def _to_single_file(
  parts: Mapping[str, single_file.Tensors], modules: Modules, config: Mapping[str, Any]
) -> single_file.Tensors:
  out = single_file.unet_and_vae(parts, modules, config)
  if _version(modules) == 2:
    tensors = single_file.open_clip(parts["text_encoder"])
    return out | single_file.prefixed("cond_stage_model.model.", tensors)
  return out | single_file.prefixed("cond_stage_model.transformer.", parts["text_encoder"])


def attentions(config: Mapping[str, Any], latent_shape: Sequence[int]) -> list[tuple[int, int]]:
  """Returns (heads, tokens) of each level of a UNet that has self-attention."""
  blocks, heads = config["down_block_types"], config.get("attention_head_dim", 8)
  heads = [heads] * len(blocks) if isinstance(heads, int) else heads
  tokens = [(latent_shape[1] // 2**level) ** 2 for level in range(len(blocks))]
  return [(heads[i], tokens[i]) for i, block in enumerate(blocks) if "Attn" in block]


FAMILY = Family(
  name="Stable Diffusion 1 and 2",
  pipelines=("StableDiffusionPipeline", "StableDiffusionImg2Img"),
  index=INDEX,
  parts={"unet": UNET, "vae": KL_VAE, "text_encoder": clip_encoder("tokenizer")},
  denoiser="unet",
  scheduler=scheduler(corrected=True),
  check_fit=check_fit,
  encode=_encode,
  abstract_cond=abstract_text,
  make_denoise=unet.make_denoise,
  make_encode=unet.make_encode,
  latent_unit=lambda module: 2 ** (len(module.block_out_channels) - 1),
  attentions=attentions,
  lora_targets=unet.ATTENTION_LAYERS,
  export_lora=_export_lora,
  to_single_file=_to_single_file,
  # Programs read the prediction type from the file only for SDXL, see `single_file`.
  v_note=(
    "note: the model predicts v. ComfyUI and A1111's web UI infer that from the weights for SD "
    "2.x, but not for SD 1.x: set it there yourself (in ComfyUI with the node "
    "ModelSamplingDiscrete, which also has zsnr; in A1111 with a .yaml beside the file)"
  ),
  correct=corrections.correct_configs,
  skippable=lambda modules: modules["text_encoder"].config.num_hidden_layers,
  input_layer="conv_in",
)
