"""SANA 1.0 and 1.5: a linear transformer, the autoencoder DC-AE, and Gemma 2 for the text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.errors import UserError
from jaxpref.models import dc_ae, gemma, piece_tokenizers
from jaxpref.models.dit import forward, sana_transformer
from jaxpref.models.families import parts
from jaxpref.models.families.family import Family, Modules, Part, Tokenizer

_TOKENS = 300  # of a text, which the transformer attends to
_PADDING = -1  # in token ids, so that a mask can be computed of them
# What Gemma reads before a prompt. The words are those of the published configurations
# (github.com/NVlabs/Sana, configs/sana_app_config, Apache-2.0), because the network was trained
# with hidden states that depend on them.
INSTRUCTION = "\n".join(
  (
    "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual "
    "descriptions suitable for image generation. Evaluate the level of detail in the user "
    "prompt:",
    "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, "
    "textures, and spatial relationships to create vivid and concrete scenes.",
    "- If the prompt is already detailed, refine and enhance the existing details slightly "
    "without overcomplicating.",
    "Here are examples of how to transform or refine prompts:",
    "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round "
    "shape, sleeping peacefully on a warm sunny windowsill, surrounded by pots of blooming red "
    "flowers.",
    "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, "
    "featuring glowing street lamps, a diverse crowd of people in colorful clothing, and a "
    "double-decker bus passing by towering glass skyscrapers.",
    "Please generate only the enhanced description for the prompt below and avoid including "
    "any additional commentary or evaluations:",
    "User Prompt: ",
  )
)


def _tokenize(tokenizer: Any, texts: Sequence[str], negative: bool) -> np.ndarray:
  """Tokenizes prompts after the instruction, or negative prompts without it; pads with -1."""
  instruction = "" if negative else INSTRUCTION
  ids, mask = piece_tokenizers.tokenize_masked(tokenizer, texts, instruction=instruction)
  return np.where(mask == 1, ids, _PADDING).astype(np.int32)


def _encode(modules: Modules, params: Any, ids: Any, *, clip_skip: int) -> dict[str, Any]:
  del clip_skip  # `Family.skippable` allows only 0
  mask = (ids[0] != _PADDING).astype(jnp.int32)
  found = gemma.encode(
    modules["text_encoder"], params["text_encoder"], jnp.maximum(ids[0], 0), mask
  )
  text, kept = (gemma.keep_prompt(values, _TOKENS) for values in (found, mask))
  return {"text": text, "mask": kept}


def _abstract_cond(modules: Modules, rows: int) -> dict[str, Any]:
  encoder = modules["text_encoder"]
  text = jax.ShapeDtypeStruct((rows, _TOKENS, encoder.config.hidden_size), encoder.dtype)
  return {"text": text, "mask": jax.ShapeDtypeStruct((rows, _TOKENS), jnp.int32)}


def _check_fit(places: Mapping[str, Path], modules: Modules) -> None:
  """Refuses a transformer whose inputs are not what the other parts make."""
  network = modules["transformer"]
  taken = network.caption_channels, network.in_channels, network.out_channels
  latent = modules["vae"].latent_channels
  given = modules["text_encoder"].config.hidden_size, latent, latent
  if taken != given:
    raise UserError(
      f"{places['transformer']} takes texts of width {taken[0]} and latents of {taken[1]} and "
      f"{taken[2]} channels, but text encoder and VAE make {given[0]} and {latent}: they do "
      "not belong together"
    )


FAMILY = Family(
  name="SANA",
  pipelines=("SanaPipeline",),
  index={
    "_class_name": "SanaPipeline",
    "_diffusers_version": "0.39.0",
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "Gemma2Model"],
    "tokenizer": ["transformers", "GemmaTokenizerFast"],
    "transformer": ["diffusers", "SanaTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderDC"],
  },
  parts={
    "transformer": Part(
      build=sana_transformer.build_sana_transformer,
      fields=sana_transformer.FIELDS,
      needed=sana_transformer.NEEDED,
      stem=parts.DIFFUSERS_STEM,
    ),
    "vae": Part(
      build=dc_ae.build_dc_ae,
      fields=dc_ae.FIELDS,
      needed=dc_ae.NEEDED,
      stem=parts.DIFFUSERS_STEM,
    ),
    "text_encoder": Part(
      build=gemma.build_gemma,
      fields=gemma.FIELDS,
      needed=gemma.NEEDED,
      stem=parts.TRANSFORMERS_STEM,
      tokenizer=Tokenizer(
        "tokenizer", parts.piece_loader("gemma", max_length=_TOKENS), _tokenize
      ),
    ),
  },
  denoiser="transformer",
  scheduler=parts.scheduler(),
  check_fit=_check_fit,
  encode=_encode,
  abstract_cond=_abstract_cond,
  make_denoise=forward.make_denoise,
  latent_unit=lambda module: 1,
  attentions=lambda config, latent_shape: [],  # those of the image are linear
  lora_targets=r"transformer_blocks\.\d+\.attn[12]\.to_[qkv]$",
  export_lora=parts.export_transformer_lora,
  unrounded=forward.UNROUNDED,
  guidance=lambda module: 4.5,
)
