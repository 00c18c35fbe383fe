"""CLIP's tensors by open_clip's names, renamed and reshaped to transformers'."""

import re
from collections.abc import Mapping

import numpy as np

from jaxpref.errors import UserError, listed

_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
# Inside a block: open_clip's names, and transformers'.
_INSIDE = {
  "attn.out_proj": "self_attn.out_proj",
  "ln_1": "layer_norm1",
  "ln_2": "layer_norm2",
  "mlp.c_fc": "mlp.fc1",
  "mlp.c_proj": "mlp.fc2",
}
_NAMES = {
  "logit_scale": "logit_scale",
  "ln_final.bias": "text_model.final_layer_norm.bias",
  "ln_final.weight": "text_model.final_layer_norm.weight",
  "positional_embedding": "text_model.embeddings.position_embedding.weight",
  "text_projection": "text_projection.weight",
  "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
  "visual.class_embedding": "vision_model.embeddings.class_embedding",
  "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
  "visual.ln_post.bias": "vision_model.post_layernorm.bias",
  "visual.ln_post.weight": "vision_model.post_layernorm.weight",
  "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
  "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
  "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
  "visual.proj": "visual_projection.weight",
}
# open_clip multiplies by these from the right. A square one would also load untransposed.
_TRANSPOSED = ("text_projection", "visual.proj")


def is_open_clip(names: Mapping[str, object]) -> bool:
  """Returns whether tensors have open_clip's names."""
  return "visual.conv1.weight" in names


def to_transformers(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns views of CLIP's tensors by the names and shapes of transformers' `CLIPModel`.

  Args:
    tensors: all tensors of an open_clip model with a vision transformer, by name.

  Raises:
    UserError: names are unknown; the message lists the first few.
  """
  found: dict[str, np.ndarray] = {}
  unknown = []
  for name, array in tensors.items():
    if name in _NAMES:
      found[_NAMES[name]] = array.T if name in _TRANSPOSED else array
    elif (block := _BLOCK.fullmatch(name)) and (inside := _in_block(block[3], array)):
      tower = "vision_model" if block[1] else "text_model"
      found |= {f"{tower}.encoder.layers.{block[2]}.{n}": a for n, a in inside.items()}
    else:
      unknown.append(name)
  if unknown:
    raise UserError(f"tensors that open_clip's ViT does not have: {listed(sorted(unknown))}")
  return found


def _in_block(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
  """Renames a tensor of a block; {} if the name is unknown."""
  module, _, leaf = name.replace("in_proj_", "in_proj.").rpartition(".")
  if module == "attn.in_proj" and array.ndim and array.shape[0] % 3 == 0:
    parts = np.split(array, 3)
    return {f"self_attn.{p}_proj.{leaf}": a for p, a in zip("qkv", parts, strict=True)}
  return {f"{_INSIDE[module]}.{leaf}": array} if module in _INSIDE else {}
