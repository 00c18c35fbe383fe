"""Flux.1-dev and Flux.1-schnell: a transformer, CLIP's pooled text, and T5.

Dev was distilled from guidance: the network is given the scale, without
classifier-free guidance. Schnell has neither; it was distilled to few steps.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxpref.errors import UserError
from jaxpref.models import single_file, t5, text
from jaxpref.models.denoiser import Denoise
from jaxpref.models.dit import flux_transformer, forward, original_names
from jaxpref.models.families import parts
from jaxpref.models.families.family import Family, Modules, Part, Tokenizer

_CLIP, _T5 = "text_encoder", "text_encoder_2"
# T5's tokens, as the models' authors use them; diffusers takes 512 for both by default.
_DEV_TOKENS, _SCHNELL_TOKENS = 512, 256
_PATCH = 2  # height and width of a token in latents
# Where ComfyUI finds the text encoders in a single file.
_ENCODERS_IN_FILE = {
  _CLIP: "text_encoders.clip_l.transformer.",
  _T5: "text_encoders.t5xxl.transformer.",
}


def _takes_guidance(transformer: Any) -> bool:
  return transformer.guidance_embeds


def _tokens(is_dev: bool) -> int:
  return _DEV_TOKENS if is_dev else _SCHNELL_TOKENS


def _load_t5_tokenizer(path: Path, entry: Any, encoder: Any, transformer: Any) -> Any:
  load = parts.piece_loader("t5", max_length=_tokens(transformer.guidance_embeds))
  return load(path, entry, encoder, transformer)


def _encode(modules: Modules, params: Any, ids: Any, *, clip_skip: int) -> dict[str, Any]:
  del clip_skip  # `Family.skippable` allows only 0
  pooled = text.encode_pooled(modules[_CLIP], params[_CLIP], ids[0])
  return {"text": t5.encode(modules[_T5], params[_T5], ids[1]), "pooled": pooled}


def _abstract_cond(modules: Modules, rows: int) -> dict[str, Any]:
  clip, network = modules[_CLIP], modules["transformer"]
  shape = lambda *of: jax.ShapeDtypeStruct((rows, *of), clip.dtype)  # noqa: E731
  tokens = _tokens(network.guidance_embeds)
  return {
    "text": shape(tokens, network.joint_attention_dim),
    "pooled": shape(clip.config.hidden_size),
  }


def _check_fit(places: Mapping[str, Path], modules: Modules) -> None:
  """Refuses a transformer whose inputs are not what the other parts make."""
  network = modules["transformer"]
  taken = (
    network.joint_attention_dim,
    network.pooled_projection_dim,
    network.in_channels / _PATCH**2,
  )
  given = (
    modules[_T5].config.d_model,
    modules[_CLIP].config.hidden_size,
    modules["vae"].latent_channels,
  )
  if taken != given:
    raise UserError(
      f"{places['transformer']} takes texts of width {taken[0]}, pooled texts of {taken[1]} "
      f"and latents of {taken[2]:g} channels, but {_T5}, {_CLIP} and VAE make {given[0]}, "
      f"{given[1]} and {given[2]}: they do not belong together"
    )


def make_denoise(module: Any, *, guidance: float = 1.0, **options: Any) -> Denoise:
  """Returns the forward pass, see `forward.make_denoise`.

  Args:
    module: from `build_flux_transformer`.
    guidance: the scale that dev is given if its conditioning has none; schnell takes none.
    **options: of `forward.make_denoise`.
  """
  denoise = forward.make_denoise(module, **options)
  if not module.guidance_embeds:
    return denoise

  def with_scale(params, x_t, t, cond):
    scale = jnp.full(t.shape, guidance, jnp.float32)
    return denoise(params, x_t, t, {"guidance": scale, **cond})

  return with_scale


def _attentions(
  config: Mapping[str, Any], latent_shape: Sequence[int]
) -> list[tuple[int, int]]:
  tokens = (latent_shape[1] // _PATCH) * (latent_shape[2] // _PATCH)
  return [
    (config["num_attention_heads"], tokens + _tokens(bool(config.get("guidance_embeds"))))
  ]


def _spacing(config: Mapping[str, Any], solver: str) -> dict[str, Any]:
  """Returns 1, 1 - 1 / N, ..., as diffusers' pipeline asks of the scheduler."""
  if config.get("use_flow_sigmas"):  # a scheduler that its pipeline leaves its own levels
    return _SCHEDULER.spacing(config, solver)
  return {"spacing": "trailing"}


def _to_single_file(
  tensors: Mapping[str, single_file.Tensors],
  modules: Modules,
  config: Mapping[str, Any],
) -> single_file.Tensors:
  out = original_names.to_original(tensors["transformer"], original_names.FLUX)
  out |= single_file.vae_tensors(tensors["vae"], modules["vae"], prefix="vae.")
  for part, prefix in _ENCODERS_IN_FILE.items():
    out |= single_file.prefixed(prefix, tensors[part])
  return out


_SCHEDULER = parts.scheduler()
FAMILY = Family(
  name="Flux.1",
  pipelines=("FluxPipeline",),
  index={
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.39.0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
  },
  parts={
    "transformer": Part(
      build=flux_transformer.build_flux_transformer,
      fields=flux_transformer.FIELDS,
      needed=flux_transformer.NEEDED,
      stem=parts.DIFFUSERS_STEM,
    ),
    "vae": parts.KL_VAE,
    _CLIP: parts.clip_encoder("tokenizer"),
    _T5: Part(
      build=t5.build_t5,
      fields=t5.FIELDS,
      needed=(),  # it refuses files without them
      stem=parts.TRANSFORMERS_STEM,
      tokenizer=Tokenizer("tokenizer_2", _load_t5_tokenizer, parts.tokenize),
    ),
  },
  denoiser="transformer",
  scheduler=dataclasses.replace(_SCHEDULER, spacing=_spacing),
  check_fit=_check_fit,
  encode=_encode,
  abstract_cond=_abstract_cond,
  make_denoise=make_denoise,
  latent_unit=lambda module: _PATCH,
  attentions=_attentions,
  # They match the blocks of one stream, too, as the attention's names in diffusers' script do.
  lora_targets=forward.JOINT_LAYERS,
  export_lora=parts.export_transformer_lora,
  to_single_file=_to_single_file,
  takes_guidance=_takes_guidance,
  guidance=lambda module: 3.5 if module.guidance_embeds else 1.0,
)
