"""Conversion of a pipeline to the tensor names that ComfyUI and A1111's web UI read.

The names are those of the original Stable Diffusion code. The text encoder of SD 2.x and the
second one of SDXL have OpenCLIP's names, with queries, keys and values in one matrix. There is
only the conversion to these names, not from them.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpref.diffusion import flow
from jaxpref.errors import UserError

Tensors = dict[str, np.ndarray]

_RESNET = {
  "norm1": "in_layers.0",
  "conv1": "in_layers.2",
  "norm2": "out_layers.0",
  "conv2": "out_layers.3",
  "time_emb_proj": "emb_layers.1",
  "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
  "conv_in": "input_blocks.0.0",
  "time_embedding.linear_1": "time_embed.0",
  "time_embedding.linear_2": "time_embed.2",
  "add_embedding.linear_1": "label_emb.0.0",
  "add_embedding.linear_2": "label_emb.0.2",
  "conv_norm_out": "out.0",
  "conv_out": "out.2",
}
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_VAE_ATTENTION = {
  "group_norm": "norm",
  "to_q": "q",
  "to_k": "k",
  "to_v": "v",
  "to_out.0": "proj_out",
}
_OPEN_CLIP_LAYER = {
  "layer_norm1": "ln_1",
  "layer_norm2": "ln_2",
  "mlp.fc1": "mlp.c_fc",
  "mlp.fc2": "mlp.c_proj",
  "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP_ENDS = {
  "embeddings.token_embedding.weight": "token_embedding.weight",
  "embeddings.position_embedding.weight": "positional_embedding",
  "final_layer_norm.weight": "ln_final.weight",
  "final_layer_norm.bias": "ln_final.bias",
}


def unet_and_vae(
  parts: Mapping[str, Tensors], modules: Mapping[str, Any], scheduler: Mapping[str, Any]
) -> Tensors:
  """Renames the tensors of UNet and VAE to their original names.

  A single file has no configuration. Empty tensors tell ComfyUI and A1111 that an SDXL model
  predicts v ('v_pred') or has zero terminal SNR ('ztsnr').

  Args:
    parts: PyTorch tensors by part and diffusers' name, of 'unet' and 'vae' among others.
    modules: modules by part.
    scheduler: the scheduler's configuration.

  Raises:
    UserError: the UNet was trained with flow matching, or a tensor does not have a name in a
      single file.
  """
  if flow.is_flow(scheduler):
    raise UserError(
      "a single file cannot say that its UNet was trained with flow matching: export a "
      "directory"
    )
  out = {
    f"model.diffusion_model.{unet_name(name, modules['unet'])}": tensor
    for name, tensor in parts["unet"].items()
  }
  out |= vae_tensors(parts["vae"], modules["vae"])
  if scheduler.get("prediction_type") == "v_prediction":
    out["v_pred"] = np.zeros(0, np.float32)
  if scheduler.get("rescale_betas_zero_snr"):
    out["ztsnr"] = np.zeros(0, np.float32)
  return out


def vae_tensors(
  tensors: Mapping[str, np.ndarray], vae: Any, *, prefix: str = "first_stage_model."
) -> Tensors:
  """Renames a VAE's tensors to their original names.

  Args:
    tensors: PyTorch tensors by diffusers' names.
    vae: the module.
    prefix: of the names.
  """
  out = {}
  for name, tensor in tensors.items():
    new = _vae_name(name, len(vae.block_out_channels))
    linear = re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", new)
    out[f"{prefix}{new}"] = tensor[:, :, None, None] if linear else tensor
  return out


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
  """Puts a prefix before all names."""
  return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def unet_name(name: str, unet: Any) -> str:
  """Returns the original name of a UNet's tensor."""
  stem, _, leaf = name.rpartition(".")
  if stem in _UNET_ENDS:
    return f"{_UNET_ENDS[stem]}.{leaf}"
  layers = unet.layers_per_block
  if match := re.fullmatch(r"mid_block\.(\w+\.\d+)\.(.+)", name):
    return f"middle_block.{_MIDDLE[match[1]]}.{_unet_inner(match[1], match[2])}"
  match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
  if match is None:
    raise UserError(f"the UNet's {name} does not have a name in a single file")
  way, block, kind, number = match[1], int(match[2]), match[3], int(match[4])
  # A block is `layers` pairs of resnet and transformer, and a downsampler. An up block has one
  # more pair, and its upsampler has the index of the last pair.
  if way == "down":
    if kind == "downsamplers":
      return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{leaf}"
    place = f"input_blocks.{1 + block * (layers + 1) + number}"
  else:
    attends = unet.up_block_types[block].startswith("CrossAttn")
    if kind == "upsamplers":
      last = block * (layers + 1) + layers
      return f"output_blocks.{last}.{2 if attends else 1}.conv.{leaf}"
    place = f"output_blocks.{block * (layers + 1) + number}"
  return f"{place}.{0 if kind == 'resnets' else 1}.{_unet_inner(kind, match[5])}"


def _unet_inner(kind: str, name: str) -> str:
  if not kind.startswith("resnets"):
    return name  # transformers have the same names
  stem, _, leaf = name.rpartition(".")
  return f"{_RESNET[stem]}.{leaf}"


def _vae_name(name: str, levels: int) -> str:
  def level(match: re.Match) -> str:
    number = int(match[2])
    if match[1] == "up":  # counted from the image, not from the latent
      number = levels - 1 - number
    return f"{match[1]}.{number}."

  name = re.sub(r"(down|up)_blocks\.(\d+)\.", level, name)
  name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
  name = re.sub(r"resnets\.(\d+)", r"block.\1", name)
  name = re.sub(r"(down|up)samplers\.0\.conv", r"\1sample.conv", name)
  name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
  if match := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(\w+)", name):
    name = f"{match[1]}.mid.attn_1.{_VAE_ATTENTION[match[2]]}.{match[3]}"
  return name


def open_clip(tensors: Tensors) -> Tensors:
  """Renames a CLIP text encoder's tensors to OpenCLIP's names."""
  out, heads = {}, {}
  for name, tensor in tensors.items():
    short = name.removeprefix("text_model.")
    if name == "text_projection.weight":
      out["text_projection"] = np.ascontiguousarray(tensor.T)
    elif short in _OPEN_CLIP_ENDS:
      out[_OPEN_CLIP_ENDS[short]] = tensor
    elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(\w+)", short):
      layer, stem, leaf = f"transformer.resblocks.{match[1]}", match[2], match[3]
      if stem in _OPEN_CLIP_LAYER:
        out[f"{layer}.{_OPEN_CLIP_LAYER[stem]}.{leaf}"] = tensor
      else:
        heads[f"{layer}.attn.in_proj_{leaf}", stem] = tensor
    else:
      raise UserError(f"the text encoder's {name} does not have a name in a single file")
  for joint in {joint for joint, _ in heads}:
    three = [heads[joint, f"self_attn.{x}_proj"] for x in "qkv"]
    out[joint] = np.concatenate(three)
  return out
